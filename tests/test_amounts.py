"""Numbers of things in messages: one has no plural."""

import pytest
from moetuner._words import amount, verb


@pytest.mark.parametrize(
    ("number", "thing", "said"),
    [
        (1, "layer", "1 layer"),
        (0, "layer", "0 layers"),
        (2048, "token", "2,048 tokens"),
        (1, "batch", "1 batch"),
        (3, "batch", "3 batches"),
        (1, "slot a rank", "1 slot a rank"),
        (9, "slot a rank", "9 slots a rank"),
    ],
)
def test_one_is_not_several(number, thing, said):
    assert amount(number, thing) == said


def test_verbs_go_with_their_number():
    assert [verb(n, "is", "are") for n in (0, 1, 2)] == ["are", "is", "are"]
