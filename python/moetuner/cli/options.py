"""Options that several commands share, and what they are turned into."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moetuner.cli.messages import note
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.shapes import DEFAULT_SHAPE, ModelShape, shape_for_model
from moetuner.evaluation.workload import BatchKind
from moetuner.solver import SOLVERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.placement.topology import Topology
    from moetuner.planning.request_homes import RequestHomes
    from moetuner.trace import CountTrace, Trace

GPUS_PER_NODE = 8  # of every `--hardware` that there is

SolverName = enum.Enum("SolverName", {n: n for n in SOLVERS}, type=str)  # type: ignore[misc]
HardwareName = enum.Enum("HardwareName", {n: n for n in HARDWARE}, type=str)  # type: ignore[misc]

TracePath = Annotated[Path, typer.Argument(help="Routing trace: safetensors or .npz")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes")]
WireOption = Annotated[
    Wire | None,
    typer.Option(
        help="What crosses the network for one token  "
        "[default: dedup; allgather for sources that only counted]"
    ),
]
HomesOption = Annotated[
    Homes, typer.Option(help="Where a token is when a layer begins")
]
BatchTokens = Annotated[
    int, typer.Option(help="Tokens of a batch, about; 0: all in one", min=0)
]
BatchKindOption = Annotated[
    BatchKind,
    typer.Option(help="Whole sequences (prefill) or tokens of all (decode)"),
]
HardwareOption = Annotated[HardwareName, typer.Option(help="Kind of GPU node")]
HiddenSize = Annotated[
    int | None, typer.Option(help="Hidden size, when unknown", min=1, max=2**24)
]
ExpertHiddenSize = Annotated[
    int | None,
    typer.Option(help="Inner width of one expert, when unknown", min=1, max=2**24),
]

RankSpeeds = Annotated[
    str, typer.Option(help="How fast each rank computes: 1,1,0.5,...; empty: alike")
]

RequestHomesOption = Annotated[
    str,
    typer.Option(
        help="Also give each sequence a home rank by the routing of its first so many "
        "tokens; all: of all, in hindsight"
    ),
]


def request_homes_of(text: str) -> RequestHomes | None:
    """What `--request-homes` asks for; nothing when it is empty."""
    from moetuner.planning.request_homes import RequestHomes

    if not text:
        return None
    if text == "all":
        return RequestHomes()
    if not text.isascii() or not text.isdigit() or not 0 < len(text) < 10:
        raise InvalidProblemError(
            f"--request-homes must be a number of tokens or all, got {text!r:.40}"
        )
    return RequestHomes(known_tokens=int(text))


def cost_model(
    trace: Trace | CountTrace,
    wire: Wire,
    homes: Homes,
    hardware: str,
    hidden_size: int | None = None,
    expert_hidden_size: int | None = None,
    quiet: bool = False,
    rank_speeds: str = "",
) -> CostModel:
    """The cost model; sizes from the options, else the model's, else stated ones."""
    known = shape_for_model(trace.metadata.model)
    shape = known or DEFAULT_SHAPE
    if known is None and not (hidden_size and expert_hidden_size):
        note(
            f"model {trace.metadata.model or 'unknown'!r} is not in the table: "
            f"assuming hidden size {hidden_size or shape.hidden_size}, "
            f"expert hidden size {expert_hidden_size or shape.expert_hidden_size}; "
            f"set --hidden-size and --expert-hidden-size",
            quiet,
        )
    return CostModel(
        hardware=HARDWARE[hardware],
        shape=ModelShape(
            hidden_size=hidden_size or shape.hidden_size,
            expert_hidden_size=expert_hidden_size or shape.expert_hidden_size,
        ),
        wire=wire,
        homes=homes,
        rank_speeds=speeds_of(rank_speeds),
    )


def speeds_of(text: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InvalidProblemError(
            f"--rank-speeds must be numbers between commas, one per rank, got {text!r}"
        ) from None


def topology_of(ranks: int, ranks_per_node: int | None, quiet: bool) -> Topology:
    """Ranks in nodes; without a word on nodes they are full, of 8 GPUs."""
    from moetuner.placement.topology import Topology

    if ranks_per_node is None and ranks > GPUS_PER_NODE:
        if ranks % GPUS_PER_NODE:
            raise InvalidProblemError(
                f"--ranks {ranks} does not fill nodes of {GPUS_PER_NODE} GPUs: say "
                f"how they are spread with --ranks-per-node"
            )
        nodes = ranks // GPUS_PER_NODE
        note(
            f"{ranks} ranks on {nodes} nodes of {GPUS_PER_NODE}; --ranks-per-node "
            f"says otherwise",
            quiet,
        )
    return Topology(
        num_ranks=ranks, ranks_per_node=ranks_per_node or min(ranks, GPUS_PER_NODE)
    )


def default_wire(traces: Sequence[Trace | CountTrace], quiet: bool) -> Wire:
    """What traces are scored with when nobody says: the best wire that all allow."""
    from moetuner.trace import CountTrace

    if not any(isinstance(trace, CountTrace) for trace in traces):
        return Wire.DEDUP
    note("this source only counted loads: scored with wire=allgather", quiet)
    return Wire.ALLGATHER
