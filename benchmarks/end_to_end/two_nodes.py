r"""Whole models on two nodes that this program makes on one machine.

    python benchmarks/end_to_end/two_nodes.py CASE --device cpu --backend gloo \
        --out FILE

Two network namespaces and a shaped link; half of a case's ranks is in each. The rate is
the case's own, so cases of one call must have the same. With GPUs, ranks share those
that there are, node by node: Gloo works always, NCCL needs a GPU for each rank, or NCCL
>= 2.30, NCCL_MULTI_RANK_GPU_ENABLE=1 and MPS.

Ends with code 3, and says why, where the machine permits no such network.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import beside  # noqa: F401
from case import SAYS
from network import NOT_PERMITTED, NUM_NODES, Node, NotPermitted, two_nodes, wait_for
from rank import COMMAND, add_options, look_around

RANK_PROGRAM = Path(__file__).with_name("rank.py")


def start_rank(task: dict[str, Any], node: Node) -> subprocess.Popen:
    """A process that will be one rank, on that node; options go along."""
    task = task | {"node": asdict(node)}
    own = node.environment() | {
        COMMAND: " ".join(["python", *sys.argv]),
    }
    command = [sys.executable, str(RANK_PROGRAM), *sys.argv[1:]]
    command += ["--task", json.dumps(task)]
    return subprocess.Popen(command, env=os.environ | own)


def run(gbit: float, number: int) -> None:
    """All ranks, to their end."""
    with two_nodes(gbit) as nodes, tempfile.TemporaryDirectory() as folder:
        common = {"ranks": number, "folder": folder, "machine": look_around()}
        ranks = [
            start_rank(common | {"rank": rank}, nodes[rank * NUM_NODES // number])
            for rank in range(number)
        ]
        codes = wait_for(ranks)
        if any(codes):
            raise SystemExit(f"two_nodes: ranks ended with {codes}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    options = parser.parse_args()
    about = [json.loads((folder / SAYS).read_text()) for folder in options.cases]
    nets = {(case["gbit"], *case["topology"].values()) for case in about}
    if len(nets) > 1:
        raise SystemExit(f"two_nodes: the cases are for different networks: {nets}")
    gbit, number, in_node = nets.pop()
    if number != NUM_NODES * in_node:
        raise SystemExit(f"two_nodes: {number} ranks in nodes of {in_node}")
    try:
        run(gbit, number)
    except NotPermitted as error:
        print(f"two_nodes: {error}", file=sys.stderr)
        raise SystemExit(NOT_PERMITTED) from error


if __name__ == "__main__":
    main()
