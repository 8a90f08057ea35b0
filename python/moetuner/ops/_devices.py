"""A check for fakes: the kernels make it too, but fakes run in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def same_device(op: str, like: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Refuse tensors that are elsewhere than `like`, as the kernels do.

    A tensor on the meta device sends a whole call to the fake, which would return
    memory that nobody wrote.

    Raises
    ------
    ValueError
        Naming the argument and both devices.
    """
    for name, tensor in others.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, other tensors on {like.device}"
            )
