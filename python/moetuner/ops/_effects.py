"""What a compiler must know of ops that talk to other ranks.

They look pure: no argument changes. But a rank that leaves one out, because nobody
reads its result or because it has no tokens, lets all others wait for ever, and a rank
that turns two of them round sends the one where the other is awaited.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch.utils import _pytree

_NAMES: list[str] = []


def keep_in_order(name: str) -> None:
    """Under `torch.compile` the op is never removed, and never passes another of them.

    torch threads a token through such ops, forward and backward; this is the way that
    it has, though its name is private.
    """
    _register_effectful_op(_op(name), _EffectType.ORDERED)
    _NAMES.append(name)


def teach_inductor() -> None:
    """Let Inductor, where it is at work, keep the order that the tokens say.

    Called by the ops' fakes: those run before anything is lowered, and Inductor is slow
    to import. Inductor of torch 2.13 files the order of such ops under the names of
    their buffers and looks it up under those of their operations, so that it is lost
    wherever no data flows from one to the other: in a layer without tokens, say.
    """
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    if lowering is None or _op(_NAMES[-1]) in getattr(lowering, "lowerings", {}):
        return
    for name in _NAMES:
        lowering.lowerings[_op(name)] = _Ordered(_op(name))


def _op(name: str) -> Any:
    return getattr(torch.ops.moetuner, name).default


class _Ordered:
    """Lowers an op as Inductor would, after the one before it."""

    def __init__(self, op: Any) -> None:
        self.op = op

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch._inductor import ir
        from torch._inductor.virtualized import V

        graph: Any = V.graph
        before, known = (
            graph.effectful_ops.get(_EffectType.ORDERED),
            len(graph.operations),
        )
        made = ir.FallbackKernel.create(self.op, *args, **kwargs)
        if before is not None:
            for operation in graph.operations[known:]:
                deps = graph.additional_star_deps[operation.get_operation_name()]
                deps.add(before.get_name())
        return _pytree.tree_map(_wrap, made)


def _wrap(value: Any) -> Any:
    from torch._inductor import ir

    if not isinstance(value, ir.IRNode):
        return value
    wrap = getattr(value, "wrap_for_lowering", None)  # torch 2.13; before, a box is one
    return wrap() if wrap else ir.TensorBox.create(value)
