"""What a release says of itself in several places is the same in all of them."""

import itertools
import re
import subprocess
from importlib import metadata, resources
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

REPOSITORY = Path(__file__).parents[1]
PROJECT = (REPOSITORY / "pyproject.toml").read_text()
CI = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
VERSION = re.search(r'^version = "(.+)"$', PROJECT, re.MULTILINE).group(1)


def test_the_installed_version_is_the_one_of_the_sources():
    assert metadata.version("moetuner") == VERSION


def test_the_changelog_begins_with_this_version_and_its_date():
    changelog = (REPOSITORY / "CHANGELOG.md").read_text()
    newest, date = re.search(r"^## \[(.+)\] - (\S+)$", changelog, re.MULTILINE).groups()
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert newest == citation["version"] == VERSION
    assert date == str(citation["date-released"])


def test_type_checkers_are_told_that_there_are_types():
    assert resources.files("moetuner").joinpath("py.typed").is_file()


def test_hosted_ci_has_every_python_that_the_package_claims():
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    oldest = re.search(r'^requires-python = ">=(.+)"$', PROJECT, re.MULTILINE).group(1)
    assert claimed[0] == oldest
    for job in ("test", "wheel"):
        assert CI["jobs"][job]["strategy"]["matrix"]["python"] == claimed


def test_hosted_ci_has_the_oldest_torch_and_the_newest():
    oldest = re.search(r'^torch = \["torch>=(.+)"\]$', PROJECT, re.MULTILINE).group(1)
    matrix = CI["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["torch"] == [f"torch=={oldest}.*", "torch"]
    assert {"g++", "clang++"} == {
        *matrix["cxx"],
        *(more["cxx"] for more in matrix["include"]),
    }


def _commands():
    steps = itertools.chain(*(job["steps"] for job in CI["jobs"].values()))
    return sorted({step["run"] for step in steps if "run" in step})


@pytest.mark.parametrize("command", _commands())
def test_what_hosted_ci_runs_exists(command):
    program, *words = command.split()
    if program == "make":
        subprocess.run(
            ["make", "-n", *words], cwd=REPOSITORY, check=True, capture_output=True
        )
    else:
        assert (REPOSITORY / program).is_file()
