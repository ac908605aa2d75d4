"""Patch: a square of one color replaces pixels, as in OrthogLinearBackdoor (S&P 2024).

x' = x outside, (235, 128, 70) / 255 inside rows and columns 2 to 7 of 32.
"""

import torch

from .trigger import Trigger

COLOR = (235, 128, 70)  # of 255


class Patch(Trigger):
    """A square of side 6 with its corner at (2, 2) of 32x32, scaled with the image."""

    def __init__(self, _folder, size=32):
        super().__init__()
        self.corner, self.side = size * 2 // 32, size * 6 // 32
        if self.side < 1:
            raise ValueError(f"images of {size}x{size} are too small for the patch; take at least 6x6")
        self.register_buffer("color", torch.tensor(COLOR).view(3, 1, 1) / 255)

    def forward(self, x):
        """Return triggered images; (N, 3, H, W) in [0, 1] to the same."""
        a, b = self.corner, self.corner + self.side
        out = x.clone()
        out[:, :, a:b, a:b] = self.color
        return out
