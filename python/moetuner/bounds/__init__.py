"""Lower bounds: how fast any placement can be at best, proven.

The proofs are in ``docs/bounds.md``.
"""

from __future__ import annotations

from moetuner.bounds.certificate import (
    Certificate,
    certify,
    counting_bound,
    layer_counting_bounds,
)

__all__ = ["Certificate", "certify", "counting_bound", "layer_counting_bounds"]
