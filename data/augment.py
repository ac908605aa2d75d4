"""Bytes to floats, and random crop and flip."""

import torch
import torch.nn.functional as F


def to_float(images):
    """Return images (N, 3, H, W), uint8 or float in [0, 1], as float32 in [0, 1], channels last in memory."""
    x = images.to(torch.float32, memory_format=torch.channels_last)
    return x if images.is_floating_point() else x / 255


def augment(images, generator, padding=4, mode="constant", flip=True):
    """Pad and randomly crop each image of a batch and, with `flip`, mirror it with probability 0.5.

    images: (N, C, H, W), uint8 or float in [0, 1]; generator: on the CPU, for the same draws on every device;
    padding: pixels; mode: of the padding, "constant" for zeros or "reflect" (floats only).
    Returns the same shape and type, channels last in memory.
    """
    n, _, h, w = images.shape
    device = images.device
    # nothing here synchronizes with a CUDA device, which computes while the next batch is prepared
    top = torch.randint(0, 2 * padding + 1, (n, 1), generator=generator)
    left = torch.randint(0, 2 * padding + 1, (n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5 * flip
    rows = top + torch.arange(h)
    cols = left + torch.arange(w)
    cols = torch.where(mirrored, cols.flip(1), cols)
    padded = F.pad(images, (padding,) * 4, mode=mode).permute(0, 2, 3, 1)
    which = torch.arange(n, device=device)[:, None, None]
    rows, cols = (t.to(device, non_blocking=images.is_cuda) for t in (rows, cols))
    return padded[which, rows[:, :, None], cols[:, None]].permute(0, 3, 1, 2)
