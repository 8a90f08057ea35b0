"""How the numbers came about, so that they can be made again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import moetuner
from moetuner._words import amount
from moetuner.report.html.content import section
from moetuner.report.html.markup import Markup, tag

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moetuner.planning.scores import Comparison
    from moetuner.report.html.markup import Child


def method(comparison: Comparison) -> Markup:
    """Options, sources and words."""
    return section(
        "method",
        "How this was made",
        "Every token's set of experts is priced exactly; intervals come from drawing "
        "whole batches again, the same ones for every placement.",
        tag(
            "div",
            tag("dl", *_pairs(_facts(comparison)), class_="facts"),
            tag("dl", *_pairs(_WORDS), class_="facts"),
            class_="grid",
        ),
    )


def _facts(comparison: Comparison) -> dict[str, str]:
    cost, about = comparison.cost, comparison.metadata
    origin = comparison.result.placement.provenance
    facts = {
        "model": about.model or "unknown",
        "recording": " / ".join(t for t in (about.source, about.dataset) if t)
        or "unknown",
        "trace": f"sha256 {comparison.trace_sha256}",
        "machine": f"{cost.hardware.name}, "
        f"{amount(comparison.topology.num_ranks, 'rank')}, "
        f"{comparison.topology.ranks_per_node} per node",
        "wire, homes": f"{cost.wire.value}, {cost.homes.value}",
        "replica rule": cost.replica_rule.value,
        "expert": f"{cost.shape.words().removeprefix('experts of ')}, "
        f"{cost.shape.num_projections} projections, "
        f"{cost.shape.expert_bytes / 1e6:.3g} MB",
        "batches": f"about {comparison.result.evaluation.batch_tokens:,} tokens each"
        if comparison.result.evaluation.batch_tokens
        else "all tokens are one",
        "solver": origin.solver or "unknown",
        "moetuner": moetuner.__version__,
    }
    if comparison.refit is not None:
        about_it = comparison.refit.placement
        facts["placement file"] = f"made of all tokens, sha256 {about_it.sha256()}"
    if origin.validation:
        facts["validated by"] = "; ".join(_told(origin.validation))
    options = "; ".join(_told(origin.options))
    return {**facts, "planned with": options} if options else facts


def _told(options: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Options as words; those of a part carry its name."""
    for name, value in options.items():
        if isinstance(value, dict) and "name" in value:
            yield f"{prefix}{name} {value['name']}"
        elif isinstance(value, dict):
            yield from _told(value, f"{prefix}{name}.")
        elif value not in (None, [], ""):
            yield f"{prefix}{name} {value}"


_WORDS = {
    "load": "(token, expert) pairs that a rank computes in a layer",
    "remote ranks": "ranks other than a token's home that compute it",
    "busiest receive": "rows into the busiest rank over its even share of tokens",
    "modelled time": "per layer, the slowest rank's computing and the slowest link's "
    "transfer there and back; layers added up, the tokens of one batch at a time, "
    "for a step waits for the slowest rank of its own batch",
    "95% interval": "of the gain in the mean batch, from 1,000 bootstrap draws of "
    "batches (of sequences, where batches are fewer than ten or mix all of them)",
}


def _pairs(entries: dict[str, str]) -> list[Child]:
    return [
        tag("div", tag("dt", name), tag("dd", value)) for name, value in entries.items()
    ]
