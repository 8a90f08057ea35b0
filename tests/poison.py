"""Undefined memory full of NaN (integers: the largest value), for a while."""

import contextlib

import torch


@contextlib.contextmanager
def poisoned():
    """What torch leaves undefined is filled, so that reading any of it shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filled
