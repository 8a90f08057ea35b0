"""What the three programs share: the process group that torchrun asks for."""

import os

import torch
import torch.distributed as dist


def start():
    """Join the group; returns the rank, the number of ranks and the device."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(0)
    return dist.get_rank(), dist.get_world_size(), device


def say(*words):
    """Print once, not on every rank."""
    if dist.get_rank() == 0:
        print(*words, flush=True)
