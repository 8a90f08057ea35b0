"""Undefined memory full of NaN (integers: the largest value), for a while."""

import contextlib

import torch


@contextlib.contextmanager
def poisoned(strict=True):
    """What torch leaves undefined is filled, so that reading any of it shows.

    Not `strict`, ops that have no deterministic form run all the same.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filled
