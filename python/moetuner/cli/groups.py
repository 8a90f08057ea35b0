"""Options that are declared once and shared: a dataclass of them as one parameter.

A command says ``cost: CostOptions``; on the command line every field of that dataclass
is an option of its own, and the command gets them as one value.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def spelt_out(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the fields of its dataclass parameters as parameters."""
    hints = typing.get_type_hints(command, include_extras=True)
    plain: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            groups[name] = kind
            plain += _parameters(kind)
        else:
            plain.append(
                parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY)
            )

    def run(**given: Any) -> None:
        made = {
            name: kind(**{f.name: given.pop(f.name) for f in dataclasses.fields(kind)})
            for name, kind in groups.items()
        }
        command(**given, **made)

    # What typer reads: the name, the help, and each parameter with its annotation.
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__module__ = command.__module__
    run.__annotations__ = {each.name: each.annotation for each in plain}
    vars(run)["__signature__"] = inspect.Signature(plain)
    return run


def _parameters(kind: Any) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty
            if each.default is dataclasses.MISSING
            else each.default,
            annotation=hints[each.name],
        )
        for each in dataclasses.fields(kind)
    ]
