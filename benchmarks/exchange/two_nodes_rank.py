"""One rank of `two_nodes.py`, which starts it with its task as JSON."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from cases import CASES, Case, Routing, read_held_out, tokens_of_ranks, uniform_tokens
from methods import AllGather, Follow, Layer, Method, Moetuner
from moetuner import Placement, Topology, read_placement
from moetuner.evaluation.cost import Homes
from moetuner.evaluation.links import link_rows
from moetuner.evaluation.tally import tally
from moetuner.evaluation.verify import ExchangeRecord
from moetuner.ops import check_overflow, node_groups
from moetuner.placement.model import contiguous_rank_of
from network import NUM_NODES, Node, bytes_on_link, enter

if TYPE_CHECKING:
    from moetuner.trace import Trace

TIMEOUT = timedelta(seconds=300)
HEADROOM = 1.25  # of the rows of the busiest rank, in the fixed form


def tokens_and_layer(case: Case, task: Any, num_ranks: int) -> tuple[Trace, int]:
    if task.follow and not (case.trace and task.layer > 0):
        raise SystemExit(
            "two_nodes: --follow needs a layer before: a case of a real trace, and "
            "--layer of at least 1"
        )
    if not case.trace:
        return uniform_tokens(case, num_ranks), 0
    held_out = read_held_out(case.trace, num_ranks * case.num_tokens)
    return tokens_of_ranks(held_out, num_ranks, case.num_tokens), task.layer


def placements(task: Any, tokens: Trace, topology: Topology) -> dict[str, Placement]:
    rank_of = contiguous_rank_of(
        tokens.num_layers, tokens.num_experts, topology.num_ranks
    )
    found = {
        "contiguous": Placement.from_rank_of(
            rank_of, layer_ids=tokens.layer_ids, topology=topology
        )
    }
    for given in (*task.placement, *task.follow):
        name, _, file = given.partition("=")
        found[name] = read_placement(file)
        assert found[name].topology == topology, (file, found[name].topology)
        assert not found[name].has_replicas, file
    return found


def inputs_of(case: Case, ids: np.ndarray, rank: int) -> tuple[torch.Tensor, ...]:
    """x [T, H], ids [T, K] and weights [T, K] of a rank's tokens."""
    rng = torch.Generator().manual_seed(rank)
    x = torch.randn(len(ids), case.hidden, generator=rng).to(torch.bfloat16)
    weights = torch.rand(ids.shape, generator=rng)
    return x, torch.from_numpy(ids.astype(np.int64)), weights


def methods_of(
    case: Case,
    placed: dict[str, Placement],
    tokens: Trace,
    layer: int,
    task: Any,
) -> list[Method]:
    num_ranks, device = dist.get_world_size(), task.device
    every = [
        inputs_of(case, tokens.topk_ids[tokens.home_rank == rank, layer], rank)
        for rank in range(num_ranks)
    ]
    inputs = tuple(t.to(device) for t in every[dist.get_rank()])
    none = torch.empty(0, device=device)
    found: list[Method] = []
    group = dist.group.WORLD.group_name
    to_follow = {given.partition("=")[0] for given in task.follow}
    for name, placement in placed.items():
        slots = torch.from_numpy(placement.slot_experts[layer].astype(np.int64))
        own = Layer(slots, placement.slots_per_rank, none, none)
        if name == "contiguous":
            found.append(AllGather(own, "all-gather + reduce-scatter", inputs))
        nodes = node_groups(group, placement.topology.ranks_per_node)
        if name in to_follow or (to_follow and name == "contiguous"):
            routing = Routing(tokens, layer, placed)
            here, keys = followed(routing, placement, every, device)
            found.append(Follow(own, name, here, keys, case.num_tokens, nodes))
        if name in to_follow:
            continue
        rows = tally(tokens, placement).rank_rows()[0, layer].max()
        fixed = {"capacity": case.num_tokens, "max_rows": int(HEADROOM * rows)}
        for levels in (None, nodes):
            found.append(Moetuner(own, name, inputs, nodes=levels))
        found.append(Moetuner(own, name, inputs, fixed, nodes=nodes))
    return found


def followed(
    routing: Routing,
    placement: Placement,
    every: list[tuple[torch.Tensor, ...]],
    device: str,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Inputs and keys of the tokens whose first expert of the layer before is here."""
    number = torch.from_numpy(routing.followed(placement, dist.get_rank()))
    here = tuple(
        torch.cat(of_ranks)[number].to(device) for of_ranks in zip(*every, strict=True)
    )
    num_tokens = len(every[0][0])
    keys = torch.stack([number // num_tokens, number % num_tokens], dim=1)
    return here, keys.to(device)


def predicted(
    tokens: Trace, placement: Placement, layer: int, method: Moetuner
) -> tuple[int, int]:
    """Rows that leave node 0, on the way out and back, by the evaluator."""
    homes = Homes.FOLLOW if isinstance(method, Follow) else Homes.RECORDED
    told = tally(tokens, placement, homes=homes)
    if method.nodes is not None:
        links = told.node_egress, told.return_node_egress
        out, back = (int(link[0, layer, 0]) for link in links)
        return out, back
    first = np.arange(placement.topology.num_ranks) < placement.topology.ranks_per_node
    traffic = told.traffic[layer]
    return int(traffic[first][:, ~first].sum()), int(traffic[~first][:, first].sum())


def bytes_told(case: Case, method: Moetuner, in_node: int, out: int, back: int) -> int:
    """Of rows that leave a node; with each choice go its slot and weight."""
    row, of_choice = case.hidden * 2, 8
    if isinstance(method, Follow):  # and a note, beside each row and each part
        note = 4 * notes_of(case, dist.get_world_size())
        out_of_row = row + of_choice * case.top_k + note
        return out * out_of_row + back * (row + of_choice + note)
    if method.sizes:  # shares travel, however full
        out = back = in_node * method.sizes["capacity"]
    return out * (row + of_choice * case.top_k) + back * row


def notes_of(case: Case, num_ranks: int) -> int:
    """Numbers of a note: see ``moetuner/ops/follow.h``."""
    return -(-(5 + min(case.top_k, num_ranks)) // 4) * 4


def counted(method: Moetuner, placement: Placement) -> int:
    """Rows that left node 0 in one call, by the counters of all ranks."""
    method.counters.zero_()
    method.dispatch(*method.inputs)
    every = [torch.empty_like(method.counters) for _ in range(dist.get_world_size())]
    dist.all_gather(every, method.counters)
    counts = torch.stack(every)[None].cpu().numpy()
    if method.nodes is None:
        node = placement.topology.ranks_per_node
        return int(counts[0, :node, 1 + node : 1 + 2 * node].sum())
    record = ExchangeRecord(
        counts=counts, layer_ids=np.zeros(1, np.int32), placement_fingerprint=""
    )
    return int(link_rows(record, placement.topology).node_egress[0, 0])


def settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def exchange(method: Method) -> Any:
    rows, _ = method.dispatch(*method.inputs)
    return method.combine(rows)


def slowest_ms(method: Method, device: str) -> float:
    settle(device)
    begin = time.perf_counter()
    exchange(method)
    if device == "cuda":
        torch.cuda.synchronize()
    spent = torch.tensor([(time.perf_counter() - begin) * 1e3], device=device)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)


def sent_bytes(method: Method, node: Node, device: str, calls: int = 5) -> int:
    """Out of this node by one call, headers too.

    The median: now and then the kernel sends a packet again.
    """
    found = []
    for _ in range(calls):
        settle(device)
        before = bytes_on_link(node)[1]
        settle(device)  # nobody sends before all have looked
        exchange(method)
        settle(device)
        found.append(bytes_on_link(node)[1] - before)
    return int(statistics.median(found))


def check_sums(methods: list[Method]) -> None:
    """All make the same sums of the rows themselves, however they travel."""
    first = None
    for method in methods:
        out = method.at_home(exchange(method)).float()
        first = out if first is None else first
        error = float((out - first).norm() / first.norm().clamp(min=1e-9))
        assert error < 0.02, (method.name, error)
        if isinstance(method, Moetuner) and method.sizes:
            check_overflow(method.sent.handle.overflow)


def run_case(case: Case, task: Any, node: Node) -> list[dict[str, Any]]:
    num_ranks, device = dist.get_world_size(), task.device
    topology = Topology(num_ranks=num_ranks, ranks_per_node=task.ranks_per_node)
    tokens, layer = tokens_and_layer(case, task, num_ranks)
    placed = placements(task, tokens, topology)
    methods = methods_of(case, placed, tokens, layer, task)
    check_sums(methods)
    times: dict[str, list[float]] = {method.name: [] for method in methods}
    for _ in range(task.repeats):
        for method in methods:
            times[method.name].append(slowest_ms(method, device))
    results = []
    for method in methods:
        low, median, high = statistics.quantiles(times[method.name], n=4)
        result: dict[str, Any] = {
            "case": str(case),
            "method": method.name,
            "exchange": {"median_ms": median, "iqr_ms": high - low},
            "sent_bytes": sent_bytes(method, node, device),
            "rows": 0,
            "predicted_bytes": 0,
        }
        if isinstance(method, Moetuner):
            placement = placed[method.placement]
            out, back = predicted(tokens, placement, layer, method)
            rows = counted(method, placement)
            assert rows == out, (method.name, rows, out)
            result["rows"] = rows
            result["predicted_bytes"] = bytes_told(
                case, method, task.ranks_per_node, out, back
            )
        results.append(result)
    return results


def main() -> None:
    task = SimpleNamespace(**json.loads(sys.argv[1]))
    node = Node(**task.node)
    enter(node)
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if task.device == "cuda" else "gloo",
        store=dist.FileStore(f"{task.folder}/store"),
        rank=task.rank,
        world_size=NUM_NODES * task.ranks_per_node,
        timeout=TIMEOUT,
    )
    (case,) = (c for c in CASES if c.name == task.case)
    case = case._replace(
        num_tokens=task.tokens or case.num_tokens, hidden=task.hidden or case.hidden
    )
    results = run_case(case, task, node)
    if task.rank == 0:
        Path(task.folder, "results").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # Gloo's threads abort the interpreter's own exit now and then


if __name__ == "__main__":
    main()
