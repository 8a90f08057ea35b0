"""Tiny random models of five families against Transformers' own eager experts."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="Transformers is not there")

import moetuner.integrations.transformers as ours  # noqa: E402
from moetuner.errors import InvalidTraceError  # noqa: E402
from tiny_models import FAMILIES, inputs, make_model  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_eager(family, device):
    model = make_model(family, device)
    results = []
    for implementation in ("eager", "moetuner"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        logits = model(**inputs(device)).logits
        logits.square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        results.append((logits, gradients))
    (logits, gradients), (ours_logits, ours_gradients) = results
    torch.testing.assert_close(ours_logits, logits, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(
                ours_gradients[name], gradient, rtol=1e-3, atol=1e-6
            )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_what_eager_generates(family, device):
    model = make_model(family, device)
    found = []
    for implementation in ("eager", "moetuner"):
        model.set_experts_implementation(implementation)
        found.append(
            model.generate(**inputs(device), max_new_tokens=8, do_sample=False)
        )
    assert torch.equal(*found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", ["eager", "moetuner"])
@pytest.mark.parametrize("family", FAMILIES)
def test_records_what_the_router_chose(family, implementation, device):
    """Against a hook of our own on the experts of one layer."""
    model = make_model(family, device)
    model.set_experts_implementation(implementation)
    layer, experts = list(ours.experts_of(model).items())[-1]
    seen = []
    handle = experts.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([*args, *kwargs.values()][1:]),
        with_kwargs=True,
    )
    with ours.record(model) as recording, torch.no_grad():
        model.generate(**inputs(device), max_new_tokens=4, do_sample=False)
    handle.remove()
    trace = recording.trace(dataset="made up")

    assert trace.num_experts == experts.num_experts
    assert trace.layer_ids.tolist() == sorted(ours.experts_of(model))
    assert layer == trace.layer_ids[-1]
    assert (trace.metadata.dataset, trace.ranked) == ("made up", True)
    # 7 and 4 tokens of prefill, then three that are decoded; the last is never fed in.
    assert trace.sequence.tolist() == [0] * 10 + [1] * 7
    assert trace.position.tolist() == [*range(10), *range(7)]
    assert trace.phase.tolist() == [0] * 7 + [1] * 3 + [0] * 4 + [1] * 3
    prefill, *decode = [[t.cpu() for t in step] for step in seen]
    wanted = torch.cat([prefill[0][:7], *[step[0][:1] for step in decode]])
    weights = torch.cat([prefill[1][:7], *[step[1][:1] for step in decode]])
    order = weights.argsort(dim=1, descending=True, stable=True)
    first = trace.topk_ids[:10, -1]
    assert np.array_equal(first, wanted.gather(1, order).numpy())
    padded = prefill[0][7:][3:]  # the second sequence without its padding
    assert set(map(frozenset, trace.topk_ids[10:14, -1].tolist())) == set(
        map(frozenset, padded.tolist())
    )


def test_hooks_are_gone_afterwards():
    model = make_model("Mixtral")
    with pytest.raises(RuntimeError, match="stop"), ours.record(model):
        raise RuntimeError("stop")
    assert not model._forward_pre_hooks
    for experts in ours.experts_of(model).values():
        assert not experts._forward_pre_hooks


def test_two_calls_are_other_sequences():
    model = make_model("Olmoe")
    with ours.record(model) as recording, torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
        model(torch.tensor([[8, 9]]))
    assert recording.trace().sequence.tolist() == [0, 0, 0, 1, 1]


def test_what_cannot_be_recorded_is_refused():
    nothing = ours.record(torch.nn.Linear(2, 2))
    with pytest.raises(InvalidTraceError, match="Linear has no experts"), nothing:
        pass
    with ours.record(make_model("Mixtral")) as recording:
        pass
    with pytest.raises(InvalidTraceError, match=r"layers \[0, 1, 2\] did not run"):
        recording.trace()


def test_a_recorded_trace_can_be_planned(tmp_path):
    from moetuner import PlanOptions, Topology, plan_trace, read_trace, write_trace

    model = make_model("Qwen3Moe")
    ids = torch.randint(1, 64, (20, 12), generator=torch.Generator().manual_seed(0))
    with ours.record(model) as recording, torch.no_grad():
        model(input_ids=ids)
    write_trace(recording.trace(), tmp_path / "routing.safetensors")
    trace = read_trace(tmp_path / "routing.safetensors")
    topology = Topology(num_ranks=4, ranks_per_node=2)
    report = plan_trace(trace, topology, PlanOptions(solver="lpt"))
    assert report.result.placement.num_experts == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_what_it_records(family):
    """Without padding, the statistics are those of the recorded trace."""
    from moetuner.trace.statistics import RoutingStatistics

    model = make_model(family)
    prompt = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    with ours.record(model) as recording, ours.count(model, max_tokens=14) as counter:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=4,
            do_sample=False,
        )
    told = counter.statistics()
    wanted = RoutingStatistics.from_trace(recording.trace())
    for name in ("num_tokens", "layer_ids", "load", "coactivation", "transitions"):
        assert np.array_equal(getattr(told, name), getattr(wanted, name)), name
    for experts in ours.experts_of(model).values():
        assert not experts._forward_pre_hooks
