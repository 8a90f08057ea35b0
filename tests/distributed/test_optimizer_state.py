"""Optimizer state moves with its experts."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from layers import (  # noqa: E402
    make_placement,
    placed_layers,
    tokens_of,
    whole_layers,
)
from moetuner.errors import InvalidPlacementError  # noqa: E402
from moetuner.nn import (  # noqa: E402
    ExpertOptions,
    apply_placement,
    average_gradients,
    logical_order,
)
from ranks import run_on_ranks  # noqa: E402

MAKERS = {
    "adamw": lambda layers: torch.optim.AdamW(layers.parameters(), lr=1e-2),
    "momentum": lambda layers: torch.optim.SGD(
        layers.parameters(), lr=1e-4, momentum=0.9
    ),
}


def _step(layers, optimizer, rank, step):
    x = tokens_of(rank, step)
    for layer in layers:
        x = x + layer(x)
    optimizer.zero_grad(set_to_none=True)
    x.square().sum().backward()
    average_gradients(layers)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return x.detach()


def _moves_along(rank, num_ranks):
    """Training that is moved to and fro goes on as if it never was."""
    for make in MAKERS.values():
        outputs = []
        for moves in (False, True):
            start = make_placement("contiguous", num_ranks)
            layers = placed_layers(whole_layers(ExpertOptions(bias=True)), start, rank)
            optimizer, seen = make(layers), []
            for step in range(6):
                if moves and step in (2, 3, 4):
                    kind = {2: "shuffled", 3: "replicated", 4: "contiguous"}[step]
                    placement = make_placement(kind, num_ranks)
                    apply_placement(layers, placement, optimizer)
                seen.append(_step(layers, optimizer, rank, step))
            outputs.append(torch.cat(seen))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


def _in_logical_order(rank, num_ranks):
    """State of slot s is that of expert s of the block."""
    layers = placed_layers(whole_layers(), make_placement("shuffled", num_ranks), rank)
    optimizer = MAKERS["momentum"](layers)
    slots = layers[0].exchange.tables.local_experts[0]
    up = layers[0].experts.up
    _step(layers, optimizer, rank, 0)
    numbers = torch.from_numpy(slots).float()[:, None, None]
    optimizer.state[up]["momentum_buffer"].copy_(numbers.expand_as(up))
    with logical_order(layers, optimizer=optimizer):
        block = optimizer.state[up]["momentum_buffer"][:, 0, 0]
        first = rank * len(block)
        assert block.tolist() == list(range(first, first + len(block)))
    assert torch.equal(
        optimizer.state[up]["momentum_buffer"][:, 0, 0], numbers[:, 0, 0]
    )


def _refused(rank, num_ranks):
    layers = placed_layers(
        whole_layers(), make_placement("contiguous", num_ranks), rank
    )
    other = make_placement("shuffled", num_ranks)
    optimizer = MAKERS["momentum"](layers)
    _step(layers, optimizer, rank, 0)
    if rank:
        optimizer.state[layers[0].experts.up].clear()
        optimizer.state[layers[0].experts.down].clear()
        optimizer.state[layers[1].experts.up].clear()
        optimizer.state[layers[1].experts.down].clear()
    before = layers[0].experts.up.clone()
    with pytest.raises(InvalidPlacementError, match="rank 1 says optimizer state"):
        apply_placement(layers, other, optimizer)
    optimizer.state[layers[0].experts.up]["blocks"] = torch.zeros(3)
    with pytest.raises(
        InvalidPlacementError, match=r"blocks of up .* is \[3\], wanted"
    ):
        apply_placement(layers, other, optimizer)
    assert torch.equal(layers[0].experts.up, before)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_training_goes_on_as_if_nothing_had_moved(num_ranks):
    run_on_ranks(num_ranks, _moves_along)


def test_state_lies_in_logical_order_too():
    run_on_ranks(2, _in_logical_order)


def test_state_that_cannot_move_is_refused():
    run_on_ranks(2, _refused)
