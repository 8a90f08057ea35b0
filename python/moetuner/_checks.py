"""Whether a value is of the kind that its annotation says, and what it is if not."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from moetuner.errors import InvalidProblemError

if TYPE_CHECKING:
    import enum

    Choice = TypeVar("Choice", bound=enum.Enum)


def is_whole(value: Any) -> bool:
    """Whether it is an integer of Python or NumPy; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a real number of Python or NumPy; a bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_array(value: Any, dtype: Any, ndim: int) -> bool:
    """Whether it is a NumPy array of that type and number of dimensions."""
    return isinstance(value, np.ndarray) and value.dtype == dtype and value.ndim == ndim


def kind_of(value: Any) -> str:
    """Type and shape of an array, the type of anything else; for error messages."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"


def one_of(choices: type[Choice], value: Any, name: str) -> Choice:
    """The member of `choices` that `value` is or spells."""
    try:
        return choices(value)
    except ValueError:
        wanted = ", ".join(str(choice.value) for choice in choices)
        raise InvalidProblemError(
            f"{name} must be one of {wanted}, got {value!r}"
        ) from None


def check_positive(where: str, name: str, value: Any) -> None:
    """Refuse what is no positive finite number."""
    if not is_number(value) or not 0 < value < np.inf:
        raise InvalidProblemError(f"{where}: {name} must be positive, got {value!r}")


def assert_never(value: NoReturn) -> NoReturn:
    """End a chain of branches that type checkers know to be complete."""
    raise AssertionError(f"no branch for {value!r}")
