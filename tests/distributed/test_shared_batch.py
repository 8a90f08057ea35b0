"""Models whose ranks share a batch: shares and sums, exported and compiled."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="Transformers is not there")

import moetuner.integrations.transformers as ours  # noqa: E402
import torch.distributed as dist  # noqa: E402
from layers import make_placement  # noqa: E402
from moetuner.nn import ExchangeOptions  # noqa: E402
from moetuner.ops._shared_batch import all_rows, in_common, own_rows  # noqa: E402
from ranks import run_on_ranks  # noqa: E402
from tiny_models import make_model  # noqa: E402

HIDDEN = 4


def _shares(rank, num_ranks):
    """Blocks of equal size, shorter ones at the end; gradients come from all ranks."""
    group = dist.group.WORLD.group_name
    for count in (0, 1, 3, 4, 9):
        batch = torch.arange(count * HIDDEN).float().view(count, HIDDEN)
        size = -(-count // num_ranks)
        mine = batch[rank * size :][:size]
        rows = batch.clone().requires_grad_()
        scale = torch.ones(HIDDEN, requires_grad=True)
        share, same = own_rows([rows, batch.int()], group)
        assert torch.equal(share, mine)
        assert torch.equal(same, mine.int())
        done = share.square() * in_common(scale, group)
        out = all_rows(done, count, group)
        assert torch.equal(out, batch.square())
        out.sum().backward()
        assert torch.equal(rows.grad, 2 * batch)
        assert torch.equal(scale.grad, batch.square().sum(dim=0))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_shares_and_sums_with_gradients(num_ranks):
    run_on_ranks(num_ranks, _shares)


def _checked_by_torch(rank, num_ranks):
    group, ops = dist.group.WORLD.group_name, torch.ops.moetuner
    batch = torch.randn(6, HIDDEN, requires_grad=True)
    share = torch.randn(6 // num_ranks, HIDDEN, requires_grad=True)
    ids = torch.arange(12).view(6, 2)
    for op, args in (
        (ops.own_rows, ([batch, ids], group)),
        (ops.own_rows_again, (batch.detach(), len(share), group)),
        (ops.all_rows, (share, 6, group)),
        (ops.in_common, (batch, group)),
        (ops.sum_over_ranks, (batch.detach(), group)),
    ):
        torch.library.opcheck(op.default, args)


def test_opcheck():
    run_on_ranks(2, _checked_by_torch)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def _forms(num_ranks):
    most = 32
    fixed = ExchangeOptions(capacity=most, max_rows=num_ranks * most * 4)
    return (ExchangeOptions(), fixed)


def _ids(count, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (1, count), generator=made)


def _exported(rank, num_ranks, every):
    placement = make_placement("replicated", num_ranks, num_layers=3)
    placement = replace(placement, layer_ids=placement.layer_ids - 3)
    eager = Logits(make_model("Olmoe"))
    exact, fixed = _forms(num_ranks)
    cases = [(True, exact), (False, fixed)]
    for shared, options in [
        *cases,
        *([(True, fixed), (False, exact)] if every else ()),
    ]:
        model = make_model("Olmoe")
        ours.parallelize(model, placement, shared_batch=shared, options=options)
        with torch.no_grad():
            program = torch.export.export(
                Logits(model),
                (_ids(7),),
                dynamic_shapes={"ids": {1: torch.export.Dim.DYNAMIC}},
                strict=False,
            )
            run = program.module()
            for count in (7, 12, 3, 2):
                ids = _ids(count, seed=0 if shared else rank)
                wanted = eager(ids)
                torch.testing.assert_close(run(ids), wanted, rtol=1e-4, atol=1e-5)


ALSO = [pytest.param(n, True, marks=pytest.mark.slow) for n in (1, 2, 4)]


@pytest.mark.parametrize(("num_ranks", "every"), [(2, False), *ALSO])
def test_exported_models_take_any_number_of_tokens(num_ranks, every):
    run_on_ranks(num_ranks, _exported, every)
