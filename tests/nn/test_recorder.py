import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from moetuner.errors import InvalidTraceError  # noqa: E402
from moetuner.nn import Recorder  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def begin(recorder, sequence, position, kept=None):
    count = len(sequence)
    recorder.begin_step(
        sequence=np.array(sequence, np.int32),
        position=np.array(position, np.int32),
        phase=np.zeros(count, np.uint8),
        kept=np.ones(count, bool) if kept is None else np.array(kept),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_steps_become_one_trace(device):
    """Interleaved sequences come apart, padding goes, experts fall by weight."""
    recorder = Recorder(num_experts=4)
    begin(recorder, [0, 1], [0, 0], kept=[True, False])
    reused = torch.tensor([[0, 1], [2, 3]], device=device)
    weights = torch.tensor([[0.25, 0.75], [0.5, 0.5]], device=device)
    recorder.add(5, reused, weights)
    recorder.add(3, reused, weights)
    reused.fill_(0)  # what was added is kept
    begin(recorder, [0, 1], [1, 0])
    for layer in (3, 5):
        ids = torch.tensor([[layer - 3, 3], [1, 0]], device=device)
        recorder.add(layer, ids, torch.tensor([[0.9, 0.1], [0.7, 0.3]], device=device))
    trace = recorder.trace()
    assert trace.layer_ids.tolist() == [3, 5]
    assert trace.sequence.tolist() == [0, 0, 1]
    assert trace.position.tolist() == [0, 1, 0]
    assert trace.topk_ids.tolist() == [
        [[1, 0], [1, 0]],
        [[0, 3], [2, 3]],
        [[1, 0], [1, 0]],
    ]
    assert trace.topk_weights[0].tolist() == [[0.75, 0.25]] * 2


def test_what_does_not_fit_is_refused():
    ids, weights = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]])
    with pytest.raises(InvalidTraceError, match="add before begin_step"):
        Recorder(num_experts=2).add(0, ids, weights)
    recorder = Recorder(num_experts=2)
    with pytest.raises(InvalidTraceError, match="no layer was recorded"):
        recorder.trace()
    begin(recorder, [0, 0], [0, 1])
    with pytest.raises(
        InvalidTraceError, match="layer 7 routes 1 tokens, the step has 2"
    ):
        recorder.add(7, ids, weights)
    begin(recorder, [1], [0])
    recorder.add(7, ids, weights)
    with pytest.raises(InvalidTraceError, match="layer 7 came twice"):
        recorder.add(7, ids, weights)
    begin(recorder, [1], [1])
    recorder.add(8, ids, weights)
    with pytest.raises(InvalidTraceError, match=r"a step has layers \[8\], the first"):
        recorder.trace()
