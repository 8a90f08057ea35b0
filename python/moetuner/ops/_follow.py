"""What a compiler must know of the notes of tokens that follow their experts.

The ops are `moetuner.nn.way_back`'s own. Legend: T tokens here, K top-k, D = min(K, G)
of G ranks, N rows that arrived, L = N + T, W numbers of a note.
"""

from __future__ import annotations

import torch

from moetuner.ops._devices import same_device

_HEAD, _ALIGNMENT = 5, 4  # numbers of a note


@torch.library.register_fake("moetuner::follow_notes")  # type: ignore[untyped-decorator,unused-ignore]
def _fake_notes(
    topk_ids: torch.Tensor,
    keys: torch.Tensor,
    candidates: torch.Tensor,
    num_candidates: torch.Tensor,
    slots_per_rank: int,
    num_ranks: int,
    rank: int,
) -> torch.Tensor:
    tables = {"candidates": candidates, "num_candidates": num_candidates}
    same_device("follow_notes", topk_ids, keys=keys, **tables)
    width = _HEAD + min(topk_ids.shape[1], num_ranks)
    width += -width % _ALIGNMENT
    return topk_ids.new_empty(topk_ids.shape[0], width, dtype=torch.float32)


@torch.library.register_fake("moetuner::follow_lines")  # type: ignore[untyped-decorator,unused-ignore]
def _fake_lines(
    arrived: torch.Tensor,
    mine: torch.Tensor,
    num_destinations: int,
    num_ranks: int,
    rank: int,
) -> tuple[torch.Tensor, ...]:
    same_device("follow_lines", arrived, mine=mine)
    lines = arrived.shape[0] + mine.shape[0]

    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return arrived.new_empty(shape, dtype=dtype)

    return (
        ints(arrived.shape[0], 1),
        ints(lines, num_destinations),
        ints(lines, 2, dtype=torch.int64),
        ints(lines, dtype=torch.int64),
        ints(2),
    )
