"""Tokens out of the rows that a recording keeps: which were written, at which layers.

Legend: T tokens, L rows of layers, K top-k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.base import as_ids, whole
from moetuner.trace.importers.layers import NamedRows, name_rows
from moetuner.trace.model import PADDING
from moetuner.trace.unwritten import routing_layers, without_unwritten

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.trace.importers.base import ImportOptions


class TokenRows:
    """The rows of one recording; its first tokens tell which layers route.

    Parameters
    ----------
    options
        Names of layers, and the number of experts to check ids against.
    layer_ids
        The model's own number of each row, where the recording has them: then every
        row is of an MoE layer.
    marked
        Whether the recording marks rows that nobody wrote itself, by -1.
    """

    def __init__(
        self,
        options: ImportOptions,
        layer_ids: NDArray[np.int32] | None = None,
        *,
        marked: bool = False,
    ) -> None:
        self._marked = marked
        self._options = options
        self._named: NamedRows | None = None
        if layer_ids is not None:
            rows = np.arange(len(layer_ids), dtype=np.int64)
            self._named = NamedRows(rows=rows, layer_ids=layer_ids)
        self._shape: tuple[int, ...] = ()
        self.unwritten = 0
        """Tokens so far that nobody wrote at any layer."""

    @property
    def layer_ids(self) -> NDArray[np.int32]:
        """The model's own layer numbers, int32; known after the first `routed`."""
        assert self._named is not None
        return self._named.layer_ids

    @property
    def rows(self) -> NDArray[np.int64]:
        """Where the rows of those layers are, int64."""
        assert self._named is not None
        return self._named.rows

    def routed(
        self, ids_TLK: NDArray[np.integer[Any]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
        """Places int64 [t] of the tokens that chose an expert, and their ids.

        Parameters
        ----------
        ids_TLK
            Expert ids as recorded, rows that nobody wrote among them.

        Raises
        ------
        InvalidTraceError
            When rows change shape, or a layer routes that none of the first tokens
            used.
        """
        ids = as_ids(whole(ids_TLK))
        if self._shape and ids.shape[1:] != self._shape:
            raise InvalidTraceError(
                f"responses change shape from {list(self._shape)} to "
                f"{list(ids.shape[1:])} (layers, top-k)"
            )
        if self._named is None:
            layers = np.asarray((ids > PADDING).any(axis=(0, 2)))
            if not self._marked:
                layers = routing_layers(ids)
            self._named = name_rows(layers, self._options.layers, self._options.note)
        self._shape = ids.shape[1:]
        rows = self._named.rows
        written = ids if self._marked else without_unwritten(ids, len(rows))
        dense = np.ones(ids.shape[1], bool)
        dense[rows] = False
        zero = 0 if ids.shape[2] == 1 and not self._marked else PADDING
        stray = written[:, dense] > zero
        if stray.any():
            layer = np.flatnonzero(dense)[np.argwhere(stray)[0][1]]
            raise InvalidTraceError(
                f"layer {layer} routes tokens, but none of the first: say with "
                f"`layers` which layers have experts"
            )
        places, routed = routed_tokens(written[:, rows], self._options.num_experts)
        self.unwritten += len(ids) - len(places)
        return places, routed


def routed_tokens(
    ids_TLK: NDArray[np.integer[Any]], num_experts: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """Places int64 [t] of the tokens that chose an expert somewhere, and their ids.

    Raises
    ------
    InvalidTraceError
        When an id is beyond `num_experts`.
    """
    places = np.flatnonzero((ids_TLK > PADDING).any(axis=(1, 2)))
    ids = np.ascontiguousarray(ids_TLK[places], np.int16)
    if num_experts is not None and ids.size and ids.max() >= num_experts:
        raise InvalidTraceError(
            f"expert id {ids.max()} is outside 0..{num_experts - 1}"
        )
    return places, ids


def written_tokens(ids_TLK: NDArray[np.int16]) -> NDArray[np.int16]:
    """Ids of the tokens that were written, where every row is of an MoE layer."""
    return routed_tokens(without_unwritten(ids_TLK, ids_TLK.shape[1]))[1]
