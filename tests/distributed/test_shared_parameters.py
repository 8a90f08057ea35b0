"""What all experts of a layer have in common: an activation's parameters, a norm's.

Their gradients are made of all rows, so no undefined one may be among them, and of the
rows of all ranks, where these share a batch.
"""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="Transformers is not there")

from moetuner.integrations.transformers import (  # noqa: E402
    experts_forward,
    parallelize,
)
from moetuner.nn import (  # noqa: E402
    ExchangeOptions,
    average_gradients,
    contiguous_placement,
)
from poison import poisoned  # noqa: E402
from ranks import run_on_ranks  # noqa: E402

EXPERTS, HIDDEN, INNER, TOKENS = 4, 16, 8, 7
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
FORMS = (ExchangeOptions(), ExchangeOptions(capacity=TOKENS, max_rows=60))


class Experts(torch.nn.Module):
    """As Transformers' interface has them, gated or not."""

    has_bias = is_transposed = False
    has_post_expert_norm = is_concatenated = True

    def __init__(self, has_gate):
        super().__init__()
        self.num_experts, self.has_gate = EXPERTS, has_gate
        up = torch.nn.Parameter(torch.empty(EXPERTS, INNER * (1 + has_gate), HIDDEN))
        self.register_parameter("gate_up_proj" if has_gate else "up_proj", up)
        self.down_proj = torch.nn.Parameter(torch.empty(EXPERTS, HIDDEN, INNER))
        self.act_fn = torch.nn.PReLU()
        self.post_expert_norm = torch.nn.RMSNorm(HIDDEN)

    def _apply_gate(self, inner):
        gate, up = inner.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, x, ids, weights):
        """Every token by every choice."""
        up = self.gate_up_proj if self.has_gate else self.up_proj
        sums = []
        for row, chosen, shares in zip(x, ids.tolist(), weights, strict=True):
            total = torch.zeros(HIDDEN)
            for expert, share in zip(chosen, shares, strict=True):
                if expert < EXPERTS:
                    inner = up[expert] @ row
                    between = self._apply_gate if self.has_gate else self.act_fn
                    done = self.down_proj[expert] @ between(inner)
                    total = total + share * self.post_expert_norm(done)
            sums.append(total)
        return torch.stack(sums)


class Model(torch.nn.Module):
    def __init__(self, has_gate):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Module()])
        self.layers[0].experts = Experts(has_gate)
        made = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -0.5, 0.5, generator=made)

    def forward(self, *given):
        return self.layers[0].experts(*given)


def batch(rank):
    made = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, EXPERTS, (TOKENS, 2), generator=made)
    ids[3, 1] = ids[5, 0] = EXPERTS  # elsewhere
    x = torch.randn(TOKENS, HIDDEN, generator=made)
    return x, ids, torch.rand(TOKENS, 2, generator=made)


def step(model, given, parts=1):
    (model(*given).square().sum() / parts).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("has_gate", [True, False])
def test_gradients_are_made_of_defined_rows_alone(has_gate, backend):
    wanted = step(Model(has_gate), batch(0))
    model = Model(has_gate)
    torch._dynamo.reset()
    run = torch.compile(experts_forward, backend=backend or "eager", fullgraph=True)
    experts = model.layers[0].experts
    experts.forward = lambda *given: (run if backend else experts_forward)(
        experts, *given
    )
    with poisoned():
        found = step(model, batch(0))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, **CLOSE)


def _on_ranks(rank, num_ranks):
    placement = contiguous_placement(1, EXPERTS, num_ranks)
    width = placement.slots_per_rank
    for has_gate, shared, options in [
        (gate, shared, form)
        for gate in (True, False)
        for shared in (True, False)
        for form in FORMS
    ]:
        whole, model = Model(has_gate), Model(has_gate)
        for other in range(1 if shared else num_ranks):
            wanted = step(whole, batch(other), 1 if shared else num_ranks)
        parallelize(model, placement, shared_batch=shared, options=options)
        with poisoned():
            found = step(model, batch(0 if shared else rank))
            if not shared:
                average_gradients(model)
        for name, value in wanted.items():
            if value.dim() == 3:
                value = value[rank * width :][:width]
            torch.testing.assert_close(found[name], value, **CLOSE)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_gradients_on_ranks_equal_one_process(num_ranks):
    run_on_ranks(num_ranks, _on_ranks)
