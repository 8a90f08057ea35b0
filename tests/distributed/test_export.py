"""Layers exported, strictly and not, for any number of tokens."""

import itertools

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from layers import HIDDEN, TOP_K, make_placement, placed_layers, whole_layers  # noqa: E402
from moetuner.nn import ExchangeOptions, ExpertOptions  # noqa: E402
from ranks import run_on_ranks  # noqa: E402

MOST = 12
FORMS = (
    ExchangeOptions(),
    ExchangeOptions(capacity=MOST, max_rows=2 * MOST * TOP_K),
)


def _exports(rank, num_ranks):
    placement = make_placement("replicated", num_ranks)
    any_number = {"x": {0: torch.export.Dim.DYNAMIC}, "keys": None}
    for options, strict in itertools.product(FORMS, (False, True)):
        whole = whole_layers(ExpertOptions(bias=True))
        layer = placed_layers(whole, placement, rank, options=options)[0]
        with torch.no_grad():
            program = torch.export.export(
                layer,
                (torch.randn(6, HIDDEN), None),
                dynamic_shapes=any_number,
                strict=strict,
            )
            run = program.module()
            for count in (6, MOST - rank, 1, 0):
                x = torch.randn(count, HIDDEN)
                torch.testing.assert_close(run(x, None), layer(x))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_exported_layers_take_any_number_of_tokens(num_ranks):
    run_on_ranks(num_ranks, _exports)
