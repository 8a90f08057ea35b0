"""Where models of Transformers route, whichever way they were written.

Most families mark their experts for Transformers' experts interface, and get ids and
weights of every token. Some do not; this module knows those that can be followed.
Legend: T tokens, K top-k, E experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from moetuner.errors import InvalidTraceError
from moetuner.integrations.transformers.stacked import BLOCKS, INTERFACE, LISTS

T = TypeVar("T")

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch.utils.hooks import RemovableHandle

    Seen = Callable[[torch.Tensor, torch.Tensor], None]

NOT_COVERED = {
    "doge": "its experts are rows of two embeddings, not modules or 3-D weights",
    "nllb_moe": "Transformers runs its experts 0 and 1 alone, whatever was chosen",
}
"""Model types of Transformers with experts that nothing here follows, and why."""

ONLY_RECORDED = {
    "dbrx": "its weights of all experts are one matrix",
}
"""Model types that `record` and `count` follow, but that run as they were written."""

ONLY_SPREAD = {
    "jetmoe": "its experts are not marked; those of its attention stay as they are",
    "llama4": "its experts are not marked for the interface; it scales what they get",
    "longcat_flash": "its experts are not marked; some are no more than the token",
    "step3p7": "its experts are not marked for the interface",
}
"""Model types without `experts_implementation` that `parallelize` runs all the same."""

BY_STACK = {
    "switch_transformers": "its encoder and decoder route different tokens: call this "
    "on each of the two",
}
"""Likewise, but the encoder and the decoder each for itself."""

ONLY_RUN = {
    "ernie4_5_vl_moe": "text and pictures have experts of their own in each layer",
}
"""Model types that our ops run, but that have no one routing for a layer, and why."""

_LIKE_THE_INTERFACE: dict[str, dict[str, bool]] = {  # but not marked for it
    "Llama4TextExperts": {"is_transposed": True},
    "LongcatFlashExperts": {},
    "Step3p7Experts": {},
}
GETS_NO_IDS = ("JetMoeMoE", "Llama4TextExperts", "SwitchTransformersExperts")
"""Kinds of experts that are called with something else than ids and weights."""
_GET_IDS = ("DbrxExperts", "LongcatFlashExperts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """One layer's place where ids and weights of all tokens go through."""

    module: torch.nn.Module
    num_experts: int
    choices: Callable[[Any], tuple[torch.Tensor, torch.Tensor]] | None = None
    """Of the output of a router; None: the module is called with ids and weights."""
    arguments: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    """Of what experts are called with, where that is something else."""

    def watch(self, seen: Seen) -> RemovableHandle:
        """Call `seen` with ids [T, K] and weights [T, K] of every call."""
        if self.choices is not None:
            choices = self.choices

            def after(_: Any, _args: tuple[Any, ...], output: Any) -> None:
                seen(*choices(output))

            return self.module.register_forward_hook(after)

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = ("hidden_states", "top_k_index", "top_k_weights")
            given = dict(zip(names, args, strict=False)) | kwargs
            ids, weights = given["top_k_index"], given["top_k_weights"]
            seen(*(self.arguments(ids, weights) if self.arguments else (ids, weights)))

        return self.module.register_forward_pre_hook(before, with_kwargs=True)


def ids_of_mask(
    chosen: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [T, K] of a mask [T, K, E], -1 where nothing is chosen; and weights."""
    found = chosen.max(dim=-1)
    return found.indices.masked_fill(found.values == 0, -1), weights


def experts_of(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """Experts of each layer that our ops can run, by the last number in its name.

    Where a tower beside the text model has experts too, as for pictures, these are
    those of the text model.

    Raises
    ------
    InvalidTraceError
        When there is none, or two of one layer, saying why where that is known.
    """
    found = _by_layer(model, _runs)
    if not found:
        raise InvalidTraceError(_why_none(model))
    return found


def routed_of(model: torch.nn.Module) -> dict[int, Routed]:
    """Where each layer's routing can be seen, by the last number in its name.

    Raises
    ------
    InvalidTraceError
        As `experts_of`.
    """
    found = _by_layer(model, _routed)
    if found:
        return found
    layers: dict[int, Any] = dict(experts_of(model).items())
    return {
        layer: Routed(module=experts, num_experts=int(experts.num_experts))
        for layer, experts in layers.items()
    }


def _by_layer(
    model: torch.nn.Module, kind: Callable[[str, Any], T | None]
) -> dict[int, T]:
    """What `kind` makes of the model's modules, by layer; None: of no interest."""
    found = [
        (name, value)
        for name, module in model.named_modules()
        if (value := kind(name, module)) is not None
    ]
    both = _reason_in(model, BY_STACK)
    if both and len({name.partition("block.")[0] for name, _ in found}) > 1:
        raise InvalidTraceError(both)
    if len({_layer_of(name) for name, _ in found}) < len(found):
        inside = _text_model(model)
        found = [(name, value) for name, value in found if name.startswith(inside)]
    layers: dict[int, T] = {}
    names: dict[int, str] = {}
    for name, value in found:
        layer = _layer_of(name)
        if layer in layers:
            raise InvalidTraceError(
                _known_reason(model)
                or f"{name} is a second experts module of layer {layer}, after "
                f"{names[layer]}: call this on one of the models that "
                f"{type(model).__name__} is made of"
            )
        layers[layer], names[layer] = value, name
    return layers


def _layer_of(name: str) -> int:
    name = re.sub(r"\b(block\.\d+)\.layer\.\d+", r"\1", name)  # parts of a T5 block
    numbers = re.findall(r"\.(\d+)\.", name)
    return int(numbers[-1]) if numbers else 0


def _text_model(model: Any) -> str:
    """Where the names of the text model's modules begin; empty: nowhere else."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    names = [name for name, module in model.named_modules() if module is decoder]
    return f"{names[0]}." if names and names[0] else ""


def _runs(_: str, module: Any) -> Any:
    """The module, when it is one of experts as Transformers' interface has them."""
    kind = type(module).__name__
    if kind in _LIKE_THE_INTERFACE:
        vars(module).update(INTERFACE | _LIKE_THE_INTERFACE[kind])
        if kind == "LongcatFlashExperts":  # behind them are those that do nothing
            vars(module)["num_experts"] = module.num_routed_experts
    if kind in BLOCKS and "experts" not in module._modules:
        vars(module)["num_experts"] = module.router.num_experts
        return module
    if kind in LISTS:
        return module
    marked = hasattr(module, "is_concatenated") and hasattr(module, "num_experts")
    return module if marked else None


def _routed(name: str, module: Any) -> Routed | None:
    kind = type(module).__name__
    if kind in _GET_IDS:
        number = getattr(module, "num_routed_experts", None) or module.num_experts
        return Routed(module=module, num_experts=number)
    if kind in LISTS:
        return Routed(
            module=module, num_experts=module.num_experts, arguments=ids_of_mask
        )
    if kind == "Llama4Router":
        top_k = module.top_k

        def of_scores(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
            weights, ids = output[0].topk(top_k, dim=-1)
            return ids, weights

        return Routed(module=module, num_experts=module.num_experts, choices=of_scores)
    if kind == "JetMoeTopKGating" and "attention" not in name.lower():
        count = module.top_k

        def of_logits(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
            logits, ids = output[-1].topk(count, dim=-1)
            return ids, logits.softmax(dim=-1)

        return Routed(module=module, num_experts=module.num_experts, choices=of_logits)
    return None


def _why_none(model: torch.nn.Module) -> str:
    """Why there are no experts to be run by our ops."""
    return _known_reason(model) or (
        f"{type(model).__name__} has no experts module that Transformers can run by an "
        f"experts_implementation"
    )


def _known_reason(model: torch.nn.Module) -> str:
    """Why models of this type are not covered; empty for others."""
    return _reason_in(model, NOT_COVERED | ONLY_RECORDED | ONLY_RUN)


def _reason_in(model: torch.nn.Module, reasons: dict[str, str]) -> str:
    """What the table says of models of this type; empty where nothing."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for kind in (getattr(c, "model_type", "") for c in (config, text)):
        known = kind.replace("-", "_").removesuffix("_text")
        if known in reasons:
            return f"{type(model).__name__} is not covered: {reasons[known]}"
    return ""
