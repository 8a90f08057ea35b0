"""A case: a model, its routing and placements, in a folder that a run is given.

A run needs neither the recording nor a solver, so that a machine with GPUs waits for
neither.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from families import Family
from moetuner import (
    CostModel,
    Hardware,
    ModelShape,
    Network,
    Topology,
    read_hardware,
    read_placement,
    read_trace,
    with_network,
    write_hardware,
    write_placement,
    write_trace,
)
from moetuner.evaluation.hardware import LinkOf
from recorded import Batches

if TYPE_CHECKING:
    from pathlib import Path

    from moetuner import Placement
    from moetuner.trace import Trace

ROUTING = "replayed.safetensors"
PLANNED = "planned.safetensors"
SAYS = "case.json"
MACHINE = "hardware.toml"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one step: sequences of a rank, tokens of a prompt, and tokens after it."""

    batches: int
    sequences: int
    prompt: int
    decode: int

    @property
    def tokens(self) -> int:
        """T, of a rank in prefill."""
        return self.sequences * self.prompt


@dataclass(frozen=True, kw_only=True)
class Case:
    """All that a run has to know."""

    family: Family
    layers: int
    sizes: Sizes
    topology: Topology
    hardware: Hardware
    gbit: float
    """Of the link between two nodes; 0: that of ``hardware``."""
    dtype: str
    source: str
    """Of the routing, in words."""
    plan_for: str
    """Whose batches placements are planned for: "prefill" or "decode"."""
    command: str
    """That made it."""
    routing: Trace
    placements: dict[str, Placement]
    told: dict[str, str]
    """Of each planner: how long it took, or why there is no placement."""

    @property
    def cost(self) -> CostModel:
        """What predicts the run."""
        return CostModel(hardware=self.hardware, shape=self.shape)

    @property
    def shape(self) -> ModelShape:
        """Sizes that the cost model knows."""
        return self.family.shape(4 if self.dtype == "float32" else 2)

    def batches(self) -> Batches:
        """Tokens of every step."""
        sizes = self.sizes
        shape = sizes.batches, self.topology.num_ranks, sizes.sequences
        return Batches.of(self.routing, shape, sizes.prompt, sizes.decode)

    def about(self) -> dict[str, Any]:
        """What stands in result files, and is read again by `read_case`."""
        return {
            "family": asdict(self.family),
            "layers": self.layers,
            "sizes": asdict(self.sizes),
            "topology": asdict(self.topology),
            "hardware": self.hardware.name,
            "network": self.hardware.network,
            "gbit": self.gbit,
            "dtype": self.dtype,
            "source": self.source,
            "plan_for": self.plan_for,
            "command": self.command,
            "told": self.told,
        }


def link_of(hardware: Hardware, gbit: float) -> Hardware:
    """The same machine, its nodes joined by a link of that rate, which ranks share."""
    if not gbit:
        return hardware
    near, far = (
        hardware.latency(hardware.ranks_per_node, between_nodes=between)
        for between in (False, True)
    )
    link = Network(
        name=f"{gbit:g} Gbit/s a node",
        bandwidth=gbit * 1e9 / 8,
        # Where only the inside of a node was measured, the other may be a data sheet's.
        latency=hardware.rank_latency if near > far else hardware.node_latency,
        link_of=LinkOf.NODE,
    )
    return with_network(hardware, link)


def write_case(case: Case, folder: Path, planned: Trace) -> None:
    """Into a folder, which is made; with the routing that was planned on."""
    folder.mkdir(parents=True, exist_ok=True)
    write_trace(case.routing, folder / ROUTING)
    write_trace(planned, folder / PLANNED)
    write_hardware(case.hardware, folder / MACHINE)
    for name, placement in case.placements.items():
        write_placement(placement, folder / file_of(name))
    (folder / SAYS).write_text(json.dumps(case.about(), indent=1) + "\n")


def read_case(folder: Path) -> Case:
    """What `write_case` wrote."""
    said = json.loads((folder / SAYS).read_text())
    told = said.pop("told")
    files = {name: folder / file_of(name) for name in told}
    said["hardware"] = read_hardware(folder / MACHINE)
    del said["network"]  # stands there, too
    kinds = {"family": Family, "sizes": Sizes, "topology": Topology}
    made = {name: kind(**said.pop(name)) for name, kind in kinds.items()}
    return Case(
        **made,
        **said,
        told=told,
        routing=read_trace(folder / ROUTING),
        placements={
            name: read_placement(file) for name, file in files.items() if file.exists()
        },
    )


def file_of(name: str) -> str:
    """Of the placement of that name."""
    return f"{name.replace(', ', '-').replace(' + ', '-with-').replace(' ', '-')}.json"
