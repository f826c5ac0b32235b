"""`python -m affina` is the command line."""

from affina.cli.main import main

if __name__ == "__main__":
    main()
