"""What the benchmark of whole models replays where a recording only counted."""

import sys
from pathlib import Path

import numpy as np
from moetuner.trace import read_trace

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "exchange"))
from counted import draw_tokens


def test_drawn_tokens_have_the_recorded_loads(traces_dir):
    """Of every question and layer of a real recording, exactly."""
    file = "mixtral-8x7b-mmlu-ajtejankar/per_question_counts.npz"
    counts = read_trace(traces_dir / file)
    drawn = draw_tokens(counts, 3000, seed=0)
    groups, first = np.unique(drawn.sequence, return_index=True)
    last = groups[first.argmax()]
    assert len(groups) > 2
    assert drawn.num_tokens >= 3000 > drawn.num_tokens - counts.num_tokens[last]
    for group in groups:
        ids = drawn.topk_ids[drawn.sequence == group]
        loads = [np.bincount(ids[:, n].ravel(), minlength=8) for n in range(32)]
        assert np.array_equal(loads, counts.counts[group])
    again = draw_tokens(counts, 3000, seed=0)
    assert again.sha256() == drawn.sha256()
    assert draw_tokens(counts, 3000, seed=1).sha256() != drawn.sha256()
