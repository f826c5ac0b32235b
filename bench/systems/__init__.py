"""What bench/train_step.py measures, one system per file: `python -m systems.NAME REQUEST OUTPUT`."""
