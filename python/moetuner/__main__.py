"""``moetuner`` and ``python -m moetuner``."""

import os
import sys

_MEASURES = "calibrate"  # with torch, whose threads are its own affair


def main() -> None:
    """Run the command line; Ctrl-C ends it quietly while it is still loading, too."""
    # Matrix products are small here, and OpenBLAS's threads wait for the next one on
    # cores that the planner's own have work for. It reads this when NumPy is loaded.
    if _MEASURES not in sys.argv[1:2]:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from moetuner.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted, nothing was written\n")
        sys.exit(130)
    finally:
        # A Ctrl-C in an `exec`, as of imports that make dataclasses, leaves a mark:
        # `python -m` then ends by the signal, not by the code. This removes it.
        exec("")


if __name__ == "__main__":
    main()
