"""The exchange between two nodes that this program makes on one machine.

    python benchmarks/exchange/two_nodes.py --gbit 20 --ranks-per-node 4 --out FILE.json
    python benchmarks/exchange/two_nodes.py --device cpu --gbit 1 --ranks-per-node 2 ...

With GPUs each of two is a node, shared by its ranks; where one is visible, both nodes
share it. Several ranks on a GPU need MPS and NCCL >= 2.30, which ``on_one_gpu.sh`` sees
to:

    on_one_gpu.sh LIBNCCL python benchmarks/exchange/two_nodes.py --out FILE.json ...

NCCL carries rows between nodes, mapped memory inside one; with ``--device cpu`` Gloo
does both. Every method makes the same sums; rows that were counted on the links must
equal the evaluator's, and the bytes on the wire are read from the kernel. Times are the
slowest rank's.

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
from typing import TYPE_CHECKING, Any

from network import (
    NOT_PERMITTED,
    NUM_NODES,
    NotPermitted,
    device_of,
    two_nodes,
    wait_for,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import environment

if TYPE_CHECKING:
    from network import Node

RANK_PROGRAM = Path(__file__).with_name("two_nodes_rank.py")


def start_rank(
    rank: int, node: Node, options: argparse.Namespace, folder: str
) -> subprocess.Popen[bytes]:
    """A process that will be one rank, on that node."""
    task = vars(options) | {"node": asdict(node), "rank": rank, "folder": folder}
    own = node.environment() | device_of(rank // options.ranks_per_node)
    command = [sys.executable, str(RANK_PROGRAM), json.dumps(task)]
    return subprocess.Popen(command, env=os.environ | own)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All ranks, to their end; what rank 0 wrote."""
    with two_nodes(options.gbit) as nodes, tempfile.TemporaryDirectory() as folder:
        number = NUM_NODES * options.ranks_per_node
        ranks = [
            start_rank(r, nodes[r // options.ranks_per_node], options, folder)
            for r in range(number)
        ]
        codes = wait_for(ranks)
        if any(codes):
            raise SystemExit(f"two_nodes: ranks ended with {codes}")
        found: list[dict[str, Any]] = json.loads(Path(folder, "results").read_text())
        return found


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line for each method."""
    heads = ["case", "method", "exchange, ms (IQR)", "rows out of a node"]
    heads += ["MB out, measured", "predicted"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in results:
        time, told = r["exchange"], r["predicted_bytes"]
        lines.append(
            f"| {r['case']} | {r['method']} | {time['median_ms']:.1f} "
            f"({time['iqr_ms']:.1f}) | {r['rows'] if told else '-'} "
            f"| {r['sent_bytes'] / 1e6:.2f} | {f'{told / 1e6:.2f}' if told else '-'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--gbit", type=float, default=20, help="0: not shaped")
    parser.add_argument("--ranks-per-node", type=int, default=4)
    parser.add_argument("--case", default="uniform", help="of cases.py, by name")
    parser.add_argument("--tokens", type=int, help="of a rank")
    parser.add_argument("--hidden", type=int)
    parser.add_argument(
        "--layer", type=int, default=1, help="of a real trace, its index"
    )
    parser.add_argument(
        "--placement",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="beside contiguous blocks; made for these nodes",
    )
    parser.add_argument(
        "--follow",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a placement under which tokens follow their experts; of a real trace",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    try:
        results = run(options)
    except NotPermitted as error:
        print(f"two_nodes: {error}", file=sys.stderr)
        raise SystemExit(NOT_PERMITTED) from error
    about = environment() | {"command": " ".join(["python", *sys.argv])}
    text = json.dumps({"environment": about, "results": results}, indent=1)
    Path(options.out).write_text(text + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
