"""One layer's exchange: tokens to the ranks of their experts and back, counted.

Legend: T tokens here, K top-k, E experts, R most slots of an expert, G ranks, N nodes,
S slots per rank, P = G * S slots, M rows of the experts here, H hidden.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from moetuner.errors import InvalidProblemError, InvalidTraceError
from moetuner.nn.agreement import agree, misfit
from moetuner.nn.exchange_counts import ExchangeCounts
from moetuner.nn.exchange_options import (
    ExchangeOptions,
    Residency,
    describe,
    takes_two_levels,
)
from moetuner.nn.follow import Resident, follow_back, keys_of
from moetuner.nn.halves import Half, halves_of
from moetuner.nn.recompute import RECOMPUTED, first_pass, recomputing
from moetuner.ops import (
    Dispatched,
    NodeGroups,
    check_overflow,
    combine,
    dispatch,
    node_groups,
    set_transport,
)
from moetuner.ops._collectives import group_named
from moetuner.ops._ranges import ranged
from moetuner.placement.tables import PlacementTables

if TYPE_CHECKING:
    from collections.abc import Callable

    from moetuner.placement.model import Placement

    RunExperts = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

ATTRIBUTE = "moetuner_exchange"
"""Where an experts module of another library keeps its `Exchange`: not as a submodule,
so that the library's own loading and saving does not meet it."""


class Seen(NamedTuple):
    """One call of an exchange, for `record_run`."""

    layer: int
    ids: torch.Tensor  # int32 [T, K]
    counted: torch.Tensor  # by the exchange, before this call


class Exchange(torch.nn.Module):
    """Sends the tokens of one layer where a placement put their experts, and counts.

    Every rank of the group makes one from the same placement, and calls it with any
    number of tokens.

    Parameters
    ----------
    placement
        For the ranks of the group; knows the layer.
    group
        Its ranks hold the experts; None: all.
    layer
        The model's number of the layer; None where the placement has only one.
    options
        How tokens travel.
    device
        Of the tokens.
    num_experts
        E of the model, where the caller knows it: checked.
    problem
        What the caller found wrong on this rank: raised on all.

    Raises
    ------
    InvalidPlacementError
        On every rank: when the placement does not fit the group or the model on any of
        them, or when placement, layer, residency, levels or capacity differ between
        ranks. One small exchange finds that out.

    Notes
    -----
    On several nodes rows take two levels: see `Levels`. `describe` says what is used.

    ``counters``, int64 [1 + G + N + P], is added to by each call: tokens, rows to each
    rank and node, choices of each slot; with two levels also rows that this rank passed
    on to each rank of its node. What activation checkpointing computes again is counted
    once. Tables and counters are no buffers: wrappers that make all ranks alike, or
    allocate a module's memory anew, must not reach them. They move with the module, and
    to the tokens' device.
    """

    candidates: torch.Tensor
    num_candidates: torch.Tensor
    counters: torch.Tensor
    overflow: torch.Tensor

    def __init__(
        self,
        placement: Placement,
        group: dist.ProcessGroup | None = None,
        *,
        layer: int | None = None,
        options: ExchangeOptions | None = None,
        device: torch.device | str | None = None,
        num_experts: int | None = None,
        problem: str = "",
    ) -> None:
        super().__init__()
        group = group or dist.group.WORLD
        if group is None:
            raise InvalidProblemError(
                "Exchange: there is no process group: call "
                "torch.distributed.init_process_group first"
            )
        self.group_name: str = group.group_name
        self.options = options or ExchangeOptions()
        self.layer = int(placement.layer_ids[0]) if layer is None else layer
        self.row_bytes = 0
        self.routing: list[Seen] | None = None
        trouble = misfit(placement, group, num_experts, self.layer)
        if layer is None and placement.num_layers > 1:
            trouble = trouble or (
                f"the placement has layers {placement.layer_ids.tolist()}: say which "
                f"one this is, by layer="
            )
        wanted = f"layer {self.layer}, {self.options.in_words()}"
        agree(placement, group, trouble or problem, wanted)
        self._set_tables(placement, torch.device(device or "cpu"))
        if self.options.chooses_transport:
            set_transport(
                self.nodes.inside if self.nodes else self.group_name,
                self.options.transport,
                senders=self.options.senders,
                blocks=self.options.most_blocks,
            )

    def set_placement(self, placement: Placement) -> None:
        """Follow another placement from now on; counters begin again at zero.

        It is not checked whether all ranks do: `moetuner.nn.apply_placement` does that,
        and moves the weights.
        """
        self._set_tables(placement, self.candidates.device)

    def forward(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        run_experts: RunExperts,
    ) -> torch.Tensor:
        """Send, run, and sum at home.

        Parameters
        ----------
        x, topk_ids, topk_weights
            [T, H], int32 or int64 [T, K], [T, K]; ids outside [0, E) are padding.
        run_experts
            Rows [M, H] by slot and their end offsets int32 [S], to rows [M, H].

        Returns
        -------
        torch.Tensor
            [T, H] of the dtype that the experts return.

        Raises
        ------
        InvalidProblemError
            When `run_experts` returns more or fewer rows.
        """
        self._begin(x, topk_ids)
        if self.options.overlap:
            from moetuner.nn.overlap import run_halves  # loads torch's compiler

            cut = halves_of(x, topk_ids, topk_weights, self._candidates_from)
            compute = partial(self._compute, run_experts)
            sums: torch.Tensor = run_halves(cut, self._send, compute)
            return sums
        sent = self._send(Half(x, topk_ids, topk_weights, self.candidates))
        return combine(self._compute(run_experts, sent), sent.handle)

    def follow(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        run_experts: RunExperts,
        keys: torch.Tensor | None = None,
    ) -> Resident:
        """Send, run, and sum where each token's first expert is.

        Parameters
        ----------
        keys
            int64 [T, 2], home rank and row of each token here; None: they are at home.

        Raises
        ------
        InvalidProblemError
            When the options have another residency, which may be of fixed sizes or
            of halves.
        InvalidTraceError
            Under `record_run` when tokens are not at home: its trace has one line for
            each token, which another rank began. On two levels where two tokens that
            end here have the same key.
        """
        if self.options.residency is not Residency.FOLLOW:
            raise InvalidProblemError(
                f"Exchange.follow: wanted ExchangeOptions(residency='follow'), got "
                f"{self.options.residency.value}"
            )
        if self.routing is not None and keys is not None:
            raise InvalidTraceError(
                f"record_run: tokens that follow their experts are not at home at "
                f"layer {self.layer}: record with residency home"
            )
        self._begin(x, topk_ids)
        sent = self._send(Half(x, topk_ids, topk_weights, self.candidates))
        done = self._compute(run_experts, sent)
        if keys is None:
            keys = keys_of(len(x), self.group_name, x.device)
        tables = (self.candidates, self.num_candidates, self.slots_per_rank)
        return follow_back(x, topk_ids, keys, sent, done, tables)

    @property
    def slots_per_rank(self) -> int:
        """S, experts (or empty slots) on each rank."""
        return self.tables.slots_per_rank

    def counts(self) -> ExchangeCounts:
        """What was counted on this rank so far; **waits for the device**."""
        return ExchangeCounts.of(
            self.counters.cpu().numpy(),
            self.placement,
            self.row_bytes,
            self.tables.rank,
        )

    def describe(self) -> str:
        """What is used to carry tokens, in words."""
        return describe(
            self.options,
            self.placement.topology,
            self.group_name,
            self.nodes,
            on_cuda=self.candidates.is_cuda,
        )

    def check_overflow(self) -> None:
        """Raise when the fixed form left rows out so far; **waits for the device**.

        Raises
        ------
        ExchangeOverflowError
            Saying how many rows, on this rank.
        """
        check_overflow(self.overflow)

    def reset(self) -> None:
        """Set counters and overflow to zero."""
        self.counters.zero_()
        self.overflow.zero_()

    def _begin(self, x: torch.Tensor, topk_ids: torch.Tensor) -> None:
        """What one call does once."""
        self.go_to(x.device)
        if self.routing is not None and not recomputing():
            # Ids beyond int32 would become experts here; dispatch refuses them later.
            ids = topk_ids.detach().clamp(-1, self.tables.num_experts)
            ids = first_pass(ids.to(torch.int32), RECOMPUTED)
            self.routing.append(Seen(self.layer, ids, self.counters.clone()))
        self.row_bytes = x.shape[-1] * x.element_size()

    def _send(self, half: Half) -> Dispatched:
        """Dispatch the tokens of a call, or half of them, and count them."""
        again = recomputing()  # counted already
        compiling = torch.compiler.is_compiling()
        counted = torch.zeros_like(self.counters) if compiling else self.counters
        sent = dispatch(
            half.x.contiguous(),
            half.topk_ids.contiguous(),
            half.topk_weights.contiguous(),
            half.candidates,
            self.num_candidates,
            self.slots_per_rank,
            self.group_name,
            ranks_per_node=self.tables.ranks_per_node,
            nodes=self.nodes,
            capacity=self.options.share(self.options.capacity),
            max_rows=self.options.share(self.options.max_rows),
            counters=None if again else counted,
        )
        if compiling:
            self.counters += first_pass(counted)
        if sent.handle.overflow is not None and not again:
            self.overflow += first_pass(sent.handle.overflow)
        return sent

    def _compute(self, run_experts: RunExperts, sent: Dispatched) -> torch.Tensor:
        done = expert(run_experts, sent).contiguous()
        # Rows that are not there would count as padding. Compiled, that is unknown.
        if not torch.compiler.is_compiling() and len(done) != len(sent.rows):
            raise InvalidProblemError(
                f"exchange: the experts of layer {self.layer} returned {len(done)} "
                f"rows, wanted {len(sent.rows)}, one for each that they were given"
            )
        return done

    def _candidates_from(self, token: int) -> torch.Tensor:
        """The table for tokens from that one on: token t keeps its turn."""
        width = self.candidates.shape[1]
        if width == 1:
            return self.candidates
        turn = torch.arange(width, device=self.candidates.device) + token
        turn = turn % self.num_candidates.clamp(min=1)[:, None]
        return self.candidates.gather(1, turn)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> Exchange:
        """Follow the module to another device; counts go along unless it is meta."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call,unused-ignore]
        probe = torch.empty(0, dtype=torch.int64, device=self.counters.device)
        self.go_to(fn(probe).device)
        return self

    def go_to(self, device: torch.device) -> None:
        """Put tables and counters on a device; counts go along unless one is meta."""
        former = self.counters, self.overflow
        if device == former[0].device:
            return
        self._set_tables(self.placement, device)
        if not (device.type == "meta" or former[0].is_meta):
            self.counters.copy_(former[0])
            self.overflow.copy_(former[1])

    def _set_tables(self, placement: Placement, device: torch.device) -> None:
        rank = group_named(self.group_name).rank()
        self.placement = placement
        self.tables = PlacementTables.of(placement, rank)
        row = self.tables.row_of(self.layer)
        topology = placement.topology
        size = 1 + topology.num_ranks + topology.num_nodes + placement.num_slots
        self.nodes: NodeGroups | None = None
        if takes_two_levels(self.options, topology):
            self.nodes = node_groups(self.group_name, topology.ranks_per_node)
            size += topology.ranks_per_node
        fresh = {
            "candidates": torch.from_numpy(self.tables.candidates[row]).to(device),
            "num_candidates": torch.from_numpy(self.tables.num_candidates[row]).to(
                device
            ),
            "counters": torch.zeros(size, dtype=torch.int64, device=device),
            "overflow": torch.zeros(1, dtype=torch.int32, device=device),
        }
        for name, tensor in fresh.items():
            old = vars(self).get(name)
            if old is None or (old.shape, old.device) != (tensor.shape, tensor.device):
                # As for buffers, compiled code may rely on the address.
                tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
                setattr(self, name, tensor.contiguous())
            else:
                old.copy_(tensor)  # captured graphs keep reading the same memory


@ranged
def expert(run_experts: RunExperts, sent: Dispatched) -> torch.Tensor:
    """The experts, by the name of their range."""
    return run_experts(sent.rows, sent.end_offsets)
