"""Lower bounds: how fast any placement can be at best, proven.

`decomposition` cuts the objective into pieces, over the links of `link_level`. Each is
bounded by `counting` (with `balance`), and beyond that by a `relaxation` (of `gram`,
with the rules of `visits` and `touches`) or by `priced_sets`, in the children of
`pool`. The proofs are in ``docs/bounds.md``.
"""

from __future__ import annotations

from moetuner.bounds.certificate import (
    Certificate,
    certify,
    counting_bound,
    layer_counting_bounds,
)

__all__ = ["Certificate", "certify", "counting_bound", "layer_counting_bounds"]
