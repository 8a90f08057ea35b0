"""Hardware and network files: read, refused, written and read again."""

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner._plain import from_plain, to_plain
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.curves import (
    Calibration,
    GemmPoint,
    GroupedGemm,
    Permutation,
    Residual,
)
from moetuner.evaluation.hardware import (
    HARDWARE,
    NETWORKS,
    Dtype,
    Hardware,
    LinkOf,
    Network,
    with_network,
)
from moetuner.evaluation.hardware_file import (
    find_hardware,
    find_network,
    read_hardware,
    read_network,
    write_hardware,
)
from moetuner.evaluation.rates import Bandwidth, Latency
from moetuner.evaluation.units import Unit, quantity
from moetuner.placement.topology import Topology

PRESETS = [HARDWARE.path(n) for n in HARDWARE] + [NETWORKS.path(n) for n in NETWORKS]
PAGE = Path(__file__).parents[2] / "docs/hardware.md"
EXAMPLE = re.search(r"^```toml\n(.*?)^```$", PAGE.read_text(), re.S | re.M)[1]

rates = st.floats(1e9, 1e15)
times = st.floats(0, 1e-3)
text = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=6)


@st.composite
def bandwidths(draw, counts):
    if draw(st.booleans()):
        return draw(rates)
    values = [
        draw(st.lists(rates, min_size=n, max_size=n))
        for n in (draw(st.sampled_from(counts)), draw(st.sampled_from(counts)))
    ]
    return Bandwidth(egress=tuple(values[0]), ingress=tuple(values[1]))


latencies = st.one_of(
    times, st.builds(Latency, base=times, per_rank=st.floats(1e-9, 1e-6))
)
points = st.builds(
    lambda rows, active, seconds: GemmPoint(
        rows=rows * active, active=active, seconds=seconds
    ),
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(1e-6, 1),
)
curves = st.builds(
    GroupedGemm,
    dtype=st.sampled_from([each.value for each in Dtype]),
    hidden_size=st.integers(1, 9),
    expert_hidden_size=st.integers(1, 9),
    weight_bytes=st.sampled_from([0.53125, 1.0, 2.0]),
    points=st.lists(points, min_size=3, max_size=4).map(tuple),
)


@st.composite
def pairs(draw):
    """Nothing, or a bandwidth for each pair of four ranks."""
    rows = draw(
        st.lists(st.lists(rates, min_size=4, max_size=4), min_size=4, max_size=4)
    )
    if draw(st.booleans()):
        return ()
    return [[0.0 if g == h else v for h, v in enumerate(r)] for g, r in enumerate(rows)]


residuals = st.builds(
    Residual, part=text, points=st.integers(1, 9), median=times, worst=times
)
machines = st.builds(
    Hardware,
    name=text,
    sources=st.lists(text, max_size=2).map(tuple),
    memory_bandwidth=rates,
    matmul_rate=rates,
    fp8_matmul_rate=st.one_of(st.none(), rates),
    fp4_matmul_rate=st.one_of(st.none(), rates),
    ranks_per_node=st.integers(1, 72),
    rank_bandwidth=bandwidths([1, 4]),
    nic_bandwidth=bandwidths([1, 2]),
    nic_of=st.sampled_from(LinkOf),
    network=text,
    rank_latency=latencies,
    node_latency=latencies,
    layer_overhead=times,
    compute_floor=times,
    pair_bandwidth=pairs(),
    permutation=st.one_of(
        st.none(), st.builds(Permutation, per_row=times, per_byte=times)
    ),
    grouped_gemm=st.lists(curves, max_size=2).map(tuple),
    calibration=st.one_of(
        st.none(),
        st.builds(
            Calibration,
            machine=text,
            date=text,
            command=text,
            residuals=st.lists(residuals, max_size=2).map(tuple),
        ),
    ),
)


def everything(machine):
    """Sources and calibration too, which `==` leaves out."""
    return {
        each.name: getattr(machine, each.name) for each in dataclasses.fields(machine)
    }


@given(machine=machines)
def test_what_is_written_is_read_again_to_the_bit(tmp_path_factory, machine):
    path = tmp_path_factory.getbasetemp() / "machine.toml"
    write_hardware(machine, path)
    assert everything(read_hardware(path)) == everything(machine)


@given(machine=machines)
def test_provenance_keeps_all_of_a_machine(machine):
    plain = to_plain(CostModel(hardware=machine))
    read = from_plain(CostModel, plain, "file").hardware
    assert everything(read) == everything(machine)


def test_files_of_before_are_read(tmp_path):
    """Placement files had bare numbers, and fewer of them."""
    old = {
        "name": "h100",
        "memory_bandwidth": 3.35e12,
        "matmul_rate": 989e12,
        "rank_bandwidth": 450e9,
        "nic_bandwidth": 50e9,
        "rank_latency": 1.18e-05,
        "node_latency": 2.24e-05,
    }
    assert (
        dataclasses.replace(from_plain(Hardware, old, "file"), fp8_matmul_rate=1979e12)
        == (HARDWARE["h100"])
    )


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_constant_of_a_preset_names_its_source(path):
    numbers = [line for line in path.read_text().splitlines() if re.search(r"\d", line)]
    for line in numbers:
        head = re.match(r'(version|name|format) = |  "', line)
        assert head or " # " in line, line
    assert sum(" # " in line for line in numbers) >= 3


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_sane(name):
    network = NETWORKS[name]
    assert network.name == name
    assert network.sources
    assert 1e9 < network.bandwidth < 100e9


def test_a_card_of_a_node_is_shared_and_cards_of_ranks_add_up():
    h100 = HARDWARE["h100"]
    slow = with_network(h100, NETWORKS["ethernet-25"])
    assert h100.between(4).egress == (200e9,)
    assert slow.between(4).egress == slow.between(8).egress == (25e9 / 8,)
    assert slow.network == "ethernet-25"
    assert set(h100.sources) < set(slow.sources)


def test_an_exchange_takes_longer_among_more_ranks():
    machine = dataclasses.replace(
        HARDWARE["h100"],
        rank_latency=Latency(base=1e-5, per_rank=1e-6),
        node_latency=Latency(base=2e-5, per_rank=2e-6),
    )
    rates = CostModel(hardware=machine).rates(Topology(num_ranks=8, ranks_per_node=4))
    assert rates.dispatch.rank_latency == 1e-5 + 4 * 1e-6
    assert rates.dispatch.node_latency == 2e-5 + 8 * 2e-6
    assert rates.both_ways.node_latency == 2 * rates.dispatch.node_latency


def test_a_narrower_type_that_is_not_known_is_as_the_next_wider():
    rate = {"bf16": 1.0, "fp8": 2.0, "fp4": 4.0}
    for known, wanted in [
        ({}, (1, 1, 1)),
        ({"fp8_matmul_rate": rate["fp8"]}, (1, 2, 2)),
        ({"fp4_matmul_rate": rate["fp4"]}, (1, 1, 4)),
    ]:
        machine = dataclasses.replace(
            HARDWARE["a100-sxm"], matmul_rate=rate["bf16"], **known
        )
        found = [machine.rate(dtype) for dtype in Dtype]
        assert found == [1, *wanted]  # fp32 is as bf16


@pytest.mark.parametrize(
    ("field", "count"), [("rank_bandwidth", 3), ("nic_bandwidth", 3)]
)
def test_bandwidths_of_other_places_are_refused(field, count):
    odd = Bandwidth(egress=(1e9,), ingress=(1e9,) * count)
    machine = dataclasses.replace(HARDWARE["h100"], **{field: odd})
    with pytest.raises(InvalidProblemError, match=f"{field} of h100 has 3 values"):
        CostModel(hardware=machine).rates(Topology(num_ranks=8, ranks_per_node=4))


@pytest.mark.parametrize(
    ("value", "unit", "wanted"),
    [
        ("3.35 TB/s", Unit.BANDWIDTH, 3.35e12),
        ("400 Gb/s", Unit.BANDWIDTH, 50e9),
        ("20 Gbit/s", Unit.BANDWIDTH, 2.5e9),
        ("400 Gbps", Unit.BANDWIDTH, 50e9),
        ("450GB/s", Unit.BANDWIDTH, 450e9),
        ("450 GBit/s", Unit.BANDWIDTH, None),
        ("11.8 us", Unit.TIME, 1.18e-05),
        ("11.8 µs", Unit.TIME, 1.18e-05),
        ("989 TFLOP/s", Unit.RATE, 989e12),
        ("1.5 ps/byte", Unit.TIME_PER_BYTE, 1.5e-12),
        (12, Unit.TIME, 12.0),
        ("450", Unit.BANDWIDTH, None),
        ("450 GB", Unit.BANDWIDTH, None),
        ("450 Gs/B", Unit.BANDWIDTH, None),
        ("4.5.0 GB/s", Unit.BANDWIDTH, None),
        ("1e999999 GB/s", Unit.BANDWIDTH, None),
        ("nan GB/s", Unit.BANDWIDTH, None),
        ("1 h", Unit.TIME, None),
        (True, Unit.TIME, None),
        (None, Unit.TIME, None),
    ],
)
def test_quantities(value, unit, wanted):
    assert quantity(value, unit) == wanted


def edited(tmp_path, old, new):
    assert old in EXAMPLE
    path = tmp_path / "odd.toml"
    path.write_text(EXAMPLE.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "key", "message"),
    [
        ('format = "moetuner.hardware"', "", "format", "is missing"),
        ('format = "moetuner.hardware"', 'format = "x"', "format", "moetuner.hardware"),
        ("version = 1", "version = 2", "version", "reads version 1, got 2"),
        ("version = 1", "version = true", "version", "got True"),
        ('name = "two-l40s-boxes"', "name = 3", "name", "wanted text"),
        ('name = "two-l40s-boxes"', r'name = "a\nb"', "name", "wanted text on one"),
        ('sources = ["data', 'sources = [1, "data', "sources", "a list of texts"),
        ("ranks_per_node = 4", "ranks_per_node = 4.0", "ranks_per_node", "whole"),
        ("ranks_per_node = 4", "ranks_per_node = 0", "ranks_per_node", ">= 1, got 0"),
        ("ranks_per_node = 4", "ranks = 4", "ranks_per_node", "is missing"),
        ('"790 GB/s"', '"790 GB"', "memory_bandwidth", "bytes/s, or text such as"),
        ('"790 GB/s"', "790", "memory_bandwidth", "was the unit forgotten?"),
        ('"790 GB/s"', '"-790 GB/s"', "memory_bandwidth", "got '-790 GB/s'"),
        ('"790 GB/s"', "nan", "memory_bandwidth", "got nan"),
        ('"790 GB/s"', "inf", "memory_bandwidth", "got inf"),
        ('"35 us"', '"-1 us"', "layer_overhead", "not negative"),
        ('"310 TFLOP/s"', '"310 TB/s"', "matmul_rate.bf16", "wanted a number in FLOP"),
        ("fp8 =", "fp6 =", "matmul_rate.fp6", "unknown, wanted one of bf16, fp4, fp8"),
        ("[inside]", "[outside]", "inside", "is missing, wanted a table"),
        ('egress = "25 GB/s"', "egress = []", "inside.egress", "an empty list"),
        ('"12 GB/s"]', "0]", "inside.ingress", "got 0"),
        ('{ base = "14 us"', '{ start = "14 us"', "inside.latency.base", "is missing"),
        ('per_rank = "0.3 us"', "per_rank = []", "inside.latency.per_rank", "got []"),
        ('{ base = "14 us", per_rank = "0.3 us" }', "[]", "inside.latency", "or a tab"),
        (
            '{ base = "14 us", per_rank = "0.3 us" }',
            '"-1 s"',
            "inside.latency",
            "not neg",
        ),
        ('link_of = "node"', 'link_of = "rack"', "between.link_of", "rank or node"),
        ("1.5 ps/byte", "1.5 ps", "permutation.per_byte", "got '1.5 ps'"),
        (
            'dtype = "bf16"',
            'dtype = "fp6"',
            "grouped_gemm[0]",
            "one of fp32, bf16, fp8, fp4",
        ),
        ("[8, 8,", "[4, 8,", "grouped_gemm[0].points[0]", "rows must be >= active"),
        ("[8, 8,", "[8.5, 8,", "grouped_gemm[0].points[0].rows", "a whole number"),
        ("[8, 8,", "[8,", "grouped_gemm[0].points[0]", "wanted [rows, active, sec"),
        ("points = [", "points = 5\nodd = [", "grouped_gemm[0].points", "got 5"),
        ('machine = "2', 'host = 1\nmachine = "2', "calibration.host", "unknown"),
        ("  [0, ", "  [1e9, ", "pairs", "to itself, got 1000000000.0 for rank 0"),
        ("  [0, ", "  [", "pairs", "square: row 0 has 7 values"),
        ("  [0, ", '  ["0 s", ', "pairs.bandwidth[0][0]", "got '0 s'"),
        ("  [0, 24e9", "  [0, inf", "pairs.bandwidth[0][1]", "got inf"),
        ("  [0, 24e9", "  [0, 24", "pairs.bandwidth[0][1]", "was the unit forgotten"),
        ("  [0, 24e9", "  [0, 0", "pairs.bandwidth[0][1]", "got 0"),
        ("bandwidth = [\n", "bandwidth = 5\nodd = [\n", "pairs.bandwidth", "got 5"),
        ("[pairs]", "[pairs]\nlatency = 1", "pairs.latency", "unknown, wanted one of"),
        ("median = 0.03", "median = -1", "calibration.residuals[0]", "must be >= 0"),
        ("median = 0.03", "", "calibration.residuals[0].median", "is missing"),
    ],
)
def test_what_a_file_must_not_say(tmp_path, old, new, key, message):
    path = edited(tmp_path, old, new)
    with pytest.raises(InvalidProblemError) as error:
        read_hardware(path)
    assert str(error.value).startswith(f"{path}: {key}:")
    assert message in str(error.value)


def test_a_latency_may_be_one_time(tmp_path):
    same = read_hardware(
        edited(tmp_path, '{ base = "14 us", per_rank = "0.3 us" }', '"14 us"')
    )
    assert same.latency(4, between_nodes=False) == 14e-6


def test_what_is_no_toml_is_refused(tmp_path):
    path = tmp_path / "odd.toml"
    for content in (b"name = ", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(InvalidProblemError, match=r"odd\.toml: not a TOML file"):
            read_hardware(path)


@pytest.mark.parametrize(
    ("find", "known"), [(find_hardware, HARDWARE), (find_network, NETWORKS)]
)
def test_names_and_files_are_found(tmp_path, find, known):
    name = next(iter(known))
    assert find(name) == find(name.upper()) == known[name]
    copy = tmp_path / "copy.toml"
    copy.write_text(known.path(name).read_text())
    assert find(str(copy)) == known[name]
    with pytest.raises(InvalidProblemError, match=rf"one of {name}, .*, or a file"):
        find("abacus")
    with pytest.raises(OSError, match="missing"):
        find(str(tmp_path / "missing.toml"))


def test_a_network_is_no_hardware():
    with pytest.raises(
        InvalidProblemError, match=r"format: wanted .moetuner\.hardware"
    ):
        read_hardware(NETWORKS.path("efa"))
    with pytest.raises(InvalidProblemError, match=r"format: wanted .moetuner\.network"):
        read_network(HARDWARE.path("h100"))
    with pytest.raises(InvalidProblemError, match="got 'efa', which is for `network`"):
        find_hardware("efa")
    with pytest.raises(InvalidProblemError, match="got 'H100', which is for `hard"):
        find_network("H100")


def test_a_network_may_be_named_between_nodes(tmp_path):
    start, end = EXAMPLE.index("[between]"), EXAMPLE.index("[permutation]")
    head = EXAMPLE.index("[matmul_rate]")
    path = tmp_path / "named.toml"
    for name in ("ethernet-25", "pigeon"):
        path.write_text(
            EXAMPLE[:head]
            + f'between = "{name}"\n'
            + EXAMPLE[head:start]
            + EXAMPLE[end:]
        )
        if name in NETWORKS:
            found = read_hardware(path)
            assert found.nic_bandwidth == 25e9 / 8
            assert found.nic_of is LinkOf.NODE
        else:
            with pytest.raises(InvalidProblemError, match=r"between: .* one of efa, "):
                read_hardware(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bandwidth(egress=(), ingress=(1.0,)), "egress must be positive"),
        (lambda: Bandwidth(egress=(1.0, -1.0), ingress=(1.0,)), "got -1.0"),
        (lambda: Latency(base=-1.0), "base must be >= 0 s"),
        (lambda: Latency(base=0.0, per_rank=float("nan")), "per_rank must be >= 0"),
        (lambda: dataclasses.replace(HARDWARE["h100"], name=3), "printable text"),
        (lambda: dataclasses.replace(HARDWARE["h100"], sources="x"), "list of texts"),
        (lambda: dataclasses.replace(HARDWARE["h100"], ranks_per_node=0), "from 1 to"),
        (lambda: dataclasses.replace(HARDWARE["h100"], nic_of="rack"), "rank, node"),
        (lambda: Network(name="x", bandwidth=0, latency=0), "bandwidth must be pos"),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(InvalidProblemError, match=message):
        make()
