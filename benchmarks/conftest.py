import sys
from pathlib import Path

import harness
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


@pytest.hookimpl
def pytest_benchmark_update_json(output_json):
    """Keep what a reader needs: the environment, and statistics instead of samples."""
    output_json["environment"] = harness.environment()
    output_json.pop("machine_info", None)
    output_json.pop("commit_info", None)
    kept = ("min", "median", "iqr", "max", "rounds")
    for entry in output_json["benchmarks"]:
        entry["stats"] = {name: entry["stats"][name] for name in kept}
        entry.pop("options", None)
