"""A Transformers model: recorded, planned for, spread over ranks, compared."""

import torch
import torch.distributed as dist
from moetuner import PlanOptions, Topology, plan_trace
from moetuner.evaluation.verify import verify
from moetuner.integrations.transformers import parallelize, record
from moetuner.nn import gather_counts, record_run
from start import say, start
from transformers import OlmoeConfig, OlmoeForCausalLM

rank, num_ranks, device = start()
config = OlmoeConfig(  # random weights, so that nothing is downloaded
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_experts=8,
    num_experts_per_tok=2,
    pad_token_id=0,
    eos_token_id=None,
)
model = OlmoeForCausalLM(config).to(device).eval()
prompts = torch.randint(1, 64, (16, 12), generator=torch.Generator().manual_seed(1))
prompts = prompts.to(device)
options = {
    "attention_mask": torch.ones_like(prompts),
    "max_new_tokens": 8,
    "do_sample": False,
}

with record(model) as recording, torch.no_grad():
    alone = model.generate(prompts, **options)
topology = Topology(num_ranks=num_ranks, ranks_per_node=num_ranks)
report = plan_trace(recording.trace(), topology, PlanOptions(solver="chain"))

# All ranks generate from the same prompts, so each sends a share of the tokens.
parallelize(model, report.result.placement, shared_batch=True)
with record_run(model) as run, torch.no_grad():
    together = model.generate(prompts, **options)
assert torch.equal(alone, together)
say(f"{num_ranks} ranks generate what one does: {together.shape[1]} tokens each")
assert verify(run.trace(), report.result.placement, gather_counts(model)) == []
say("counters are as predicted")
dist.destroy_process_group()
