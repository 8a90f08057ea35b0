"""Lets scripts of this folder import the modules of the folders beside it."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
# At the end: modules of the same name in this folder come first.
for folder in (HERE, HERE.parent, HERE.parent / "exchange"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
