"""torch.ops.moetuner: what runs beside the model. Importing this needs torch."""

from moetuner.ops._library import load_library

load_library()

from moetuner.ops import _follow  # noqa: E402, F401 - what compilers must know
from moetuner.ops.combine import combine  # noqa: E402
from moetuner.ops.count_routing import count_routing  # noqa: E402
from moetuner.ops.dispatch import (  # noqa: E402
    Dispatched,
    ExchangeHandle,
    NodeHop,
    buffer_nbytes,
    check_overflow,
    dispatch,
)
from moetuner.ops.node_groups import NodeGroups, node_groups  # noqa: E402
from moetuner.ops.permute import (  # noqa: E402
    Permuted,
    choices_to_rows,
    permute,
)
from moetuner.ops.transport import (  # noqa: E402
    Transport,
    describe_transport,
    set_transport,
)
from moetuner.ops.unpermute import unpermute  # noqa: E402

__all__ = [
    "Dispatched",
    "ExchangeHandle",
    "NodeGroups",
    "NodeHop",
    "Permuted",
    "Transport",
    "buffer_nbytes",
    "check_overflow",
    "choices_to_rows",
    "combine",
    "count_routing",
    "describe_transport",
    "dispatch",
    "node_groups",
    "permute",
    "set_transport",
    "unpermute",
]
