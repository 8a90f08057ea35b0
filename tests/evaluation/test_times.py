"""Times from the files of several tools, and beside the prediction."""

import json
from dataclasses import replace

import numpy as np
import pytest
from moetuner.errors import InvalidTraceError
from moetuner.evaluation.cost import CostModel, Homes
from moetuner.evaluation.curves import Permutation
from moetuner.evaluation.evaluate import evaluate
from moetuner.evaluation.step_times import (
    RECORDED_RUN,
    compare_times,
    part_seconds,
    steps_of,
)
from moetuner.evaluation.tally import tally
from moetuner.evaluation.times_file import LayerPart, MeasuredTime, read_times
from moetuner.placement.topology import Topology
from moetuner.trace import Trace, TraceMetadata
from strategies import random_ids, random_placement

# All columns that nsys 2024 and 2025 write, with lines of its progress between them.
NSYS = """\
Generating SQLite file run.sqlite from run.nsys-rep
Processing [run.sqlite] with [/opt/nvidia/nsys/reports/nvtx_sum.py]...
Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),\
Style,Range
40.0,4000,2,2000.0,1900.0,100,4000,2757.7,PushPop,moetuner:dispatch
30.0,3000,2,1500.0,1500.0,100,4000,2757.7,PushPop,moetuner:expert
20.0,2000,2,1000.0,900.0,100,4000,2757.7,PushPop,moetuner:combine
10.0,1000,2,500.0,500.0,100,4000,2757.7,PushPop,other:dispatch
10.0,1000,2,500.0,500.0,100,4000,2757.7,PushPop,moetuner:route

Processing [run.sqlite] with [/opt/nvidia/nsys/reports/nvtx_gpu_proj_sum.py]...
Range,Style,Total Proj Time (ns),Total Range Time (ns),Range Instances,Proj Avg (ns),\
Proj Med (ns),Proj Min (ns),Proj Max (ns),Proj StdDev (ns),Total GPU Ops,Avg GPU Ops,\
Avg Range Lvl,Avg Num Child
moetuner:dispatch,PushPop,6000,4000,2,3000.0,2900.0,100,5900,4101.2,8,4.0,1.0,0.0
moetuner:expert,PushPop,6000,3000,2,3000.0,"3,100.0",100,5900,4101.2,4,2.0,1.0,0.0
"""
KERNELS = """\
Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name
100.0,4000,2,2000.0,1900.0,100,4000,2757.7,"void send_rows<__nv_bfloat16>(Args)"
"""
PROFILER = """\
USDT: SyncActivityProfilerHandler.cpp:59] profiler_stop
-------------------  -----------  -----------  ----------  -------------  ----------
               Name   Self CPU %    CPU total  CUDA total  CUDA time avg  # of Calls
-------------------  -----------  -----------  ----------  -------------  ----------
 moetuner::dispatch        0.09%      3.000ms   600.000us      200.000us           3
  aten::_grouped_mm        0.10%    128.893ms     1.200ms      200.000us           6
  moetuner::combine        0.04%    363.625us   300.000us      100.000us           3
           aten::mm        0.04%    363.625us      1.000s      100.000us           3
-------------------  -----------  -----------  ----------  -------------  ----------
Self CPU time total: 228.878ms
"""


@pytest.fixture
def read(tmp_path):
    def of(text):
        path = tmp_path / "times.csv"
        path.write_text(text)
        return {(t.part.value, t.layer): t for t in read_times(path)}

    return of


def seconds(found):
    return {key: pytest.approx(time.seconds) for key, time in found.items()}


def test_a_plain_file_has_medians_of_steps_and_the_slowest_rank(read):
    found = read(
        "Part,layer,rank,step,ms\n"
        "dispatch,3,0,0,1\ndispatch,3,1,0,2\n"
        "dispatch,3,0,1,5\ndispatch,3,1,1,4\n"
        "dispatch,3,0,2,3\ndispatch,3,1,2,3\n"
        "Experts,,0,0,7\n"
    )
    assert seconds(found) == {("dispatch", 3): 3e-3, ("experts", None): 7e-3}
    assert not found["experts", None].of_each_layer


def test_lines_without_step_or_rank_are_steps(read):
    assert seconds(read("part,us\ntotal,1\ntotal,3\ntotal,4\n")) == {
        ("total", None): 3e-6
    }


def test_ranks_without_steps_are_of_one_step(read):
    found = read("part,rank,seconds\ntotal,0,1\ntotal,1,3\n")
    assert seconds(found) == {("total", None): 3}


def test_ranges_of_nsys_are_ours_alone_and_the_gpu_goes_first(read):
    host = NSYS[: NSYS.index("\nProcessing [run.sqlite] with [/opt/nvidia/", 80)]
    found = read(host)
    assert seconds(found) == {
        ("dispatch", None): 1.9e-6,
        ("experts", None): 1.5e-6,
        ("combine", None): 0.9e-6,
    }
    assert all(time.of_each_layer for time in found.values())
    assert seconds(read(NSYS)) == {
        ("dispatch", None): 2.9e-6,
        ("experts", None): 3.1e-6,
    }


@pytest.mark.parametrize(("unit", "factor"), [("us", 1e3), ("ms", 1e6), ("s", 1e9)])
def test_ranges_of_nsys_may_be_in_another_unit(read, unit, factor):
    """As `nsys stats --timeunit` has them."""
    host = NSYS[: NSYS.index("\nProcessing [run.sqlite] with [/opt/nvidia/", 80)]
    found = read(host.replace("(ns)", f"({unit})"))
    assert found["dispatch", None].seconds == pytest.approx(1.9e-6 * factor)


def test_tables_of_torch_profiler_have_the_device_time_of_a_call(read):
    found = read(PROFILER)
    assert seconds(found) == {
        ("dispatch", None): 200e-6,
        ("experts", None): 400e-6,  # two products of each call
        ("combine", None): 100e-6,
    }


def test_a_list_of_torch_profiler_falls_back_to_the_cpu(read):
    rows = [
        {"key": "moetuner::dispatch", "count": 2, "cpu_time_total": 50.0},
        {"key": "aten::mm", "count": 2, "cpu_time_total": 50.0},
    ]
    assert seconds(read(json.dumps(rows))) == {("dispatch", None): 25e-6}


def op(key, count, micro):
    return {"key": key, "count": count, "cpu_time_total": micro}


def test_rows_of_one_op_are_taken_together(read):
    """As key_averages(group_by_input_shape=True) has them."""
    dispatch = "moetuner::dispatch"
    rows = [op(dispatch, 10, 1000.0), op(dispatch, 30, 3000.0)]
    rows += [op("aten::_grouped_mm", 60, 6000.0), op("aten::_grouped_mm", 20, 2000.0)]
    found = seconds(read(json.dumps(rows)))
    assert found["dispatch", None] == pytest.approx(100e-6)
    assert found["experts", None] == pytest.approx(200e-6)


def test_a_product_inside_another_counts_once(read):
    """Compiled layers in float32 call torch's product inside moetuner's."""
    rows = [op("moetuner::grouped_mm", 6, 900.0), op("aten::_grouped_mm", 6, 600.0)]
    without = seconds(read(json.dumps(rows)))
    assert without == {("experts", None): pytest.approx(200e-6)}  # two for a layer
    told = seconds(read(json.dumps([op("moetuner::dispatch", 3, 30.0), *rows])))
    assert told["experts", None] == pytest.approx(200e-6)


def test_what_torch_profiler_really_prints_is_read(tmp_path, read):
    torch = pytest.importorskip("torch")
    pytest.importorskip("moetuner.ops")
    from moetuner.ops import permute
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            with record_function("moetuner::dispatch"):
                permute(torch.ones(4, 8), torch.zeros(4, 1, dtype=torch.int64), 1)
    averages = profiler.key_averages()
    (own,) = (e for e in averages if e.key == "moetuner::dispatch")
    found = read(averages.table())
    assert found["dispatch", None].seconds == pytest.approx(
        own.cpu_time_total * 1e-6 / 2, rel=1e-3
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "wanted a CSV with the columns part"),
        ("part,layer\ntotal,1\n", "one of seconds, ms or us"),
        ("part,ms,us\ntotal,1,2\n", "one of seconds, ms or us"),
        ("part,ms\n", "no time of dispatch"),
        (KERNELS, "a CSV of nsys stats with NVTX ranges"),
        ("part,ms\nrouter,1\n", "line 2: part: wanted one of dispatch, experts"),
        ("part,ms\ntotal,fast\n", "line 2: wanted a time >= 0, got 'fast'"),
        ("part,ms\ntotal,-1\n", "wanted a time >= 0"),
        ("part,ms\ntotal,nan\n", "wanted a time >= 0"),
        ("part,ms\ntotal\n", "wanted a time >= 0, got None"),
        ("part,layer,ms\ntotal,x,1\n", "layer: wanted a whole number, got 'x'"),
        ("part,layer,ms\ntotal,\u00b2,1\n", "layer: wanted a whole number"),
        ("part,rank,ms\ntotal,0,1\ntotal,0,2\n", "number the steps in a column step"),
        ("[1, 2]", "wanted a list of objects"),
        ("[{", "not JSON"),
        ('[{"key": "moetuner::dispatch", "count": "x"}]', "wanted a time >= 0"),
        ("[]", "no time of dispatch"),
    ],
)
def test_what_cannot_be_read_is_named(read, tmp_path, text, said):
    with pytest.raises(InvalidTraceError) as caught:
        read(text)
    assert said in str(caught.value)
    assert "times.csv" in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xff\xfe\x00part")
    with pytest.raises(InvalidTraceError, match="not a text file"):
        read_times(path)


@pytest.fixture
def run(rng):
    """A run of two ranks in three steps, and a placement."""
    step = np.repeat([0, 1, 2], 40)
    rank = np.tile(np.repeat([0, 1], 20), 3)
    trace = Trace(
        topk_ids=random_ids(rng, 120, 3, 8, 2),
        num_experts=8,
        layer_ids=np.array([1, 2, 5], np.int32),
        sequence=(step * 2 + rank).astype(np.int32),
        position=np.tile(np.arange(20, dtype=np.int32), 6),
        home_rank=rank.astype(np.int16),
        metadata=TraceMetadata(source=RECORDED_RUN),
    )
    topology = Topology(num_ranks=2, ranks_per_node=2)
    return trace, random_placement(rng, trace, topology, extra_slots=0)


COST = CostModel(homes=Homes.RECORDED)


def times_of(*told):
    return [
        MeasuredTime(part=LayerPart(part), layer=layer, seconds=of, of_each_layer=each)
        for part, layer, of, each in told
    ]


def test_steps_of_a_recorded_run_are_those_of_all_ranks(run):
    trace, placement = run
    steps = steps_of(trace, placement, 7, "sequences")
    assert np.array_equal(steps, np.repeat([0, 1, 2], 40))


def test_predictions_are_the_evaluators_means_over_steps(run):
    trace, placement = run
    found = compare_times(trace, placement, COST, times_of(("total", None, 1.0, False)))
    parts = [
        evaluate(_step(trace, number), placement, COST, batch_tokens=0)
        for number in range(3)
    ]
    wanted = np.mean([part.batch_seconds_mean for part in parts])
    assert found[0].predicted == pytest.approx(wanted)
    found = compare_times(
        trace,
        placement,
        COST,
        times_of(("dispatch", None, 1.0, False), ("experts", 2, 1.0, False)),
    )
    assert found[0].predicted == pytest.approx(
        np.mean([part.dispatch_seconds for part in parts])
    )
    assert 0 < found[1].predicted < np.mean([part.compute_seconds for part in parts])


def _step(trace, number):
    mine = trace.sequence // 2 == number
    return Trace(
        topk_ids=np.ascontiguousarray(trace.topk_ids[mine]),
        num_experts=trace.num_experts,
        layer_ids=trace.layer_ids,
        home_rank=trace.home_rank[mine],
    )


def test_times_of_each_layer_are_multiplied_and_parts_are_summed(run):
    trace, placement = run
    told = [("dispatch", None, 1.0, True), ("combine", None, 2.0, True)]
    found = compare_times(trace, placement, COST, times_of(*told))
    assert [(one.part.value, one.measured) for one in found] == [
        ("dispatch", 3.0),
        ("combine", 6.0),
    ]
    found = compare_times(
        trace, placement, COST, times_of(*told, ("experts", None, 3.0, True))
    )
    assert [(one.part.value, one.measured) for one in found] == [
        ("dispatch", 3.0),
        ("experts", 9.0),
        ("combine", 6.0),
        ("total", 18.0),
    ]


def test_bringing_rows_into_order_is_part_of_dispatch_and_combine(run):
    trace, placement = run
    order = Permutation(per_row=1e-6, per_byte=1e-9)
    plain = replace(COST.hardware, permutation=None)
    rows = tally(trace, placement, homes=Homes.RECORDED)
    before, after = (
        part_seconds(rows, replace(COST, hardware=machine))
        for machine in (plain, replace(plain, permutation=order))
    )
    most = rows.rank_rows().max(axis=-1)
    each = 1e-6 + COST.shape.hidden_size * 2 * 1e-9
    for part in (LayerPart.DISPATCH, LayerPart.COMBINE):
        assert after[part] - before[part] == pytest.approx(most * each)
    assert np.array_equal(after[LayerPart.EXPERTS], before[LayerPart.EXPERTS])


def test_ratios_and_errors(run):
    trace, placement = run
    total = compare_times(trace, placement, COST, times_of(("total", 5, 1.0, False)))[0]
    again = compare_times(
        trace, placement, COST, times_of(("total", 5, 2 * total.predicted, False))
    )[0]
    assert again.ratio == pytest.approx(2)
    assert again.error == pytest.approx(0.5)


def test_layers_that_the_trace_does_not_have_are_refused(run):
    with pytest.raises(InvalidTraceError, match="times of layer 3, but the trace has"):
        compare_times(*run, COST, times_of(("total", 3, 1.0, False)))
