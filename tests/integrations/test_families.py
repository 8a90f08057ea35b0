"""Families that do not mark their experts: followed, run, or named in a table."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="Transformers is not there")

from pathlib import Path  # noqa: E402

import moetuner.integrations.transformers as ours  # noqa: E402
from moetuner.errors import InvalidTraceError  # noqa: E402
from other_families import IDS, make_other  # noqa: E402

MODELS = Path(transformers.__file__).parent / "models"
DOCS = Path(__file__).parents[2] / "docs" / "transformers.md"


def router_of(model):
    """The last layer's router, and how it tells logits [T, E]."""
    kinds = {
        "Llama4Router": lambda out: out[1],
        "JetMoeTopKGating": lambda out: out[-1],
        "DbrxRouter": lambda out: out,
        "LongcatFlashTopkRouter": lambda out: out[0],
        "Step3p7TopKRouter": lambda out: out[0],
    }
    routers = [
        module
        for name, module in model.named_modules()
        if type(module).__name__ in kinds and "attention" not in name
    ]
    router = routers[-1]
    return router, kinds[type(router).__name__]


@pytest.mark.parametrize("family", [*ours.ONLY_RECORDED, *ours.ONLY_SPREAD])
def test_what_is_recorded_is_what_the_router_chose(family):
    """The largest of its logits; weights fall; `count` sees the same."""
    model, seen = make_other(family), []
    router, logits_of = router_of(model)
    handle = router.register_forward_hook(
        lambda _, __, out: seen.append(logits_of(out))
    )
    with (
        ours.record(model) as recording,
        ours.count(model, max_tokens=IDS.numel()) as counter,
        torch.no_grad(),
    ):
        model(input_ids=IDS)
    handle.remove()
    trace = recording.trace()
    assert trace.num_tokens == IDS.numel()
    assert trace.position.tolist() == list(range(5)) * 2
    top_k = trace.topk_ids.shape[2]
    wanted = seen[0].view(IDS.numel(), -1).topk(top_k, dim=-1).indices
    ids = torch.from_numpy(trace.topk_ids[:, -1].astype(np.int64))
    wanted = wanted.masked_fill(wanted >= trace.num_experts, -1)  # the token itself
    assert torch.equal(ids.sort(dim=1).values, wanted.sort(dim=1).values)
    load = np.bincount(ids[ids >= 0], minlength=trace.num_experts)
    assert np.array_equal(counter.statistics().load[-1], load)


@pytest.mark.parametrize("family", ours.NOT_COVERED)
def test_what_is_not_covered_says_why(family):
    model, why = make_other(family), ours.NOT_COVERED[family]
    for use in (ours.record(model), ours.count(model, max_tokens=9)):
        with pytest.raises(InvalidTraceError, match=f"is not covered: {why}"), use:
            pass


def test_two_experts_of_nllb_are_all_that_run():
    """Whatever the others hold: so there is nothing to place."""
    model = make_other("nllb_moe")

    def logits():
        with torch.no_grad():
            return model(input_ids=IDS, decoder_input_ids=IDS).logits

    wanted, lost = logits(), 0
    for name, parameter in model.named_parameters():
        if "experts.expert_" in name and name.split("expert_")[1][0] not in "01":
            parameter.data.fill_(torch.nan)
            lost += 1
    assert lost == 2 * 2 * 4  # experts 2 and 3 of each stack
    assert torch.equal(logits(), wanted)


@pytest.mark.parametrize("family", ours.NOT_COVERED | ours.ONLY_RECORDED)
def test_what_cannot_be_spread_says_why(family):
    from moetuner.nn import contiguous_placement

    why = (ours.NOT_COVERED | ours.ONLY_RECORDED)[family]
    with pytest.raises(InvalidTraceError, match=f"is not covered: {why}"):
        ours.parallelize(make_other(family), contiguous_placement(2, 6, 1))


def test_routing_cannot_be_given_to_experts_without_ids():
    from moetuner.nn import GivenRouting

    ids = torch.zeros(IDS.numel(), 2, dtype=torch.int64)
    given = {0: GivenRouting(topk_ids=ids, topk_weights=torch.ones(ids.shape))}
    replay = ours.replay_routing(make_other("llama4"), given)
    with (
        pytest.raises(InvalidTraceError, match=r"layers \[0\] are Llama4TextExperts"),
        replay,
    ):
        pass


def families_with_experts():
    """Of this Transformers: with the experts interface, and others."""
    marked, others = set(), set()
    for file in MODELS.glob("*/modeling_*.py"):
        text = file.read_text()
        if "@use_experts_implementation" in text:
            marked.add(file.parent.name)
        elif "num_experts_per_tok" in text or "num_experts" in text:
            others.add(file.parent.name)
    return marked, others


def test_the_tables_are_complete_and_in_the_documentation():
    """Every family with experts is marked for the interface, or one that we know."""
    marked, others = families_with_experts()
    known = {*ours.NOT_COVERED, *ours.ONLY_RECORDED, *ours.ONLY_SPREAD, *ours.BY_STACK}
    assert not known & marked, "now marked: leave it to the interface"
    nothing_routed = {"bamba", "vitpose_backbone"}  # they know the word alone
    assert others - marked == known | nothing_routed
    page = DOCS.read_text()
    assert marked >= ours.ONLY_RUN.keys()
    every = ours.NOT_COVERED | ours.ONLY_RECORDED | ours.ONLY_RUN | ours.ONLY_SPREAD
    every |= ours.BY_STACK
    for family, why in every.items():
        assert f"| {family} |" in page
        assert why in page
