"""A small Mixture-of-Experts language model over bytes, in plain PyTorch.

Legend: B batch, S sequence, T = B * S tokens, H hidden, E experts, K top-k, I inner
width of an expert.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    vocabulary: int = 256
    layers: int = 12
    hidden: int = 512
    heads: int = 8
    experts: int = 64
    top_k: int = 4
    expert_hidden: int = 256
    sequence: int = 512


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What one layer's router decided."""

    ids_TK: torch.Tensor  # int64, strongest expert first
    weights_TK: torch.Tensor  # float32, sum to 1
    balance_loss: torch.Tensor  # 1 when loads are even
    z_loss: torch.Tensor


class Router(nn.Module):
    """Softmax over all experts, the K largest renormalised (as Mixtral, Qwen-MoE)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.linear = nn.Linear(config.hidden, config.experts, bias=False)

    def forward(self, x_TH: torch.Tensor) -> Routing:
        with torch.autocast(x_TH.device.type, enabled=False):
            logits_TE = self.linear(x_TH.float())
            probability_TE = logits_TE.softmax(dim=-1)
            weights_TK, ids_TK = probability_TE.topk(self.top_k, dim=-1)
            experts = probability_TE.shape[1]
            load_E = torch.bincount(ids_TK.flatten(), minlength=experts)
            share_E = load_E / ids_TK.numel()
            return Routing(
                ids_TK=ids_TK,
                weights_TK=weights_TK / weights_TK.sum(dim=-1, keepdim=True),
                balance_loss=experts * (share_E * probability_TE.mean(dim=0)).sum(),
                z_loss=logits_TE.logsumexp(dim=-1).square().mean(),
            )


class Experts(nn.Module):
    """SwiGLU experts as 3-D weights; one grouped product for all of them on a GPU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, h, i = config.experts, config.hidden, config.expert_hidden
        self.gate_up = nn.Parameter(torch.randn(e, h, 2 * i) * h**-0.5)
        self.down = nn.Parameter(torch.randn(e, i, h) * i**-0.5 * 0.2)

    def forward(self, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
        top_k = routing.ids_TK.shape[1]
        ids = routing.ids_TK.flatten()
        order = ids.argsort(stable=True)
        counts_E = torch.bincount(ids, minlength=self.down.shape[0])
        rows = x_TH[order // top_k]
        gate, up = self._product(rows, self.gate_up, counts_E).chunk(2, dim=-1)
        rows = self._product(F.silu(gate) * up, self.down, counts_E)
        rows = rows * routing.weights_TK.flatten()[order, None].to(rows.dtype)
        return torch.zeros_like(x_TH).index_add(0, order // top_k, rows.to(x_TH.dtype))

    @staticmethod
    def _product(rows, weights, counts_E):
        if rows.is_cuda:
            ends = counts_E.cumsum(0).to(torch.int32)
            return F.grouped_mm(rows.bfloat16(), weights.bfloat16(), offs=ends)
        parts = rows.split(counts_E.tolist())
        return torch.cat([part @ w for part, w in zip(parts, weights, strict=True)])


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        batch, sequence, hidden = x_BSH.shape
        qkv = self.qkv(x_BSH).view(batch, sequence, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, sequence, hidden))


def _rotate(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    steps = torch.arange(half, device=x.device) / half
    positions = torch.arange(x.shape[-2], device=x.device)
    angle = positions[:, None] * 10_000.0**-steps
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.attention = Attention(config)
        self.expert_norm = nn.RMSNorm(config.hidden)
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x_BSH: torch.Tensor):
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH))
        flat_TH = self.expert_norm(x_BSH).flatten(0, 1)
        routing = self.router(flat_TH)
        return x_BSH + self.experts(flat_TH, routing).view_as(x_BSH), routing


class DemoModel(nn.Module):
    """Bytes in, next-byte logits and every layer's routing out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens_BS: torch.Tensor):
        x_BSH = self.embedding(tokens_BS)
        routings = []
        for block in self.blocks:
            x_BSH, routing = block(x_BSH)
            routings.append(routing)
        return self.head(self.norm(x_BSH)), routings
