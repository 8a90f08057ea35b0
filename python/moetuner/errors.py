"""Every error that moetuner raises on purpose.

A message names the operation, the argument, what was wanted and what came.
"""


class MoetunerError(Exception):
    """Base of all errors raised by moetuner."""


class InvalidTraceError(MoetunerError, ValueError):
    """A routing trace, or the file that should hold one, breaks the format."""


class InvalidPlacementError(MoetunerError, ValueError):
    """A placement is not legal, or does not belong to the trace or problem."""


class InvalidProblemError(MoetunerError, ValueError):
    """A topology, cost model, problem or option makes no sense."""


class MissingStatisticsError(MoetunerError):
    """An operation needs a statistic that its source does not have."""


class SolverError(MoetunerError):
    """A solver failed, or was given a problem that it does not solve."""


class MissingDependencyError(MoetunerError, ImportError):
    """An optional package is needed; the message names it and how to get it."""


class ExchangeOverflowError(MoetunerError, RuntimeError):
    """Rows of a fixed-capacity exchange found no room."""


class CalibrationError(MoetunerError, RuntimeError):
    """Measuring a machine did not succeed: a rank is gone, or memory is too small."""
