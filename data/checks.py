"""Checks of images and labels."""

import torch


def check_images(x, what, shape=None):
    """Raise ValueError unless x is a tensor (N, 3, H, W), uint8 or float in [0, 1].

    what: for example `training`; shape: what (3, H, W) has to be, None for any.
    """
    if not isinstance(x, torch.Tensor) or x.dim() != 4:
        raise ValueError(f"{what} images must be a tensor (N, 3, H, W)")
    if x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        raise ValueError(f"{what} images are {tuple(x.shape)}; give (N, 3, H, W), as x.permute(0, 3, 1, 2) is")
    if shape is not None and x.shape[1:] != shape:
        raise ValueError(
            f"{what} images are {tuple(x.shape[1:])}, the others {tuple(shape)}; the bounds are for one size"
        )
    if len(x) == 0:
        raise ValueError(f"there are no {what} images")
    if x.dtype == torch.uint8:
        return
    if not x.is_floating_point():
        raise ValueError(f"{what} images are {x.dtype}; give uint8, or float in [0, 1]")
    low, high = x.amin().item(), x.amax().item()
    if low != low or high != high:
        raise ValueError(f"there is a NaN in the {what} images")
    if low < 0 or high > 1:
        raise ValueError(
            f"{what} images range from {low:g} to {high:g}, not within [0, 1]; leave normalization to the network"
        )


def check_labels(y, n, num_classes, what):
    """Raise ValueError unless y is a tensor of n labels, int64 (n,), from 0 to num_classes - 1."""
    if not isinstance(y, torch.Tensor) or y.dtype != torch.int64 or tuple(y.shape) != (n,):
        there = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__
        raise ValueError(f"{what} labels must be int64 ({n},), one per image; these are {there}")
    low, high = y.min().item(), y.max().item()
    if low < 0 or high >= num_classes:
        raise ValueError(f"{what} labels range from {low} to {high}, the network has {num_classes} classes")
