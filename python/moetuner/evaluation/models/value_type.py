"""What a weight, or a value of a row, is stored in, and its bytes with scales."""

from __future__ import annotations

import enum

from moetuner.errors import InvalidProblemError


class ValueType(str, enum.Enum):
    """Number formats of weights and of rows."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"
    """E4M3 or E5M2. Weights have a 32-bit scale per 128 x 128 block, rows one per 128
    values, as DeepSeek's models and DeepEP have it."""
    MXFP8 = "mxfp8"
    """Open Compute microscaling: a scale of one byte per 32 values."""
    INT8 = "int8"
    """One scale per output channel of the weights, or 32 bits per row."""
    NVFP4 = "nvfp4"
    """Four bits, and a scale of one byte (FP8) per 16 values."""
    MXFP4 = "mxfp4"
    """Four bits, and a scale of one byte per 32 values."""
    INT4 = "int4"
    """Four bits, and a 16-bit scale per 128 values, as AWQ and GPTQ have it."""

    @property
    def bits(self) -> int:
        """Of one value, without scales."""
        return _BITS[self]

    def weight_bytes(
        self, *, group: int | None = None, scale_bytes: float | None = None
    ) -> float:
        """Bytes of a weight and its share of a scale.

        Parameters
        ----------
        group
            Weights of one scale; as usual for the type when None.
        scale_bytes
            Bytes of that scale, and of a zero point; as usual when None.
        """
        usual = _WEIGHT_SCALES.get(self, (0.0, 1))
        share = (usual[0] if scale_bytes is None else scale_bytes) / (group or usual[1])
        return self.bits / 8 + share

    def row_bytes(self, hidden_size: float) -> float:
        """Bytes of a value of a row of `hidden_size`, and its share of the scales.

        Raises
        ------
        InvalidProblemError
            For a type that no exchange sends.
        """
        if self is ValueType.INT4:
            raise InvalidProblemError(
                f"rows: no exchange sends {self.value}; wanted one of "
                f"{', '.join(each.value for each in ROW_TYPES)}"
            )
        scale_bytes, group = _ROW_SCALES.get(self, (0, 1))
        num_scales = 1 if group is None else -(-hidden_size // group)
        return self.bits / 8 + scale_bytes * num_scales / hidden_size


_BITS = {
    ValueType.FP32: 32,
    ValueType.BF16: 16,
    ValueType.FP16: 16,
    ValueType.FP8: 8,
    ValueType.MXFP8: 8,
    ValueType.INT8: 8,
    ValueType.NVFP4: 4,
    ValueType.MXFP4: 4,
    ValueType.INT4: 4,
}
# Bytes of a scale, and of how many values it is. Of int8 it is that of a whole channel,
# thousands of values: left out.
_WEIGHT_SCALES: dict[ValueType, tuple[float, int]] = {
    ValueType.FP8: (4, 128 * 128),
    ValueType.MXFP8: (1, 32),
    ValueType.NVFP4: (1, 16),
    ValueType.MXFP4: (1, 32),
    ValueType.INT4: (2, 128),
}
_ROW_SCALES: dict[ValueType, tuple[float, int | None]] = {  # None: the whole row
    ValueType.FP8: (4, 128),
    ValueType.MXFP8: (1, 32),
    ValueType.INT8: (4, None),
    ValueType.NVFP4: (1, 16),
    ValueType.MXFP4: (1, 32),
}
ROW_TYPES = tuple(each for each in ValueType if each is not ValueType.INT4)
"""What rows travel in."""
