"""What else permutes tokens, behind one face; each is compared only when importable.

`permute` takes (x, ids, num_experts) and gives (rows, way back), `unpermute` takes
(rows, way back, weights) and gives the tokens. What a peer wants instead of ids [T, K]
and weights [T, K] is prepared beforehand, and not timed.
"""

from __future__ import annotations

import torch
from moetuner.ops import permute, unpermute


class Peer:
    """Ids and weights as they are."""

    prepare_ids = staticmethod(lambda topk_ids, _: topk_ids)
    prepare_weights = staticmethod(lambda weights, *_: weights)


class Moetuner(Peer):
    """Ours."""

    name = "moetuner"

    @staticmethod
    def permute(x, topk_ids, num_experts):
        found = permute(x, topk_ids, num_experts)
        return found.rows, found.row_map

    unpermute = staticmethod(unpermute)


class Torch(Peer):
    """What one writes without a kernel: argsort, index_select, index_put, sum."""

    name = "torch"

    @staticmethod
    def permute(x, topk_ids, num_experts):
        choices = topk_ids.flatten()
        order = choices.argsort(stable=True)
        count = torch.zeros(num_experts, dtype=torch.int32, device=x.device)
        count.index_add_(0, choices, torch.ones_like(choices)).cumsum(0)
        return x.index_select(0, order // topk_ids.shape[1]), order

    @staticmethod
    def unpermute(rows, order, weights):
        gathered = torch.empty_like(rows)
        gathered[order] = rows
        gathered = gathered.view(*weights.shape, -1)
        return (gathered * weights[..., None]).sum(dim=1).to(rows.dtype)


class TorchIndexAdd(Peer):
    """The other way back that one meets: weight the rows, index_add in float32."""

    name = "torch index_add"
    permute = Torch.permute

    @staticmethod
    def unpermute(rows, order, weights):
        top_k = weights.shape[1]
        out = rows.new_zeros(weights.shape[0], rows.shape[1], dtype=torch.float32)
        weighted = rows * weights.flatten()[order, None]
        return out.index_add_(0, order // top_k, weighted).to(rows.dtype)


class TransformerEngine(Peer):
    """NVIDIA TransformerEngine's Triton kernels, by mask [T, E]."""

    name = "TransformerEngine"

    @staticmethod
    def prepare_ids(topk_ids, num_experts):
        mask = torch.zeros(
            len(topk_ids), num_experts, dtype=torch.int32, device=topk_ids.device
        )
        return mask.scatter_(1, topk_ids.long(), 1), topk_ids.numel()

    @staticmethod
    def prepare_weights(weights, topk_ids, num_experts):
        wide = weights.new_zeros(len(weights), num_experts)
        return wide.scatter_(1, topk_ids.long(), weights)

    @staticmethod
    def permute(x, prepared, num_experts):
        from transformer_engine.pytorch.triton import permutation as te

        mask, num_rows = prepared
        num_tokens, hidden = x.shape
        row_id_map = te.make_row_id_map(mask, num_tokens, num_experts)
        rows, _, _ = te.permute_with_mask_map(
            x,
            row_id_map,
            None,
            None,
            None,
            num_tokens,
            num_experts,
            num_rows,
            hidden,
            0,
        )
        return rows, row_id_map

    @staticmethod
    def unpermute(rows, row_id_map, weights):
        from transformer_engine.pytorch.triton import permutation as te

        num_tokens, num_experts = weights.shape
        return te.unpermute_with_mask_map(
            rows,
            row_id_map,
            weights,
            None,
            None,
            num_tokens,
            num_experts,
            rows.shape[1],
        )[0]


class Vllm(Peer):
    """vLLM's CUDA kernels."""

    name = "vLLM"

    @staticmethod
    def permute(x, topk_ids, num_experts):
        from vllm.model_executor.layers.fused_moe import moe_permute_unpermute as vllm

        rows, _, first, inverse, _ = vllm.moe_permute(x, None, topk_ids, num_experts)
        return rows, (first, inverse)

    @staticmethod
    def unpermute(rows, back, weights):
        from vllm.model_executor.layers.fused_moe import moe_permute_unpermute as vllm

        first, inverse = back
        out = rows.new_empty(len(weights), rows.shape[1])
        vllm.moe_unpermute(out, rows, weights, inverse, first)
        return out


ALL = [Moetuner, Torch, TorchIndexAdd, TransformerEngine, Vllm]
PERMUTING = [peer for peer in ALL if peer is not TorchIndexAdd]


def skip_unless_importable(peer) -> None:
    """Skip the benchmark of a peer that is not installed."""
    import pytest

    modules = {
        "TransformerEngine": "transformer_engine.pytorch.triton.permutation",
        "vLLM": "vllm.model_executor.layers.fused_moe.moe_permute_unpermute",
    }
    if peer.name in modules:
        pytest.importorskip(modules[peer.name])
