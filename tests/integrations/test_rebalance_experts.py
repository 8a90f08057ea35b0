"""The drop-in for EPLB: its signature, its return, never less balanced, few moves."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidProblemError
from moetuner.integrations.eplb import EplbPolicy, rebalance_experts

# The example of the published README: 2 layers, 16 slots, 4 groups, 2 nodes, 8 GPUs.
EXAMPLE = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
PUBLISHED = np.array(
    [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
)


def greedy_pack(weights, packs):
    """Published packing, written out: the heaviest item to the lightest open pack."""
    if len(weights) == packs:
        return list(range(packs))
    found, sums, sizes = [0] * len(weights), [0.0] * packs, [0] * packs
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        is_open = [p for p in range(packs) if sizes[p] < len(weights) // packs]
        found[item] = min(is_open, key=sums.__getitem__)
        sums[found[item]] += weights[item]
        sizes[found[item]] += 1
    return found


def published(load, num_slots, groups, nodes, ranks):
    """Load of the fullest rank of one layer under the published algorithm."""
    if groups % nodes:
        groups = nodes = 1
    size, heaviest = len(load) // groups, 0.0
    sums = load.reshape(groups, size).sum(axis=1)
    node_of = greedy_pack(sums.tolist(), nodes)
    for node in range(nodes):
        mine = [g * size + i for g in range(groups) if node_of[g] == node
                for i in range(size)]  # fmt: skip
        count = dict.fromkeys(mine, 1)
        for _ in range(num_slots // nodes - len(mine)):
            count[max(mine, key=lambda e: load[e] / count[e])] += 1
        items = [e for e in mine for _ in range(count[e])]
        each = [load[e] / count[e] for e in items]
        packs = np.zeros(ranks // nodes)
        np.add.at(packs, greedy_pack(each, ranks // nodes), each)
        heaviest = max(heaviest, packs.max())
    return heaviest


def fullest(slots, load, ranks):
    count = np.bincount(slots, minlength=len(load))
    return (load / count)[slots].reshape(ranks, -1).sum(axis=1).max()


@st.composite
def problems(draw):
    nodes = draw(st.sampled_from([1, 2, 4]))
    ranks = nodes * draw(st.integers(1, 4))
    groups = draw(st.sampled_from([nodes, 2 * nodes, 3]))
    experts = groups * draw(st.integers(1, 6))
    slots = ranks * (-(-experts // ranks) + draw(st.integers(0, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    layers = draw(st.integers(1, 3))
    loads = draw(st.sampled_from(["even", "skewed", "zeros", "real"]))
    if loads == "skewed":
        load = rng.zipf(1.5, (layers, experts)).clip(max=10**6)
    elif loads == "real":
        load = rng.random((layers, experts))
    else:
        load = rng.integers(0, 300, (layers, experts)) * (loads == "even")
    return load.astype(float), slots, groups, nodes, ranks


def test_the_published_example(rng):
    slots, of_experts, count = rebalance_experts(EXAMPLE, 16, 4, 2, 8)
    for ours, theirs, load in zip(slots, PUBLISHED, EXAMPLE, strict=True):
        assert fullest(ours, load, 8) <= fullest(theirs, load, 8)
        assert fullest(theirs, load, 8) == pytest.approx(published(load, 16, 4, 2, 8))
        groups = ours.reshape(2, 8) // 3  # a group of three experts stays on a node
        assert not set(groups[0]) & set(groups[1])
    assert slots.dtype == of_experts.dtype == count.dtype == np.int64
    assert count.tolist() == [np.bincount(row, minlength=12).tolist() for row in slots]


@given(problems())
def test_it_is_never_less_balanced_than_the_published_greedy(problem):
    load, num_slots, groups, nodes, ranks = problem
    if groups % nodes == 0 and num_slots // nodes < load.shape[1] // nodes:
        return
    slots, of_experts, count = rebalance_experts(load, num_slots, groups, nodes, ranks)
    assert slots.shape == (len(load), num_slots)
    for layer, row in enumerate(slots):
        wanted = published(load[layer], num_slots, groups, nodes, ranks)
        assert fullest(row, load[layer], ranks) <= wanted * (1 + 1e-6) + 1e-12
        for expert, places in enumerate(of_experts[layer]):
            found = places[places >= 0]
            assert found.tolist() == np.flatnonzero(row == expert).tolist()
            assert len(found) == count[layer, expert] >= 1


def test_tensors_come_back_as_tensors():
    torch = pytest.importorskip("torch")
    for kind in (torch.int32, torch.float32, torch.bfloat16):
        result = rebalance_experts(torch.tensor(EXAMPLE).to(kind), 16, 4, 2, 8)
        assert all(table.dtype == torch.int64 for table in result)
        assert result.physical_to_logical_map.shape == (2, 16)
    slots = EplbPolicy.rebalance_experts(torch.tensor(EXAMPLE), 16, 4, 2, 8)
    assert np.array_equal(slots, rebalance_experts(EXAMPLE, 16, 4, 2, 8)[0])


def test_numpy_needs_no_torch():
    code = (
        "import sys, numpy as np; from moetuner.integrations.eplb import "
        "rebalance_experts; rebalance_experts(np.ones((1, 4)), 4, 1, 1, 2); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def moved(new, old, ranks):
    """(rank, expert) pairs that were not there before."""
    pairs = [
        {(layer, slot * ranks // new.shape[1], e) for layer, row in enumerate(table)
         for slot, e in enumerate(row)}
        for table in (new, old)
    ]  # fmt: skip
    return len(pairs[0] - pairs[1])


@pytest.mark.parametrize(("groups", "nodes"), [(8, 4), (1, 1)])
def test_told_the_map_in_use_it_moves_less_for_the_same_balance(rng, groups, nodes):
    load = rng.zipf(1.4, (4, 64)).clip(max=10**4).astype(float)
    old = rebalance_experts(load, 80, groups, nodes, 16)[0]
    again = rebalance_experts(load, 80, groups, nodes, 16, old)[0]
    assert np.array_equal(again, old)
    later = load * rng.uniform(0.8, 1.25, load.shape)
    free = rebalance_experts(later, 80, groups, nodes, 16)[0]
    near = rebalance_experts(later, 80, groups, nodes, 16, old)[0]
    assert moved(near, old, 16) < moved(free, old, 16)
    for layer in range(4):
        best = fullest(free[layer], later[layer], 16)
        assert fullest(near[layer], later[layer], 16) <= best * (1 + 1e-9)
    # what stays on a rank stays in its slot
    for new_row, old_row in zip(near.reshape(-1, 5), old.reshape(-1, 5), strict=True):
        stays = [e for e in set(new_row) if (old_row == e).sum() == 1]
        for expert in stays:
            if (new_row == expert).sum() == 1:
                assert np.argmax(new_row == expert) == np.argmax(old_row == expert)


def test_a_map_with_empty_slots_is_no_reason_to_stop():
    old = rebalance_experts(EXAMPLE, 16, 4, 2, 8)[0]
    old[0, 3] = -1
    new = rebalance_experts(EXAMPLE, 16, 4, 2, 8, old)[0]
    assert new.min() >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((EXAMPLE[0], 16, 4, 2, 8), r"numbers \[layers, experts\]"),
        ((EXAMPLE * -1, 16, 4, 2, 8), "finite and >= 0"),
        ((EXAMPLE * np.nan, 16, 4, 2, 8), "finite and >= 0"),
        ((EXAMPLE, 8, 4, 2, 8), "num_replicas must be >= 12"),
        ((EXAMPLE, 18, 4, 2, 8), "num_replicas must be a multiple of num_gpus"),
        ((EXAMPLE, 15, 4, 2, 5), "num_gpus must be a multiple of num_nodes"),
        ((EXAMPLE, 16, 5, 1, 8), "multiple of num_groups, got 12 and 5"),
        ((EXAMPLE, 16, 0, 2, 8), "num_groups must be >= 1"),
        (
            (EXAMPLE, 16, 4, 2, 8, PUBLISHED[:1]),
            "old_global_expert_indices must be int",
        ),
        ((EXAMPLE, 16, 4, 2, 8, PUBLISHED + 9), "must be -1..11"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(InvalidProblemError, match=message):
        rebalance_experts(*arguments)


def test_groups_that_no_nodes_share_say_nothing_about_ranks_or_experts():
    """The published one looks at neither then: 3 nodes of 8 ranks, 5 groups of 12."""
    ours = rebalance_experts(EXAMPLE, 16, 5, 3, 8)
    alone = rebalance_experts(EXAMPLE, 16, 1, 1, 8)
    assert np.array_equal(ours.physical_to_logical_map, alone.physical_to_logical_map)


def test_numbers_that_are_no_whole_ones_and_tensors_without_data_are_named():
    with pytest.raises(InvalidProblemError, match="num_replicas must be >= 1 and whol"):
        rebalance_experts(EXAMPLE, 16.0, 4, 2, 8)
    torch = pytest.importorskip("torch")
    with pytest.raises(InvalidProblemError, match="on the meta device"):
        rebalance_experts(torch.ones(2, 12, device="meta"), 16, 4, 2, 8)
