"""What a placement's file says of how it came about, and the way back to options."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from moetuner._checks import is_number, is_whole
from moetuner._plain import from_plain, to_plain
from moetuner.errors import InvalidPlacementError, InvalidProblemError
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.models import DEFAULT_SHAPE
from moetuner.planning.options import PlanOptions, Pricing
from moetuner.solver import get_solver

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moetuner.placement.model import Placement, ProgressPoint
    from moetuner.planning.recordings import Recording
    from moetuner.solver import Solution

_DECIDES = ("moetuner", "numpy", "scipy", "mip")
"""Packages whose versions a plan may depend on."""


def with_source(
    solution: Solution,
    recordings: Sequence[Recording],
    options: PlanOptions,
    progress: tuple[ProgressPoint, ...] = (),
) -> Solution:
    """The solution with model, traces, resolved options and its course."""
    if options.config is None:
        options = replace(options, config=get_solver(options.solver).config)
    provenance = replace(
        solution.placement.provenance,
        model=recordings[0].score.metadata.model,
        trace_sha256=recordings[0].sha256,
        other_traces=tuple(each.sha256 for each in recordings[1:]),
        progress=progress,
        options=to_plain(options),
        versions=_versions(),
    )
    return replace(
        solution, placement=replace(solution.placement, provenance=provenance)
    )


def _versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in _DECIDES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def options_of(placement: Placement, *, stay: Placement | None = None) -> PlanOptions:
    """The options that made `placement`, as its file tells them.

    With the same traces, `placement.topology` and fixed rounds, `plan_trace` then makes
    it again, bit for bit.

    Parameters
    ----------
    placement
        As `moetuner.placement.file.read_placement` gives it.
    stay
        The placement that was in use, where the plan started from one; a file names it
        by its hash alone.

    Raises
    ------
    InvalidPlacementError
        When the file does not say how it was made, or `stay` is not the one.
    """
    told = dict(placement.provenance.options)
    if "solver_options" not in told:
        raise InvalidPlacementError(
            "options_of: the placement does not say all that made it: it is not of "
            "moetuner plan, or of a version before 0.2"
        )
    try:
        config = _config_of(str(told.get("solver")), told.pop("config", None), stay)
        options = from_plain(PlanOptions, told, "provenance.options")
        return replace(options, config=config)
    except InvalidProblemError as error:
        raise InvalidPlacementError(f"options_of: {error}") from error


def _config_of(solver: str, told: Any, stay: Placement | None) -> Any:
    """The solver's own options, with the placement in use put back."""
    kind = type(get_solver(solver).config)
    named = told.get("stay") if isinstance(told, dict) else None
    if named is None:
        return from_plain(kind, told, "provenance.options.config")
    if stay is None or named != to_plain(stay):
        raise InvalidPlacementError(
            f"options_of: the plan started from the placement {named}; give that one "
            f"as stay, got {None if stay is None else to_plain(stay)}"
        )
    config = from_plain(kind, {**told, "stay": None}, "provenance.options.config")
    return replace(config, stay=stay)


def pricing_of(placement: Placement) -> Pricing | None:
    """What `placement` was planned to be priced with; None when its file is silent.

    Files of versions before 0.2 tell no rank speeds and no widths of rows; those are
    taken to be alike and two bytes a value, and a machine that is not in the table to
    be the default one.

    Raises
    ------
    InvalidPlacementError
        When what it says makes no sense.
    """
    told = placement.provenance.options
    try:
        if "cost" in told:
            return from_plain(Pricing, dict(told), "provenance.options")
        if "wire" in told and "homes" in told:
            return from_plain(Pricing, _before_0_2(told), "provenance.options")
    except InvalidProblemError as error:
        raise InvalidPlacementError(str(error)) from error
    return None


def _before_0_2(told: Mapping[str, Any]) -> dict[str, Any]:
    """The flat options of older files, in today's shape."""
    default = CostModel()
    hardware = HARDWARE.get(str(told.get("hardware")), default.hardware)
    sizes = {
        name: told[name]
        for name in ("hidden_size", "expert_hidden_size")
        if name in told
    }
    cost = {
        "hardware": to_plain(hardware),
        "shape": {**to_plain(DEFAULT_SHAPE), **sizes, "guessed": len(sizes) < 2},
        "wire": told["wire"],
        "homes": told["homes"],
    }
    batches = {n: told[n] for n in ("batch_tokens", "batch_kind") if n in told}
    return {"cost": cost, **batches}


def part_of(placement: Placement, trace_sha256: str) -> tuple[float, int] | None:
    """Share and seed of the part of a trace that `placement` was planned on.

    None when it was planned on none of it.

    Raises
    ------
    InvalidPlacementError
        When it was, but does not say on which part.
    """
    origin = placement.provenance
    told = origin.options
    others = told.get("other_traces", origin.other_traces)  # before 0.2: an option
    others = others if isinstance(others, (list, tuple)) else ()
    if trace_sha256 not in (origin.trace_sha256, *others):
        return None
    solver_options = told.get("solver_options", told)
    fraction = told.get("plan_fraction")
    seed = solver_options.get("seed") if isinstance(solver_options, dict) else None
    if not is_number(fraction) or not is_whole(seed):
        raise InvalidPlacementError(
            "planned on this trace, but its provenance does not say on which part "
            "(plan_fraction, seed): nothing is known to be held out"
        )
    if told.get("refit") is True:
        fraction = 1.0  # what validated it is another placement
    return float(fraction), int(seed)  # type: ignore[arg-type]


def slots_of(placement: Placement) -> int:
    """Slots per rank that `placement` was given to fill; 0: just enough.

    Clusters of free sizes have as many slots as the largest one needs.
    """
    told = placement.provenance.options
    if "cost" in told and is_whole(told.get("slots_per_rank")):
        return int(told["slots_per_rank"])
    given = told.get("equal_slots") is True  # before 0.2: an option
    return placement.slots_per_rank if given or placement.has_replicas else 0
