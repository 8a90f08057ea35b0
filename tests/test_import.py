import pkgutil
import subprocess
import sys
from pathlib import Path

import moetuner
import pytest

REPOSITORY = Path(__file__).parents[1]


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_import_is_light():
    """Neither torch nor a solver comes with the package."""
    code = (
        "import sys, moetuner, moetuner.cli, moetuner.trace;"
        "heavy = ('torch', 'mip', 'scipy', 'matplotlib');"
        "print([n for n in heavy if n in sys.modules])"
    )
    assert run(code) == "[]"


def test_layers_load_no_compiler():
    """It takes as long as all else that they import."""
    pytest.importorskip("torch")
    code = "import sys, moetuner.nn; print('torch._dynamo' in sys.modules)"
    assert run(code) == "False"


def test_import_is_quick():
    """Under 0.3 s, the best of three."""
    code = (
        "import time; t = time.perf_counter(); import moetuner;"
        "print(time.perf_counter() - t)"
    )
    assert min(float(run(code)) for _ in range(3)) < 0.3


def test_every_public_name_exists():
    code = "import moetuner; print(all(hasattr(moetuner, n) for n in moetuner.__all__))"
    assert run(code) == "True"


def test_no_public_name_is_hidden_by_a_module():
    """Importing a submodule sets its name on the package, whatever stood there."""
    modules = {module.name for module in pkgutil.iter_modules(moetuner.__path__)}
    assert not modules & set(moetuner.__all__)


def test_unknown_names_are_refused():
    code = (
        "import moetuner\n"
        "try: moetuner.no_such_name\n"
        "except AttributeError as error: print(error)"
    )
    assert "no_such_name" in run(code)


def test_helpers_of_tests_share_no_name_with_each_other_or_with_benchmarks():
    """Both are imported by their bare names: in one process the first would win."""
    of_tests, of_benchmarks = (
        [
            path.name
            for path in (REPOSITORY / folder).rglob("*.py")
            if not path.name.startswith(("test_", "conftest"))
        ]
        for folder in ("tests", "benchmarks")
    )
    assert len(of_tests) == len(set(of_tests))
    assert not set(of_tests) & set(of_benchmarks)
