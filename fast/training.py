"""Training steps in less time: memory layout, matrix products on AMX, compiled on a CPU, recorded on a GPU."""

import copy

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import utils

from . import ranks
from .clip import can_compile
from .graphs import record_passes
from .products import small_maps_by_products


def training_layout(model):
    """Return the memory format to train in: channels last, which is the faster, but for narrow networks on a CPU.

    There the weight gradient of a strided 1x1 convolution of less than 16 channels, channels last and over an odd
    batch, writes past its buffer (seen with torch 2.13 on two threads).
    """
    convs = (m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    narrow = any(m.weight.is_cpu and m.kernel_size == (1, 1) and m.in_channels < 16 for m in convs)
    return torch.contiguous_format if narrow else torch.channels_last


def in_layout(model, dtype):
    """Lay `model` out for training in `dtype`, in place; return it. In eval mode it computes what it did."""
    model.to(memory_format=training_layout(model))
    if dtype == torch.bfloat16 and utils.has_amx(next(model.parameters()).device):
        small_maps_by_products(model, dtype)
    return model


def training_copy(model, dtype):
    """Return a copy of `model` with trainable weights, laid out for training in `dtype`; the model stays as it is."""
    return in_layout(copy.deepcopy(model).requires_grad_(True), dtype)


def compiled(model, n_images, width):
    """Return `model` compiled for batches of one size where that pays for the minute it takes, else itself.

    n_images: that pass through it over all epochs; width: of the network.
    """
    pays = next(model.parameters()).device.type == "cpu" and can_compile() and n_images * width > 200_000
    return torch.compile(model, dynamic=False) if pays else model


def training_step(model, width, n_images, batch_size, dtype):
    """Return a function (images, labels, size of the whole batch, extra loss) that leaves the loss's gradient in .grad.

    The loss is the mean cross-entropy over the whole batch, of which images float (B, 3, H, W) in [0, 1] and labels
    int64 (B,) are this process's share, plus what extra(logits, labels) returns, if anything. The function returns
    (summed cross-entropy, number of labels met), fp32 (2,).
    n_images: over all epochs; batch_size: over all processes; dtype: of the network's arithmetic, by autocast.
    """
    in_layout(model, dtype)
    n_ranks = ranks.ranks()[1]
    device = next(model.parameters()).device
    whole = shared = DistributedDataParallel(model) if n_ranks > 1 else model
    if device.type == "cuda" and n_ranks == 1:
        record_passes(model)
    else:
        whole = compiled(shared, n_images, width)
    layout = training_layout(model)

    def step(x, y, size, extra=None):
        net = whole if len(x) * n_ranks == batch_size else shared  # the last batch of an epoch is smaller
        with utils.autocast(device, dtype):
            logits = net(x.contiguous(memory_format=layout)).float()
        loss = F.cross_entropy(logits, y, reduction="sum")
        # gradients are averaged over the processes: this is the mean over the whole batch
        mean, more = loss / size * n_ranks, None if extra is None else extra(logits, y)
        (mean if more is None else mean + more).backward()
        return torch.stack((loss.detach(), (logits.detach().argmax(1) == y).sum()))

    return step
