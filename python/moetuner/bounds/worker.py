"""Child process that bounds pieces, one after the other, with one BLAS thread.

Started by `moetuner.bounds.pool`. On standard input it reads pickled pairs (piece,
limits) until that ends; for each it writes the pickled bound in seconds.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys

from moetuner.bounds.visits import RuleBook


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent closes the pipe
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    book = RuleBook()
    while True:
        try:
            piece, limits = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(piece.bound(**limits, book=book), answers)
        answers.flush()
