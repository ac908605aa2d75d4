"""A run shared by several processes under torchrun; in a single process nothing is shared or summed."""

from flags import InputError

import os

import torch
import torch.distributed as dist


def start_ranks(device):
    """Join the process group of torchrun and return this process's device; without torchrun return `device`.

    Raises InputError if there are fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        n_gpus, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if local_rank >= n_gpus:
            raise InputError(f"torchrun started more processes than the {n_gpus} GPUs here; lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def ranks():
    """Return (rank of this process, number of processes); (0, 1) without torchrun."""
    started = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if started else (0, 1)


def sum_over_ranks(tensors):
    """Replace each tensor (same dtype and device) by its sum over all processes, in one all-reduce."""
    if ranks()[1] > 1:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(total.view(t.shape))


def share(x, y, size, device):
    """Yield this process's share of images and labels on `device`, `size` at a time."""
    rank, n_ranks = ranks()
    x, y = x[rank::n_ranks].to(device), y[rank::n_ranks].to(device)
    return zip(x.split(size), y.split(size), strict=True)
