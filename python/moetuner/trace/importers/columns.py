"""What the columns of a table of routes mean, by the many names that loggers use.

Legend: K top-k.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetuner.errors import InvalidTraceError

if TYPE_CHECKING:
    from collections.abc import Iterable


class Column(enum.Enum):
    """What a column says of a route."""

    LAYER = "layer"
    EXPERTS = "experts"
    EXPERT = "expert"
    CHOICE = "choice"
    WEIGHTS = "weights"
    SEQUENCE = "sequence"
    STEP = "step"
    TOKEN = "token"
    RANK = "rank"
    PHASE = "phase"
    COUNT = "count"


# The first name that a table has is taken, so sure ones stand before vague ones.
_NAMES: dict[Column, tuple[str, ...]] = {
    Column.LAYER: (
        "layer_id", "layer_idx", "layer_index", "layer", "layer_number", "layer_num",
        "moe_layer", "moe_layer_id", "block_idx",
    ),
    Column.EXPERTS: (
        "topk_ids", "top_k_ids", "topk_idx", "topk_indices", "top_k_indices",
        "top_indices", "topk_experts", "top_k_experts", "selected_experts",
        "activated_expert_ids", "activated_experts", "routed_experts", "expert_ids",
        "expert_indices", "expert_idxs", "experts", "expert_list",
    ),
    Column.EXPERT: ("expert_id", "expert_idx", "expert_index", "expert"),
    Column.CHOICE: (
        "topk_rank", "top_k_rank", "expert_rank", "choice", "slot", "k", "topk_pos",
    ),
    Column.WEIGHTS: (
        "topk_weights", "top_k_weights", "topk_weight", "router_weights",
        "expert_weights", "gate_weights", "routing_weights", "weights", "weight",
    ),
    Column.SEQUENCE: (
        "request_id", "req_id", "request_idx", "request", "sequence_id", "seq_id",
        "seq_idx", "sequence", "seq", "prompt_id", "prompt_idx", "prompt_number",
        "sample_id", "sample_idx", "sample", "example_id", "conversation_id", "doc_id",
    ),
    Column.STEP: (
        "step", "step_id", "iteration", "iter", "forward_pass_id", "forward_step",
        "pass_id", "batch_number", "batch_id", "batch_idx", "batch",
    ),
    Column.TOKEN: (
        "token_idx", "token_index", "token_pos", "token_position", "position", "pos",
        "token_number", "token_no", "token_offset", "tok_idx", "token", "token_id",
    ),
    Column.RANK: ("home_rank", "dp_rank", "ep_rank", "rank"),
    Column.PHASE: ("phase", "stage", "is_decode", "is_prefill", "forward_mode"),
    Column.COUNT: ("count", "counts", "num_tokens", "token_count", "frequency", "load"),
}  # fmt: skip
_WIDE = re.compile(
    r"(?:expert|expert_id|expert_idx|topk|top|topk_id|e|k|choice)_?(\d{1,3})"
)
_WIDE_WEIGHT = re.compile(
    r"(?:weight|topk_weight|expert_weight|gate|prob|score|w)_?(\d{1,3})"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which column of a table is which.

    Parameters
    ----------
    names
        The table's own name of each column that it has.
    experts, weights
        Names of the columns that hold one choice each, in order of choice; empty where
        a list is in one column.
    """

    names: dict[Column, str]
    experts: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    @property
    def are_counts(self) -> bool:
        """Whether a row is a count of one expert, and not a token's route."""
        return Column.COUNT in self.names and Column.EXPERT in self.names

    @property
    def are_routes(self) -> bool:
        """Whether a row says which experts a token chose."""
        return bool(self.experts or {Column.EXPERTS, Column.EXPERT} & self.names.keys())


def columns_of(header: Iterable[object]) -> Columns:
    """The columns of a table, by their names."""
    plain = {_plain(str(name)): str(name) for name in header}
    names: dict[Column, str] = {}
    for column, known in _NAMES.items():
        name = next((plain[n] for n in known if n in plain), None)
        if name is not None:
            names[column] = name
    experts = () if Column.EXPERTS in names else _numbered(plain, _WIDE)
    if experts:
        names.pop(Column.EXPERT, None)
    if Column.EXPERTS in names:
        names.pop(Column.EXPERT, None)
    weights = () if Column.WEIGHTS in names else _numbered(plain, _WIDE_WEIGHT)
    return Columns(
        names=names,
        experts=experts,
        weights=weights if len(weights) == len(experts) else (),
    )


def check_routes(columns: Columns, header: Iterable[object]) -> None:
    """Refuse a table that says no token's experts.

    Raises
    ------
    InvalidTraceError
        Naming the columns that came, and those that would do.
    """
    if not columns.are_routes:
        raise InvalidTraceError(
            f"no column of experts among {[str(n) for n in header][:12]!r:.200}: "
            f"wanted one of {', '.join(_NAMES[Column.EXPERTS][:6])}, ..., or "
            f"expert_0, expert_1, ..., or expert_id"
        )


def _plain(name: str) -> str:
    """A name in small letters, with _ between its words."""
    return re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_")


def _numbered(plain: dict[str, str], pattern: re.Pattern[str]) -> tuple[str, ...]:
    """Names that one pattern numbers from 0 or 1 without a gap, in that order."""
    stems: dict[str, dict[int, str]] = {}
    for name, own in plain.items():
        match = pattern.fullmatch(name)
        if match is not None:
            stem = name[: match.start(1)]
            stems.setdefault(stem, {})[int(match[1])] = own
    for found in stems.values():
        order = sorted(found)
        if order[0] < 2 and order == list(range(order[0], order[0] + len(order))):
            return tuple(found[number] for number in order)
    return ()
