"""Transformers models whose experts are spread over Gloo ranks, against eager ones."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="Transformers is not there")

import moetuner.integrations.transformers as ours  # noqa: E402
import torch.distributed as dist  # noqa: E402
from moetuner.errors import (  # noqa: E402
    InvalidPlacementError,
    InvalidProblemError,
    InvalidTraceError,
)
from moetuner.evaluation.verify import verify  # noqa: E402
from moetuner.nn import (  # noqa: E402
    ExchangeOptions,
    apply_placement,
    contiguous_placement,
    gather_counts,
    logical_order,
    record_run,
)
from moetuner.placement.model import Placement, contiguous_rank_of  # noqa: E402
from moetuner.placement.topology import Topology  # noqa: E402
from moetuner.planning.options import PlanOptions  # noqa: E402
from moetuner.planning.plan import plan_trace  # noqa: E402
from ranks import run_on_ranks  # noqa: E402
from tiny_models import FAMILIES, inputs, make_model  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _placements(model, num_ranks):
    """Contiguous; planned from a recording; the plan with a replica on each rank."""
    ids = torch.randint(1, 64, (16, 12), generator=torch.Generator().manual_seed(0))
    with ours.record(model) as recording, torch.no_grad():
        model(input_ids=ids)
    trace = recording.trace()
    topology = Topology(num_ranks=num_ranks, ranks_per_node=max(num_ranks // 2, 1))
    shape = (trace.num_layers, trace.num_experts, num_ranks)
    contiguous = Placement.from_rank_of(
        contiguous_rank_of(*shape), layer_ids=trace.layer_ids, topology=topology
    )
    tuned = plan_trace(trace, topology, PlanOptions(solver="lpt")).result.placement
    width = tuned.slots_per_rank
    slots = np.full((trace.num_layers, num_ranks, width + 1), -1, np.int32)
    slots[..., :width] = tuned.slot_experts.reshape(trace.num_layers, num_ranks, width)
    rng = np.random.default_rng(0)
    for layer, rank in np.ndindex(trace.num_layers, num_ranks):
        others = np.setdiff1d(np.arange(trace.num_experts), slots[layer, rank])
        if others.size:
            slots[layer, rank, -1] = rng.choice(others)
    replicated = Placement(
        slot_experts=slots.reshape(trace.num_layers, -1),
        layer_ids=trace.layer_ids,
        num_experts=trace.num_experts,
        topology=topology,
    )
    return {"contiguous": contiguous, "tuned": tuned, "replicated": replicated}


def _own_batch(rank):
    """Other tokens, and another number of them, on every rank."""
    rng = torch.Generator().manual_seed(rank)
    return {"input_ids": torch.randint(1, 64, (1 + rank, 5), generator=rng)}


def _equal_eager(rank, num_ranks):
    for family in FAMILIES:
        eager = make_model(family)
        placements = _placements(eager, num_ranks)
        with torch.no_grad():
            logits = eager(**inputs()).logits
            mine = eager(**_own_batch(rank)).logits
        wanted = eager.generate(**inputs(), max_new_tokens=3, do_sample=False)
        for kind, placement in placements.items():
            model = make_model(family)
            ours.parallelize(model, placement, shared_batch=True)
            with record_run(model) as run, torch.no_grad():
                torch.testing.assert_close(model(**inputs()).logits, logits, **CLOSE)
                done = model.generate(**inputs(), max_new_tokens=3, do_sample=False)
            assert torch.equal(done, wanted), (family, kind)
            assert verify(run.trace(), placement, gather_counts(model)) == []
            model = make_model(family)
            ours.parallelize(model, placement)
            with torch.no_grad():
                told = model(**_own_batch(rank)).logits
            torch.testing.assert_close(told, mine, **CLOSE)
        _moves_and_comes_back(family, placements, model, rank, mine)
        _has_gradients(family, placements["tuned"], rank, num_ranks)


def _moves_and_comes_back(family, placements, model, rank, mine):
    """From the last placement to others, and to a whole checkpoint."""
    whole = dict(make_model(family).named_parameters())
    for placement in placements.values():
        apply_placement(model, placement)
        with torch.no_grad():
            told = model(**_own_batch(rank)).logits
        torch.testing.assert_close(told, mine, **CLOSE)
        with logical_order(model, whole=True):
            for name, value in model.state_dict().items():
                if name in whole:
                    assert torch.equal(value, whole[name]), (family, name)
    with torch.no_grad():
        torch.testing.assert_close(model(**_own_batch(rank)).logits, mine, **CLOSE)


def _has_gradients(family, placement, rank, num_ranks):
    """Of what every rank has whole, for a batch that all share."""
    gradients = []
    for options in (None, ExchangeOptions(), ExchangeOptions(overlap=True)):
        model = make_model(family)
        if options:
            ours.parallelize(model, placement, shared_batch=True, options=options)
        model(**inputs()).logits.square().mean().backward()
        gradients.append(
            {n: p.grad for n, p in model.named_parameters() if ".experts." not in n}
        )
    for name, gradient in gradients[0].items():
        for found in gradients[1:] if gradient is not None else []:
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("num_ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_spread_models_equal_eager_ones(num_ranks):
    run_on_ranks(num_ranks, _equal_eager)


def _refused(rank, num_ranks):
    model = make_model("Mixtral")
    tuned = _placements(model, num_ranks)["tuned"]
    fewer = Placement(
        slot_experts=tuned.slot_experts[:2],
        layer_ids=tuned.layer_ids[:2],
        num_experts=tuned.num_experts,
        topology=tuned.topology,
    )
    with pytest.raises(InvalidTraceError, match=r"^Linear has no experts module"):
        ours.parallelize(torch.nn.Linear(2, 2), tuned)
    with pytest.raises(InvalidPlacementError, match=r"another model.*layers \[0, 1\]"):
        ours.parallelize(model, fewer)
    other = _placements(make_model("Olmoe"), num_ranks)["tuned"]
    with pytest.raises(InvalidPlacementError, match="has 8 experts, the model has 6"):
        ours.parallelize(model, other)
    with pytest.raises(InvalidProblemError, match="residency must be home"):
        ours.parallelize(model, tuned, options=ExchangeOptions(residency="follow"))
    with pytest.raises(InvalidPlacementError, match="has no layer whose experts"):
        apply_placement(model, tuned)
    ours.parallelize(model, tuned)
    with pytest.raises(InvalidProblemError, match="spread over ranks already"):
        ours.parallelize(model, _placements(model, num_ranks)["contiguous"])


def test_what_does_not_fit_is_refused():
    run_on_ranks(2, _refused)


VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


def _config(num_ranks, shared):
    from transformers.distributed import DistributedConfig

    if VERSION >= (5, 23):
        sizes = {"tp_size" if shared else "fsdp_size": num_ranks}
        return DistributedConfig(
            **sizes, ep_size=num_ranks, ep_implementation="moetuner"
        )
    experts = "model.layers.*.mlp.experts"
    plan = {
        f"{experts}.gate_up_proj": "grouped_gemm",
        f"{experts}.down_proj": "grouped_gemm",
        experts: "moetuner_experts",
    }
    return DistributedConfig(tp_size=num_ranks, tp_plan=plan)


def _sharded_by_transformers(rank, num_ranks, folder):
    """Loaded with its own expert parallelism, run on our exchange, then placed."""
    for family in ("Qwen3Moe", "Olmoe"):
        eager = make_model(family)
        placements = _placements(eager, num_ranks)
        where = f"{folder}/{family}"
        if rank == 0:
            eager.save_pretrained(where)
        dist.barrier()
        with torch.no_grad():
            shared_logits = eager(**inputs()).logits
            own_logits = eager(**_own_batch(rank)).logits
        for shared in (True, False) if VERSION >= (5, 23) else (True,):
            kind = getattr(transformers, f"{family}ForCausalLM")
            model = kind.from_pretrained(
                where, distributed_config=_config(num_ranks, shared)
            ).eval()
            batch, wanted = (
                (inputs(), shared_logits) if shared else (_own_batch(rank), own_logits)
            )

            def check(model=model, batch=batch, wanted=wanted):
                with torch.no_grad():
                    told = model(**batch).logits
                told = told.full_tensor() if hasattr(told, "full_tensor") else told
                torch.testing.assert_close(told, wanted, **CLOSE)

            check()
            more = contiguous_placement(9, eager.config.num_experts, num_ranks)
            with pytest.raises(InvalidPlacementError, match="another model: it has la"):
                ours.parallelize(model, more)
            ours.parallelize(model, placements["tuned"])
            check()
            with pytest.raises(InvalidProblemError, match="spread over ranks already"):
                ours.parallelize(model, placements["contiguous"])
            with pytest.raises(InvalidPlacementError, match="for replicas, load"):
                apply_placement(model, placements["replicated"])
            apply_placement(model, placements["contiguous"])
            check()


@pytest.mark.parametrize("num_ranks", [2])
def test_models_that_transformers_spread_run_on_our_exchange(num_ranks, tmp_path):
    pytest.importorskip("accelerate", reason="loading needs accelerate")
    run_on_ranks(num_ranks, _sharded_by_transformers, str(tmp_path))


def _output(model, ids):
    out = model(input_ids=ids)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def _unmarked_family(rank, num_ranks, family):
    """Experts as Transformers' interface has them, though not marked for it.

    `test_stacked_experts` has those that lie otherwise.
    """
    from other_families import IDS, make_other

    eager = make_other(family)
    layers = sorted(ours.experts_of(eager))
    plain = contiguous_placement(len(layers), 6, num_ranks)
    placement = Placement(
        slot_experts=plain.slot_experts[:, ::-1].copy(),
        layer_ids=np.array(layers, np.int32),
        num_experts=6,
        topology=plain.topology,
    )
    _output(eager, IDS).square().mean().backward()
    whole = dict(eager.named_parameters())
    for shared, ids in ((True, IDS), (False, IDS[:, rank:])):
        model = make_other(family)
        ours.parallelize(model, placement, shared_batch=shared)
        first, model = model, copy.deepcopy(model)
        for parameter in first.parameters():  # a copy has nothing of it
            parameter.data.fill_(torch.nan)
        with record_run(model) as run, ours.record(model) as recording:
            told = _output(model, ids)
        with torch.no_grad():
            torch.testing.assert_close(told, _output(eager, ids), **CLOSE)
        assert verify(run.trace(), placement, gather_counts(model)) == []
        assert recording.trace().num_tokens == ids.numel()
        if shared:
            told.square().mean().backward()
            _has_the_gradients(model, whole, placement, rank)
            model.zero_grad(set_to_none=True)
        with logical_order(model, whole=True):
            for name, value in model.named_parameters():
                assert torch.equal(value, whole[name]), name


def _has_the_gradients(model, whole, placement, rank):
    """Those of one process; of experts, those of this rank's slots."""
    from moetuner.nn import expert_parameters

    owned, width = expert_parameters(model), placement.slots_per_rank
    for name, parameter in model.named_parameters():
        wanted = whole[name].grad
        if wanted is None:
            continue
        if name in owned:
            layer = int(name.split("layers.")[1].split(".")[0])
            row = placement.layer_ids.tolist().index(layer)
            wanted = wanted[placement.slot_experts[row, rank * width :][:width]]
        scale = whole[name].grad.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(
            parameter.grad / scale, wanted / scale, rtol=1e-3, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("family", sorted({*ours.ONLY_SPREAD} - {"jetmoe"}))
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_unmarked_families_are_spread_too(num_ranks, family):
    run_on_ranks(num_ranks, _unmarked_family, family)
