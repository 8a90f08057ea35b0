"""Experts that are a list of MLPs, or lie in a block's own modules: spread over ranks.

Against one process: logits, every gradient, dropped tokens, and what a checkpoint says.
"""

import contextlib
import copy
import itertools

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="Transformers is not there")

import moetuner.integrations.transformers as ours  # noqa: E402
import numpy as np  # noqa: E402
from moetuner.errors import InvalidPlacementError, InvalidTraceError  # noqa: E402
from moetuner.evaluation.verify import verify  # noqa: E402
from moetuner.nn import (  # noqa: E402
    ExchangeOptions,
    apply_placement,
    average_gradients,
    contiguous_placement,
    expert_parameters,
    gather_counts,
    logical_order,
    record_run,
)
from moetuner.nn.move import placed_layers  # noqa: E402
from moetuner.placement.model import Placement  # noqa: E402
from other_families import IDS, make_other  # noqa: E402
from ranks import run_on_ranks  # noqa: E402

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
FORMS = (ExchangeOptions(), ExchangeOptions(capacity=16, max_rows=128))


def _placement(stack, num_ranks, spare=0):
    """Experts turned round, and on each rank a replica of another rank's first."""
    layers = sorted(ours.experts_of(stack))
    number = next(iter(ours.experts_of(stack).values())).num_experts
    plain = contiguous_placement(len(layers), number, num_ranks)
    slots = plain.slot_experts[:, ::-1].reshape(len(layers), num_ranks, -1)
    if spare:
        others = np.roll(slots[:, :, :1], 1, axis=1)
        slots = np.concatenate([slots, others if num_ranks > 1 else -1 + 0 * others], 2)
    return Placement(
        slot_experts=np.ascontiguousarray(slots.reshape(len(layers), -1)),
        layer_ids=np.array(layers, np.int32),
        num_experts=number,
        topology=plain.topology,
    )


def _switch(capacity=2):
    """A token behind the second of an expert is dropped."""
    model = make_other("switch_transformers")
    for module in model.modules():
        if hasattr(module, "expert_capacity"):
            module.expert_capacity = capacity
    return model


def _stacks(model):
    kind = type(model).__name__
    return [model.encoder, model.decoder] if "Switch" in kind else [model]


def _logits(model, ids):
    switch = (
        {"decoder_input_ids": ids.flip(1)} if "Switch" in type(model).__name__ else {}
    )
    return model(input_ids=ids, **switch).logits


def _one_process(make, batches):
    model = make()
    logits = [_logits(model, ids) for ids in batches]
    (sum(each.square().mean() for each in logits) / len(logits)).backward()
    return model, logits


# A shared batch, spare slots, the form: every two of them meet in the half as well.
EVERY = list(itertools.product((1, 0), (0, 1), FORMS))
HALF = [EVERY[i] for i in (0, 3, 5, 6)]


def _like_one_process(rank, num_ranks, family, cases):
    make = _switch if family == "switch" else lambda: make_other(family)
    for shared, spare, form in cases:
        batches = [IDS] if shared else [IDS[:, r:] for r in range(num_ranks)]
        whole, logits = _one_process(make, batches)
        mine = 0 if shared else rank
        model = make()
        for stack in _stacks(model):
            placement = _placement(stack, num_ranks, spare)
            ours.parallelize(stack, placement, shared_batch=bool(shared), options=form)
        first, model = model, copy.deepcopy(model)
        for parameter in first.parameters():  # a copy has nothing of it
            parameter.data.fill_(torch.nan)
        told = _logits(model, batches[mine])
        torch.testing.assert_close(told, logits[mine], **CLOSE)
        told.square().mean().backward()
        if not shared:
            average_gradients(model)
        elif spare:
            continue  # replicas have parts of the gradient, which nobody adds up
        _has_the_gradients(model, whole, rank)
        model.zero_grad(set_to_none=True)
        _is_the_checkpoint(model, whole, batches[mine], logits[mine])


def _has_the_gradients(model, whole, rank):
    owned = {id(p) for p in expert_parameters(model).values()}
    gradients = {name: p.grad for name, p in whole.named_parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in owned:
            if gradients[name] is not None:
                _close(parameter.grad, gradients[name], name)
            continue
        block, _, part = name.rpartition(".experts.")
        exchange = vars(model.get_submodule(f"{block}.experts"))["moetuner_exchange"]
        for slot, expert in enumerate(exchange.tables.local_experts[0].tolist()):
            if expert < 0:
                continue
            wanted = gradients[_old_name(block, part, expert)]
            if wanted is None:  # nobody chose it
                assert not parameter.grad[slot].any()
                continue
            listed = wanted.dim() == 2
            _close(parameter.grad[slot], wanted if listed else wanted[expert], name)


def _old_name(block, part, expert):
    listed = {"up_proj": "wi", "down_proj": "wo"}
    if "block." in block:
        return f"{block}.experts.expert_{expert}.{listed[part]}.weight"
    own = {"gate_up_proj": "input_linear", "down_proj": "output_linear"}
    return f"{block}.{own[part]}.weight"


def _close(found, wanted, name):
    scale = wanted.abs().max().clamp(min=1e-6)
    torch.testing.assert_close(
        found / scale, wanted / scale, rtol=1e-3, atol=1e-4, msg=name
    )


def _is_the_checkpoint(model, whole, ids, logits):
    """By the family's own names; loaded again into weights that were lost."""
    wanted = whole.state_dict()
    with _whole(model):
        state = {name: value.clone() for name, value in model.state_dict().items()}
    assert state.keys() == wanted.keys()
    for name, value in state.items():
        assert torch.equal(value, wanted[name]), name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    with _whole(model):
        model.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(_logits(model, ids), logits, **CLOSE)
        for stack in _stacks(model):
            number = placed_layers(stack)[0].exchange.placement.topology.num_ranks
            apply_placement(stack, _placement(stack, number))
        torch.testing.assert_close(_logits(model, ids), logits, **CLOSE)


@contextlib.contextmanager
def _whole(model):
    with contextlib.ExitStack() as orders:
        for stack in _stacks(model):
            orders.enter_context(logical_order(stack, whole=True))
        yield


CASES = [pytest.param(HALF, id="half")]
CASES += [pytest.param(EVERY, id="every", marks=pytest.mark.slow)]


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("family", ["switch", "jetmoe"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_they_train_like_one_process(num_ranks, family, cases):
    run_on_ranks(num_ranks, _like_one_process, family, cases)


def _followed(rank, num_ranks):
    """Recordings of each stack, before and behind; predicted traffic is what went."""
    model = _switch()
    plain, counted = _recorded(model)
    for stack in _stacks(model):
        ours.parallelize(stack, _placement(stack, num_ranks), shared_batch=True)
    spread, again = _recorded(model)
    for before, behind in zip([*plain, *counted], [*spread, *again], strict=True):
        assert np.array_equal(before, behind)
    if VERSION >= (5, 24):  # 5.17 never drops any, whatever the capacity
        assert any((ids < 0).any() for ids in plain)
    assert any((ids >= 0).any() for ids in plain)
    for stack in _stacks(model):
        placement = _placement(stack, num_ranks)
        for placed in placed_layers(stack):
            placed.exchange.reset()
        with record_run(stack) as run, torch.no_grad():
            _logits(model, IDS)
        assert verify(run.trace(), placement, gather_counts(stack)) == []


def _recorded(model):
    traces, loads = [], []
    for stack in _stacks(model):
        with (
            ours.record(stack) as recording,
            ours.count(stack, max_tokens=IDS.numel()) as counter,
            torch.no_grad(),
        ):
            _logits(model, IDS)
        traces.append(recording.trace().topk_ids)
        loads.append(counter.statistics().load)
    return traces, loads


def test_lists_are_recorded_and_verified():
    run_on_ranks(2, _followed)


def _refused(rank, num_ranks):
    model = _switch()
    with pytest.raises(InvalidTraceError, match="call this on each of the two"):
        ours.experts_of(model)
    with pytest.raises(InvalidTraceError, match="call this on each of the two"):
        ours.parallelize(model, _placement(model.encoder, num_ranks))
    experts = next(iter(ours.experts_of(model.encoder).values()))
    experts["expert_1"].wi = torch.nn.Sequential(experts["expert_1"].wi)
    with pytest.raises(InvalidPlacementError, match=r"expert_1\.wi .* is Sequential"):
        ours.parallelize(model.encoder, _placement(model.encoder, num_ranks))


def test_what_cannot_be_stacked_is_refused():
    run_on_ranks(1, _refused)
