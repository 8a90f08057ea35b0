"""Trains the demo model on `corpus.py`'s archive and records its routing.

    python corpus.py corpus.npz
    python train.py corpus.npz --out demo_trace.npz --minutes 5

The recording is an archive that `moetuner.read_trace` reads.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import DemoModel, ModelConfig

BALANCE_WEIGHT = 0.01
Z_WEIGHT = 1e-3
TINY = ModelConfig(
    layers=2, hidden=32, heads=2, experts=8, top_k=2, expert_hidden=16, sequence=64
)


def batches(texts, config, batch, rng, device):
    """Endless batches [B, S + 1]; each kind in proportion to the root of its size."""
    kinds = [text for text in texts.values() if len(text) > config.sequence + 1]
    share = np.sqrt([len(text) for text in kinds])
    while True:
        rows = []
        for kind in rng.choice(len(kinds), batch, p=share / share.sum()):
            start = rng.integers(len(kinds[kind]) - config.sequence - 1)
            rows.append(kinds[kind][start : start + config.sequence + 1])
        yield torch.from_numpy(np.stack(rows)).to(device).long()


def loss_of(model, tokens):
    """Next-byte loss, and the balance and z losses averaged over layers."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        logits, routings = model(tokens[:, :-1])
    text = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    balance = torch.stack([routing.balance_loss for routing in routings]).mean()
    z = torch.stack([routing.z_loss for routing in routings]).mean()
    return text, balance, z


def train(model, texts, arguments, device):
    """Train until the clock says stop; the learning rate follows the clock, too."""
    rng = np.random.default_rng(arguments.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1
    )
    log, started, step = [], time.monotonic(), 0
    for tokens in batches(texts, model.config, arguments.batch, rng, device):
        done = (time.monotonic() - started) / (60 * arguments.minutes)
        if done >= 1 or step >= arguments.steps:
            break
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = (
                1e-3 * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
            )
        text, balance, z = loss_of(model, tokens)
        (text + BALANCE_WEIGHT * balance + Z_WEIGHT * z).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % arguments.log_every == 0:
            entry = {
                "step": step,
                "seconds": round(time.monotonic() - started, 1),
                "loss": round(text.item(), 4),
                "balance": round(balance.item(), 4),
            }
            log.append(entry)
            print(json.dumps(entry), flush=True)
        step += 1
    return log, step


@torch.no_grad()
def held_out_losses(model, texts, config, device):
    """Mean next-byte loss (nats) of each kind, on the first sequences of its text."""
    losses = {}
    for kind, text in texts.items():
        count = min(32, len(text) // config.sequence)
        if count:
            rows = text[: count * config.sequence].reshape(count, config.sequence)
            tokens = torch.from_numpy(rows.copy()).to(device).long()
            losses[kind] = round(loss_of(model, tokens)[0].item(), 4)
    return losses


@torch.no_grad()
def record(model, texts, config, max_tokens, seed, device):
    """Routing of held-out sequences of many lengths, kinds in turn, [T, L, K]."""
    rng = np.random.default_rng(seed)
    ids, weights, sequence, position, kinds = [], [], [], [], []
    usable = [k for k, text in texts.items() if len(text) > config.sequence]
    total = 0
    while True:
        kind = usable[len(kinds) % len(usable)]
        length = int(rng.integers(config.sequence // 4, config.sequence + 1))
        if total + length > max_tokens:
            break
        start = int(rng.integers(len(texts[kind]) - length))
        piece = torch.from_numpy(texts[kind][start : start + length].copy())
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            _, routings = model(piece.to(device).long()[None])
        ids.append(torch.stack([r.ids_TK for r in routings], dim=1).cpu().numpy())
        chosen = torch.stack([r.weights_TK for r in routings], dim=1)
        weights.append(chosen.float().cpu().numpy().astype(np.float16))
        sequence.append(np.full(length, len(kinds), np.int32))
        position.append(np.arange(length, dtype=np.int32))
        kinds.append(kind)
        total += length
    return {
        "experts": np.concatenate(ids).astype(np.uint8),
        "weights": np.concatenate(weights),
        "seq": np.concatenate(sequence),
        "pos": np.concatenate(position),
        "layer_ids": np.arange(config.layers, dtype=np.int16),
        "kinds": kinds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="recording (.npz)")
    parser.add_argument("--log", type=Path, help="losses and settings (.json)")
    parser.add_argument("--weights", type=Path, help="keep the trained model (.pt)")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24_000, help="to record")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a model for tests")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TINY if arguments.tiny else ModelConfig()
    torch.manual_seed(arguments.seed)
    with np.load(arguments.corpus) as archive:
        texts = {name: archive[name] for name in archive.files}
    parts = {
        part: {n.split("/")[1]: t for n, t in texts.items() if n.startswith(part)}
        for part in ("train", "held_out")
    }
    model = DemoModel(config).to(device)
    log, steps = train(model, parts["train"], arguments, device)
    model.eval()
    losses = held_out_losses(model, parts["held_out"], config, device)
    recording = record(
        model, parts["held_out"], config, arguments.tokens, arguments.seed, device
    )
    kinds = recording.pop("kinds")
    meta = {
        "model": "moetuner-demo-moe",
        "domain": "held-out text of the Python standard library",
        "experts": config.experts,
        "topk": config.top_k,
        "hidden_size": config.hidden,
        "expert_hidden_size": config.expert_hidden,
        "phase": "prefill, whole sequences",
        "sequence_kinds": ", ".join(kinds),
    }
    np.savez_compressed(arguments.out, meta=json.dumps(meta), **recording)
    summary = {
        "config": dataclasses.asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "seed": arguments.seed,
        "steps": steps,
        "trained_tokens": steps * arguments.batch * config.sequence,
        "held_out_loss": losses,
        "log": log,
    }
    if arguments.weights:
        kept = {"config": dataclasses.asdict(config), "weights": model.state_dict()}
        torch.save(kept, arguments.weights)
    if arguments.log:
        arguments.log.write_text(json.dumps(summary, indent=1))
    print(json.dumps({k: v for k, v in summary.items() if k != "log"}))


if __name__ == "__main__":
    main()
