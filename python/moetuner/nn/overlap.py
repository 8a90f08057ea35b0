"""The exchange of one half of a rank's tokens beside the experts of the other half.

    exchange   | send A | send B      |        | return A | return B |
    experts             | experts A   | experts B         |

To import this loads torch's compiler. Legend: T tokens here, H hidden.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING

import torch

from moetuner.ops import combine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

    from moetuner.nn.halves import Half
    from moetuner.ops import Dispatched


@torch.compiler.disable(  # type: ignore[no-untyped-call,untyped-decorator,unused-ignore]
    reason="ExchangeOptions(overlap=True) runs on two streams, which cannot be "
    "compiled: leave overlap out, or the layer out of torch.compile"
)
def run_halves(
    halves: tuple[Half, Half],
    send: Callable[[Half], Dispatched],
    compute: Callable[[Dispatched], torch.Tensor],
) -> torch.Tensor:
    """Sums [T, H] of both halves, in the order of tokens.

    All that talks to other ranks is enqueued in one order on one stream, here and, as
    gradients take the streams of what they are of, in the backward pass.
    """
    side = _Side(halves[0].x.device)
    sent, done = [], []
    side.takes(*(tensor for half in halves for tensor in half))
    for half in halves:
        with side.exchange():
            sent.append(send(half))
        side.gives(sent[-1].rows, sent[-1].end_offsets)
        done.append(compute(sent[-1]))
        side.finished(done[-1])
    sums = []
    for number, part in enumerate(sent):
        side.awaits(number)
        with side.exchange():
            sums.append(combine(done[number], part.handle))
    side.gives(*sums)
    return torch.cat(sums)


class _Side:
    """The stream of an exchange, and that of its caller; on the CPU there are none."""

    def __init__(self, device: torch.device) -> None:
        self._computed: list[torch.cuda.Event] = []
        self._own: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._own = _stream_beside(device)
            self._callers = torch.cuda.current_stream(device)

    def exchange(self) -> AbstractContextManager[object]:
        """What is enqueued within is of the exchange."""
        return nullcontext() if self._own is None else torch.cuda.stream(self._own)

    def takes(self, *tensors: torch.Tensor) -> None:
        """The exchange reads what the caller has enqueued so far."""
        if self._own is not None:
            self._own.wait_stream(self._callers)
            _used_by(self._own, tensors)

    def gives(self, *tensors: torch.Tensor) -> None:
        """The caller reads what the exchange has enqueued so far."""
        if self._own is not None:
            self._callers.wait_stream(self._own)
            _used_by(self._callers, tensors)

    def finished(self, done: torch.Tensor) -> None:
        """The caller's stream comes here when its next half is computed."""
        if self._own is not None:
            self._computed.append(self._callers.record_event())
            _used_by(self._own, [done])

    def awaits(self, number: int) -> None:
        """The exchange needs what the half of that number computed, and no more."""
        if self._own is not None:
            self._own.wait_event(self._computed[number])


@cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    """Its blocks begin first where both streams have some: others wait for them."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call,unused-ignore]


def _used_by(stream: torch.cuda.Stream, tensors: Iterable[torch.Tensor]) -> None:
    """Their memory is nobody else's before that stream is done with it."""
    for tensor in tensors:
        tensor.detach().record_stream(stream)
