"""Tokens of a call, cut in two for an exchange that runs beside experts.

Legend: T tokens here, K top-k, E experts, R most slots of an expert, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


class Half(NamedTuple):
    """Tokens that one dispatch sends: all of a call, or half of them."""

    x: torch.Tensor
    """[T, H]."""
    topk_ids: torch.Tensor
    """[T, K]."""
    topk_weights: torch.Tensor
    """[T, K]."""
    candidates: torch.Tensor
    """int32 [E, R], slots of each expert, that of the first token first."""


def halves_of(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    candidates_from: Callable[[int], torch.Tensor],
) -> tuple[Half, Half]:
    """The first T // 2 tokens, and the others; either may have none."""
    cut = len(x) // 2
    first = Half(x[:cut], topk_ids[:cut], topk_weights[:cut], candidates_from(0))
    second = Half(x[cut:], topk_ids[cut:], topk_weights[cut:], candidates_from(cut))
    return first, second
