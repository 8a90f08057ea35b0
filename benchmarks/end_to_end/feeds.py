"""What the ranks read, step by step: drawn tokens with given routing, or real text.

Step -1 is the prompt, 0, 1, ... are the tokens that come next. Legend: G ranks, B
sequences of a rank, S tokens of a prompt, T = B S, L layers, K top-k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from pathlib import Path

    from case import Case
    from numpy.typing import NDArray

PROMPT = -1
HELD_OUT = "held_out/"  # arrays of that name in the archive of corpus.py


class Replayed:
    """Routing as recorded. What the tokens are does not matter then: they are drawn."""

    def __init__(self, case: Case) -> None:
        self.sizes, self.vocabulary = case.sizes, case.family.vocabulary
        self.num_ranks = case.topology.num_ranks
        self.batches = case.batches()

    def tokens(self, batch: int, step: int, rank: int) -> torch.Tensor:
        """int64 [B, S] or [B, 1]; the same whatever the placement."""
        seed = (batch * 1000 + step + 1) * self.num_ranks + rank
        rng = torch.Generator().manual_seed(seed)
        shape = self.sizes.sequences, self.sizes.prompt if step == PROMPT else 1
        return torch.randint(self.vocabulary, shape, generator=rng)

    def ids(self, batch: int, step: int) -> NDArray[np.int16]:
        """[G, T, L, K] of all ranks."""
        if step == PROMPT:
            return self.batches.prefill(batch)
        return self.batches.decoded(batch, step)


class Text:
    """Held-out bytes of `examples/train_demo_model/corpus.py`; routers choose."""

    def __init__(self, case: Case, corpus: Path, seed: int = 0) -> None:
        sizes, self.prompt = case.sizes, case.sizes.prompt
        length = sizes.prompt + sizes.decode
        with np.load(corpus) as archive:
            texts = [archive[n] for n in archive.files if n.startswith(HELD_OUT)]
        texts = [text for text in texts if len(text) > length]
        if not texts:
            raise SystemExit(f"{corpus} has no held-out text of {length} bytes")
        rng = np.random.default_rng(seed)
        shape = sizes.batches, case.topology.num_ranks, sizes.sequences
        pieces = []
        for number in range(int(np.prod(shape))):
            text = texts[number % len(texts)]  # kinds in turn
            start = int(rng.integers(len(text) - length))
            pieces.append(text[start : start + length])
        self.pieces = torch.from_numpy(np.stack(pieces)).long().view(*shape, length)

    def tokens(self, batch: int, step: int, rank: int) -> torch.Tensor:
        """int64 [B, S] or [B, 1], consecutive bytes."""
        own = self.pieces[batch, rank]
        if step == PROMPT:
            return own[:, : self.prompt]
        place = self.prompt + step
        return own[:, place : place + 1]
