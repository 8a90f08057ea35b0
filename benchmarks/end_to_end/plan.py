r"""Plans a case: a folder with routing to replay and the placements to compare.

    python benchmarks/end_to_end/plan.py --model gpt-oss-20b --layers 8 --ranks 8 \
        --ranks-per-node 4 --gbit 5 --out CASE

Placements are planned on one part of a recording; the other is what a run replays. The
recordings are looked for in the folder that MOETUNER_TRACES names, or given by
--recording; `moetuner-demo-moe` needs none, as its recording is shipped. What cannot be
planned is left out, and the folder says why.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from case import Case, Sizes, link_of, write_case
from families import FAMILIES
from moetuner import Topology
from moetuner.evaluation.hardware_file import find_hardware
from plans import PLANNERS, Asked, plan_all
from recorded import first_tokens, read_source

if TYPE_CHECKING:
    from moetuner import Hardware


def make_case(options: argparse.Namespace) -> None:
    """Read, split, plan and write."""
    family = FAMILIES[options.model]
    if options.weights:
        from trained import TrainedExperts  # torch, which planning does not need

        family = TrainedExperts(options.weights).family
    layers = min(options.layers or family.layers, family.layers)
    sizes = Sizes(
        batches=options.batches,
        sequences=options.sequences,
        prompt=options.prompt,
        decode=options.decode,
    )
    wanted = options.ranks * sizes.tokens * sizes.batches
    source = read_source(
        family,
        file=options.recording,
        layers=layers,
        tokens=wanted,
        seed=options.seed,
    )
    layers = source.plan.num_layers
    case = Case(
        family=family.narrowed(options.narrow),
        layers=layers,
        sizes=sizes,
        topology=Topology(
            num_ranks=options.ranks, ranks_per_node=options.ranks_per_node
        ),
        hardware=hardware_of(options, options.gbit),
        gbit=options.gbit,
        dtype=options.dtype,
        source=source.about,
        plan_for=options.plan_for,
        command=command(),
        routing=first_tokens(
            source.replay, wanted + wanted * sizes.decode // sizes.prompt
        ),
        placements={},
        told={},
    )
    asked = Asked.of(case, source.plan, options)
    plan_all(options.placement or [*PLANNERS], asked, case, options.jobs)
    write_case(case, options.out, source.plan)


def parser() -> argparse.ArgumentParser:
    """Options; sizes are those of a step on one rank."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", choices=FAMILIES, default="moetuner-demo-moe")
    made.add_argument("--recording", type=Path, help="instead of the family's own")
    made.add_argument("--weights", type=Path, help="of train.py: sizes are its own")
    made.add_argument("--layers", type=int, default=0, help="the first ones; 0: all")
    made.add_argument("--narrow", type=int, default=1, help="divide all widths by it")
    made.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    made.add_argument("--ranks", type=int, default=8)
    made.add_argument("--ranks-per-node", type=int, default=4)
    made.add_argument("--gbit", type=float, default=0, help="between nodes; 0: fast")
    made.add_argument("--sequences", type=int, default=4, help="of a rank")
    made.add_argument("--prompt", type=int, default=512, help="tokens of a sequence")
    made.add_argument("--decode", type=int, default=16, help="steps after the prompt")
    made.add_argument("--batches", type=int, default=4, help="different ones")
    made.add_argument("--plan-for", choices=["prefill", "decode"], default="prefill")
    made.add_argument("--spare", type=int, default=1, help="slots for replicas, a rank")
    add_options(made)
    return made


def add_options(made: argparse.ArgumentParser) -> None:
    """Those that `replan.py` has as well."""
    made.add_argument("--hardware", default="h200", help="a known name, or a file")
    made.add_argument(
        "--measured",
        action="store_true",
        help="the file was measured over that very network: its links are taken",
    )
    made.add_argument("--placement", action="append", choices=PLANNERS)
    made.add_argument("--seconds", type=float, default=60, help="joint; CBC as well")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int, default=0, help="0: all cores")
    made.add_argument("--jobs", type=int, default=1, help="placements planned at once")
    made.add_argument("--out", type=Path, required=True)


def hardware_of(options: argparse.Namespace, gbit: float) -> Hardware:
    """The machine; between nodes a link of that rate, unless its own was measured."""
    hardware = find_hardware(options.hardware)
    return hardware if options.measured else link_of(hardware, gbit)


def command() -> str:
    """What was typed."""
    return " ".join(["python", *sys.argv])


def main() -> None:
    make_case(parser().parse_args())


if __name__ == "__main__":
    main()
