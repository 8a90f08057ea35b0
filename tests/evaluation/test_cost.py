import dataclasses

import numpy as np
import pytest
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.hardware import HARDWARE, Dtype, Hardware
from moetuner.evaluation.models import ModelShape, shape_for_model
from moetuner.placement.topology import Topology

# 10 FLOPs per row at 5 per second: 2 s a row. 10 bytes an expert at 2 per second: 5 s
# an expert.
HARDWARE_FIELDS = {
    "name": "toy",
    "memory_bandwidth": 2,
    "matmul_rate": 5,
    "rank_bandwidth": 8,
    "nic_bandwidth": 1,
    "rank_latency": 0.25,
    "node_latency": 0.5,
}
SHAPE_FIELDS = {
    "hidden_size": 4,
    "expert_hidden_size": 1.25,
    "num_projections": 1,
    "weight_bytes": 2,
}
TOY = CostModel(hardware=Hardware(**HARDWARE_FIELDS), shape=ModelShape(**SHAPE_FIELDS))


def two_ranks(cost):
    return cost.layer_price(Topology(num_ranks=2, ranks_per_node=2))


@pytest.mark.parametrize(
    ("rows", "active", "seconds"),
    [
        ([0, 0], [0, 0], 0),
        ([1, 1], [1, 1], 5),  # few rows: the weights are slower
        ([2, 2], [2, 1], 10),
        ([3, 1], [1, 1], 6),  # many rows: arithmetic is slower
        ([4, 2], [1, 2], 10),  # 8 s of rows on rank 0, 10 s of weights on rank 1
        ([0, 50], [0, 1], 100),
    ],
)
def test_compute_is_bound_by_rows_or_by_active_experts(rows, active, seconds):
    assert two_ranks(TOY).compute(rows, active) == seconds


def test_layers_are_timed_one_by_one():
    """Leading axes stay; the slowest rank is another one in each."""
    rows = np.array([[[3.0, 1], [0, 4]]])
    active = np.array([[[1.0, 1], [0, 1]]])
    assert two_ranks(TOY).compute(rows, active).tolist() == [[6, 8]]


@pytest.mark.parametrize(
    ("rank_rows", "node_rows", "ranks_per_node", "seconds"),
    [
        (0, 0, 2, 0),  # nothing crosses: no latency either
        (2, 0, 2, 2 * 1 + 0.25),  # 8 bytes a row over 8 bytes/s
        (0, 2, 2, 2 * 4 + 0.5),  # 8 bytes a row over two network cards
        (9, 2, 2, 9 + 8 + 0.5),  # both, one after the other; the longer latency
        (0, 2, 8, 2 * 1 + 0.5),  # eight network cards
    ],
)
def test_exchange_takes_both_hops(rank_rows, node_rows, ranks_per_node, seconds):
    topology = Topology(num_ranks=8, ranks_per_node=ranks_per_node)
    price = TOY.layer_price(topology)
    assert price.exchange(price.rates.dispatch, rank_rows, node_rows) == seconds


@pytest.mark.parametrize("wire", [wire for wire in Wire if wire is not Wire.DEDUP])
@pytest.mark.parametrize(("rank_rows", "seconds"), [(9, 9 + 0.5), (1, 8 + 0.5)])
def test_links_that_work_at_once_are_bound_by_the_slower_kind(wire, rank_rows, seconds):
    topology = Topology(num_ranks=8, ranks_per_node=2)
    price = dataclasses.replace(TOY, wire=wire).layer_price(topology)
    assert price.exchange(price.rates.dispatch, rank_rows, 2) == seconds


def test_fp8_out_and_bf16_back():
    """The way back carries twice the bytes, and pays the same latency."""
    shape = ModelShape(**SHAPE_FIELDS, dispatch_bytes=1, combine_bytes=2)
    model = dataclasses.replace(TOY, shape=shape)
    price = two_ranks(model)
    rates = price.rates
    assert price.exchange(rates.dispatch, [6.0], [0.0]).tolist() == [3.25]
    assert price.exchange(rates.combine, [6.0], [0.0]).tolist() == [6.25]
    assert price.exchange(rates.both_ways, [6.0], [0.0]).tolist() == [9.5]
    assert rates.dispatch_share == 1 / 3


def test_size_of_an_expert():
    """DeepSeek-V3: 3 x 7168 x 2048 weights, about 44 million."""
    shape = shape_for_model("deepseek-v3")
    assert shape.expert_values == 44_040_192
    assert shape.expert_bytes == 88_080_384
    assert shape.flops_per_row == 88_080_384
    gpu = CostModel(hardware=HARDWARE["h100"], shape=shape)
    # One active expert, one row: 88 MB at 3.35 TB/s.
    assert two_ranks(gpu).compute([1, 1], [1, 1]) == pytest.approx(26.3e-6, rel=1e-2)


@pytest.mark.parametrize("name", HARDWARE)
def test_presets_are_sane(name):
    """Memory is faster than links, links inside a node faster than between nodes."""
    gpu = HARDWARE[name]
    assert gpu.name == name
    assert gpu.matmul_rate > gpu.memory_bandwidth > gpu.rank_bandwidth
    assert gpu.rank_bandwidth > gpu.nic_bandwidth
    assert 1e-6 < gpu.rank_latency < gpu.node_latency < 1e-3
    rates = [gpu.rate(dtype) for dtype in Dtype]
    assert rates == sorted(rates)
    assert gpu.sources


def test_plans_for_h100_are_priced_as_ever():
    """What files of plans were made with, to the bit."""
    gpu = HARDWARE["h100"]
    assert (gpu.memory_bandwidth, gpu.matmul_rate) == (3.35e12, 989e12)
    assert (gpu.rank_bandwidth, gpu.nic_bandwidth) == (900e9 / 2, 400e9 / 8)
    assert (gpu.rank_latency, gpu.node_latency) == (1.18e-05, 2.24e-05)
    assert gpu.grouped_gemm == ()
    assert (gpu.permutation, gpu.layer_overhead) == (None, 0.0)


def test_h200_is_an_h100_with_faster_memory():
    h100, h200 = HARDWARE["h100"], HARDWARE["h200"]
    assert h200.memory_bandwidth == 4.8e12
    assert h100.memory_bandwidth == 3.35e12
    assert dataclasses.replace(h200, name="h100", memory_bandwidth=3.35e12) == h100


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("kind", "fields", "name"),
    [
        *((Hardware, HARDWARE_FIELDS, n) for n in HARDWARE_FIELDS if "_b" in n),
        *((Hardware, HARDWARE_FIELDS, f"{n}matmul_rate") for n in ("", "fp8_", "fp4_")),
        *((ModelShape, SHAPE_FIELDS, n) for n in SHAPE_FIELDS),
        (ModelShape, SHAPE_FIELDS, "dispatch_bytes"),
        (ModelShape, SHAPE_FIELDS, "combine_bytes"),
    ],
)
def test_impossible_rates_and_sizes_are_refused(kind, fields, name, value):
    message = f"{kind.__name__}: {name} must be positive, got {value}"
    with pytest.raises(InvalidProblemError, match=message):
        kind(**(fields | {name: value}))


@pytest.mark.parametrize("name", ["rank_latency", "node_latency"])
@pytest.mark.parametrize("value", [-1e-6, float("nan"), float("inf")])
def test_impossible_latencies_are_refused(name, value):
    with pytest.raises(InvalidProblemError, match=f"{name} must be >= 0 s, got"):
        Hardware(**(HARDWARE_FIELDS | {name: value}))


def test_no_latency_is_legal():
    assert Hardware(**(HARDWARE_FIELDS | {"rank_latency": 0})).rank_latency == 0


def test_choices_are_spelled_as_on_the_command_line():
    assert [homes.value for homes in Homes] == ["uniform", "recorded", "follow"]
    assert Wire("dedup") is Wire.DEDUP
    assert CostModel().wire is Wire.DEDUP
    assert CostModel().homes is Homes.UNIFORM


def test_choices_may_be_given_by_name():
    cost = CostModel(wire="per_expert", homes="follow")
    assert cost.wire is Wire.PER_EXPERT
    assert cost.homes is Homes.FOLLOW


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"wire": "pigeon"}, "CostModel: wire must be one of dedup, .*'pigeon'"),
        ({"homes": None}, "CostModel: homes must be one of uniform, .*None"),
    ],
)
def test_choices_that_do_not_exist_are_refused(fields, message):
    with pytest.raises(InvalidProblemError, match=message):
        CostModel(**fields)


def test_text_is_no_rate():
    with pytest.raises(InvalidProblemError, match="matmul_rate must be positive"):
        Hardware(**(HARDWARE_FIELDS | {"matmul_rate": "1"}))
