"""Engines and backends by their names, as the documentation lists them."""

import re
from pathlib import Path

import pytest
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.backends import BACKENDS, wire_named
from moetuner.evaluation.cost import Wire

PAGE = (Path(__file__).parents[2] / "docs/engines.md").read_text()


def test_wires_and_backends_have_names():
    for wire in Wire:
        assert wire_named(wire.value) is wire
    assert wire_named("moetuner") is Wire.DEDUP
    assert wire_named("deepep") is Wire.DEDUP_PIPELINED
    assert wire_named("deepep_low_latency") is Wire.PER_EXPERT
    assert wire_named("moetuner-one-level") is Wire.DEDUP_RANKS
    assert not set(BACKENDS) & {wire.value for wire in Wire}
    with pytest.raises(InvalidProblemError, match=r"dedup_ranks.*deepep-ll.*'pigeon'"):
        wire_named("pigeon")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_that_sends_in_several_ways_says_which(engine):
    with pytest.raises(InvalidProblemError, match="that engine has several") as error:
        wire_named(engine)
    named = [name for name in BACKENDS if name in str(error.value)]
    assert len(named) >= 3


def test_the_documentation_lists_every_backend_with_its_wire():
    table = re.findall(r"^\| .* \| (`.*`) \| `(\w+)` \|.*$", PAGE, re.MULTILINE)
    listed = {
        name: wire for names, wire in table for name in re.findall(r"`([^`]+)`", names)
    }
    assert listed == {name: wire.value for name, wire in BACKENDS.items()}
