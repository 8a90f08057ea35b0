"""Which experts are chosen together, and whether they share a rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetuner.report.html.charts import Line, line_chart
from moetuner.report.html.colors import scale_from_zero
from moetuner.report.html.content import Pair, figure, grid, note, section
from moetuner.report.html.heatmap import Axis, color_bar, heatmap
from moetuner.report.html.markup import Markup, tag
from moetuner.report.quantities import experts_by_rank, ranks_in_order, together

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.planning.scores import Comparison, Scored
    from moetuner.report.html.colors import Scale
    from moetuner.report.html.content import Numbers

_MAX_CELLS = 70_000
"""Of all matrices of one placement: 64 layers of 32 experts, one of 256."""
_CAP = 0.995


def coactivation(comparison: Comparison, numbers: Numbers) -> Markup:
    """Matrices of some layers in the order of ranks, and each layer's share."""
    title, counts = "Experts chosen together", comparison.statistics.coactivation
    if counts is None:
        lead = "This source only counted loads: which experts go together is unknown."
        return section("together", title, lead)
    pair = Pair.of(comparison)
    shares = [together(c.placement, counts) for c in pair.both()]
    shown = _layers_shown(counts, shares[-1] - shares[0])
    layers = comparison.statistics.layer_ids.tolist()
    blocks = [
        _matrices(comparison, pair, layer, first=i == 0)
        for i, layer in enumerate(shown)
    ]
    table = numbers.table(
        "together",
        "Share of pairs on one rank, by layer",
        ("layer", *(c.name for c in pair.both())),
        ((layer, *(float(s[i]) for s in shares)) for i, layer in enumerate(layers)),
    )
    return section(
        "together",
        title,
        _lead(pair, shares),
        _choice([layers[i] for i in shown], len(layers)),
        *blocks,
        grid(_share_chart(pair, layers, shares), _reading(comparison, pair)),
        table,
        _counts(comparison, shown, numbers),
    )


def _lead(pair: Pair, shares: list[NDArray[np.float64]]) -> str:
    words = " and ".join(
        f"{share.mean():.1%} with {c.name}"
        for c, share in zip(pair.both(), shares, strict=True)
    )
    return (
        f"Experts that a token needs together cost one row less when they share a "
        f"rank. Of all pairs that tokens chose, {words} are on one rank."
    )


def _layers_shown(counts: NDArray[np.int64], gained: NDArray[np.float64]) -> list[int]:
    """As many layers as fit, spread evenly, after the one that changed most."""
    num_layers, num_experts = counts.shape[:2]
    fit = max(_MAX_CELLS // num_experts**2, 0 if num_experts > 512 else 1)
    if fit == 0:
        return []
    most = int(np.abs(gained).argmax())
    spread = np.linspace(0, num_layers - 1, min(fit, num_layers)).round().astype(int)
    others = [layer for layer in dict.fromkeys(spread.tolist()) if layer != most]
    return [most, *sorted(others)][:fit]


def _choice(layers: list[int], num_layers: int) -> Markup:
    if not layers:
        return note("More experts than a page can show pair by pair.")
    options = (tag("option", f"layer {layer}", value=layer) for layer in layers)
    words = f"{len(layers)} of {num_layers} layers; first the one that changed most"
    return tag(
        "p",
        tag("label", "Show ", tag("select", *options, data_shows="layer")),
        tag("span", words, class_="hint"),
        class_="choice",
    )


def _matrices(comparison: Comparison, pair: Pair, layer: int, *, first: bool) -> Markup:
    counts = comparison.statistics.coactivation
    assert counts is not None
    pairs = counts[layer] * (1000.0 / max(comparison.statistics.num_tokens, 1))
    np.fill_diagonal(pairs, np.nan)
    scale = scale_from_zero(pairs, cap=_CAP, label="pairs per 1,000 tokens")
    number = int(comparison.statistics.layer_ids[layer])
    maps = [
        figure(
            f"{c.name}, layer {number}",
            _matrix(c, layer, pairs, scale, f"pair-{number}"),
            color=color,
        )
        for c, color in zip(pair.both(), pair.colors(), strict=True)
    ]
    return tag(
        "div",
        color_bar(scale, pairs, end=" or more", words="grey: with itself"),
        grid(*maps),
        data_layer=number,
        hidden=None if first else "",
    )


def _matrix(
    scored: Scored, layer: int, pairs: NDArray[np.float64], scale: Scale, where: str
) -> Markup:
    order = experts_by_rank(scored.placement, layer)
    ranks = ranks_in_order(scored.placement, layer)
    starts = np.flatnonzero(np.diff(ranks)) + 1
    if len(starts) > 32:  # lines at nodes only, or there is nothing but lines
        nodes = ranks // scored.placement.topology.ranks_per_node
        starts = np.flatnonzero(np.diff(nodes)) + 1
    labels = [str(expert) for expert in order]
    axis = Axis(
        name="expert, in the order of ranks",
        labels=labels,
        lines=starts.tolist(),
        show=False,
    )
    return heatmap(
        pairs[np.ix_(order, order)],
        scale,
        x=axis,
        y=axis,
        name=f"{scored.name}: pairs of experts in the order of ranks",
        lookup=f"{where} {','.join(labels)}",
    )


def _share_chart(
    pair: Pair, layers: list[int], shares: list[NDArray[np.float64]]
) -> Markup:
    lines = [
        Line(x=layers, y=(share * 100).tolist(), color=color, dash=dash, name=c.name)
        for c, share, color, dash in zip(
            pair.both(), shares, pair.colors(), pair.dashes(), strict=True
        )
    ]
    drawing = line_chart(
        lines,
        x="layer",
        y="% of pairs",
        name="Share of pairs of experts on one rank, by layer",
    )
    return figure("Pairs on one rank, by layer", drawing, pair.key())


def _reading(comparison: Comparison, pair: Pair) -> Markup:
    slots = pair.after.placement.slots_per_rank
    experts = comparison.statistics.num_experts
    chance = (slots - 1) / max(experts - 1, 1)
    return tag(
        "div",
        tag("h3", "How to read the matrices"),
        tag(
            "p",
            "Rows and columns are the experts of one layer, rank after rank; lines "
            "part the ranks (or nodes, where there are many). Strong squares along the "
            "diagonal are experts that tokens choose together and that share a rank.",
        ),
        tag(
            "p",
            f"A placement that knows nothing of pairs puts about {chance:.1%} of them "
            f"on one rank ({slots} of {experts} experts).",
        ),
        class_="reading",
    )


def _counts(comparison: Comparison, shown: list[int], numbers: Numbers) -> Markup:
    """Pairs of the layers shown, one table each so that a page finds them quickly."""
    counts = comparison.statistics.coactivation
    assert counts is not None
    experts = range(comparison.statistics.num_experts)
    return tag(
        "div",
        *(
            tag(
                "div",
                numbers.table(
                    f"pair-{number}",
                    f"Tokens that chose both experts, layer {number}",
                    ("expert", *(str(expert) for expert in experts)),
                    ((e, *map(int, counts[layer, e])) for e in experts),
                ),
                data_layer=number,
                hidden=None if i == 0 else "",
            )
            for i, layer in enumerate(shown)
            for number in (int(comparison.statistics.layer_ids[layer]),)
        ),
    )
