"""From measurements to a file that can plan."""

from dataclasses import replace

import pytest
from made_machine import ONE_NODE, SEED, SHAPES, TWO_NODES, Made
from moetuner.calibration.fit import Comparison, Origin, fit_hardware, residuals
from moetuner.calibration.samples import Form, Load
from moetuner.errors import CalibrationError
from moetuner.evaluation.hardware import HARDWARE, LinkOf
from moetuner.evaluation.hardware_file import read_hardware, write_hardware
from moetuner.placement.topology import Topology

ORIGIN = Origin(name="made-up", date="2026-11-30", command="moetuner calibrate")
LIKE = HARDWARE["h200"]


def calibrated(made, form=Form.EXACT):
    return fit_hardware(made.measurements(), ORIGIN, LIKE, form, SEED)


def test_the_machine_has_the_figures_of_the_fit_and_the_file_holds_them(tmp_path):
    found = calibrated(Made(ONE_NODE)).hardware
    assert found.rank_bandwidth.egress[0] == pytest.approx(Made.egress, rel=1e-2)
    assert found.rank_bandwidth.ingress[0] == pytest.approx(Made.ingress, rel=1e-2)
    assert found.latency(4, between_nodes=False) == pytest.approx(18e-6, rel=1e-2)
    assert found.memory_bandwidth == pytest.approx(Made.memory)
    assert found.matmul_rate == pytest.approx(Made.matmul)
    assert [gemm.hidden_size for gemm in found.grouped_gemm] == [
        shape.hidden_size for shape in SHAPES
    ]
    write_hardware(found, tmp_path / "made.toml")
    again = read_hardware(tmp_path / "made.toml")
    assert again == found
    assert again.calibration == found.calibration
    assert again.calibration.command == "moetuner calibrate"
    assert "made up" in again.calibration.machine


def test_what_one_node_cannot_tell_is_taken_over_and_said():
    found = calibrated(Made(ONE_NODE))
    assert found.hardware.nic_bandwidth == LIKE.nic_bandwidth
    assert found.notes[0] == "links between nodes: not measured, as h200"
    assert found.notes[0] in found.hardware.sources


def test_two_nodes_tell_what_joins_them():
    found = calibrated(Made(TWO_NODES))
    assert found.hardware.nic_of is LinkOf.NODE
    slowest = min(Made.node_egress, Made.node_ingress)
    assert found.hardware.between(2).slowest == pytest.approx(slowest, rel=1e-2)
    assert not found.notes


def test_one_rank_tells_no_link_at_all():
    found = calibrated(Made(Topology(num_ranks=1, ranks_per_node=1)))
    assert found.hardware.rank_bandwidth == LIKE.rank_bandwidth
    assert len(found.notes) == 2


def test_every_time_is_beside_the_price_of_the_machine():
    made = Made(ONE_NODE)
    measured = replace(made.measurements(), layers=tuple(made.layers()))
    found = fit_hardware(measured, ORIGIN, LIKE, Form.EXACT, SEED)
    parts = [one.part for one in found.comparisons]
    assert parts.count("dispatch") == parts.count("combine") > 20
    sent = [s for s in measured.layers if s.case.load is not Load.LOCAL]
    assert parts.count("layer") == len(sent) < len(measured.layers)
    assert parts.count("experts") == len(measured.experts)
    told = {each.part: each for each in found.hardware.calibration.residuals}
    assert list(told) == ["dispatch", "combine", "experts", "layer", "all"]
    assert told["all"].points == len(found.comparisons)


def test_residuals_are_relative_and_have_no_sign():
    def one(part, measured, fitted):
        return Comparison(
            part=part, what="", measured=measured, spread=0, fitted=fitted
        )

    found = residuals([one("a", 1, 1.1), one("a", 1, 0.7), one("b", 10, 10)])
    assert [(r.part, r.points) for r in found] == [("a", 2), ("b", 1), ("all", 3)]
    assert found[0].median == pytest.approx(0.2)
    assert found[0].worst == pytest.approx(0.3)
    assert found[2].median == pytest.approx(0.1)


def test_a_form_that_was_not_measured_is_refused():
    with pytest.raises(
        CalibrationError, match="nothing was measured of the form fixed"
    ):
        calibrated(Made(ONE_NODE), Form.FIXED)


def test_what_a_layer_takes_besides_is_found():
    """The whole layer takes 30 us more than its parts, on one rank too."""
    made = Made(Topology(num_ranks=1, ranks_per_node=1))
    measured = made.measurements()
    bare = fit_hardware(measured, ORIGIN, LIKE, Form.EXACT, SEED)
    layers = [layer for layer in made.layers() if layer.case.num_tokens == 1024]
    from moetuner.calibration.prediction import predict

    for layer in layers:
        own = float(predict(layer.case, bare.hardware, 1, SEED).total[0])
        object.__setattr__(layer.timing, "seconds", own + 30e-6)
    found = fit_hardware(
        replace(measured, layers=tuple(layers)), ORIGIN, LIKE, Form.EXACT, SEED
    )
    assert found.hardware.layer_overhead == pytest.approx(30e-6, rel=1e-6)
