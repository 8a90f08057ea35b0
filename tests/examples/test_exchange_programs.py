"""The three programs on Gloo ranks; slow tests start them as their README says."""

import functools
import re
from pathlib import Path

import pytest
from forked import run_programs, torchrun

pytest.importorskip("torch", reason="torch is not installed")

EXAMPLES = Path(__file__).parents[2] / "examples" / "exchange"


def run(script, ranks=2):
    """What all ranks print: they are told what torchrun tells them."""
    every = run_programs([[EXAMPLES / script]] * ranks, cwd=Path.cwd())
    said = "".join(done.stdout for done in every)
    codes = [done.returncode for done in every]
    assert codes == [0] * ranks, said + "".join(done.stderr for done in every)
    return said


def started(script, ranks=2):
    """The same, where torchrun itself starts them."""
    return torchrun(EXAMPLES / script, ranks=ranks)


STARTERS = [run, pytest.param(started, marks=pytest.mark.slow)]


@pytest.mark.parametrize("start", STARTERS)
def test_ops(start):
    said = start("ops.py")
    told = re.findall(r"(\w+): (\d+) rows left a rank, predicted (\d+)", said)
    assert [name for name, *_ in told] == ["contiguous", "planned"], said
    assert all(int(counted) == int(predicted) > 0 for _, counted, predicted in told)
    assert "both give the same output" in said


@pytest.fixture(scope="module")
def layer_says():
    """What layer.py says on so many ranks; it runs once on each number."""
    return functools.cache(functools.partial(run, "layer.py"))


@pytest.mark.parametrize("start", STARTERS)
def test_layer(layer_says, start):
    said = layer_says(2) if start is run else start("layer.py")
    losses = losses_of(said)
    assert losses[1] < losses[0], said
    assert "placed: the output is the same" in said
    assert "counters are as predicted" in said
    assert "saved (8, 128, 32)" in said


def losses_of(said):
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_layer_trains_like_one_process(layer_says, ranks):
    """The same tokens on any number of ranks: the same losses, step after step."""
    alone = losses_of(layer_says(1))
    assert losses_of(layer_says(ranks)) == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_transformers_model():
    pytest.importorskip("transformers", reason="Transformers is not there")
    said = started("transformers_model.py")
    assert "2 ranks generate what one does: 20 tokens each" in said
    assert "counters are as predicted" in said
