"""`record` and `count` in odd but real uses, against the routing of whole texts."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="Transformers is not there")

import moetuner.integrations.transformers as ours  # noqa: E402
from moetuner.errors import InvalidTraceError  # noqa: E402
from moetuner.trace.statistics import RoutingStatistics  # noqa: E402
from tiny_models import make_model  # noqa: E402

TEXTS = torch.randint(2, 64, (3, 9), generator=torch.Generator().manual_seed(2))
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def routing_of(model, text):
    """[T, K] ids of the last layer by falling weight, by a hook of our own."""
    seen = []
    experts = list(ours.experts_of(model).values())[-1]
    handle = experts.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([*args, *kwargs.values()][1:3]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(input_ids=text[None])
    handle.remove()
    ids, weights = seen[0]
    return ids.gather(1, weights.argsort(dim=1, descending=True, stable=True)).numpy()


def check(model, trace, texts, last=0):
    """Each text is one sequence with every position once, and its own routing."""
    assert len(set(trace.sequence.tolist())) == len(texts)
    for number, text in enumerate(texts):
        mine = trace.sequence == number
        wanted = routing_of(model, text)[: len(text) - last]
        assert trace.position[mine].tolist() == list(range(len(wanted)))
        assert np.array_equal(trace.topk_ids[mine, -1], wanted)


def cache_of(model):
    return transformers.DynamicCache(config=model.config)


def test_two_caches_in_turn():
    model = make_model("Olmoe")
    first, second = cache_of(model), cache_of(model)
    a, b = TEXTS[:1], TEXTS[1:2]
    with ours.record(model) as recording, torch.no_grad():
        for cache, text, start, end in (
            (first, a, 0, 3),
            (second, b, 0, 4),
            (first, a, 3, 5),
            (second, b, 4, 5),
            (first, a, 5, 9),
            (second, b, 5, 9),
        ):
            model(input_ids=text[:, start:end], **{CACHE: cache})
    check(model, recording.trace(), [a[0], b[0]])


def test_a_cache_that_the_model_makes():
    model = make_model("Olmoe")
    with ours.record(model) as recording, torch.no_grad():
        out = model(input_ids=TEXTS[:2, :4], use_cache=True)
        model(input_ids=TEXTS[:2, 4:], **{CACHE: out[CACHE]})
    check(model, recording.trace(), TEXTS[:2])


def other_model():
    draft = make_model("Olmoe")
    torch.manual_seed(8)
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return draft


def test_rejected_drafts_leave_no_trace():
    model = make_model("Olmoe")
    text = TEXTS[:1]
    options = {"attention_mask": torch.ones_like(text), **GREEDY}
    with ours.record(model) as recording:
        out = model.generate(input_ids=text, assistant_model=other_model(), **options)
        again = model.generate(input_ids=text, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(out, again)
    check(model, recording.trace(), [out[0], again[0]], last=1)


def test_a_cache_cut_short_by_hand_reads_on():
    model = make_model("Olmoe")
    cache = cache_of(model)
    with ours.record(model) as recording, torch.no_grad():
        model(input_ids=TEXTS[:1], **{CACHE: cache})
        cache.crop(-5)
        model(input_ids=TEXTS[1:2, 4:7], **{CACHE: cache})
    read = torch.cat([TEXTS[0, :4], TEXTS[1, 4:7]])
    check(model, recording.trace(), [read])


def test_beams_are_followed():
    """Rows of a cache change places; what was written stays where it belongs."""
    model = make_model("Olmoe")
    cache = cache_of(model)
    with ours.record(model) as recording, torch.no_grad():
        model(input_ids=TEXTS[:, :4], **{CACHE: cache})
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        model(input_ids=TEXTS[[2, 0, 1], 4:6], **{CACHE: cache})
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        model(input_ids=TEXTS[:, 6:], **{CACHE: cache})
    check(model, recording.trace(), TEXTS)


def test_a_beam_that_goes_on_twice_begins_a_second_sequence():
    model = make_model("Olmoe")
    cache = cache_of(model)
    text = torch.stack([TEXTS[0], torch.cat([TEXTS[0, :4], TEXTS[1, 4:]])])
    with ours.record(model) as recording, torch.no_grad():
        model(input_ids=TEXTS[:2, :4], **{CACHE: cache})
        cache.reorder_cache(torch.tensor([0, 0]))
        model(input_ids=text[:, 4:], **{CACHE: cache})
    trace = recording.trace()
    assert trace.sequence.tolist() == [0] * 9 + [1] * 4 + [2] * 5
    assert trace.position.tolist() == [*range(9), *range(4), *range(4, 9)]
    wanted = [routing_of(model, row) for row in text]
    assert np.array_equal(trace.topk_ids[:9, -1], wanted[0])
    assert np.array_equal(trace.topk_ids[13:, -1], wanted[1][4:])


def test_beam_search_counts_every_token_that_ran_once():
    model = make_model("Olmoe")
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)[1]["input_ids"].numel()),
        with_kwargs=True,
    )
    with ours.record(model) as recording:
        model.generate(input_ids=TEXTS[:2], num_beams=3, **GREEDY)
    handle.remove()
    trace = recording.trace()
    assert trace.num_tokens == sum(seen)
    for sequence in set(trace.sequence.tolist()):
        position = trace.position[trace.sequence == sequence]
        assert (np.diff(position) == 1).all()


@pytest.mark.parametrize("grown", [False, True])
def test_a_cache_that_is_not_known_begins_anew_and_says_so(grown):
    model = make_model("Olmoe")
    cache = cache_of(model)
    said = "grown outside" if grown else "from before the recording"
    with torch.no_grad():
        if not grown:
            model(input_ids=TEXTS[:1, :4], **{CACHE: cache})
        with ours.record(model) as recording:
            if grown:
                model(input_ids=TEXTS[:1, :2], **{CACHE: cache})
                for layer in cache.layers:
                    layer.keys = torch.cat([layer.keys, layer.keys], dim=2)
                    layer.values = torch.cat([layer.values, layer.values], dim=2)
            with pytest.warns(UserWarning, match=said):
                model(input_ids=TEXTS[:1, 4:6], **{CACHE: cache})
            model(input_ids=TEXTS[:1, 6:], **{CACHE: cache})
    trace = recording.trace()
    assert trace.sequence.tolist() == [0] * 2 * grown + [int(grown)] * 5
    assert trace.position.tolist() == [*range(2 * grown), *range(5)]


class Stop(Exception):
    pass


def test_calls_that_ended_badly_are_left_out():
    model = make_model("Olmoe")

    def stop(*_):
        raise Stop

    with (
        ours.record(model) as recording,
        ours.count(model, max_tokens=TEXTS.numel()) as counter,
        torch.no_grad(),
    ):
        model(input_ids=TEXTS[:1])
        handle = model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            model(input_ids=TEXTS[2:])
        handle.remove()
        model(input_ids=TEXTS[1:2])
        handle = model.model.layers[2].register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            model(input_ids=TEXTS[2:])
        handle.remove()
    trace = recording.trace()
    assert trace.num_tokens == 18
    for row, text in enumerate(TEXTS[:2]):
        mine = trace.topk_ids[9 * row : 9 * row + 9, -1]
        assert np.array_equal(mine, routing_of(model, text))
    told, wanted = counter.statistics(), RoutingStatistics.from_trace(trace)
    assert told.num_tokens == 18
    assert np.array_equal(told.load, wanted.load)
    assert np.array_equal(told.coactivation, wanted.coactivation)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_training_step_with_checkpointing_is_seen_once(reentrant):
    """Ids, and transitions from each layer to the next."""
    model = make_model("Olmoe").train()
    with ours.record(model) as recording, torch.no_grad():
        model(input_ids=TEXTS, use_cache=False)
    wanted = RoutingStatistics.from_trace(recording.trace())
    enable = getattr(
        model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": reentrant})
    with (
        ours.record(model) as recording,
        ours.count(model, max_tokens=TEXTS.numel()) as counter,
    ):
        model(input_ids=TEXTS, labels=TEXTS, use_cache=False).loss.backward()
    assert np.array_equal(
        RoutingStatistics.from_trace(recording.trace()).load, wanted.load
    )
    told = counter.statistics()
    assert told.num_tokens == TEXTS.numel()
    for name in ("load", "coactivation", "transitions"):
        assert np.array_equal(getattr(told, name), getattr(wanted, name)), name


def test_experts_that_run_unseen_are_named():
    model = make_model("Olmoe")
    with ours.record(model) as recording:
        pass
    with pytest.raises(
        InvalidTraceError, match=r"record: .* layers \[0, 1, 2\] did not"
    ):
        recording.trace()
    hidden = list(ours.experts_of(model).values())[1]
    model.model.layers[1].mlp.experts = torch.nn.Identity()
    model.model.layers[1].mlp.experts.forward = hidden.forward
    model.model.layers[1].register_module("hidden", hidden)  # not what runs
    with (
        pytest.raises(InvalidTraceError, match=r"count: .* layers \[1\] did not run"),
        ours.count(model, max_tokens=9),
        torch.no_grad(),
    ):
        model(input_ids=TEXTS[:1])
