"""Which layers an engine's file has rows for, and what stands in those not planned.

Files name no layers, or must have every one: a placement of a few layers, written as it
is, would put layer 8's experts where layer 0 looks for its own. Layers are all there
when they follow one another from one of the first on (dense layers come before), or lie
evenly spaced. Anything else is refused, or completed with layers that nobody planned:
experts in order, then the first ones again, as engines start without a file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner._words import verb
from moetuner.errors import InvalidPlacementError
from moetuner.evaluation.replica_rule import in_order
from moetuner.export.padding import fill_slots
from moetuner.placement.model import EMPTY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.export.base import ExportOptions
    from moetuner.placement.model import Placement

MAX_LAYERS = 1 << 16
MAX_DENSE = 4
"""More dense layers before the first MoE layer than models have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completed:
    """A placement with a row for every layer that the engine wants one for.

    Parameters
    ----------
    placement
        The plan, and layers in order where it has none.
    added
        Layers that the plan does not have.
    """

    placement: Placement
    added: tuple[int, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of the added layers; nothing where there are none."""
        if not self.added:
            return ()
        return (
            f"{_layers(self.added)} {verb(len(self.added), 'is', 'are')} not in the "
            f"placement: experts in order there, as without a file",
        )


def complete(
    placement: Placement,
    options: ExportOptions,
    engine: str,
    *,
    hidden: bool = False,
    repeats: bool = True,
) -> Completed:
    """The placement with all layers of the model.

    Parameters
    ----------
    placement
        The plan.
    options
        The model's layers, as far as they are told.
    engine
        Whose file it is, for messages.
    hidden
        Whether the engine has a row for every hidden layer, dense ones too.
    repeats
        Whether spare slots of the added layers hold the first experts again; else each
        rank has an equal share of the experts, and its other slots are empty.

    Raises
    ------
    InvalidPlacementError
        When layers are missing and nobody says how many there are.
    """
    planned = placement.layer_ids.tolist()
    wanted = _wanted(planned, options, engine, hidden)
    strange = sorted(set(planned) - set(wanted))
    if strange:
        raise InvalidPlacementError(
            f"export to {engine}: the placement has {_layers(tuple(strange))}, "
            f"which the options leave out (`num_layers`, `moe_layers`, `mtp_layers`)"
        )
    added = tuple(sorted(set(wanted) - set(planned)))
    if not added:
        return Completed(placement=placement)
    plain = in_order(placement) if repeats else _in_shares(placement)
    row_of = dict(zip(planned, placement.slot_experts, strict=True))
    rows = np.stack([row_of.get(layer, plain) for layer in wanted])
    whole = replace(
        placement,
        slot_experts=np.ascontiguousarray(rows, np.int32),
        layer_ids=np.array(wanted, np.int32),
    )
    return Completed(placement=whole, added=added)


def filled_rows(
    completed: Completed, options: ExportOptions, *, repeats: bool = True
) -> NDArray[np.int32]:
    """Expert of each slot int32 [layers, P], spare slots filled as `padding` says."""
    placement, load = completed.placement, options.load
    if load is not None and completed.added:
        kept = ~np.isin(placement.layer_ids, completed.added)
        whole = np.ones((placement.num_layers, placement.num_experts))
        whole[kept] = load
        load = whole
    return fill_slots(placement, load=load, repeats=repeats).slots


def _layers(layers: tuple[int, ...]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {spelled(layers)}"


def spelled(layers: tuple[int, ...]) -> str:
    """Numbers as ``0-7, 9``."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _in_shares(placement: Placement) -> NDArray[np.int32]:
    """Slots [P] of a layer that nobody planned, no expert twice."""
    shape = placement.topology.num_ranks, placement.slots_per_rank
    share = placement.num_experts // placement.topology.num_ranks
    slots = np.full(shape, EMPTY, np.int32)
    slots[:, :share] = np.arange(placement.num_experts).reshape(-1, share)
    return slots.ravel()


def _wanted(
    planned: list[int], options: ExportOptions, engine: str, hidden: bool
) -> list[int]:
    """The layers that the file has rows for, in order."""
    count, mtp = options.num_layers, options.mtp_layers
    if count is None:
        if hidden or mtp:
            raise InvalidPlacementError(
                f"export to {engine}: the file has a row for every hidden layer, dense "
                f"ones too: say how many there are with `num_layers` "
                f"(num_hidden_layers in the model's config.json)"
                if hidden
                else f"export to {engine}: `mtp_layers` come after `num_layers`: say "
                f"that too"
            )
        if options.moe_layers is not None:
            return list(options.moe_layers)
        if not _all_there(planned):
            raise InvalidPlacementError(
                f"export to {engine}: the placement has only layers "
                f"{spelled(tuple(planned))}, and the file needs all of the model's: "
                f"say `num_layers` (hidden layers, all with experts) or `moe_layers`, "
                f"and the missing ones get their experts in order"
            )
        return planned
    if not max(planned) < count + mtp <= MAX_LAYERS:
        raise InvalidPlacementError(
            f"export to {engine}: `num_layers` is {count}, the placement has layer "
            f"{max(planned)}; layers of multi-token prediction come after them, with "
            f"`mtp_layers`"
        )
    last = list(range(count, count + mtp))
    if hidden:
        return list(range(count + mtp))
    if options.moe_layers is not None:
        return [*options.moe_layers, *last]
    body = [layer for layer in planned if layer < count]
    if _all_there(body, at_least=2) and _reaches(body, count):
        return [*body, *last]
    return [*range(count), *last]


def _all_there(layers: list[int], at_least: int = 3) -> bool:
    """Whether layers look like all MoE layers of a model.

    Evenly spaced ones must be `at_least` so many.
    """
    steps = set(np.diff(layers).tolist())
    if not layers or len(steps) > 1:
        return False
    step = next(iter(steps), 1)
    if step == 1:
        return layers[0] <= MAX_DENSE
    return len(layers) >= at_least and layers[0] < step


def _reaches(layers: list[int], count: int) -> bool:
    """Whether evenly spaced layers go on to the last of `count`."""
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    return layers[-1] + step >= count
