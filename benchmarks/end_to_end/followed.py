"""A step in which tokens stay where their first expert is: what attention then takes.

A token attends to others of its sequence, which are anywhere. So every rank keeps keys
and values of all sequences, as in ExFlow (arXiv 2401.08383). Of prompts each layer's
new ones are gathered on all ranks before they are attended to; a decoded token attends
to older ones and itself, so those of all layers are gathered once, after the step. Only
for the head tokens go home.

Legend: T tokens of a rank at home, U here now, G ranks, B sequences of a rank, S their
new tokens, A sequences with tokens here, M most tokens of one here, L layers, H hidden,
n heads, d width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from moetuner.nn import GivenRouting, return_home
from moetuner.ops._collectives import group_named

if TYPE_CHECKING:
    from decoder import Attention, Cache, Decoder
    from moetuner.ops import NodeGroups


def forward(decoder: Decoder, tokens: torch.Tensor, cache: Cache, ids) -> torch.Tensor:
    """Logits [B, V] as `Decoder.forward` makes them.

    ``cache`` has room for the sequences of all ranks; ``ids`` [L, G, T, K] are given
    experts, None lets routers choose.
    """
    sequences, new = tokens.shape
    x = decoder.embedding(tokens).flatten(0, 1)
    number = torch.arange(len(x), device=x.device)
    keys = torch.stack([torch.full_like(number, dist.get_rank()), number], dim=1)
    nodes = decoder.blocks[0].moe.exchange.nodes
    fresh: list[Fresh] = []
    for layer, block in enumerate(decoder.blocks):
        where = Where(keys, sequences, new, nodes)
        normed = block.attention_norm(x)
        if new > 1:
            x = x + attend(block.attention, normed, where, layer, cache)
        else:
            out, made = attend_one(block.attention, normed, where, layer, cache)
            x = x + out
            fresh.append(made)
        if ids is not None:
            chosen = ids[layer][keys[:, 0], keys[:, 1]]
            block.moe.given = GivenRouting(topk_ids=chosen)
        here = block.moe(x, None if layer == 0 else keys)
        block.moe.given = None
        x, keys = here.tokens + here.sums, here.keys
        if block.shared is not None:
            x = x + block.shared(block.expert_norm(here.tokens))
    if fresh:
        keep(fresh, cache, nodes)
    home = return_home(x, keys, sequences * new, dist.group.WORLD.group_name)
    return decoder.finish(home.view(sequences, new, -1), cache)


class Where:
    """Which tokens are here: sequences of all ranks by number, and places in them."""

    def __init__(
        self,
        keys: torch.Tensor,
        sequences: int,
        new: int,
        nodes: NodeGroups | None = None,
    ) -> None:
        self.sequence = keys[:, 0] * sequences + keys[:, 1] // new
        self.place = keys[:, 1] % new
        self.every = dist.get_world_size() * sequences
        self.new, self.nodes = new, nodes


class Fresh(NamedTuple):
    """What a layer made of the tokens that are here, and nobody else has yet."""

    pairs: torch.Tensor
    """[U, 2, n, d], keys and values."""
    number: torch.Tensor
    """[U], layer x (G B) + sequence."""


def attend_one(
    attention: Attention, x: torch.Tensor, where: Where, layer: int, cache: Cache
) -> tuple[torch.Tensor, Fresh]:
    """[U, H] for one new token of each sequence here; and what the others must get."""
    q, k, v = attention.project(x, where.place + cache.length)
    mixed = q
    if len(x):
        kept = cache.keys, cache.values
        past = [t[layer, where.sequence, :, : cache.length] for t in kept]
        k_all, v_all = (
            torch.cat([old, own[:, :, None]], dim=2)
            for old, own in zip(past, (k, v), strict=True)
        )
        grouped = attention.heads != attention.kv_heads
        mixed = F.scaled_dot_product_attention(
            q[:, :, None], k_all, v_all, enable_gqa=grouped
        )
    number = layer * where.every + where.sequence
    out = attention.out(mixed.flatten(1))
    return out, Fresh(torch.stack([k, v], dim=1), number)


def keep(fresh: list[Fresh], cache: Cache, nodes: NodeGroups | None) -> None:
    """Every rank's new keys and values of all layers into every rank's cache."""
    layers, every = cache.keys.shape[:2]
    pairs = torch.cat([one.pairs for one in fresh])
    number = torch.cat([one.number for one in fresh])
    found = gathered(pairs, number, layers * every, nodes)
    found = found.unflatten(0, (layers, every))
    cache.keys[:, :, :, cache.length] = found[:, :, 0]
    cache.values[:, :, :, cache.length] = found[:, :, 1]


def attend(
    attention: Attention, x: torch.Tensor, where: Where, layer: int, cache: Cache
) -> torch.Tensor:
    """[U, H] for tokens anywhere, in order of their keys: by sequence and place."""
    q, k, v = attention.project(x, where.place + cache.length)
    number = where.sequence * where.new + where.place
    pairs, total = torch.stack([k, v], dim=1), where.every * where.new
    every = gathered(pairs, number, total, where.nodes)
    k, v = every.unflatten(0, (where.every, where.new)).unbind(2)
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


def gathered(
    mine: torch.Tensor, number: torch.Tensor, total: int, nodes: NodeGroups | None
) -> torch.Tensor:
    """All ranks' rows [U, ...], each at its number: [total, ...].

    On two levels a row crosses once to each other node, and is passed on there. **The
    host waits**: ranks have different numbers of rows.
    """
    count = torch.tensor([len(mine)], device=mine.device)
    most = int(from_all(count, None).max())
    rows = F.pad(mine, (0, 0) * (mine.dim() - 1) + (0, most - len(mine)))
    places = F.pad(number, (0, most - len(mine)), value=total)
    hops = (nodes.between, nodes.inside) if nodes else (None,)
    for hop in hops:
        rows, places = from_all(rows, hop), from_all(places, hop)
    out = rows.new_empty(total + 1, *rows.shape[1:])
    out[places] = rows  # padding falls into the last row
    return out[:-1]


def from_all(mine: torch.Tensor, group_name: str | None) -> torch.Tensor:
    """As many rows of each rank of a group, one behind the other; None: of all."""
    group = group_named(group_name) if group_name else dist.group.WORLD
    every = mine.new_empty(len(mine) * group.size(), *mine.shape[1:])
    dist.all_gather_into_tensor(every, mine.contiguous(), group=group)
    return every
