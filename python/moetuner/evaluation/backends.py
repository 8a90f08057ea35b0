"""What engines and their communication backends send: a wire by the name users know.

docs/engines.md has the table with its sources.
"""

from __future__ import annotations

from moetuner.errors import InvalidProblemError
from moetuner.evaluation.cost import Wire

BACKENDS: dict[str, Wire] = {
    # moetuner.nn.MoELayer: levels=two, levels=one
    "moetuner": Wire.DEDUP,
    "moetuner-one-level": Wire.DEDUP_RANKS,
    # DeepEP: normal kernels, low-latency kernels, V2 without hybrid mode
    "deepep": Wire.DEDUP_PIPELINED,
    "deepep-ll": Wire.PER_EXPERT,
    "deepep-direct": Wire.DEDUP_RANKS,
    "nccl-ep": Wire.DEDUP_RANKS,
    # vLLM: --all2all-backend
    "allgather_reducescatter": Wire.ALLGATHER,
    "deepep_high_throughput": Wire.DEDUP_PIPELINED,
    "deepep_low_latency": Wire.PER_EXPERT,
    # SGLang: --moe-a2a-backend none; deepep above is its --deepep-mode normal
    "sglang-none": Wire.ALLGATHER,
    # One NCCL all-to-all of rows by expert
    "megatron": Wire.PER_EXPERT,
    "torchtitan": Wire.PER_EXPERT,
    "transformers": Wire.PER_EXPERT,
}
"""Wires by the names of engines and backends."""
_CHOICES = {
    "vllm": ("allgather_reducescatter", "deepep_high_throughput", "deepep_low_latency"),
    "sglang": ("sglang-none", "deepep", "deepep-ll"),
}
"""Engines that send in several ways; the first is what they do unless told."""


def wire_named(name: str) -> Wire:
    """The wire of that name, or of the backend of that name.

    Raises
    ------
    InvalidProblemError
        When there is neither.
    """
    known = {wire.value: wire for wire in Wire} | BACKENDS
    if name in _CHOICES:
        usual, *others = _CHOICES[name]
        raise InvalidProblemError(
            f"`wire` {name}: that engine has several; say {usual}, which it takes "
            f"unless told, {' or '.join(others)}"
        )
    if name not in known:
        raise InvalidProblemError(
            f"`wire` must be one of {', '.join(wire.value for wire in Wire)}, or a "
            f"backend ({', '.join(BACKENDS)}), got {name!r}"
        )
    return known[name]
