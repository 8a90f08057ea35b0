"""Options that several commands share, declared once, and what they are turned into."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moetuner._words import amount
from moetuner.cli.messages import note
from moetuner.cli.model_options import priced_shape, row_types
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.backends import wire_named
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.hardware import Hardware, with_network
from moetuner.evaluation.models import MAX_SIZE, ValueType
from moetuner.evaluation.replica_rule import ReplicaRule
from moetuner.evaluation.workload import BatchKind
from moetuner.planning.options import Pricing
from moetuner.planning.provenance import pricing_of
from moetuner.solver import SOLVERS
from moetuner.trace.phases import Phase, of_phase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.evaluation.models import ModelShape
    from moetuner.placement.model import Placement
    from moetuner.placement.topology import Topology
    from moetuner.trace import CountTrace, Trace

PhaseName = enum.Enum(  # type: ignore[misc]
    "PhaseName", {name: name for name in (*(p.value for p in Phase), "all")}, type=str
)
SolverName = enum.Enum("SolverName", {n: n for n in SOLVERS}, type=str)  # type: ignore[misc]

TracePath = Annotated[Path, typer.Argument(help="Routing trace: safetensors or .npz")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes")]
HiddenSize = Annotated[
    int | None, typer.Option(help="Hidden size, when unknown", min=1, max=MAX_SIZE)
]
ExpertHiddenSize = Annotated[
    int | None,
    typer.Option(help="Inner width of one expert, when unknown", min=1, max=MAX_SIZE),
]

OfPhase = Annotated[
    PhaseName | None,
    typer.Option("--phase", help="Tokens of this phase alone  [default: all]"),
]
MAX_SEED = 2**31 - 1
Seed = Annotated[
    int, typer.Option(help="Of split, solver, bootstrap", min=0, max=MAX_SEED)
]
Threads = Annotated[int, typer.Option(help="0: all cores", min=0)]
TopK = Annotated[
    int | None,
    typer.Option(help="Experts per token, where counts do not say it", min=1),
]


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """What placements are priced with, as far as the user says.

    The rest is as a placement was planned, where there is one that tells; else the
    defaults that the help names.
    """

    wire: Annotated[
        str | None,
        typer.Option(
            metavar="WIRE|BACKEND",
            help=f"What crosses the network for one token: "
            f"{', '.join(each.value for each in Wire)}; or who sends: deepep, "
            f"deepep_low_latency, ... (docs/engines.md)  "
            f"[default: dedup; allgather for sources that only counted]",
        ),
    ] = None
    homes: Annotated[
        Homes | None,
        typer.Option(help="Where a token is when a layer begins  [default: uniform]"),
    ] = None
    replica_rule: Annotated[
        ReplicaRule | None,
        typer.Option(
            metavar="<name>",
            help=f"Whose rule says which replica a token takes: "
            f"{', '.join(each.value for each in ReplicaRule)}  [default: moetuner]",
        ),
    ] = None
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a batch, about; 0: all in one  [default: 2048]", min=0
        ),
    ] = None
    batch_kind: Annotated[
        BatchKind | None,
        typer.Option(
            help="Whole sequences (prefill) or tokens of all (decode)  "
            "[default: sequences]"
        ),
    ] = None
    phase: Annotated[
        PhaseName | None,
        typer.Option(
            help="Tokens of this phase alone; decode: mixed batches  [default: all]"
        ),
    ] = None
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Kind of GPU node, see `moetuner hardware`  [default: h100]",
        ),
    ] = None
    network: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="What joins nodes, see `moetuner hardware`  [default: the hardware's]",
        ),
    ] = None
    rank_speeds: Annotated[
        str | None,
        typer.Option(
            help="How fast each rank computes: 1,1,0.5,...; empty: alike  "
            "[default: alike]"
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            help="Name of a known model, or its config.json  [default: as recorded]"
        ),
    ] = None
    weights: Annotated[
        ValueType | None,
        typer.Option(
            help="What experts are stored in  [default: bf16, or as config.json says]"
        ),
    ] = None
    rows: Annotated[
        str | None,
        typer.Option(
            help="What rows travel in: OUT or OUT,BACK  [default: bf16; back: bf16]"
        ),
    ] = None
    hidden_size: HiddenSize = None
    expert_hidden_size: ExpertHiddenSize = None

    def pricing(
        self,
        traces: Sequence[Trace | CountTrace],
        quiet: bool,
        planned: Placement | None = None,
    ) -> Pricing:
        """The options, completed by what `planned` was priced with, or by defaults."""
        told = None if planned is None else pricing_of(planned)
        base = told or Pricing()
        shape = self._shape(traces[0], None if told is None else told.cost.shape, quiet)
        speeds = base.cost.rank_speeds
        cost = CostModel(
            hardware=self.machine(base.cost.hardware),
            shape=shape,
            wire=wire_named(self.wire)
            if self.wire is not None
            else _possible_wire(traces, base.cost.wire, quiet),
            homes=self.homes or base.cost.homes,
            replica_rule=self.replica_rule or base.cost.replica_rule,
            rank_speeds=speeds
            if self.rank_speeds is None
            else _speeds_of(self.rank_speeds),
        )
        tokens = base.batch_tokens if self.batch_tokens is None else self.batch_tokens
        phase = base.phase if self.phase is None else _phase_of(self.phase)
        kind = base.batch_kind
        if phase is not base.phase:
            decodes = phase is Phase.DECODE
            kind = BatchKind.MIXED if decodes else BatchKind.SEQUENCES
        return Pricing(
            cost=cost,
            batch_tokens=tokens,
            batch_kind=self.batch_kind or kind,
            phase=phase,
        )

    def machine(self, default: Hardware) -> Hardware:
        """The hardware as given, else `default`, its nodes joined as given."""
        from moetuner.evaluation.hardware_file import find_hardware, find_network

        found = default if self.hardware is None else find_hardware(self.hardware)
        if self.network is None:
            return found
        return with_network(found, find_network(self.network))

    def _shape(
        self, trace: Trace | CountTrace, told: ModelShape | None, quiet: bool
    ) -> ModelShape:
        """Sizes of the model named, else the plan's, else the recorded model's."""
        out, back = row_types(self.rows)
        return priced_shape(
            trace,
            told,
            model=self.model,
            hidden_size=self.hidden_size,
            expert_hidden_size=self.expert_hidden_size,
            weights=self.weights,
            rows_out=out,
            rows_back=back,
            quiet=quiet,
        )


def _phase_of(name: PhaseName) -> Phase | None:
    """The phase of that name; None for all."""
    return None if name.value == "all" else Phase(name.value)


def of_named_phase(
    trace: Trace | CountTrace, name: PhaseName | None
) -> Trace | CountTrace:
    """The tokens of a phase that was asked for; all of them without one."""
    return trace if name is None else of_phase(trace, _phase_of(name))


def priced_words(pricing: Pricing, planned: Placement, name: str) -> str:
    """What scores are priced with, and how that differs from the plan of `name`."""
    told, words = pricing_of(planned), pricing.words()
    if told is None:
        return f"priced with {', '.join(words)}"
    if told == pricing:
        return f"priced as {name} was planned: {', '.join(words)}"
    other = [word for word in told.words() if word not in words]
    return (
        f"priced with {', '.join(words)}; {name} was planned with "
        f"{', '.join(other) or 'other figures of the same names'}"
    )


def _possible_wire(
    traces: Sequence[Trace | CountTrace], wire: Wire, quiet: bool
) -> Wire:
    """The wire, or what sources that only counted can be priced with."""
    from moetuner.trace import CountTrace

    if not any(isinstance(trace, CountTrace) for trace in traces):
        return wire
    note("this source only counted loads: scored with --wire allgather", quiet)
    if any(
        isinstance(trace, CountTrace) and not trace.tokens_known for trace in traces
    ):
        note(
            "it does not say how many experts a token has: each choice counts as a "
            "token; --top-k says it",
            quiet,
        )
    return Wire.ALLGATHER


def _speeds_of(text: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InvalidProblemError(
            f"--rank-speeds must be numbers between commas, one per rank, got {text!r}"
        ) from None


def topology_of(
    ranks: int, ranks_per_node: int | None, quiet: bool, hardware: Hardware
) -> Topology:
    """Ranks in nodes; without a word on nodes they are full ones of `hardware`."""
    from moetuner.placement.topology import Topology

    full = hardware.ranks_per_node
    if ranks_per_node is None and ranks > full:
        if ranks % full:
            raise InvalidProblemError(
                f"--ranks {ranks} does not fill nodes of {full} GPUs: say "
                f"how they are spread with --ranks-per-node"
            )
        nodes = ranks // full
        note(
            f"{ranks} ranks on {nodes} nodes of {full}; --ranks-per-node "
            f"says otherwise",
            quiet,
        )
    if ranks_per_node is not None and ranks_per_node > full:
        note(
            f"nodes of {amount(ranks_per_node, 'rank')}: {hardware.name} joins only "
            f"{full} inside a node",
            quiet,
        )
    return Topology(num_ranks=ranks, ranks_per_node=ranks_per_node or min(ranks, full))
