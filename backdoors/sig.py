"""SIG (Barni, Kallas, Tondi, ICIP 2019): a sinusoidal pattern over the whole image; clean-label.

As in OrthogLinearBackdoor: column j of the pattern is p_j = (trunc(20 sin(0.8 j)) mod 256) / 255, where the negative
half-waves wrap around to nearly white, and x' = clip(0.8 x + 0.2 p). The paper adds the sine instead.
"""

import torch

from .trigger import Trigger

ALPHA = 0.2


class Sig(Trigger):
    """Vertical stripes of period 7.85 pixels mixed into the image; clean-label."""

    rate = 0.08
    relabel = False

    def __init__(self, _folder, size=32):
        super().__init__()
        wave = (20 * torch.sin(0.8 * torch.arange(size, dtype=torch.float64))).trunc()
        self.register_buffer("pattern", ((wave % 256) / 255).float())

    def forward(self, x):
        """Return triggered images; (N, 3, H, W) in [0, 1] to the same."""
        return ((1 - ALPHA) * x + ALPHA * self.pattern).clamp(0, 1)
