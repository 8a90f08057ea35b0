"""Times of a step's parts, layer by layer, on this rank.

All ranks begin an exchange together: they wait for each other before each, outside of
what is timed. So a rank that was slow with its experts is slow with its experts, and
not with everybody's exchange.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from place import Place
    from stacks import Stack


class LayerParts(NamedTuple):
    """Milliseconds."""

    dispatch: float
    experts: float
    combine: float


class StepParts(NamedTuple):
    """Of one step on one rank; ``other`` is all but the layers' three parts."""

    other: float
    layers: list[LayerParts]


class Marks:
    """Hooks on the modules of a stack, which note the time while attached."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.marks: list[tuple[str, object]] = []

    def attach(self, stack: Stack) -> list[torch.utils.hooks.RemovableHandle]:
        """Give back what takes the hooks off."""
        found = []
        for moe in stack.layers:
            found += [
                moe.router.register_forward_hook(self._then("routed", "begin")),
                moe.experts.register_forward_pre_hook(self._then("arrived")),
                moe.experts.register_forward_hook(self._then("done", "back")),
                moe.register_forward_hook(self._then("home")),
            ]
        return found

    def note(self, name: str) -> None:
        """That something is here."""
        if self.place.device.type == "cuda":
            now: object = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((name, now))

    def _then(self, before: str, after: str = ""):
        def hook(*of_the_module: object) -> None:
            self.note(before)
            if after:
                self.place.settle()
                self.note(after)

        return hook

    def take(self) -> StepParts:
        """What was noted between a "start" and an "end"."""
        if self.place.device.type == "cuda":
            torch.cuda.synchronize()
        spans = dict.fromkeys(("other", "dispatch", "experts", "combine"), 0.0)
        layers = []
        for kind, milliseconds in self._spans():
            spans[kind] += milliseconds
            if kind == "combine":
                own = {name: spans.pop(name) for name in LayerParts._fields}
                layers.append(LayerParts(**own))
                spans |= dict.fromkeys(LayerParts._fields, 0.0)
        self.marks.clear()
        return StepParts(other=spans["other"], layers=layers)

    def _spans(self) -> Iterator[tuple[str, float]]:
        kinds = {"routed": "other", "end": "other"}
        kinds |= {"arrived": "dispatch", "done": "experts", "home": "combine"}
        for i in range(1, len(self.marks)):
            (_, before), (name, now) = self.marks[i - 1 : i + 1]
            if name in kinds:
                yield kinds[name], _milliseconds(before, now)


def _milliseconds(before, now) -> float:
    if isinstance(before, float):
        return (now - before) * 1e3
    return before.elapsed_time(now)
