"""What recording costs a model: none, a trace of every token, statistics alone.

One forward pass of an OLMoE of random weights and few layers, experts on our ops.
"""

import contextlib

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="Transformers is not there")

import shapes  # noqa: E402
from moetuner.integrations.transformers import count, record  # noqa: E402
from moetuner.nn import Recorder, RoutingCounter  # noqa: E402

ON_GPU = shapes.DEVICE != "cpu"
TOKENS = {"decode": (32, 1), "prefill": (4, 1024 if ON_GPU else 32)}
MODES = ("none", "trace", "loads", "statistics")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=1024,
        hidden_size=2048 if ON_GPU else 128,
        intermediate_size=1024 if ON_GPU else 64,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
    )
    model = transformers.OlmoeForCausalLM(config).to(shapes.DEVICE)
    model.set_experts_implementation("moetuner")
    return (model.bfloat16() if ON_GPU else model).eval()


def recorder(model, mode, num_tokens):
    if mode == "none":
        return contextlib.nullcontext()
    if mode == "trace":
        return record(model)
    return count(model, max_tokens=num_tokens, pairs=mode == "statistics")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("phase", TOKENS)
def bench_recorder(benchmark, model, phase, mode):
    sequences, length = TOKENS[phase]
    ids = torch.randint(0, 1024, (sequences, length), device=shapes.DEVICE)
    benchmark.group = f"recorder: {phase}, {sequences} x {length} tokens"
    benchmark.extra_info |= {"mode": mode, "phase": phase, "device": shapes.DEVICE}

    def run():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        if ON_GPU:
            torch.cuda.synchronize()

    with torch.no_grad(), recorder(model, mode, sequences * length):
        benchmark.pedantic(run, rounds=20, warmup_rounds=3)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("num_tokens", [32, 2048])
def bench_recorder_alone(benchmark, num_tokens, mode):
    """What a call of the model spends on recording: 4 layers, 8 of 64 experts."""
    ids = torch.rand(num_tokens, 64, device=shapes.DEVICE).topk(8).indices
    weights = torch.rand(num_tokens, 8, device=shapes.DEVICE)
    counter = RoutingCounter(
        range(4),
        64,
        max_tokens=num_tokens,
        top_k=8,
        device=shapes.DEVICE,
        pairs=mode == "statistics",
    )
    zeros = np.zeros(num_tokens, np.int32)
    benchmark.group = f"recorder alone: {num_tokens} tokens, 4 layers"

    def run():
        if mode == "trace":
            recorder = Recorder(64)
            recorder.begin_step(zeros, zeros, zeros.astype(np.uint8), zeros == 0)
        for layer in range(4):
            if mode == "trace":
                recorder.add(layer, ids, weights)
            else:
                counter.add(layer, ids)
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=300, warmup_rounds=20)
