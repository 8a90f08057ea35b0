"""The cells that a calibrated machine is scored on: models, sizes, tokens, placements.

Legend: T tokens of a rank, G ranks, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from moetuner.calibration.loads import KnownLoad
from moetuner.calibration.samples import Form, LayerShape
from moetuner.evaluation.models import ModelShape
from moetuner.problem import Objective
from moetuner.trace import TOPIC_PRESETS, Trace, topic_trace

# Sizes of the models that score. On CPUs their routing, with smaller experts.
SCORED = {
    "cuda": {
        "deepseek-v2-lite": (2048, 1408),
        "gpt-oss": (2880, 2880),
        "mixtral": (4096, 14336),
    },
    "cpu": {
        "deepseek-v2-lite": (320, 176),
        "gpt-oss": (360, 360),
        "mixtral": (448, 448),
    },
}
TOKENS = {
    "cuda": {Form.EXACT: (512, 2048, 8192), Form.FIXED: (16, 64, 256)},
    "cpu": {Form.EXACT: (128, 512), Form.FIXED: (8, 32)},
}
BASELINES = {
    # name: (solver, objective, spare slots of a rank)
    "contiguous": ("contiguous", Objective.MAX_LOAD, 0),
    "random": ("random", Objective.MAX_LOAD, 0),
    "lpt": ("lpt", Objective.MAX_LOAD, 0),
    "eplb": ("eplb", Objective.MAX_LOAD, 0),
    "affinity": ("affinity", Objective.TOTAL_TRAFFIC, 0),
    "coactivation": ("coactivation", Objective.MODELLED_TIME, 0),
    "chain": ("chain", Objective.LINK_TRAFFIC, 0),
    "eplb+replica": ("eplb", Objective.MODELLED_TIME, 1),
}
PLANS = {
    "joint": ("joint", Objective.MODELLED_TIME, 0),
    "joint+replica": ("joint", Objective.MODELLED_TIME, 1),
}
PLACEMENTS = BASELINES | PLANS
SEED = 1
_LEAST_TOKENS = 20_000  # to plan on; more where batches are large
_PLANNED_BATCHES = 3
MAX_BATCHES = 8
_LARGE = 16_384  # tokens of a rank in all batches of a cell; two batches at least


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A model's shape and a batch; decoding has the fixed form."""

    model: str
    form: Form
    num_tokens: int
    """T."""
    num_layers: int
    hidden_size: int
    inner_size: int

    @property
    def key(self) -> str:
        return f"{self.model}, {self.form.value}, {self.num_tokens}"

    @property
    def decodes(self) -> bool:
        return self.form is Form.FIXED

    @property
    def routing(self):
        return replace(TOPIC_PRESETS[self.model], num_layers=self.num_layers)

    @property
    def shape(self) -> LayerShape:
        return LayerShape(
            hidden_size=self.hidden_size,
            inner_size=self.inner_size,
            num_experts=self.routing.num_experts,
            top_k=self.routing.top_k,
        )

    @property
    def model_shape(self) -> ModelShape:
        return ModelShape(
            hidden_size=self.hidden_size, expert_hidden_size=self.inner_size
        )

    @property
    def most_batches(self) -> int:
        """That are measured."""
        return min(MAX_BATCHES, max(_LARGE // self.num_tokens, 2))

    def _split(self, num_ranks: int) -> tuple[Trace, Trace]:
        """Tokens of one made-up model: to plan on, and others to measure."""
        size = num_ranks * self.num_tokens
        seen = max(_PLANNED_BATCHES * size, _LEAST_TOKENS)
        rest = max(self.most_batches * size, _LEAST_TOKENS)
        whole = topic_trace(self.routing, num_tokens=seen + rest, seed=SEED)
        parts = np.split(np.arange(whole.num_tokens), [seen])
        planned, measured = (
            Trace(
                topk_ids=whole.topk_ids[part],
                num_experts=whole.num_experts,
                layer_ids=whole.layer_ids,
                sequence=whole.sequence[part],
                ranked=whole.ranked,
            )
            for part in parts
        )
        return planned, measured

    def planned_trace(self, num_ranks: int) -> Trace:
        """Routing to plan on, of at least some batches."""
        return self._split(num_ranks)[0]

    def batches(self, num_ranks: int, most: int) -> list[Trace]:
        """At most so many batches of other tokens, T on each rank.

        Prompts are whole sequences in their order; tokens that are decoded together are
        of different sequences.
        """
        size = num_ranks * self.num_tokens
        whole = self._split(num_ranks)[1]
        order = np.arange(whole.num_tokens)
        if self.decodes:
            order = np.random.default_rng(SEED).permutation(order)
        return [
            self._batch(whole, order[i * size : (i + 1) * size])
            for i in range(min(most, self.most_batches))
        ]

    def _batch(self, whole: Trace, token: np.ndarray) -> Trace:
        return Trace(
            topk_ids=whole.topk_ids[token],
            num_experts=whole.num_experts,
            layer_ids=whole.layer_ids,
            sequence=None if self.decodes else whole.sequence[token],
            home_rank=(np.arange(token.size) // self.num_tokens).astype(np.int16),
            ranked=whole.ranked,
        )


def cells_of(kind, models, layers, tokens) -> list[Cell]:
    """Of a kind of device; `tokens` by form, those of `TOKENS` where it has none."""
    return [
        Cell(
            model=model,
            form=form,
            num_tokens=num_tokens,
            num_layers=layers,
            hidden_size=SCORED[kind][model][0],
            inner_size=SCORED[kind][model][1],
        )
        for model in models
        for form, usual in TOKENS[kind].items()
        for num_tokens in (usual if tokens.get(form) is None else tokens[form])
    ]


def add_cell_options(parser) -> None:
    """Those that say which cells there are."""
    parser.add_argument("--models", nargs="+", default=list(SCORED["cuda"]))
    parser.add_argument("--layers", type=int, default=3)
    for form, phase in ((Form.EXACT, "prefill"), (Form.FIXED, "decode")):
        parser.add_argument(
            f"--{phase}",
            dest=form.value,
            nargs="*",
            type=int,
            help=f"tokens of a rank in {phase}; none: leave it out",
        )


def cells_asked(options, kind: str) -> list[Cell]:
    """The cells that the options name."""
    tokens = {form: getattr(options, form.value) for form in Form}
    return cells_of(kind, options.models, options.layers, tokens)


def cell_arguments(options) -> list[str]:
    """The same options for another program."""
    found = ["--models", *options.models, "--layers", str(options.layers)]
    for form, phase in ((Form.EXACT, "prefill"), (Form.FIXED, "decode")):
        given = getattr(options, form.value)
        if given is not None:
            found += [f"--{phase}", *map(str, given)]
    return found


def one_layer(trace: Trace, placement, layer: int) -> KnownLoad:
    """A layer of a batch, by itself."""
    only = np.zeros(1, np.int32)
    return KnownLoad(
        trace=Trace(
            topk_ids=np.ascontiguousarray(trace.topk_ids[:, layer : layer + 1]),
            num_experts=trace.num_experts,
            layer_ids=only,
            home_rank=trace.home_rank,
        ),
        placement=replace(
            placement,
            slot_experts=placement.slot_experts[layer : layer + 1],
            layer_ids=only,
        ),
    )
