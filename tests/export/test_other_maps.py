"""Maps as tensors and arrays, one map for all layers, and DeepEP's replicas."""

from dataclasses import replace

import numpy as np
import pytest
from moetuner.errors import InvalidPlacementError
from moetuner.evaluation.replica_rule import ReplicaRule
from moetuner.export import (
    Engine,
    ExportOptions,
    ReadOptions,
    export_placement,
    read_engine_placement,
)
from moetuner.export.replica_rules import other_rule_note, rules_of
from moetuner.placement.model import Placement, Provenance
from moetuner.placement.topology import Topology
from safetensors.numpy import load_file

SLOTS = [[1, 0, 2, 3], [3, 2, 0, 1]]
TWO = ReadOptions(num_ranks=2)


def placement(slots, ranks=2, ranks_per_node=2, experts=4, first=0):
    slots = np.array(slots, np.int32)
    return Placement(
        slot_experts=slots,
        layer_ids=np.arange(first, first + len(slots), dtype=np.int32),
        num_experts=experts,
        topology=Topology(num_ranks=ranks, ranks_per_node=ranks_per_node),
    )


def test_the_start_map_is_what_torch_saves(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "map.pt"
    exported = export_placement(placement(SLOTS), path, Engine.VLLM_START_MAP)
    read = torch.load(path, weights_only=True)
    assert read.dtype == torch.int64
    assert read.tolist() == SLOTS
    assert '{"init_placement_path": ' in exported.command
    assert read_engine_placement(path, options=TWO).slot_experts.tolist() == SLOTS
    torch.save(torch.tensor(SLOTS, dtype=torch.int32), path)
    assert read_engine_placement(path, options=TWO).slot_experts.tolist() == SLOTS
    torch.save([1, 2], path)
    with pytest.raises(InvalidPlacementError, match="wanted one tensor"):
        read_engine_placement(path, options=TWO)


def test_sglang_maps_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "map.pt"
    torch.save({"physical_to_logical_map": torch.tensor(SLOTS)}, path)
    read = read_engine_placement(path, options=TWO)
    assert read.slot_experts.tolist() == SLOTS
    assert read.provenance.solver == "sglang file"
    torch.save({"physical_to_logical_map": torch.tensor(SLOTS), "x": 1}, path)
    with pytest.raises(InvalidPlacementError, match="wanted the one key"):
        read_engine_placement(path, options=TWO)


def test_eplb_maps_of_numpy(tmp_path):
    np.save(tmp_path / "phy2log.npy", np.array(SLOTS, np.int32))
    read = read_engine_placement(tmp_path / "phy2log.npy", options=TWO)
    assert read.slot_experts.tolist() == SLOTS
    np.save(tmp_path / "phy2log.npy", np.array(SLOTS, float))
    with pytest.raises(InvalidPlacementError, match="must be integers"):
        read_engine_placement(tmp_path / "phy2log.npy", options=TWO)


@pytest.mark.parametrize("kind", ["json", "npy", "ranks"])
def test_one_map_is_of_all_layers(tmp_path, kind):
    path = tmp_path / "map"
    if kind == "npy":
        np.save(tmp_path / "map.npy", np.array(SLOTS[0]))
        path = tmp_path / "map.npy"
    else:
        text = {"json": "[1, 0, 2, 3]", "ranks": '{"expert_to_ep_rank": [0, 0, 1, 1]}'}
        path.write_text(text[kind])
    options = ReadOptions(num_ranks=2, layers=(3, 4, 7))
    read = read_engine_placement(path, options=options)
    assert read.layer_ids.tolist() == [3, 4, 7]
    assert (read.slot_experts == read.slot_experts[0]).all()


def test_yaml_comments_may_hold_any_sign(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "p.yaml"
    body = "num_slots: 2\ninitial_global_assignments:\n  3: [0, 1]  # a * b & c\n"
    path.write_text("# 2 + 4 * 1 slots of A & B, it's so\n" + body)
    assert read_engine_placement(path, options=TWO).layer_ids.tolist() == [3]


def mapping(tmp_path, plan, **options):
    options = ExportOptions(**options)
    export_placement(plan, tmp_path / "d", Engine.DEEPEP, options=options)
    tensors = load_file(tmp_path / "d")
    return tensors["master_experts"], tensors["redundancy_mapping"]


def test_deepep_replicas_name_their_masters(tmp_path):
    plan = placement([[2, 0, 1, 3, 1, 2]])
    masters, replicas = mapping(tmp_path, plan)
    assert masters.dtype == replicas.dtype == np.int32
    assert masters.shape == (1, 4)
    assert replicas.shape == (1, 2, 1)
    for rank, held in enumerate(plan.slot_experts.reshape(2, 3)):
        own = masters[0].reshape(2, 2)[rank].tolist()
        (number,) = replicas[0, rank].tolist()
        copied = [] if number < 0 else [int(masters[0, number])]
        assert sorted(own + copied) == sorted(held.tolist())
        assert not set(own) & set(copied)


def test_deepep_leaves_spare_slots_unused(tmp_path):
    masters, replicas = mapping(tmp_path, placement([[0, 1, -1, 3, 2, -1]]))
    assert masters.tolist() == [[0, 1, 2, 3]]
    assert replicas.tolist() == [[[-1], [-1]]]


def test_deepep_counts_masters_through_a_node(tmp_path):
    # two nodes of two ranks with one master each; rank 3 replicates rank 2's
    plan = placement([[0, 1, 1, -1, 2, -1, 3, 2]], 4, 2)
    masters, replicas = mapping(tmp_path, plan)
    assert masters.tolist() == [[0, 1, 2, 3]]
    assert replicas.tolist() == [[[1], [-1], [-1], [0]]]


def test_deepep_layers_that_nobody_planned_have_equal_shares(tmp_path):
    plan = placement([[2, 0, 1, 3, 1, 2]])
    masters, replicas = mapping(tmp_path, plan, num_layers=2)
    assert masters[1].tolist() == [0, 1, 2, 3]
    assert replicas[1].tolist() == [[-1], [-1]]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (placement([[0, 1, 2, -1]], experts=3), "no equal shares"),
        (placement([[0, 1, 2, 3, -1, -1]], 2), "gives every rank 2"),
        (placement([[0, 2, 1, -1, 2, -1, 3, -1]], 4, 2), "on another node"),
    ],
)
def test_what_deepep_cannot_hold_is_refused(tmp_path, plan, message):
    with pytest.raises(InvalidPlacementError, match=message):
        export_placement(plan, tmp_path / "d", Engine.DEEPEP)


def test_deepep_files_are_only_written(tmp_path):
    export_placement(placement(SLOTS), tmp_path / "d", Engine.DEEPEP)
    with pytest.raises(InvalidPlacementError, match="only written"):
        read_engine_placement(tmp_path / "d", engine=Engine.DEEPEP, options=TWO)


def test_the_rule_for_spare_slots_is_said(tmp_path):
    plan = placement([[0, 1, -1, 2, 3, -1]])
    for engine, rule in ((Engine.VLLM, "repeat"), (Engine.VLLM_ASCEND, "another rank")):
        exported = export_placement(plan, tmp_path / "x", engine)
        assert rule in exported.notes[-1]
        assert "say `load`" in exported.notes[-1]
        options = ExportOptions(load=np.ones((1, 4)))
        exported = export_placement(plan, tmp_path / "x", engine, options=options)
        assert "coldest expert that their rank lacks" in exported.notes[-1]
    exported = export_placement(placement(SLOTS), tmp_path / "x", Engine.VLLM)
    assert not any("spare slots" in note for note in exported.notes)
    options = ExportOptions(num_layers=2)
    exported = export_placement(plan, tmp_path / "x", Engine.SGLANG, options=options)
    assert any("pull request 32962" in note for note in exported.notes)


def planned_under(rule, slots=((0, 1, 2, 2, 3, 0),)):
    options = {"cost": {} if rule is None else {"replica_rule": rule.value}}
    return replace(placement(slots), provenance=Provenance(options=options))


@pytest.mark.parametrize("engine", list(Engine))
@pytest.mark.parametrize("rule", list(ReplicaRule))
def test_a_plan_for_another_engines_replica_rule_is_pointed_out(engine, rule):
    rules = rules_of(engine)
    found = other_rule_note(planned_under(rule), engine)
    if not rules or rule in rules:
        assert not found
        return
    (note,) = found
    assert f"under the replica rule {rule.value}, but {engine.value} " in note
    assert note.endswith(f"plan again with `replica_rule` {rules[0].value}")
    assert not other_rule_note(planned_under(rule, SLOTS), engine)  # no replica


def test_plans_that_knew_one_rule_or_say_nothing():
    (note,) = other_rule_note(planned_under(None), Engine.VLLM)
    assert "replica rule moetuner, but vllm chooses" in note
    assert not other_rule_note(placement([[0, 1, 2, 2, 3, 0]]), Engine.VLLM)


def test_sglang_is_told_how_replicas_are_chosen(tmp_path):
    for rule in ReplicaRule:
        exported = export_placement(
            planned_under(rule),
            tmp_path / "x",
            Engine.SGLANG,
            options=ExportOptions(num_layers=1),
        )
        dynamic = rule is ReplicaRule.SGLANG_DYNAMIC
        assert ("--ep-dispatch-algorithm dynamic" in exported.command) == dynamic
        assert any("plan again" in note for note in exported.notes) == (
            rule not in rules_of(Engine.SGLANG)
        )
