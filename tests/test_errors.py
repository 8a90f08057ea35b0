import inspect

import pytest
from moetuner import errors

OURS = [cls for _, cls in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("error", OURS)
def test_every_error_is_caught_by_the_base(error):
    assert issubclass(error, errors.MoetunerError)
    assert error.__doc__


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.InvalidTraceError, ValueError),
        (errors.InvalidPlacementError, ValueError),
        (errors.InvalidProblemError, ValueError),
        (errors.MissingDependencyError, ImportError),
    ],
)
def test_callers_may_catch_the_builtin_kind(error, builtin):
    assert issubclass(error, builtin)


def test_a_bad_value_is_not_mistaken_for_another():
    """Catching a wrong placement does not swallow a wrong trace."""
    kinds = [cls for cls in OURS if cls is not errors.MoetunerError]
    for one in kinds:
        assert [cls for cls in kinds if issubclass(one, cls)] == [one]
