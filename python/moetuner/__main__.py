"""``python -m moetuner``."""

from moetuner.cli import main

main()
