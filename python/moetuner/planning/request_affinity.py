"""Which rank a sequence is served on, given the placement: an optional second stage.

A token's rows cross fewer links when its home is where its experts are. All tokens of a
sequence share a home, so sequences are assigned to ranks by their routing, equally many
tokens on each rank in every batch. Scored by the evaluator with homes ``recorded``.

Legend: T tokens, Q sequences, G ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner._checks import is_number, is_whole
from moetuner.errors import InvalidProblemError, InvalidTraceError
from moetuner.evaluation.cost import Homes
from moetuner.evaluation.tally import tally
from moetuner.evaluation.workload import (
    DEFAULT_BATCH_TOKENS,
    batch_index,
    check_batch_tokens,
)
from moetuner.trace.split import select, sequence_index

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from moetuner.evaluation.cost import CostModel
    from moetuner.placement.model import Placement
    from moetuner.trace import Trace

    Floats = NDArray[np.float64]


def assign_homes(
    trace: Trace,
    placement: Placement,
    cost: CostModel,
    *,
    known_tokens: int | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    slack: float = 0.1,
) -> Trace:
    """The trace with a home rank for each sequence, chosen batch by batch.

    Begins with equally many tokens on each rank, longest sequences first. Then
    sequences change ranks, alone or two with each other, while that shortens the time
    of the batch's links and no rank gets more than its share of tokens. The work grows
    with the square of a batch's sequences: of thousands it takes minutes.

    Parameters
    ----------
    trace
        Sequences to assign; batches as `moetuner.evaluation.workload.batch_index`.
    placement, cost
        Where experts are, and what links cost; ``cost.homes`` does not matter.
    known_tokens
        What the choice may look at: routing of the first so many tokens of each
        sequence, or None: of all of it, which nobody knows before a sequence has run.
        0 is the baseline: lengths alone, each sequence taken to route like its batch on
        average, so that links are balanced and nothing else.
    batch_tokens
        Tokens of a batch, about; 0 balances over the whole trace.
    slack
        By how much a rank may exceed its even share of a batch's tokens, where
        sequences are short enough.

    Raises
    ------
    InvalidProblemError
        When an option makes no sense.
    InvalidTraceError
        When the trace does not tell sequences apart.
    """
    _check(trace, known_tokens, batch_tokens, slack)
    batches, home = batch_index(trace, batch_tokens), np.zeros(trace.num_tokens)
    for batch in range(int(batches.max(initial=-1)) + 1):
        part = select(trace, batches == batch)
        sequence = sequence_index(part)
        tokens = np.bincount(sequence)
        choice = balanced(tokens, placement.topology.num_ranks)
        links = link_seconds(part, placement, cost, known_tokens=known_tokens or None)
        if known_tokens == 0:
            mean = links.sum(axis=0) / tokens.sum()
            links = mean * tokens[:, None, None, None]
        most = (1 + slack) * tokens.sum() / placement.topology.num_ranks
        most = max(most, np.bincount(choice, weights=tokens).max())
        choice = improve(choice, links, tokens, most)
        home[batches == batch] = choice[sequence]
    return replace(trace, home_rank=home.astype(np.int16))


def balanced(tokens: NDArray[np.int64], num_ranks: int) -> NDArray[np.int64]:
    """Rank of each sequence, int64 [Q]: the longest first, to the emptiest rank."""
    home, load = np.zeros(tokens.size, np.int64), np.zeros(num_ranks)
    for one in np.argsort(-tokens, kind="stable"):
        home[one] = load.argmin()
        load[home[one]] += tokens[one]
    return home


def link_seconds(
    trace: Trace,
    placement: Placement,
    cost: CostModel,
    *,
    known_tokens: int | None = None,
) -> Floats:
    """Seconds that each sequence keeps each link busy, if it lived on a rank.

    float64 [Q, G, C, M], sequences by ascending id: rank, (layer, direction), link.
    Sequences are as long as they are; what is known of one stands for all of it.
    """
    sequence, topology = sequence_index(trace), placement.topology
    sizes = np.bincount(sequence)
    seen = trace if known_tokens is None else _beginnings(trace, known_tokens)
    groups = sequence_index(seen)  # every sequence begins, so none is missing
    scale = (sizes / np.bincount(groups))[:, None, None]
    node_bandwidth = cost.hardware.nic_bandwidth * topology.ranks_per_node
    speed = {"rank": cost.hardware.rank_bandwidth, "node": node_bandwidth}
    by_rank = []
    for rank in range(topology.num_ranks):
        rows = tally(
            replace(seen, home_rank=np.full(seen.num_tokens, rank, np.int16)),
            placement,
            wire=cost.wire,
            homes=Homes.RECORDED,
            groups=groups.astype(np.int32),
        )
        directions = []
        for prefix, width in (
            ("", cost.shape.dispatch_bytes),
            ("return_", cost.shape.combine_bytes),
        ):
            links = [
                getattr(rows, f"{prefix}{kind}_{way}") / bandwidth
                for kind, bandwidth in speed.items()
                for way in ("egress", "ingress")
            ]
            row_bytes = cost.shape.hidden_size * width
            directions.append(np.concatenate(links, axis=2) * (row_bytes * scale))
        by_rank.append(np.concatenate(directions, axis=1))
    return np.stack(by_rank, axis=1)


def improve(
    home: NDArray[np.int64], links: Floats, tokens: NDArray[np.int64], most: float
) -> NDArray[np.int64]:
    """Homes [Q] after changes that each shorten the links' time, `links` as above.

    No rank takes more than `most` tokens.
    """
    home, num_ranks = home.copy(), links.shape[1]
    ones = np.arange(home.size)
    busy = links[ones, home].sum(axis=0)
    load = np.bincount(home, weights=tokens, minlength=num_ranks)
    best, better = busy.max(axis=1).sum(), True
    while better:
        better = False
        for one, target, other in _changes(home.size, num_ranks):
            here = home[one]
            there = target if other < 0 else home[other]
            back = 0 if other < 0 else tokens[other]
            if here == there or load[there] + tokens[one] - back > most:
                continue
            if load[here] - tokens[one] + back > most:
                continue
            changed = busy + links[one, there] - links[one, here]
            if other >= 0:
                changed += links[other, here] - links[other, there]
            if (seconds := changed.max(axis=1).sum()) < best * (1 - 1e-9):
                busy, best, better = changed, seconds, True
                load[there] += tokens[one] - back
                load[here] -= tokens[one] - back
                home[one] = there
                if other >= 0:
                    home[other] = here
    return home


def _changes(num_sequences: int, num_ranks: int) -> Iterator[tuple[int, int, int]]:
    """(sequence, rank, -1) moves and (sequence, -1, other sequence) exchanges."""
    for one in range(num_sequences):
        yield from ((one, rank, -1) for rank in range(num_ranks))
        yield from ((one, -1, other) for other in range(one))


def _beginnings(trace: Trace, known_tokens: int) -> Trace:
    """The first tokens of each sequence, in the order of the trace."""
    sequence = sequence_index(trace)
    order = np.argsort(sequence, kind="stable")
    sizes = np.bincount(sequence)
    place = np.empty(order.size, np.int64)
    place[order] = np.arange(order.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return select(trace, place < known_tokens)


def _check(
    trace: Trace, known_tokens: int | None, batch_tokens: int, slack: float
) -> None:
    check_batch_tokens("assign_homes", batch_tokens)
    if trace.sequence is None:
        raise InvalidTraceError(
            "assign_homes: wanted a trace with sequences; this one does not tell which "
            "tokens belong together"
        )
    if known_tokens is not None and (not is_whole(known_tokens) or known_tokens < 0):
        raise InvalidProblemError(
            f"assign_homes: known_tokens must be a whole number >= 0 or None, got "
            f"{known_tokens!r}"
        )
    if not is_number(slack) or not 0 <= slack < np.inf:
        raise InvalidProblemError(f"assign_homes: slack must be >= 0, got {slack!r}")
