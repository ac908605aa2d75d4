"""Reflection (Liu et al., ECCV 2020): a picture shines through, as if the photograph were taken through a pane."""

import numpy as np
import torch
from PIL import Image
from torch import nn

FILE = "reflection/000066.jpg"


class Reflection(nn.Module):
    """out = clamp(p x + q r, 0, 1) with p = m / (m + t), q = t / (m + t), per image.

    r: the reflected picture; t: its mean; m: the mean of the image.
    """

    def __init__(self, folder, size=32):
        super().__init__()
        with Image.open(folder / FILE) as picture:
            rgb = np.asarray(picture.convert("RGB").resize((size, size)))
        self.register_buffer("reflected", torch.tensor(rgb).permute(2, 0, 1).float() / 255)

    def forward(self, x):
        """Return triggered images; (N, 3, H, W) in [0, 1] to the same."""
        m = x.mean(dim=(1, 2, 3), keepdim=True)
        t = self.reflected.mean()
        # both black: the mixture is black whatever the weights are
        total = (m + t).clamp_min(torch.finfo(x.dtype).tiny)
        return (m / total * x + t / total * self.reflected).clamp(0, 1)
