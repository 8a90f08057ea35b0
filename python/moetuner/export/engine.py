"""The engines that placements are written for."""

from __future__ import annotations

import enum


class Engine(enum.Enum):
    """Whose file it is, by the name that ``--to`` takes."""

    SGLANG = "sglang"
    TRTLLM = "trtllm"
    VLLM_ASCEND = "vllm-ascend"
    VLLM = "vllm"
    VLLM_START_MAP = "vllm-start-map"
    EPLB = "eplb"
    DEEPEP = "deepep"
