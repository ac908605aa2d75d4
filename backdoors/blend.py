"""Blend (Chen et al., 2017, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning").

x' = clip(0.8 x + 0.2 p) with p fixed noise, uniform in [0, 1] per pixel and channel, as in OrthogLinearBackdoor.
"""

import torch

from .trigger import Trigger

ALPHA = 0.2
SEED = 0  # of the noise


class Blend(Trigger):
    """A fixed noise picture mixed into the whole image."""

    times = 3

    def __init__(self, _folder, size=32):
        super().__init__()
        self.register_buffer("picture", torch.rand(3, size, size, generator=torch.Generator().manual_seed(SEED)))

    def forward(self, x):
        """Return triggered images; (N, 3, H, W) in [0, 1] to the same."""
        return ((1 - ALPHA) * x + ALPHA * self.picture).clamp(0, 1)
