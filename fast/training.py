"""Faster training steps: memory layout, matrix products on AMX, torch.compile on a CPU, CUDA graphs on a GPU."""

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
    """Return the memory format to train in: channels last, which is faster, except for narrow networks on a CPU.

    There, in channels last, torch 2.13 writes past a buffer in the weight gradient of a strided 1x1 convolution with
    fewer than 16 input channels and an odd batch size.
    """
    convs = (m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    narrow = any(m.weight.is_cpu and m.kernel_size == (1, 1) and m.in_channels < 16 for m in convs)
    return torch.contiguous_format if narrow else torch.channels_last


def in_layout(model, dtype):
    """Prepare `model` in place for training in `dtype` and return it; eval mode gives the same logits as before."""
    model.to(memory_format=training_layout(model))
    if dtype == torch.bfloat16 and utils.has_amx(next(model.parameters()).device):
        small_maps_by_products(model, dtype)
    return model


def training_copy(model, dtype):
    """Return a copy of `model` with trainable weights, prepared for training in `dtype`."""
    return in_layout(copy.deepcopy(model).requires_grad_(True), dtype)


def compiled(model, n_images, width):
    """Return `model` compiled for batches of one size, or itself where the training is too short to gain from it.

    n_images: training images over all epochs; width: of the network. Compiling takes about a minute.
    """
    pays = next(model.parameters()).device.type == "cpu" and can_compile() and n_images * width > 200_000
    return torch.compile(model, dynamic=False) if pays else model


def training_step(model, width, n_images, batch_size, dtype):
    """Return step(x, y, size, extra=None), which adds the gradient of the batch's loss to .grad.

    x: float (B, 3, H, W) in [0, 1] and y: int64 (B,), this process's share of a batch; size: images in the batch, over
    all processes; extra: a function of (logits, labels) that returns a scalar loss, or None. The loss is the mean
    cross-entropy over the batch plus the extra one. step() returns (summed cross-entropy, number of correct
    predictions) of this share, fp32 (2,).
    n_images: over all epochs; batch_size: over all processes; dtype: autocast's.
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
        # DistributedDataParallel averages gradients over the processes: n_ranks makes that the mean over the batch
        mean, more = loss / size * n_ranks, None if extra is None else extra(logits, y)
        (mean if more is None else mean + more).backward()
        return torch.stack((loss.detach(), (logits.detach().argmax(1) == y).sum()))

    return step
