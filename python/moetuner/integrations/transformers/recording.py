"""Routing of a running Transformers model.

Legend: B sequences, S their length, T = B x S tokens.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moetuner.errors import InvalidTraceError
from moetuner.integrations.transformers.families import Routed, routed_of
from moetuner.integrations.transformers.sequences import Sequences
from moetuner.nn.counter import RoutingCounter
from moetuner.nn.recompute import recomputing
from moetuner.nn.recorder import Recorder
from moetuner.trace import Trace, TraceMetadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import ParamSpec

    P = ParamSpec("P")


class Recording:
    """What `record` has seen so far."""

    def __init__(self, model: torch.nn.Module, layers: dict[int, Routed]) -> None:
        self._model: Any = model
        self._layers = set(layers)
        self._recorder = Recorder(next(iter(layers.values())).num_experts)
        self._sequences = Sequences()
        self._call: Any = None  # the conversation of a call that has not ended

    def trace(self, dataset: str = "") -> Trace:
        """The routing as a trace; `dataset` names the text for its metadata.

        Calls that ended with an error are left out, and so are tokens that a cache has
        dropped again, as rejected drafts are.

        Raises
        ------
        InvalidTraceError
            When nothing was recorded, naming the layers whose experts did not run.
        """
        import transformers

        self._drop_open()
        self._forget_rejected()
        missing = sorted(self._layers - self._recorder.layers())
        if missing:
            raise InvalidTraceError(silent("record", missing))
        config: Any = getattr(self._model, "config", None)
        return self._recorder.trace(
            TraceMetadata(
                model=getattr(config, "_name_or_path", "")
                or type(self._model).__name__,
                source=f"transformers {transformers.__version__}",
                dataset=dataset,
            )
        )

    def _begin(self, arguments: dict[str, Any]) -> None:
        """Name the tokens of a call: new sequences, or the next tokens of others."""
        self._drop_open()
        given = arguments.get("input_ids")
        if given is None:
            given = arguments["inputs_embeds"]
        mask = arguments.get("attention_mask")
        tokens, self._call = self._sequences.begin(
            _cache_of(arguments),
            tuple(given.shape[:2]),
            mask if torch.is_tensor(mask) else None,
        )
        self._forget_rejected()
        self._recorder.begin_step(
            sequence=tokens.sequence.ravel(),
            position=tokens.position.ravel(),
            phase=np.full(tokens.kept.size, tokens.decode, np.uint8),
            kept=tokens.kept.ravel(),
        )

    def _finish(self, arguments: dict[str, Any], output: Any) -> None:
        cache = _cache_of(arguments)
        if cache is None and hasattr(output, "items"):  # the model made one
            cache = _cache_of(dict(output.items()))
        self._sequences.finish(cache, self._call)
        self._call = None

    def _drop_open(self) -> None:
        """A call that did not end well recorded some layers, perhaps."""
        if self._call is not None:
            self._recorder.drop_step()
            self._call = None

    def _end(self) -> None:
        self._drop_open()
        self._sequences.settle()
        self._forget_rejected()

    def _forget_rejected(self) -> None:
        self._sequences.settle(self._sequences.last)
        for sequences, stays in self._sequences.rejected:
            self._recorder.forget(sequences, stays)
        self._sequences.rejected.clear()


def _cache_of(arguments: dict[str, Any]) -> Any:
    """past_key_values until Transformers 5.23, cache since 5.24."""
    found = [a for a in arguments.values() if hasattr(a, "get_seq_length")]
    return found[0] if found else None


def _eager(hook: Callable[P, None]) -> Callable[P, None]:
    """Hooks read and keep: where a compiler meets one, it runs as it is."""
    outside: Callable[P, None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call,unused-ignore]
    return outside


def silent(what: str, layers: list[int]) -> str:
    """The error of layers whose hooks did not run."""
    return (
        f"{what}: the experts of layers {layers} did not run, or not where hooks see "
        f"them: call the model itself, eagerly, not what torch.compile or a CUDA graph "
        f"made of it"
    )


@contextmanager
def record(model: torch.nn.Module) -> Iterator[Recording]:
    """Record the routing of `model` while the context lasts, whatever runs its experts.

    Parameters
    ----------
    model
        A Transformers model with experts modules (``...layers.<n>...experts``). Called
        eagerly: compiled or captured calls run no hooks.

    Returns
    -------
    A context manager whose value has ``trace()``: a `moetuner.Trace` with sequences,
    positions, phases, weights and the model's own layer numbers; padding (an attention
    mask of 0) is left out. Ids stay on the device until then.

    Raises
    ------
    InvalidTraceError
        When the model has no experts module that is understood.

    Notes
    -----
    Each cache is a conversation, so several may be used in turn. Drafts that are
    rejected leave the trace; beams are followed, and where one goes on as two, the
    second begins a new sequence there. What cannot be followed (a cache from before
    the recording, or changed by others) begins new sequences, with a warning. What
    activation checkpointing computes again is recorded once.
    """
    layers = routed_of(model)
    recording = Recording(model, layers)

    @_eager
    def before_model(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not recomputing():
            recording._begin({"input_ids": args[0], **kwargs} if args else kwargs)

    @_eager
    def after_model(
        _: Any, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not recomputing():
            recording._finish(kwargs, output)

    def into(layer: int) -> Any:
        @_eager
        def seen(ids: torch.Tensor, weights: torch.Tensor) -> None:
            recording._recorder.add(layer, ids, weights)

        return seen

    handles = [
        model.register_forward_pre_hook(before_model, with_kwargs=True),
        model.register_forward_hook(after_model, with_kwargs=True),
    ]
    for layer, routed in layers.items():
        handles.append(routed.watch(into(layer)))
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()
        recording._end()


@contextmanager
def count(
    model: torch.nn.Module, *, max_tokens: int, pairs: bool = True
) -> Iterator[RoutingCounter]:
    """Count the routing of `model` on its device while the context lasts.

    Parameters
    ----------
    model
        As for `record`.
    max_tokens
        The most tokens of one call, over all its sequences.
    pairs
        Co-activation and transitions too.

    Returns
    -------
    A context manager whose value is a `moetuner.nn.RoutingCounter`. Padding is counted
    like any token; a call that does not end well is not. Call the model inside a
    CUDA-graph capture, and replays count too.

    Raises
    ------
    InvalidTraceError
        When the model has no experts module that is understood; at the end, when the
        experts of some layers did not run, naming them.
    """
    layers = routed_of(model)
    ran: set[int] = set()

    @_eager
    def before_model(*_: Any) -> None:
        if not recomputing():
            counter.drop_step()  # one that did not end
            counter.begin_step()

    @_eager
    def after_model(*_: Any) -> None:
        if not recomputing():
            counter.end_step()

    first = next(iter(layers.values()))
    counter = RoutingCounter(
        sorted(layers),
        first.num_experts,
        max_tokens=max_tokens,
        device=next(first.module.parameters()).device,
        pairs=pairs,
    )

    def into(layer: int) -> Any:
        @_eager
        def seen(ids: torch.Tensor, _: torch.Tensor) -> None:
            counter.add(layer, ids)
            ran.add(layer)

        return seen

    handles = [
        model.register_forward_pre_hook(before_model),
        model.register_forward_hook(after_model),
        *(routed.watch(into(layer)) for layer, routed in layers.items()),
    ]
    try:
        yield counter
    finally:
        for handle in handles:
            handle.remove()
        counter.drop_step()
    if len(ran) < len(layers):
        raise InvalidTraceError(silent("count", sorted(layers.keys() - ran)))
