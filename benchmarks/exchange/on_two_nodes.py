"""Runs a program's ranks on the two nodes that `network.py` makes, as torchrun would:

    python benchmarks/exchange/on_two_nodes.py --gbit 20 --ranks-per-node 4 \
        -- -m moetuner calibrate --out network.toml
    python benchmarks/exchange/on_two_nodes.py --gbit 1 --ranks-per-node 2 \
        -- benchmarks/planning/calibrated.py --device cpu

With GPUs each of two is a node, shared by its ranks; where one is visible, both nodes
share it. Several ranks on a GPU need MPS and NCCL >= 2.30: put ``on_one_gpu.sh`` and
its LIBNCCL ahead of the command. Ends with code 3, and says why, where the machine
permits no such network; else with the largest code of a rank, or with 128 and the
signal where all that failed were killed.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from network import (
    NOT_PERMITTED,
    NUM_NODES,
    Node,
    NotPermitted,
    device_of,
    enter,
    two_nodes,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

PORT = 29517
_ON_NODE = "--on-node"


def environment(
    rank: int, ranks_per_node: int, nodes: Sequence[Node]
) -> dict[str, str]:
    """What torchrun tells a rank, and which way its messages take."""
    number, place = divmod(rank, ranks_per_node)
    node = nodes[number]
    return (
        node.environment()
        | device_of(number)
        | {
            "RANK": str(rank),
            "WORLD_SIZE": str(NUM_NODES * ranks_per_node),
            "LOCAL_RANK": str(place),
            "LOCAL_WORLD_SIZE": str(ranks_per_node),
            "MASTER_ADDR": nodes[0].address,
            "MASTER_PORT": str(PORT),
        }
    )


def run(options: argparse.Namespace) -> int:
    """All ranks, to their end; the largest code."""
    with two_nodes(options.gbit) as nodes:
        ranks = []
        for rank in range(NUM_NODES * options.ranks_per_node):
            node = json.dumps(asdict(nodes[rank // options.ranks_per_node]))
            command = [sys.executable, __file__, _ON_NODE, node, *options.program]
            own = environment(rank, options.ranks_per_node, nodes)
            ranks.append(subprocess.Popen(command, env=os.environ | own))
        codes = wait_for(ranks)
    killed = min(codes)
    return 128 - killed if killed < 0 and max(codes) <= 0 else max(codes)


def become(node: Node, program: list[str]) -> None:
    """Be one rank: a script, or a module after ``-m``."""
    enter(node)
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path[0] = os.path.dirname(program[0])  # noqa: PTH120 - as Python does
        runpy.run_path(program[0], run_name="__main__")


def main() -> None:
    if sys.argv[1:2] == [_ON_NODE]:
        become(Node(**json.loads(sys.argv[2])), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gbit", type=float, default=20, help="0: not shaped")
    parser.add_argument("--ranks-per-node", type=int, default=4)
    if "--" not in sys.argv[1:-1]:
        parser.error("wanted -- and a program: a script, or -m and a module")
    end = sys.argv.index("--")
    options = parser.parse_args(sys.argv[1:end])
    options.program = sys.argv[end + 1 :]
    try:
        raise SystemExit(run(options))
    except NotPermitted as error:
        print(f"on_two_nodes: {error}", file=sys.stderr)
        raise SystemExit(NOT_PERMITTED) from error


if __name__ == "__main__":
    main()
