"""Hugging Face Transformers: run its MoE models on our ops, record their routing.

Importing this module registers ``experts_implementation="moetuner"``::

    from moetuner.integrations.transformers import record

    model = AutoModelForCausalLM.from_pretrained(
        name, experts_implementation="moetuner"
    )
    with record(model) as recording:
        model.generate(**inputs)
    write_trace(recording.trace(), "routing.safetensors")
"""

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moetuner.integrations.transformers.experts import experts_forward
from moetuner.integrations.transformers.families import (
    BY_STACK,
    NOT_COVERED,
    ONLY_RECORDED,
    ONLY_RUN,
    ONLY_SPREAD,
    experts_of,
)
from moetuner.integrations.transformers.parallel import parallelize, register
from moetuner.integrations.transformers.recording import Recording, count, record
from moetuner.integrations.transformers.replay import replay_routing

ALL_EXPERTS_FUNCTIONS.register("moetuner", experts_forward)
register()

__all__ = [
    "BY_STACK",
    "NOT_COVERED",
    "ONLY_RECORDED",
    "ONLY_RUN",
    "ONLY_SPREAD",
    "Recording",
    "count",
    "experts_forward",
    "experts_of",
    "parallelize",
    "record",
    "replay_routing",
]
