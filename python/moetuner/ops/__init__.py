"""torch.ops.moetuner: what runs beside the model. Importing this needs torch."""

from moetuner.ops._library import load_library

load_library()

from moetuner.ops.count_routing import count_routing  # noqa: E402
from moetuner.ops.permute import Permuted, permute  # noqa: E402
from moetuner.ops.unpermute import unpermute  # noqa: E402

__all__ = ["Permuted", "count_routing", "permute", "unpermute"]
