"""``moetuner`` and ``python -m moetuner``."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it quietly while it is still loading, too."""
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
