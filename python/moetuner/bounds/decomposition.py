"""The modelled time of a workload, cut into pieces that are bounded one by one.

"Group" is a node or a rank, see `moetuner.bounds.link_level`.

Legend: T tokens, L layers, E experts, K top-k, n items.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._core import Rows
from moetuner.bounds.counting import Counting, LayerShare, expert_rows
from moetuner.bounds.gram import Groups
from moetuner.bounds.priced_sets import Maxima, PricedSets, few_enough
from moetuner.bounds.relaxation import RelaxedPiece
from moetuner.bounds.visits import Visits
from moetuner.evaluation.cost import CostModel, Homes
from moetuner.evaluation.workload import num_batches
from moetuner.trace import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem

    Floats = NDArray[np.float64]


class Decomposition:
    """The objective of one problem, and how it falls into pieces."""

    def __init__(
        self, problem: PlacementProblem, *, replicas: bool, known: Placement | None
    ) -> None:
        self.problem, self.workload = problem, problem.workload
        self.cost: CostModel = problem.workload.cost
        self.counting = Counting(problem, replicas=replicas)
        self.level = self.counting.level
        self.known = known if known is None or not known.has_replicas else None

    def pieces(self) -> list[RelaxedPiece | PricedSets]:
        """Pieces whose bounds add up to one of the objective.

        On one node compute and links look at the same groups, the ranks, and stay
        together; on several nodes compute is a piece of its own.
        """
        num_layers = self.problem.num_layers
        shares = [self.counting.shares(layer) for layer in range(num_layers)]
        if self._prices_sets():
            return [self._priced_piece(*pair) for pair in enumerate(shares)]
        apart = self.level.ranks_per_group > 1
        pieces: list[RelaxedPiece | PricedSets] = []
        if self.cost.homes is not Homes.FOLLOW or num_layers == 1:
            pieces += [
                self._links_piece(f"{layer}", layer, [(layer, 1.0)], shares, apart)
                for layer in range(num_layers)
            ]
        else:
            for layer in range(1, num_layers):
                own = [(layer, 1.0 if layer == num_layers - 1 else 0.5)]
                own.append((layer - 1, 1.0 if layer == 1 else 0.5))
                name = f"{layer - 1}-{layer}"
                pieces.append(self._links_piece(name, layer, own, shares, apart))
        if apart:  # last: of a short time, links make more
            pieces += [
                self._compute_piece(layer, share) for layer, share in enumerate(shares)
            ]
        return pieces

    def _prices_sets(self) -> bool:
        """Whether all sets of experts that a rank can hold are priced one by one."""
        level, tokens = self.level, self.level.rows is not Rows.TO_ALL
        maxima = sum(num_batches(batches) for batches in self.workload.batches)
        return (
            level.equal
            and level.ranks_per_group == 1
            and self.cost.homes is Homes.UNIFORM
            and few_enough(level.num_groups, level.slots, maxima * (1 + tokens))
        )

    def _priced_piece(self, layer: int, shares: list[LayerShare]) -> PricedSets:
        level, counting = self.level, self.counting
        parts = ("compute", "dispatch", "combine")
        least = sum(
            getattr(share, f"{part}_least") for share in shares for part in parts
        )
        planes = tuple(
            (plane.row / counting.top_speed, plane.expert / counting.top_speed)
            for plane in counting.price.busy_planes
        )
        maxima, launches = [], 0.0
        for trace, batches, weight in zip(
            self.workload.traces,
            self.workload.batches,
            counting.weights(),
            strict=True,
        ):
            rows = expert_rows(trace, batches, layer)
            launches += weight * counting.launches(rows)
            per_visit = level.leaves * (level.dispatch + level.combine)
            tokens: list[NDArray[Any]] = []
            link_floor = np.zeros(0)
            if level.rows is not Rows.TO_ALL:
                assert isinstance(trace, Trace)
                ids = trace.topk_ids[:, layer]
                floor = counting.min_rows(ids, batches, rows, True)
                link_floor = floor * (level.dispatch + level.combine)
                tokens = [ids[batches == batch] for batch in range(len(rows))]
                if level.rows is Rows.PER_EXPERT:  # a row of its own for each
                    tokens = [of[of >= 0][:, None] for of in tokens]
            maxima.append(
                Maxima(
                    rows=rows,
                    compute_floor=counting.compute_floor(rows),
                    planes=planes,
                    tokens=tuple(tokens),
                    link_floor=link_floor,
                    per_visit=per_visit,
                    weight=weight,
                )
            )
        known = self.known.rank_of()[layer] if self.known else None
        return PricedSets(
            name=f"{layer}",
            least=least,
            constant=launches
            + sum(share.dispatch_base + share.combine_base for share in shares),
            num_groups=level.num_groups,
            slots=level.slots,
            maxima=tuple(maxima),
            known=known,
        )

    def _compute_piece(self, layer: int, shares: list[LayerShare]) -> RelaxedPiece:
        """Of ranks where links are of nodes: compute, and hops inside nodes."""
        least = sum(share.compute_least + share.inside_least for share in shares)
        ranks = self.problem.topology.num_ranks
        slots = self.problem.slots_per_rank
        groups = Groups(num_groups=ranks, sizes=(slots,))
        options = self._options([(layer, 1.0)], {layer: 0}, [shares], groups, 0.0)
        visits = self._inside_visits(layer)
        if not visits:
            options = options[1:]  # the first is counting
        name = f"{layer} compute"
        if not self.level.equal or not options:
            return RelaxedPiece(name=name, least=least)
        return RelaxedPiece(
            name=name,
            least=least,
            groups=groups,
            options=tuple(options),
            visits=tuple(visits),
            together=self._together_on_ranks(groups, layer),
        )

    def _inside_visits(self, layer: int) -> list[Visits]:
        """Visits to ranks, which hops inside nodes go to."""
        inside = self.counting.inside(layer)
        visits: list[Visits] = []
        for trace, batch in zip(
            self.workload.traces if inside else (),
            self.counting.weights() if inside else (),
            strict=True,
        ):
            assert isinstance(trace, Trace)
            ids = trace.topk_ids[:, layer].astype(np.int64)
            some = ids[(ids >= 0).any(axis=1)]
            seconds = batch * inside / self.problem.topology.num_ranks
            _add(visits, Visits(items=some, weight=seconds, free=0))
        return visits

    def _together_on_ranks(self, groups: Groups, layer: int) -> Floats | None:
        """Y of the known placement, whose groups are ranks."""
        if self.known is None:
            return None
        rank_of = self.known.rank_of()[layer]
        group = -1 - np.arange(groups.num_items)
        group[: len(rank_of)] = rank_of
        return np.asarray(group[:, None] == group, np.float64)

    def _options(
        self,
        own: list[tuple[int, float]],
        offset: dict[int, int],
        shares: list[list[LayerShare]],
        groups: Groups,
        constant: float,
    ) -> list[tuple[float, Floats]]:
        """(constant, weight): compute by counting; and by who shares a rank."""
        counted = searched = constant
        weight = np.zeros((groups.num_items, groups.num_items))
        for (index, part), of_layer in zip(own, shares, strict=True):
            at = offset[index]
            for share in of_layer:
                counted += part * share.compute_least
                searched += part * share.compute_base
                if share.compute is not None:
                    size = len(share.compute)
                    weight[at : at + size, at : at + size] -= part * share.compute
        options = [(counted, np.zeros_like(weight))]
        if weight.any():
            options.append((searched, weight))
        return options

    def _links_piece(
        self,
        name: str,
        layer: int,
        own: list[tuple[int, float]],
        shares: list[list[LayerShare]],
        apart: bool,
    ) -> RelaxedPiece:
        """Links of `layer` (and combine of the layers `own`, by their parts).

        Compute is in it unless it is a piece apart.
        """
        least = base = 0.0
        for index, part in own:
            for share in shares[index]:
                least += part * share.combine_least
                base += part * share.combine_base
                if not apart:
                    least += part * share.compute_least
        dispatches = [layer] + ([0] if len(own) > 1 and layer == 1 else [])
        for index in dispatches:
            least += sum(share.dispatch_least for share in shares[index])
            base += sum(share.dispatch_base for share in shares[index])
        if not self.level.equal or self.level.num_groups == 1:
            return RelaxedPiece(name=name, least=least)
        level, anchors = self.level, self.cost.homes is Homes.RECORDED
        block = level.num_groups * level.slots
        sizes = (level.slots,) * len(own) + ((1,) if anchors else ())
        groups = Groups(num_groups=level.num_groups, sizes=sizes, apart=anchors)
        # Items of `layer` come first; the layer before it, or the homes, follow.
        offset = {index: 0 if index == layer else block for index, _ in own}
        links = np.zeros((groups.num_items, groups.num_items))
        visits: list[Visits] = []
        for index, part in own:
            at = offset[index]
            for share in shares[index]:
                if share.links is not None:
                    size = len(share.links)
                    links[at : at + size, at : at + size] -= part * share.links
            base += self._add_links("combine", index, part, at, block, links, visits)
        for index in dispatches:
            at = offset[index]
            base += self._add_links("dispatch", index, 1.0, at, block, links, visits)
        of_own = [[] if apart else shares[index] for index, _ in own]
        options = self._options(own, offset, of_own, groups, base)
        if not visits and not links.any():
            if len(options) == 1:
                return RelaxedPiece(name=name, least=max(least, options[0][0]))
            options = options[1:]
        return RelaxedPiece(
            name=name,
            least=least,
            groups=groups,
            options=tuple((constant, links + weight) for constant, weight in options),
            visits=tuple(visits),
            together=self._together(groups, offset, anchors),
        )

    def _add_links(
        self,
        part: str,
        layer: int,
        factor: float,
        at: int,
        block: int,
        weight: Floats,
        visits: list[Visits],
    ) -> float:
        """Add rows of one direction at `layer`, whose items begin at `at`.

        Returns seconds that are the same for every placement.
        """
        level, constant = self.level, 0.0
        per_row = level.dispatch if part == "dispatch" else level.combine
        uniform = self.counting.uniform(part, layer)
        for trace, batch in zip(
            self.workload.traces, self.counting.weights(), strict=True
        ):
            seconds = factor * batch * per_row / level.num_groups
            if level.rows is Rows.TO_ALL:
                if isinstance(trace, Trace) and self.cost.homes is Homes.FOLLOW:
                    constant += seconds * trace.num_tokens * (level.num_groups - 1)
                continue
            assert isinstance(trace, Trace)
            ids = trace.topk_ids[:, layer].astype(np.int64)
            ids = np.where(ids >= 0, ids + at, -1)
            home = self._homes(trace, part, layer, at, block)
            some = (ids >= 0).any(axis=1)
            if level.rows is Rows.PER_EXPERT:
                constant += self._add_copies(ids, home, uniform, seconds, weight)
                continue
            if uniform:
                _add(
                    visits,
                    Visits(items=ids[some], weight=seconds * level.leaves, free=0),
                )
                continue
            known = some & (home >= 0)
            if part == "combine" and self.cost.homes is Homes.FOLLOW:
                sets = ids[known]  # the home is the first of them
            else:
                sets = np.column_stack([ids[known], home[known]])
            _add(visits, Visits(items=sets, weight=seconds, free=1))
            _add(visits, Visits(items=ids[some & (home < 0)], weight=seconds, free=1))
        return constant

    def _homes(
        self, trace: Trace, part: str, layer: int, at: int, block: int
    ) -> NDArray[np.int64]:
        """Item at each token's home, int64 [T]; -1 where no item tells."""
        none = np.full(trace.num_tokens, -1, np.int64)
        if self.counting.uniform(part, layer):
            return none
        if self.cost.homes is Homes.RECORDED:
            assert trace.home_rank is not None
            home = trace.home_rank.astype(np.int64) // self.level.ranks_per_group
            return np.asarray(block + home)
        if part == "combine":
            first = trace.topk_ids[:, layer, 0].astype(np.int64)
            return np.where(first >= 0, first + at, -1)
        first = trace.topk_ids[:, layer - 1, 0].astype(np.int64)
        return np.where(first >= 0, first + block, -1)

    def _add_copies(
        self,
        ids: NDArray[np.int64],
        home: NDArray[np.int64],
        uniform: bool,
        seconds: float,
        weight: Floats,
    ) -> float:
        """Rows of `Rows.PER_EXPERT`: one for each expert away from the home."""
        copies = int((ids >= 0).sum())
        if self.cost.homes is Homes.UNIFORM:
            return 0.0  # the load says it, and more
        if uniform:
            return seconds * copies * self.level.leaves
        token, choice = np.nonzero(ids >= 0)
        expert, at_home = ids[token, choice], home[token]
        known = at_home >= 0
        np.add.at(weight, (expert[known], at_home[known]), seconds / 2)
        np.add.at(weight, (at_home[known], expert[known]), seconds / 2)
        return seconds * int(known.sum())

    def _together(
        self, groups: Groups, offset: dict[int, int], anchors: bool
    ) -> Floats | None:
        """Y of the known placement; experts without rows count as alone."""
        if self.known is None:
            return None
        rank_of = self.known.rank_of() // self.level.ranks_per_group
        group = -1 - np.arange(groups.num_items)
        for index, at in offset.items():
            group[at : at + rank_of.shape[1]] = rank_of[index]
        if anchors:
            group[-groups.num_groups :] = np.arange(groups.num_groups)
        return np.asarray(group[:, None] == group, np.float64)


def _add(visits: list[Visits], more: Visits) -> None:
    """Append `more`, or add its weight where the same sets are there already."""
    for i, known in enumerate(visits):
        if known.free == more.free and np.array_equal(known.items, more.items):
            visits[i] = replace(known, weight=known.weight + more.weight)
            return
    visits.append(more)
