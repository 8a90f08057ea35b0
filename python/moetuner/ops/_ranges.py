"""NVTX ranges around the ops, when asked for by ``MOETUNER_NVTX=1``."""

from __future__ import annotations

import os
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from moetuner.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")


def ranged(function: Callable[P, R]) -> Callable[P, R]:
    """Mark each eager call of `function` by its name, in the domain ``moetuner``.

    Asked once, at import: without ``MOETUNER_NVTX=1`` the function stays as it is and
    costs nothing. Inside `torch.compile` there are no ranges.
    """
    if os.environ.get("MOETUNER_NVTX") != "1":
        return function
    try:
        import nvtx
    except ImportError as error:
        raise MissingDependencyError(
            "MOETUNER_NVTX=1 needs nvtx: pip install 'moetuner[nvtx]'"
        ) from error
    import torch

    @wraps(function)
    def marked(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with nvtx.annotate(function.__name__, domain="moetuner"):
            return function(*args, **kwargs)

    return marked
