"""What the networks share: normalization of the input, and channels scaled by a width."""

from flags import LARGEST_MEAN, NORMALIZATIONS

import math

import torch
from torch import nn

MEAN, STD = NORMALIZATIONS["authors"]


class Normalized(nn.Module):
    """Base class of a network that takes images in [0, 1] and normalizes them: (x - mean) / std per color channel.

    mean, std: three numbers each, std above 0.
    """

    def __init__(self, mean=MEAN, std=STD):
        super().__init__()
        for name in ("mean", "std"):  # not persistent, so that public state dicts fit
            self.register_buffer(name, torch.zeros(1, 3, 1, 1), persistent=False)
        self.set_normalization(mean, std)

    def set_normalization(self, mean, std):
        """Set mean and std. Raises ValueError unless each is three numbers, of images in [0, 1], std above 0."""
        mean, std = tuple(map(float, mean)), tuple(map(float, std))
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or not min(std) > 0:
            raise ValueError("mean and std must be three finite numbers each, std above 0")
        if max(map(abs, mean + std)) > LARGEST_MEAN:
            raise ValueError("mean and std are of images in [0, 255]; divide them by 255")
        for name, value in (("mean", mean), ("std", std)):
            setattr(self, name, torch.tensor(value, device=getattr(self, name).device).view(1, 3, 1, 1))

    def normalize(self, x):
        """Return (x - mean) / std per color channel; x: (N, 3, H, W) in [0, 1]."""
        return (x - self.mean) / self.std


def scaled(channels, width):
    """Return each number of channels times `width`, rounded. Raises ValueError where one of them would be 0."""
    result = tuple(round(c * width) for c in channels)
    if min(result) < 1:
        raise ValueError(f"width {width} leaves a layer without a channel; take at least 1/{min(channels)}")
    return result
