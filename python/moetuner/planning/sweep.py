"""Plans for several numbers of GPUs, spare slots and machines, side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from moetuner._checks import is_number
from moetuner.errors import InvalidProblemError
from moetuner.placement.topology import Topology
from moetuner.planning.options import PlanOptions
from moetuner.planning.plan import plan_trace
from moetuner.planning.redundancy import check_slots, slots_with_redundant
from moetuner.solver import SolveStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moetuner.placement.model import Placement
    from moetuner.planning.options import Pricing
    from moetuner.planning.scores import Comparison
    from moetuner.solver import ProgressCallback, ProgressEvent
    from moetuner.trace import CountTrace, Trace


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """One machine to plan for.

    Parameters
    ----------
    num_ranks
        GPUs of the expert-parallel group G.
    ranks_per_node
        0: as many as the hardware joins, or all.
    redundant
        Slots beyond one per expert, all ranks together, as engines count them.
    slots_per_rank
        Instead of `redundant`; 0: just enough.
    pricing
        Machine, model, wire, homes and batches.
    """

    num_ranks: int
    ranks_per_node: int = 0
    redundant: int = 0
    slots_per_rank: int = 0
    pricing: Pricing

    def topology(self) -> Topology:
        """Ranks in full nodes; one node where they fit into it."""
        full = self.ranks_per_node or self.pricing.cost.hardware.ranks_per_node
        return Topology(
            num_ranks=self.num_ranks, ranks_per_node=min(full, self.num_ranks)
        )

    def slots(self, num_experts: int) -> int:
        """Slots of each rank; 0: just enough."""
        if self.slots_per_rank or not self.redundant:
            return self.slots_per_rank
        return slots_with_redundant(num_experts, self.num_ranks, self.redundant)

    def check(self, trace: Trace | CountTrace, memory: float | None = None) -> None:
        """Refuse what no plan can be: see `sweep`."""
        experts, ranks = trace.num_experts, self.topology().num_ranks
        slots = self.slots(experts)
        check_slots(experts, ranks, slots)
        needed = self.weight_bytes(slots or -(-experts // ranks), trace.num_layers)
        if memory is not None and needed > memory:
            raise InvalidProblemError(
                f"sweep: memory={memory / 1e9:g} GB is less than the expert weights "
                f"of a GPU, {needed / 1e9:.4g} GB"
            )

    def weight_bytes(self, slots: int, num_layers: int) -> float:
        """Of so many experts in each layer."""
        return self.pricing.cost.shape.expert_bytes * slots * num_layers


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """What came of one setup."""

    setup: Setup
    comparison: Comparison | None = None
    """None when it was not planned."""
    why_not: str = ""

    @cached_property
    def scored(self) -> Comparison:
        """The plan and its scores, of a cell that was planned."""
        assert self.comparison is not None
        return self.comparison

    @property
    def placement(self) -> Placement:
        """The plan."""
        return self.scored.result.placement

    @property
    def redundant(self) -> int:
        """Slots beyond one per expert, all ranks together."""
        return self.placement.num_slots - self.placement.num_experts

    @property
    def batch_seconds(self) -> float:
        """Modelled time of the recorded MoE layers for the mean batch."""
        return self.scored.result.evaluation.batch_seconds_mean

    @property
    def batch_size(self) -> float:
        """Tokens of the mean batch that was scored."""
        scores = self.scored.result.evaluation
        return scores.num_tokens / scores.batch_seconds.size

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU, in these layers alone."""
        return self.batch_size / self.batch_seconds / self.setup.num_ranks

    @property
    def weight_bytes(self) -> float:
        """Expert weights that a GPU holds, of the recorded layers."""
        plan = self.placement
        return self.setup.weight_bytes(plan.slots_per_rank, plan.num_layers)

    @property
    def imbalance(self) -> float:
        """Fullest rank over mean rank, mean over layers."""
        return self.scored.result.evaluation.imbalance_mean


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sweep:
    """All cells, and the best of those that were planned."""

    cells: tuple[Cell, ...]
    interrupted: bool = False

    @property
    def planned(self) -> tuple[Cell, ...]:
        """Cells that have a plan."""
        return tuple(cell for cell in self.cells if cell.comparison is not None)

    def best(self) -> dict[str, Cell]:
        """By ``time``, ``tokens_per_second`` of a GPU, and ``memory``.

        Of equal ones the faster, then the one with fewer GPUs.
        """
        keys: dict[str, Callable[[Cell], float]] = {
            "time": lambda cell: cell.batch_seconds,
            "tokens_per_second": lambda cell: -cell.tokens_per_second,
            "memory": lambda cell: cell.weight_bytes,
        }
        return {
            name: min(
                self.planned,
                key=lambda cell: (key(cell), cell.batch_seconds, cell.setup.num_ranks),
            )
            for name, key in keys.items()
            if self.planned
        }


def sweep(
    trace: Trace | CountTrace,
    setups: Sequence[Setup],
    options: PlanOptions = PlanOptions(),
    *,
    memory: float | None = None,
    progress: ProgressCallback | None = None,
    on_cell: Callable[[Cell], None] | None = None,
) -> Sweep:
    """Plan and score each setup as `moetuner.planning.plan.plan_trace` does.

    Ctrl-C ends it: the cell at work and those after it are not planned.

    Parameters
    ----------
    trace
        Split alike for every setup.
    setups
        What is planned for.
    options
        Solver, limits, split and baselines; machine, batches and slots are the setup's.
    memory
        Bytes of expert weights that fit into a GPU; None: no limit.
    progress
        Gets the news of each solver, its stage named after the cell.
    on_cell
        Gets each cell when it is done.

    Raises
    ------
    InvalidProblemError
        When no setup can be planned, or `memory` is not positive.
    InvalidTraceError, MissingStatisticsError, SolverError
        As `plan_trace`.
    """
    if memory is not None and (not is_number(memory) or not memory > 0):
        raise InvalidProblemError(f"sweep: memory must be > 0 bytes, got {memory!r}")
    cells: list[Cell] = []
    interrupted = False
    for number, setup in enumerate(setups, start=1):
        if interrupted:
            cell = Cell(setup=setup, why_not="interrupted")
        else:
            try:
                cell = _cell(
                    *(trace, setup, options, memory),
                    _named(progress, f"cell {number}/{len(setups)}"),
                )
            except InvalidProblemError as error:
                cell = Cell(setup=setup, why_not=str(error))
            except KeyboardInterrupt:
                interrupted = True
                cell = Cell(setup=setup, why_not="interrupted")
        cells.append(cell)
        if on_cell is not None and not interrupted:
            on_cell(cell)
    found = Sweep(cells=tuple(cells), interrupted=interrupted)
    if not found.planned and not interrupted:
        reason = cells[0].why_not if cells else "nothing was asked for"
        raise InvalidProblemError(reason)
    return found


def _cell(
    trace: Trace | CountTrace,
    setup: Setup,
    options: PlanOptions,
    memory: float | None,
    progress: ProgressCallback | None,
) -> Cell:
    """Plan one setup; an interrupted plan is no cell."""
    setup.check(trace, memory)

    def stop(placement: Placement) -> None:
        if placement.provenance.status == SolveStatus.INTERRUPTED.value:
            raise KeyboardInterrupt

    asked = replace(options, slots_per_rank=setup.slots(trace.num_experts))
    comparison = plan_trace(
        *(trace, setup.topology(), asked.priced_as(setup.pricing)),
        progress=progress,
        on_solved=stop,
    )
    return Cell(setup=setup, comparison=comparison)


def _named(progress: ProgressCallback | None, cell: str) -> ProgressCallback | None:
    """`progress` that hears of which cell the news are."""
    if progress is None:
        return None

    def told(event: ProgressEvent) -> None:
        progress(replace(event, stage=f"{cell}, {event.stage}"))

    return told
