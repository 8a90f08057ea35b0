"""What an optimizer knows of each expert.

Legend: S slots per rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moetuner.nn.layer import local_share

if TYPE_CHECKING:
    from collections.abc import Iterable

States = dict[torch.nn.Parameter, dict[str, torch.Tensor]]


def states_of(
    optimizer: torch.optim.Optimizer | None, experts: Iterable[torch.nn.Module]
) -> tuple[States, str]:
    """State with a row per slot of each parameter, by name in order.

    And why some of it cannot move along with the slots; empty when all of it can.
    """
    found: States = {}
    if optimizer is None:
        return found, ""
    for module in experts:
        for label, parameter in module.named_parameters(recurse=False):
            known = optimizer.state.get(parameter, {})
            for name in sorted(known):
                value = known[name]
                if not torch.is_tensor(value) or value.dim() == 0:
                    continue  # a number of steps
                if len(local_share(value)) != len(local_share(parameter)):
                    return found, (
                        f"{name} of {label} in the optimizer is {list(value.shape)}, "
                        f"wanted one row per slot"
                    )
                found.setdefault(parameter, {})[name] = value
    return found, ""
