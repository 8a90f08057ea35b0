"""A bandwidth for each pair of ranks: read, refused, and what follows from it."""

import dataclasses
import re
from pathlib import Path

import pytest
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.hardware import HARDWARE, NETWORKS, with_network
from moetuner.evaluation.hardware_file import read_hardware
from moetuner.evaluation.rates import Bandwidth
from moetuner.placement.topology import Topology

PAGE = Path(__file__).parents[2] / "docs/hardware.md"
EXAMPLE = re.search(r"^```toml\n(.*?)^```$", PAGE.read_text(), re.S | re.M)[1]
PAIRS = ((0, 8e9, 1e9, 1e9), (2e9, 0, 1e9, 3e9), (1e9, 1e9, 0, 4e9), (1e9, 1e9, 4e9, 0))


def without_links(path, pairs):
    """The example of the page for two nodes of two ranks, links left to `pairs`."""
    start = EXAMPLE.index("[pairs]")
    text = re.sub(r"^(egress|ingress) = .*\n", "", EXAMPLE[:start], flags=re.M)
    text = text.replace("ranks_per_node = 4", "ranks_per_node = 2")
    end = EXAMPLE.index("[[other_ranks]]")
    rest = EXAMPLE[EXAMPLE.index("[permutation]") : end]
    path.write_text(f"{text}[pairs]\nbandwidth = {pairs}\n\n{rest}")
    return path


def test_links_follow_from_pairs_where_a_file_leaves_them_out(tmp_path):
    rows = [list(row) for row in PAIRS]
    machine = read_hardware(without_links(tmp_path / "pairs.toml", rows))
    assert machine.pair_bandwidth == PAIRS
    # A rank of two has one neighbour; a card takes turns with four pairs.
    assert machine.inside.egress == pytest.approx((8e9, 2e9, 4e9, 4e9))
    assert machine.inside.ingress == pytest.approx((2e9, 8e9, 4e9, 4e9))
    assert machine.between(2).egress == pytest.approx((4 / (10 / 3e9), 1e9))
    assert machine.between(2).ingress == pytest.approx((1e9, 4 / (10 / 3e9)))
    cost = CostModel(hardware=machine)
    two = Topology(num_ranks=4, ranks_per_node=2)
    assert cost.pair_bandwidths(two).tolist() == rows
    assert cost.rates(two).rank_links.egress == pytest.approx([0.25, 1, 0.5, 0.5])


def test_pairs_that_are_alike_make_links_that_are(tmp_path):
    rows = [[0.0 if g == h else 7.3e9 for h in range(6)] for g in range(6)]
    path = without_links(tmp_path / "alike.toml", rows)
    path.write_text(path.read_text().replace("per_node = 2", "per_node = 3"))
    machine = read_hardware(path)
    assert set(machine.inside.egress + machine.inside.ingress) == {7.3e9}
    assert CostModel(hardware=machine).alike(Topology(num_ranks=6, ranks_per_node=3))


@pytest.mark.parametrize("key", ["inside", "between"])
def test_links_that_pairs_say_nothing_of_are_wanted(tmp_path, key):
    ranks = {"inside": 1, "between": 2}[key]
    path = without_links(tmp_path / "few.toml", [[0, 1e9], [1e9, 0]])
    text = path.read_text().replace("ranks_per_node = 2", f"ranks_per_node = {ranks}")
    path.write_text(text)
    with pytest.raises(InvalidProblemError, match=rf"{key}\.egress: is missing"):
        read_hardware(path)


@pytest.mark.parametrize(
    ("ranks", "per_node"), [(8, 4), (2, 2), (4, 4), (4, 1)], ids=str
)
def test_pairs_of_other_ranks_or_nodes_are_refused(ranks, per_node):
    machine = dataclasses.replace(
        HARDWARE["h100"], ranks_per_node=2, pair_bandwidth=PAIRS
    )
    topology = Topology(num_ranks=ranks, ranks_per_node=per_node)
    message = f"4 ranks in nodes of 2, the topology has {ranks} in nodes of {per_node}"
    with pytest.raises(InvalidProblemError, match=message):
        CostModel(hardware=machine).rates(topology)


def test_a_network_cannot_join_what_pairs_join():
    whole = dataclasses.replace(HARDWARE["h100"], pair_bandwidth=PAIRS)
    assert with_network(whole, NETWORKS["efa"]).network == "efa"  # one node
    two = dataclasses.replace(whole, ranks_per_node=2)
    with pytest.raises(InvalidProblemError, match="so efa cannot join them"):
        with_network(two, NETWORKS["efa"])


def test_a_file_cannot_name_a_network_beside_pairs_of_nodes(tmp_path):
    path = without_links(tmp_path / "both.toml", [list(row) for row in PAIRS])
    text = path.read_text()
    start = text.index("[between]")
    end = text.index("\n[", start)
    named = 'between = "efa"\n' + text[:start] + text[end:]
    path.write_text(named)
    message = r"between: wanted a table, or no \[pairs\]: .* so efa cannot"
    with pytest.raises(InvalidProblemError, match=message):
        read_hardware(path)
    # Pairs of one node say nothing of what joins it to others.
    path.write_text(named.replace("ranks_per_node = 2", "ranks_per_node = 4"))
    assert read_hardware(path).nic_bandwidth == NETWORKS["efa"].bandwidth


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1], [1]], "pair_bandwidth must be square: row 1 has 1"),
        ([[0, 1], [1, 2]], "got 2 for rank 1"),
        ([[0, float("nan")], [1, 0]], "got nan from rank 0 to rank 1"),
        ([[0, -1.0], [1, 0]], "positive and finite, got -1.0"),
        (5, "pair_bandwidth must be a list of rows, .* got 5"),
        ([1.0, 2.0], r"must be a list of rows, .* got \[1.0, 2.0\]"),
    ],
)
def test_what_is_no_bandwidth_of_pairs_is_refused(rows, message):
    with pytest.raises(InvalidProblemError, match=message):
        dataclasses.replace(HARDWARE["h100"], pair_bandwidth=rows)


def test_a_file_whose_pairs_say_nothing_is_refused(tmp_path):
    path = without_links(tmp_path / "none.toml", [])
    with pytest.raises(InvalidProblemError, match=r"pairs\.bandwidth: .* got \["):
        read_hardware(path)


def test_links_from_rank_to_rank_are_as_slow_as_their_slower_end():
    machine = dataclasses.replace(
        HARDWARE["h100"],
        rank_bandwidth=Bandwidth(egress=(8.0, 2.0), ingress=(4.0,)),
        nic_bandwidth=Bandwidth(egress=(1.0,), ingress=(1.0, 0.5)),
    )
    topology = Topology(num_ranks=4, ranks_per_node=2)
    found = CostModel(hardware=machine).pair_bandwidths(topology)
    wanted = [[4, 4, 0.5, 0.5], [2, 2, 0.5, 0.5], [1, 1, 4, 4], [1, 1, 2, 2]]
    assert found.tolist() == wanted
