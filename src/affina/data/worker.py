"""The child process of `encoding.py`: reads pickled chunks from standard input and answers on standard output."""

from __future__ import annotations

import os
import pickle
import signal
import sys

from affina.data.encoding import Encoder, read_message, write_message


def main() -> None:
    """Serve chunks until the parent closes the pipe."""
    # The parent handles Ctrl-C and closes the pipe; a second trace from every child would bury its message.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not end up among the answers
    requests = sys.stdin.buffer
    initial = read_message(requests)
    if initial is None:
        return
    tokenizer, settings = pickle.loads(initial)
    encoder = Encoder(tokenizer, settings)
    while (payload := read_message(requests)) is not None:
        results = encoder.encode_chunk(pickle.loads(payload))
        try:
            write_message(answers, pickle.dumps(results, protocol=pickle.HIGHEST_PROTOCOL))
        except BrokenPipeError:
            return  # the parent is gone


if __name__ == "__main__":
    main()
