"""Child processes that bound pieces side by side.

Threads would not do: SciPy holds the interpreter while it looks for eigenvalues, and
BLAS with several threads is slower than with one on matrices of these sizes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moetuner.bounds.piece import Piece
    from moetuner.bounds.whole import WholeGroups

# The child imports from where we do: `-m` would look in the working directory first.
_WORKER = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from moetuner.bounds.worker import main; main()"
)
_ONE_THREAD = dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)


def bound_pieces(
    pieces: Sequence[Piece | WholeGroups],
    *,
    deadline: float,
    threads: int = 0,
    max_iterations: int = 2000,
    on_bound: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Lower bound of each piece, found until ``time.monotonic()`` is `deadline`.

    A piece that nobody got to, or whose child died, keeps what counting says of it;
    the same after Ctrl-C, which goes no further.
    """
    bounds = [piece.least for piece in pieces]
    searched = [i for i, piece in enumerate(pieces) if piece.searched]
    width = min(threads or os.cpu_count() or 1, len(searched))
    if not width:
        return bounds
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in searched:
        waiting.put(index)
    left = len(searched)
    children = [_start() for _ in range(width)]

    def work(child: subprocess.Popen[bytes]) -> None:
        nonlocal left
        while True:
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            now = time.monotonic()
            seconds = max(deadline - now, 0.0) * min(1.0, width / max(left, 1))
            left -= 1
            if now >= deadline:
                return
            bound = _ask(child, pieces[index], seconds, max_iterations)
            if bound is None:
                return
            bounds[index] = max(bounds[index], bound)
            if on_bound:
                on_bound(index, bounds[index])

    crew = [threading.Thread(target=work, args=(c,), daemon=True) for c in children]
    for member in crew:
        member.start()
    try:
        for member in crew:
            # A child that is stuck in one decomposition is not waited for.
            member.join(max(deadline - time.monotonic(), 0.0) + 5.0)
    except KeyboardInterrupt:
        pass
    finally:
        for child in children:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    with contextlib.suppress(OSError):  # what it did not read
                        pipe.close()
    return bounds


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **_ONE_THREAD},
        start_new_session=True,
    )


def _ask(
    child: subprocess.Popen[bytes],
    piece: Piece | WholeGroups,
    seconds: float,
    max_iterations: int,
) -> float | None:
    assert child.stdin is not None
    assert child.stdout is not None
    limits = {"deadline": time.time() + seconds, "max_iterations": max_iterations}
    try:
        pickle.dump((piece, limits), child.stdin)
        child.stdin.flush()
        answer = pickle.load(child.stdout)
    except (OSError, EOFError, ValueError, pickle.UnpicklingError):
        return None
    return float(answer)
