"""Loads the library that registers the ops."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from moetuner.errors import MissingDependencyError


def load_library() -> None:
    """Register ``torch.ops.moetuner``.

    Raises
    ------
    MissingDependencyError
        When torch is not installed, or was not when moetuner was built.
    """
    if find_spec("torch") is None:
        raise MissingDependencyError(
            "moetuner.ops needs torch: pip install 'moetuner[torch]', then reinstall "
            "moetuner so that its ops are built"
        )
    import torch

    library = _library_path()
    if library is None:
        raise MissingDependencyError(
            "moetuner was built without torch, so it has no ops: with torch installed, "
            "run pip install --force-reinstall --no-deps moetuner"
        )
    torch.ops.load_library(str(library))  # type: ignore[no-untyped-call,unused-ignore]


def _library_path() -> Path | None:
    """The library beside this module, or where an editable build put it."""
    for folder in sys.modules[__package__].__path__:
        for path in Path(folder).glob("libmoetuner_ops.*"):
            return path
    return None
