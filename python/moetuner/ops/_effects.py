"""What a compiler must know of ops that talk to other ranks.

They look pure: no argument changes. But a rank that leaves one out, because nobody
reads its result or because it has no tokens, lets all others wait for ever.
"""

from __future__ import annotations

import torch
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op


def keep_in_order(name: str) -> None:
    """Under `torch.compile` the op is never removed, and never passes another of them.

    torch threads a token through such ops, forward and backward; this is the way that
    it has, though its name is private.
    """
    op = getattr(torch.ops.moetuner, name).default
    _register_effectful_op(op, _EffectType.ORDERED)
