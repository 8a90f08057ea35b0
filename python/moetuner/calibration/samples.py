"""What was measured: times with their spread, and the load that each is about.

Legend: T tokens of a rank, G ranks, N nodes, H hidden, I inner.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from moetuner._checks import is_whole, one_of
from moetuner.errors import InvalidProblemError

if TYPE_CHECKING:
    from moetuner.calibration.machine import Machine
    from moetuner.placement.topology import Topology


class Level(str, enum.Enum):
    """Which links a message crosses."""

    RANK = "rank"
    """Between ranks of one node."""
    NODE = "node"
    """Between nodes."""


class Direction(str, enum.Enum):
    """Who sends while a message is timed."""

    ONE_WAY = "one way"
    """One rank to one other."""
    BOTH_WAYS = "both ways"
    """Two ranks to each other."""
    ALL = "all ranks"
    """Every rank to its neighbour at once: the load that an exchange makes."""


class Collective(str, enum.Enum):
    """What all ranks do together, by the name of the communicator."""

    ALL_TO_ALL = "all-to-all"
    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"


class Form(str, enum.Enum):
    """The two forms of our exchange."""

    EXACT = "exact"
    FIXED = "fixed"


class Way(str, enum.Enum):
    """Which part of an exchange."""

    DISPATCH = "dispatch"
    COMBINE = "combine"
    BOTH = "dispatch and combine"
    """One right behind the other, where they cannot be told apart."""


class Load(str, enum.Enum):
    """A routing that is known beforehand."""

    LOCAL = "local"
    """Every token stays on its rank."""
    NEXT = "next rank"
    """Every token goes to the next rank of its node."""
    NEXT_NODE = "next node"
    """Every token goes to the rank of the same place in the next node."""
    TO_ONE = "to one rank"
    """All tokens go to rank 0: the way in of one rank is the narrowest place."""
    FROM_ONE = "from one rank"
    """Only rank 0 has tokens, each for all ranks: its way out is the narrowest."""
    UNIFORM = "uniform"
    """Every expert is as likely as any other."""


PADDED_LOADS = (Load.NEXT_NODE, Load.UNIFORM)
"""Of these about as many rows travel as are counted, where whole shares are sent."""


class ValueKind(str, enum.Enum):
    """What rows and weights of a measured layer are, by torch's names."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"

    @property
    def num_bytes(self) -> int:
        """Of a value."""
        return 4 if self is ValueKind.FLOAT32 else 2


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """Sizes of a layer that is measured, and what its values are."""

    hidden_size: int
    inner_size: int
    num_experts: int
    top_k: int
    values: ValueKind = ValueKind.BFLOAT16

    def __post_init__(self) -> None:
        values = one_of(ValueKind, self.values, "LayerShape: values")
        object.__setattr__(self, "values", values)
        for name in ("hidden_size", "inner_size", "num_experts", "top_k"):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise InvalidProblemError(
                    f"LayerShape: {name} must be a positive whole number, got {value!r}"
                )
        if self.top_k > self.num_experts:
            raise InvalidProblemError(
                f"LayerShape: top_k {self.top_k} is more than num_experts "
                f"{self.num_experts}"
            )

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.hidden_size * self.values.num_bytes

    @property
    def expert_bytes(self) -> int:
        """Of the weights of one expert: gate, up and down."""
        return 3 * self.hidden_size * self.inner_size * self.values.num_bytes

    def __str__(self) -> str:
        return (
            f"H={self.hidden_size} I={self.inner_size} E={self.num_experts} "
            f"K={self.top_k} {self.values.value}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of one call on the slowest rank: median and interquartile range."""

    seconds: float
    spread: float
    repeats: int

    def each_of(self, calls: int) -> Timing:
        """Of one call, where so many were timed as one."""
        return replace(self, seconds=self.seconds / calls, spread=self.spread / calls)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkSample:
    """A message of so many bytes from each sender."""

    level: Level
    direction: Direction
    num_bytes: int
    timing: Timing


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSample:
    """A message from one rank to one other, while all others wait."""

    level: Level
    source: int
    target: int
    num_bytes: int
    timing: Timing


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveSample:
    """Every rank has so many bytes for each other rank."""

    collective: Collective
    num_bytes: int
    timing: Timing


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What a layer of the exchange is run on."""

    shape: LayerShape
    form: Form
    load: Load
    num_tokens: int
    """T of each rank that has tokens."""
    num_ranks: int
    """The first so many ranks take part."""

    def __str__(self) -> str:
        return (
            f"{self.form.value}, {self.load.value}, {self.num_tokens} tokens on each "
            f"of {self.num_ranks} ranks, {self.shape}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeSample:
    """Part of our exchange under a known load."""

    case: Case
    way: Way
    replayed: bool
    """Whether the calls came from a CUDA graph."""
    timing: Timing


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSample:
    """Dispatch, experts and combine, one behind the other."""

    case: Case
    replayed: bool
    timing: Timing


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsSample:
    """The experts of one rank on rows of the active ones, shared out unevenly."""

    shape: LayerShape
    rows: int
    active: int
    replayed: bool
    timing: Timing
    of_ranks: tuple[Timing, ...] = ()
    """Of each rank by itself, in their order; empty where that was not told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PermuteSample:
    """Rows put in the order of experts, or summed back, by this rank alone."""

    way: Way
    """``dispatch``: permute; ``combine``: unpermute."""
    rows: int
    row_bytes: int
    replayed: bool
    timing: Timing


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurements:
    """All that one calibration measured, on one machine."""

    machine: Machine
    topology: Topology
    links: tuple[LinkSample, ...] = ()
    pairs: tuple[PairSample, ...] = ()
    collectives: tuple[CollectiveSample, ...] = ()
    exchanges: tuple[ExchangeSample, ...] = ()
    layers: tuple[LayerSample, ...] = ()
    experts: tuple[ExpertsSample, ...] = ()
    permutes: tuple[PermuteSample, ...] = ()
    seconds: float = 0.0
    """That measuring took."""
    notes: tuple[str, ...] = field(default=())
    """What was not measured, and why."""

    @property
    def pads_shares(self) -> bool:
        """Whether the fixed form sends whole shares, however few of its rows are used.

        It does so wherever a communicator carries rows, and always between nodes.
        """
        mapped = "mapped memory" in self.machine.transport
        return self.topology.num_nodes > 1 or not mapped
