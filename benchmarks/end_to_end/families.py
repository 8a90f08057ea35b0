"""Sizes of decoders: four that were published, and the one of the shipped recording.

Legend: H hidden, E experts, K top-k, I inner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moetuner import ModelShape

GRAIN = 16  # widths are multiples of it: what grouped products want


@dataclass(frozen=True, kw_only=True)
class Family:
    """A decoder whose layers are all alike, and where its routing comes from.

    ``recording`` is a file in the folder of recordings; where there is none, routing is
    ``drawn`` from that preset of `moetuner.trace.TOPIC_PRESETS`; where neither is
    named, the shipped recording is replayed.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    """Width of a head."""
    experts: int
    top_k: int
    inner: int
    shared_inner: int = 0
    """Of the expert that every token takes; 0: there is none."""
    vocabulary: int
    recording: str = ""
    drawn: str = ""

    def narrowed(self, factor: int) -> Family:
        """The same experts and layers, everything else ``factor`` times as narrow."""
        kv_heads = max(self.kv_heads // factor, 1)
        heads = max(self.heads // factor // kv_heads, 1) * kv_heads
        widths = {
            name: _grain(getattr(self, name) / factor)
            for name in ("hidden", "inner", "shared_inner", "vocabulary")
        }
        return replace(self, heads=heads, kv_heads=kv_heads, **widths)

    def shape(self, value_bytes: int) -> ModelShape:
        """What the cost model has to know, with values of so many bytes."""
        return ModelShape(
            hidden_size=self.hidden,
            expert_hidden_size=self.inner,
            dispatch_bytes=value_bytes,
            combine_bytes=value_bytes,
            weight_bytes=value_bytes,
        )


def _grain(width: float) -> int:
    return 0 if width == 0 else max(round(width / GRAIN), 1) * GRAIN


# From each model's config.json. Left out, as they are the same under any placement:
# DeepSeek's first layer, which has no experts, and its low-rank keys and values;
# sliding windows and sinks of gpt-oss's attention, and biases.
FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="mixtral-8x7b",
            layers=32,
            hidden=4096,
            heads=32,
            kv_heads=8,
            head=128,
            experts=8,
            top_k=2,
            inner=14336,
            vocabulary=32000,
            recording="mixtral-8x7b-mmlu-ajtejankar/per_question_counts.npz",
        ),
        Family(
            name="deepseek-v2-lite",
            layers=26,
            hidden=2048,
            heads=16,
            kv_heads=16,
            head=128,
            experts=64,
            top_k=6,
            inner=1408,
            shared_inner=2816,
            vocabulary=102400,
            recording="deepseek-v2-lite-esft/law.npz",
        ),
        Family(
            name="gpt-oss-20b",
            layers=24,
            hidden=2880,
            heads=64,
            kv_heads=8,
            head=64,
            experts=32,
            top_k=4,
            inner=2880,
            vocabulary=201088,
            recording="gpt-oss-20b-fingerprinting/mmlu.npz",
        ),
        Family(
            name="qwen3-30b-a3b",
            layers=48,
            hidden=2048,
            heads=32,
            kv_heads=4,
            head=128,
            experts=128,
            top_k=8,
            inner=768,
            vocabulary=151936,
            drawn="qwen3",
        ),
        Family(
            name="moetuner-demo-moe",
            layers=12,
            hidden=512,
            heads=8,
            kv_heads=8,
            head=64,
            experts=64,
            top_k=4,
            inner=256,
            vocabulary=256,
        ),
    )
}
