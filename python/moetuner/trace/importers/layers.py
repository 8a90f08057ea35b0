"""Which rows of a recording are of which layers: one rule for every reader.

Engines keep a row for every hidden layer, or one for each MoE layer, and most do not
say which. Numbers that are given (``--layers``) and all lie within the rows pick rows;
else they name rows in order: all of them, or those that route. Where a layer has a name
of its own, as modules of a model have, its number is in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


MAX_LAYER = 1 << 16
"""Layers have smaller numbers."""
_OF_LAYER = re.compile(r"layers?[\W_]*(\d{1,5})(?!\d)", re.IGNORECASE)
_ONLY = re.compile(r"(?!\s*[-+])\D*(\d{1,5})\D*")  # with a sign it is no name


def layer_number(name: str) -> int | None:
    """The number of a layer by its name; None where the name does not say one.

    The number behind the word layer, or the only one.

    Examples
    --------
    >>> [layer_number(n) for n in ("3", "model.layers.3.mlp", "v2.layer_3", "h.3.b.1")]
    [3, 3, 3, None]
    """
    found = _OF_LAYER.findall(name)
    if not found and (only := _ONLY.fullmatch(name)):
        found = [only[1]]
    if len(found) != 1 or int(found[0]) >= MAX_LAYER:
        return None
    return int(found[0])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NamedRows:
    """Rows of a recording that hold a layer's routing.

    Parameters
    ----------
    rows
        int64 [L], where each layer's row is.
    layer_ids
        int32 [L], the model's own number of it.
    """

    rows: NDArray[np.int64]
    layer_ids: NDArray[np.int32]


def name_rows(
    routed: NDArray[np.bool_],
    given: tuple[int, ...] | None,
    note: Callable[[str], Any],
) -> NamedRows:
    """The layers of a recording's rows.

    Parameters
    ----------
    routed
        bool [rows], which of them route some token.
    given
        The model's own numbers of its MoE layers, or None.
    note
        Called with what was assumed.

    Raises
    ------
    InvalidTraceError
        When no row routes, or the given layers fit neither all rows nor those that do.
    """
    routing = np.flatnonzero(routed)
    if given is None:
        if not routing.size:
            raise InvalidTraceError(
                "no layer of the recording routes any token; `layers` says which ones "
                "do"
            )
        if routing.size < routed.size:
            dense = np.flatnonzero(~routed).tolist()
            which = f"layers {dense} hold"
            if len(dense) == 1:
                which = f"layer {dense[0]} holds"
            note(f"{which} no routing: taken as dense")
        return NamedRows(rows=routing, layer_ids=routing.astype(np.int32))
    layer_ids = np.array(given, np.int32)
    if given[-1] < routed.size:
        left_out = np.setdiff1d(routing, layer_ids)
        if left_out.size:
            raise InvalidTraceError(
                f"layer {left_out[0]} routes tokens, but is none of `layers`"
            )
        return NamedRows(rows=layer_ids.astype(np.int64), layer_ids=layer_ids)
    if len(given) == routed.size:
        return NamedRows(rows=np.arange(routed.size), layer_ids=layer_ids)
    if len(given) == routing.size:
        return NamedRows(rows=routing, layer_ids=layer_ids)
    raise InvalidTraceError(
        f"import: layer {given[-1]} of `layers` is beyond the {routed.size} recorded "
        f"ones, and {len(given)} numbers name neither those rows in order nor the "
        f"{routing.size} that route"
    )
