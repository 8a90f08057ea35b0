"""Hugging Face Transformers: run its MoE models on our ops, record their routing.

Importing this module registers ``experts_implementation="moetuner"``::

    from moetuner.integrations.transformers import record

    model = AutoModelForCausalLM.from_pretrained(
        name, experts_implementation="moetuner"
    )
    with record(model) as recording:
        model.generate(**inputs)
    write_trace(recording.trace(), "routing.safetensors")

Legend: B sequences, S their length, T = B x S tokens, K top-k, H hidden.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moetuner.errors import InvalidTraceError
from moetuner.integrations._transformers_experts import experts_of, run_experts
from moetuner.integrations._transformers_parallel import parallelize, register
from moetuner.nn.recorder import Recorder
from moetuner.ops import permute, unpermute
from moetuner.trace import Trace, TraceMetadata

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Recording", "experts_forward", "experts_of", "parallelize", "record"]


def experts_forward(
    experts: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run the experts of one layer on this device, as Transformers calls it.

    Parameters
    ----------
    experts
        A module that ``use_experts_implementation`` decorated: its flags say how its
        weights lie, gated or not, with biases or not.
    hidden_states
        [T, H].
    top_k_index
        int64 [T, K]; ids from ``num_experts`` on live elsewhere and are left out.
    top_k_weights
        [T, K].

    Returns
    -------
    torch.Tensor
        [T, H] of the dtype of ``hidden_states``; summed in float32 in the order of k.
    """
    module: Any = experts
    rows, row_map, end_offsets, _ = permute(
        hidden_states.contiguous(), top_k_index.contiguous(), module.num_experts
    )
    done = run_experts(module, rows, end_offsets)
    weights = top_k_weights.contiguous()
    if weights.dtype not in (torch.float32, done.dtype):
        weights = weights.float()
    return unpermute(done.contiguous(), row_map, weights).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register("moetuner", experts_forward)
register()


class Recording:
    """What `record` has seen so far."""

    def __init__(
        self, model: torch.nn.Module, layers: dict[int, torch.nn.Module]
    ) -> None:
        experts: Any = next(iter(layers.values()))
        self._model: Any = model
        self._recorder = Recorder(num_experts=experts.num_experts)
        self._next_sequence = 0
        self._rows = np.zeros(0, np.int32)  # sequence of each row of the batch
        self._lengths = np.zeros(0, np.int32)  # tokens of each row so far

    def trace(self, dataset: str = "") -> Trace:
        """The routing as a trace; `dataset` names the text for its metadata."""
        import transformers

        config: Any = getattr(self._model, "config", None)
        return self._recorder.trace(
            TraceMetadata(
                model=getattr(config, "_name_or_path", "")
                or type(self._model).__name__,
                source=f"transformers {transformers.__version__}",
                dataset=dataset,
            )
        )

    def _begin(self, arguments: dict[str, Any]) -> None:
        """Name the tokens of a call: new sequences, or the next tokens of the last."""
        given = arguments.get("input_ids")
        if given is None:
            given = arguments["inputs_embeds"]
        batch, length = given.shape[:2]
        # past_key_values until Transformers 5.23, cache since 5.24
        caches = (a for a in arguments.values() if hasattr(a, "get_seq_length"))
        past = max((int(cache.get_seq_length()) for cache in caches), default=0)
        if past == 0:
            self._rows = np.arange(batch, dtype=np.int32) + self._next_sequence
            self._next_sequence += batch
            self._lengths = np.zeros(batch, np.int32)
        elif len(self._rows) != batch:
            raise InvalidTraceError(
                f"record: a cache for {batch} sequences, but the last call had "
                f"{len(self._rows)}; begin recording before the prefill"
            )
        kept = np.ones((batch, length), bool)
        mask = arguments.get("attention_mask")
        if torch.is_tensor(mask) and mask.dim() == 2:
            kept = mask[:, -length:].bool().cpu().numpy()
        position = self._lengths[:, None] + np.cumsum(kept, axis=1) - 1
        self._lengths = self._lengths + kept.sum(axis=1).astype(np.int32)
        decode = past > 0 and length == 1
        self._recorder.begin_step(
            sequence=np.repeat(self._rows, length),
            position=position.astype(np.int32).ravel(),
            phase=np.full(batch * length, decode, np.uint8),
            kept=kept.ravel(),
        )


@contextmanager
def record(model: torch.nn.Module) -> Iterator[Recording]:
    """Record the routing of `model` while the context lasts, whatever runs its experts.

    Parameters
    ----------
    model
        A Transformers model with experts modules (``...layers.<n>...experts``). Called
        eagerly: compiled or captured calls run no hooks.

    Returns
    -------
    A context manager whose value has ``trace()``: a `moetuner.Trace` with sequences,
    positions, phases, weights and the model's own layer numbers; padding (an attention
    mask of 0) is left out. Ids stay on the device until then.

    Raises
    ------
    InvalidTraceError
        When the model has no experts module that is understood.
    """
    layers = experts_of(model)
    recording = Recording(model, layers)

    def before_model(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording._begin({"input_ids": args[0], **kwargs} if args else kwargs)

    def before_experts(layer: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = ("hidden_states", "top_k_index", "top_k_weights")
            given = dict(zip(names, args, strict=False)) | kwargs
            recording._recorder.add(layer, given["top_k_index"], given["top_k_weights"])

        return hook

    handles = [model.register_forward_pre_hook(before_model, with_kwargs=True)]
    for layer, experts in layers.items():
        hook = before_experts(layer)
        handles.append(experts.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()
