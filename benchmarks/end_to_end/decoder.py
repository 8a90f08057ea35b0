"""A whole decoder in plain torch, whose experts are spread by a `MoELayer`.

Legend: B sequences of a rank, S their new tokens, T = B S, H hidden, L layers, V
vocabulary, n heads, d width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from families import Family

ROTARY_BASE = 10_000.0


class Cache:
    """Keys and values of the tokens so far, [L, B, n, room, d] each."""

    def __init__(self, family: Family, layers: int, sequences: int, room: int, like):
        shape = (layers, sequences, family.kv_heads, room, family.head)
        self.keys, self.values = (like.new_zeros(shape) for _ in "kv")
        self.length = 0

    def put(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Behind the others; all of the layer, with these."""
        end = self.length + k.shape[2]
        for kept, new in ((self.keys, k), (self.values, v)):
            kept[layer, :, :, self.length : end] = new
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal, with rotary positions, and fewer heads of keys where the family has."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.heads, self.kv_heads = family.heads, family.kv_heads
        self.head = family.head
        width = (self.heads + 2 * self.kv_heads) * self.head
        self.qkv = nn.Linear(family.hidden, width, bias=False)
        self.out = nn.Linear(self.heads * self.head, family.hidden, bias=False)

    def project(self, x: torch.Tensor, positions: torch.Tensor):
        """[..., H] at those positions [...] to q, k and v, [..., n, d]."""
        every = self.qkv(x).unflatten(-1, (-1, self.head))
        q, k, v = every.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        return rotated(q, positions), rotated(k, positions), v

    def forward(self, x: torch.Tensor, layer: int, cache: Cache) -> torch.Tensor:
        """[B, S, H]; several new tokens must be the first ones."""
        new = x.shape[1]
        positions = torch.arange(new, device=x.device) + cache.length
        q, k, v = (t.transpose(1, 2) for t in self.project(x, positions))
        k, v = cache.put(layer, k, v)
        grouped = self.heads != self.kv_heads
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=new > 1, enable_gqa=grouped
        )
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[..., n, d] turned by positions [...]."""
    half = x.shape[-1] // 2
    steps = torch.arange(half, device=x.device) / half
    angle = (positions[..., None] * ROTARY_BASE**-steps)[..., None, :]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Dense(nn.Module):
    """The expert that every token takes."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then experts; ``moe`` is set by whoever chooses the placement."""

    moe: nn.Module

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(family.hidden)
        self.attention = Attention(family)
        self.expert_norm = nn.RMSNorm(family.hidden)
        self.shared = None
        if family.shared_inner:
            self.shared = Dense(family.hidden, family.shared_inner)

    def forward(self, x: torch.Tensor, layer: int, cache: Cache) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), layer, cache)
        normed = self.expert_norm(x)
        out = self.moe(normed)
        if self.shared is not None:
            out = out + self.shared(normed)
        return x + out


class Decoder(nn.Module):
    """Tokens [B, S] in, logits [B, V] of each sequence's last one out."""

    def __init__(self, family: Family, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(family.vocabulary, family.hidden)
        self.blocks = nn.ModuleList(Block(family) for _ in range(layers))
        self.norm = nn.RMSNorm(family.hidden)
        self.head = nn.Linear(family.hidden, family.vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, cache)
        return self.finish(x, cache)

    def finish(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        """The head, and the cache has these tokens; x [B, S, H]."""
        cache.length += x.shape[1]
        return self.head(self.norm(x[:, -1]))
