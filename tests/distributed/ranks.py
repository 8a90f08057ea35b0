"""Runs a function on several ranks, a process each, and brings errors back.

Ranks on the CPU are forked from one server that has imported torch and what most tests
need: an import takes as long as most tests. Ranks on GPUs start afresh.
"""

import os
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from forked import fork_server

TIMEOUT = timedelta(seconds=240)  # ranks that compile wait for each other
RANKS_PER_DEVICE = "NCCL_MULTI_RANK_GPU_ENABLE"  # NCCL >= 2.30 lets ranks share a GPU


BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def run_on_ranks(num_ranks, function, *args, device="cpu", backend=None):
    """Call ``function(rank, num_ranks, *args)`` inside a process group of `device`.

    With Gloo on CUDA any number of ranks shares the devices there are.

    Fails with what each rank that failed has to say.
    """
    backend = backend or BACKENDS[device]
    if device == "cuda":
        need_devices(1 if backend == "gloo" else num_ranks)
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            one_rank,
            (num_ranks, device, backend, folder, function, args, dict(os.environ)),
            nprocs=num_ranks,
            join=False,
            start_method=start_method(device),
        )
        try:
            while not context.join(timeout=2 * TIMEOUT.total_seconds()):
                pass
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            said = [p.read_text() for p in sorted(Path(folder).glob("error-*"))]
            pytest.fail("\n".join(said) or str(error), pytrace=False)


def start_method(device="cpu"):
    """How a process for a rank begins."""
    if device == "cuda":
        return "spawn"
    return fork_server().get_start_method()


def need_devices(num_ranks):
    if (
        torch.cuda.device_count() >= num_ranks
        or os.environ.get(RANKS_PER_DEVICE) == "1"
    ):
        return
    why = (
        f"{num_ranks} ranks need as many CUDA devices, or NCCL >= 2.30 and "
        f"{RANKS_PER_DEVICE}=1"
    )
    if os.environ.get("FAIL_WITHOUT_CUDA") == "1" and num_ranks == 1:
        pytest.fail(why)
    pytest.skip(why)


def one_rank(rank, num_ranks, device, backend, folder, function, args, environment=()):
    """The whole life of one rank; what forks it may know an older `environment`."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        backend,
        store=dist.FileStore(f"{folder}/store", num_ranks),
        rank=rank,
        world_size=num_ranks,
        timeout=TIMEOUT,
    )
    try:
        function(rank, num_ranks, *args)
    except BaseException:
        said = f"rank {rank} of {num_ranks}:\n{traceback.format_exc()}"
        Path(f"{folder}/error-{rank}").write_text(said)
        raise
    dist.barrier()  # nobody leaves while another still listens
    dist.destroy_process_group()
    # At the interpreter's own exit Gloo's threads abort the process now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
