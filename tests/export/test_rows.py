"""Files need every layer: what is missing is named, and completed only when told."""

import json

import numpy as np
import pytest
from moetuner.errors import InvalidPlacementError
from moetuner.export import Engine, ExportOptions, export_placement
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology

IN_ORDER = [0, 1, 2, 3, 0, 1]


def plan(*layers):
    """Four experts in six slots of two ranks, never in order."""
    return Placement(
        slot_experts=np.array([[3, 2, 1, 0, 1, 2]] * len(layers), np.int32),
        layer_ids=np.array(layers, np.int32),
        num_experts=4,
        topology=Topology(num_ranks=2, ranks_per_node=2),
    )


def rows(tmp_path, placement, engine=Engine.VLLM, **options):
    exported = export_placement(
        placement, tmp_path / "f", engine, options=ExportOptions(**options)
    )
    if engine is Engine.TRTLLM:
        lines = (tmp_path / "f").read_text().splitlines()[2:-1]
        return exported, [int(line.split(":")[0]) for line in lines]
    return exported, json.loads((tmp_path / "f").read_text())


@pytest.mark.parametrize("engine", [Engine.VLLM, Engine.VLLM_ASCEND, Engine.EPLB,
                                    Engine.TRTLLM, Engine.VLLM_START_MAP])  # fmt: skip
@pytest.mark.parametrize(
    "layers", [(8, 12, 18, 23), (8, 12, 16), (1, 3), (5, 6, 7), (0, 1, 3)], ids=str
)
def test_a_partial_placement_is_refused(tmp_path, engine, layers):
    with pytest.raises(InvalidPlacementError, match=r"has only layers .*`num_layers`"):
        export_placement(plan(*layers), tmp_path / "f", engine)
    assert not (tmp_path / "f").exists()


def test_it_is_completed_by_name(tmp_path):
    exported, table = rows(tmp_path, plan(1, 2, 5), num_layers=7)
    planned = [3, 2, 1, 0, 1, 2]
    assert table == [planned if layer in (1, 2, 5) else IN_ORDER for layer in range(7)]
    assert any("layers 0, 3-4, 6 are not in" in note for note in exported.notes)


@pytest.mark.parametrize(
    ("layers", "options", "wanted"),
    [
        ((3, 4, 5), {}, 3),  # dense layers come first
        ((3, 4, 5), {"num_layers": 6}, 3),
        ((1, 3, 5), {}, 3),  # every other layer
        ((1, 3), {"num_layers": 4}, 2),
        ((0, 1), {"num_layers": 4}, 4),
        ((4, 9), {"moe_layers": (4, 7, 9)}, 3),
        ((3, 4), {"num_layers": 5, "mtp_layers": 1}, 3),
        ((3, 4, 5), {"num_layers": 5, "mtp_layers": 1}, 3),
    ],
    ids=str,
)
def test_which_rows_there_are(tmp_path, layers, options, wanted):
    assert len(rows(tmp_path, plan(*layers), **options)[1]) == wanted


def test_layers_of_multi_token_prediction_have_their_rows(tmp_path):
    """TensorRT-LLM ends when one is missing."""
    _, numbers = rows(
        tmp_path, plan(3, 4, 5), Engine.TRTLLM, num_layers=6, mtp_layers=1
    )
    assert numbers == [3, 4, 5, 6]
    _, table = rows(tmp_path, plan(3, 4, 6), Engine.SGLANG, num_layers=6, mtp_layers=1)
    table = table["physical_to_logical_map"]
    assert [row == IN_ORDER for row in table] == [True] * 3 + [
        False,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ((3, 4, 5), {"num_layers": 5}, "has layer 5.*`mtp_layers`"),
        ((3, 4), {"mtp_layers": 1}, "`mtp_layers` come after `num_layers`"),
        ((3, 4), {"moe_layers": (4, 5)}, "has layer 3, which the options leave out"),
    ],
    ids=str,
)
def test_what_contradicts_the_placement_is_refused(tmp_path, layers, options, message):
    with pytest.raises(InvalidPlacementError, match=message):
        rows(tmp_path, plan(*layers), **options)


def test_loads_are_of_the_planned_layers(tmp_path):
    empty = Placement(
        slot_experts=np.array([[3, 2, -1, 0, 1, -1]], np.int32),
        layer_ids=np.array([2], np.int32),
        num_experts=4,
        topology=Topology(num_ranks=2, ranks_per_node=2),
    )
    _, table = rows(tmp_path, empty, num_layers=4, load=np.array([[9, 1, 8, 5]]))
    assert table == [IN_ORDER, IN_ORDER, [3, 2, 1, 0, 1, 3], IN_ORDER]
