"""What to measure, how long, and on what."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from moetuner._checks import check_positive, is_whole, one_of
from moetuner.calibration.samples import LayerShape, ValueKind
from moetuner.errors import InvalidProblemError


class Device(str, enum.Enum):
    """Where ranks compute."""

    AUTO = "auto"
    """GPUs where there are any."""
    CUDA = "cuda"
    CPU = "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationOptions:
    """What is measured, for how long.

    Parameters
    ----------
    shapes
        Layers to measure; empty: some that differ, by the kind of device.
    seconds
        To measure for, about; joining the group and loading kernels come on top.
    ranks_per_node
        None: as many as were started on this machine.
    device
        Where.
    values
        Of rows and weights of the shapes that are taken where there are none.
    seed
        Of rows and uniform routing.
    """

    shapes: tuple[LayerShape, ...] = ()
    seconds: float = 40.0
    ranks_per_node: int | None = None
    device: Device = Device.AUTO
    values: ValueKind = ValueKind.BFLOAT16
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("CalibrationOptions", "seconds", self.seconds)
        device = one_of(Device, self.device, "CalibrationOptions: device")
        object.__setattr__(self, "device", device)
        values = one_of(ValueKind, self.values, "CalibrationOptions: values")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "shapes", tuple(self.shapes))
        per_node = self.ranks_per_node
        if per_node is not None and (not is_whole(per_node) or per_node < 1):
            raise InvalidProblemError(
                f"CalibrationOptions: ranks_per_node must be a positive whole number, "
                f"got {per_node!r}"
            )

    def shapes_on(self, kind: str) -> tuple[LayerShape, ...]:
        """Those to measure on a kind of device."""
        usual = (replace(shape, values=self.values) for shape in SHAPES[kind])
        return self.shapes or tuple(usual)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How large messages and batches get on a kind of device; small ones first."""

    messages: tuple[int, ...]
    """Bytes."""
    tokens: tuple[int, ...]
    """Of a rank."""
    rows_per_expert: tuple[int, ...]
    max_rows: int
    """Of all experts of a rank together."""
    cold_bytes: int
    """Weights that are gone through before any is read again: more than caches hold."""


_KB, _MB = 1 << 10, 1 << 20
SIZES = {
    "cuda": Sizes(
        messages=(*(8 * _KB << (3 * i) for i in range(5)), 256 * _MB),
        tokens=(16, 64, 256, 1024, 2048, 4096, 8192),
        rows_per_expert=(1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096),
        max_rows=1 << 16,
        cold_bytes=256 * _MB,
    ),
    "cpu": Sizes(
        messages=tuple(8 * _KB << (2 * i) for i in range(6)),
        tokens=(4, 16, 64, 256, 1024),
        rows_per_expert=(1, 4, 16, 64, 256),
        max_rows=1 << 11,
        cold_bytes=64 * _MB,
    ),
}
SHAPES = {
    "cuda": (
        LayerShape(hidden_size=4096, inner_size=1536, num_experts=128, top_k=8),
        LayerShape(hidden_size=2048, inner_size=2048, num_experts=32, top_k=4),
    ),
    "cpu": (
        LayerShape(hidden_size=512, inner_size=256, num_experts=32, top_k=4),
        LayerShape(hidden_size=256, inner_size=512, num_experts=16, top_k=2),
    ),
}
"""Where no shape was asked for: two that differ in all sizes."""
