"""A small model with MoELayers: trained, placed by its own routing, verified."""

import torch
import torch.distributed as dist
from moetuner import PlanOptions, Topology, plan_trace
from moetuner.evaluation.verify import verify
from moetuner.nn import (
    Experts,
    MoELayer,
    TopKRouter,
    apply_placement,
    average_gradients,
    contiguous_placement,
    gather_counts,
    logical_order,
    record_run,
)
from start import say, start

LAYERS, EXPERTS, TOP_K, HIDDEN, INNER, BATCH = 2, 8, 2, 32, 64, 96
rank, num_ranks, device = start()
contiguous = contiguous_placement(LAYERS, EXPERTS, num_ranks)


class Block(torch.nn.Module):
    """Norm, MoE layer, residual."""

    def __init__(self, layer):
        super().__init__()
        self.norm = torch.nn.LayerNorm(HIDDEN)
        router = TopKRouter(HIDDEN, EXPERTS, TOP_K).to(device)
        experts = Experts(contiguous.slots_per_rank, HIDDEN, INNER, device=device)
        self.moe = MoELayer(router, experts, contiguous, layer=layer)

    def forward(self, x):
        return x + self.moe(self.norm(x))


model = torch.nn.Sequential(*[Block(layer) for layer in range(LAYERS)]).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
batches = torch.Generator().manual_seed(0)


def next_batch():
    """This rank's tokens; those of all ranks together are the same on any number."""
    return torch.randn(BATCH, HIDDEN, generator=batches)[rank::num_ranks].to(device)


def loss_of(x):
    return (model(x) - x.roll(1, dims=1)).square().mean()


for step in range(20):  # each rank has its own tokens; experts see those of all
    loss = loss_of(next_batch())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(model)  # now as if one process had the tokens of all ranks
    optimizer.step()
    if step % 10 == 9:
        dist.all_reduce(loss.detach_())
        say(f"step {step}: loss {loss.item() / num_ranks:.5f}")

with record_run(model) as run, torch.no_grad():
    for _ in range(8):
        model(next_batch())
topology = Topology(num_ranks=num_ranks, ranks_per_node=num_ranks)
report = plan_trace(run.trace(), topology, PlanOptions(solver="chain"))

optimizer.zero_grad(set_to_none=True)
x = next_batch()
before = model(x).detach()
apply_placement(model, report.result.placement)
torch.testing.assert_close(model(x).detach(), before, rtol=1e-4, atol=1e-5)
say("placed: the output is the same")

with record_run(model) as run, torch.no_grad():
    model(next_batch())
counts = model[0].moe.exchange.counts()
say(f"layer 0: {counts.ranks_per_token:.2f} ranks per token")
trace, record = run.trace(), gather_counts(model)
assert verify(trace, report.result.placement, record) == []
say("counters are as predicted")

with logical_order(model, whole=True):
    saved = {name: value.shape for name, value in model.state_dict().items()}
say("saved", tuple(saved["0.moe.experts.up"]))
dist.destroy_process_group()
