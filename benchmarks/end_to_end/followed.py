"""A step in which tokens stay where their first expert is: what attention then takes.

A token attends to others of its sequence, which are anywhere. So every rank keeps keys
and values of all sequences; each layer's new ones are gathered on all ranks, and a rank
attends for the tokens that are there now. Only for the head they go home. ExFlow (arXiv
2401.08383) keeps such a context on every GPU.

Legend: T tokens of a rank at home, U here now, G ranks, B sequences of a rank, S their
new tokens, A sequences with tokens here, M most tokens of one here, H hidden, n heads,
d width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from moetuner.nn import GivenRouting, return_home

if TYPE_CHECKING:
    from decoder import Attention, Cache, Decoder


def forward(decoder: Decoder, tokens: torch.Tensor, cache: Cache, ids) -> torch.Tensor:
    """Logits [B, V] as `Decoder.forward` makes them.

    ``cache`` has room for the sequences of all ranks; ``ids`` [L, G, T, K] are given
    experts, None lets routers choose.
    """
    sequences, new = tokens.shape
    x = decoder.embedding(tokens).flatten(0, 1)
    number = torch.arange(len(x), device=x.device)
    keys = torch.stack([torch.full_like(number, dist.get_rank()), number], dim=1)
    for layer, block in enumerate(decoder.blocks):
        where = Where(keys, sequences, new)
        x = x + attend(block.attention, block.attention_norm(x), where, layer, cache)
        if ids is not None:
            chosen = ids[layer][keys[:, 0], keys[:, 1]]
            block.moe.given = GivenRouting(topk_ids=chosen)
        here = block.moe(x, None if layer == 0 else keys)
        block.moe.given = None
        x, keys = here.tokens + here.sums, here.keys
        if block.shared is not None:
            x = x + block.shared(block.expert_norm(here.tokens))
    home = return_home(x, keys, sequences * new, dist.group.WORLD.group_name)
    return decoder.finish(home.view(sequences, new, -1), cache)


class Where:
    """Which tokens are here: sequences of all ranks by number, and places in them."""

    def __init__(self, keys: torch.Tensor, sequences: int, new: int) -> None:
        self.sequence = keys[:, 0] * sequences + keys[:, 1] // new
        self.place = keys[:, 1] % new
        self.every = dist.get_world_size() * sequences
        self.new = new


def attend(
    attention: Attention, x: torch.Tensor, where: Where, layer: int, cache: Cache
) -> torch.Tensor:
    """[U, H] for tokens anywhere, in order of their keys: by sequence and place."""
    q, k, v = attention.project(x, where.place + cache.length)
    k, v = gathered(torch.stack([k, v], dim=1), where)
    k, v = cache.put(layer, k.transpose(1, 2), v.transpose(1, 2))
    if not len(x):
        return x
    here, row, count = where.sequence.unique(return_inverse=True, return_counts=True)
    begin = count.cumsum(0) - count
    column = torch.arange(len(x), device=x.device) - begin[row]
    padded = q.new_zeros(len(here), int(count.max()), *q.shape[1:])
    padded[row, column] = q
    last = torch.full(padded.shape[:2], cache.length, device=x.device)
    last[row, column] = where.place + cache.length
    known = torch.arange(k.shape[2], device=x.device)
    mask = known <= last[:, :, None]
    groups = attention.heads // attention.kv_heads
    k, v = (t[here].repeat_interleave(groups, dim=1) for t in (k, v))
    mixed = F.scaled_dot_product_attention(
        padded.transpose(1, 2), k, v, attn_mask=mask[:, None]
    )
    return attention.out(mixed.transpose(1, 2)[row, column].flatten(1))


def gathered(mine: torch.Tensor, where: Where) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all new tokens, [G B, S, n, d] each, from [U, 2, n, d].

    **The host waits**: ranks hold different numbers of tokens.
    """
    num_ranks = dist.get_world_size()
    count = torch.tensor([len(mine)], device=mine.device)
    counts = count.new_empty(num_ranks)
    dist.all_gather_into_tensor(counts, count)
    most = int(counts.max())
    place = where.sequence * where.new + where.place
    padded = F.pad(mine, (0, 0) * 3 + (0, most - len(mine)))
    places = F.pad(place, (0, most - len(mine)), value=where.every * where.new)
    every = padded.new_empty(num_ranks * most, *padded.shape[1:])
    where_to = places.new_empty(num_ranks * most)
    dist.all_gather_into_tensor(every, padded)
    dist.all_gather_into_tensor(where_to, places)
    out = every.new_empty(where.every * where.new + 1, *every.shape[1:])
    out[where_to] = every  # padding falls into the last row
    out = out[:-1].unflatten(0, (where.every, where.new))
    return out[:, :, 0], out[:, :, 1]
