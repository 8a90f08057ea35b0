"""The command line: results on standard output, progress and errors on standard error.

Exit codes: 0 done, also when Ctrl-C or SIGTERM ended the solver early and the best
placement found was kept; 1 failed; 2 wrong usage or unusable input; 3 `drift`:
re-planning pays; 130 interrupted before or after the solver, where the message says
whether a placement was written.
Heavy modules are imported by the command that needs them.
"""

from moetuner.cli.app import app, main

__all__ = ["app", "main"]
