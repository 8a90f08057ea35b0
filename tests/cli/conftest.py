import json

import numpy as np
import pytest
from moetuner.cli import app
from moetuner.trace import write_trace
from strategies import make_trace, random_ids
from typer.testing import CliRunner


class Folder:
    """A folder with traces, and the command line run on them in this process."""

    def __init__(self, path):
        self.path = path
        self.out = path / "placement.json"

    def trace(self, ids, num_experts=16, name="trace.safetensors", **fields):
        fields.setdefault("sequence", (np.arange(len(ids)) // 20).astype(np.int32))
        write_trace(make_trace(ids, num_experts, **fields), self.path / name)
        return self.path / name

    def run(self, *arguments):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    def plan(self, trace, *arguments, ranks=4, solver="lpt"):
        return self.run(
            *("plan", trace, "--ranks", ranks, "--solver", solver),
            *("--time-limit", 2, "--threads", 1, "--out", self.out, *arguments),
        )

    def plan_json(self, trace, *arguments, **options):
        result = self.plan(trace, "--json", *arguments, **options)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


@pytest.fixture
def ids(rng):
    """600 tokens, 3 layers, 16 experts, top-2, skewed."""
    return random_ids(rng, 600, 3, 16, 2)
