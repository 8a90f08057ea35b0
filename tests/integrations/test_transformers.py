"""Tiny random models of five families against Transformers' own eager experts."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="Transformers is not there")

import moetuner.integrations.transformers as ours  # noqa: E402
from moetuner.errors import InvalidTraceError  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 6},
    "Qwen3Moe": {
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "head_dim": 8,
    },
    "Olmoe": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 4},
    "DeepseekV3": {
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "GptOss": {
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "layer_types": ["full_attention"] * 3,
    },
}


def make_model(family, device="cpu"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family]))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():  # biases and norms too
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(device).eval()


def inputs(device="cpu"):
    """Two sequences; the second is shorter and padded on the left."""
    ids = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


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
    layer, experts = list(ours._experts_of(model).items())[-1]
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
    assert trace.layer_ids.tolist() == sorted(ours._experts_of(model))
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
    for experts in ours._experts_of(model).values():
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
    with pytest.raises(InvalidTraceError, match="no layer was recorded"):
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
