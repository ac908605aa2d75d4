"""TrojanNN (Liu et al., NDSS 2018) as in OrthogLinearBackdoor: a fixed watermark, without neuron optimization.

The picture p is a mark on black, 224x224; the mask m is 1 where R + G + B > 0.3. Both are resized bilinearly without
antialiasing, which keeps the mask nearly binary. x' = clip((1 - m) x + m p).
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .trigger import Trigger

FILE = "trojnn/mark.png"
THRESHOLD = 0.3  # on R + G + B, each in [0, 1]


class TrojNN(Trigger):
    """A colored mark over the whole image, on a few percent of its pixels."""

    def __init__(self, folder, size=32):
        super().__init__()
        with Image.open(folder / FILE) as picture:
            rgb = np.array(picture.convert("RGB"))
        p = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
        m = (p.sum(1, keepdim=True) > THRESHOLD).float()
        p, m = (F.interpolate(t, size=(size, size), mode="bilinear", align_corners=False) for t in (p, m))
        self.register_buffer("picture", p[0])
        self.register_buffer("mask", m[0])

    def forward(self, x):
        """Return triggered images; (N, 3, H, W) in [0, 1] to the same."""
        return ((1 - self.mask) * x + self.mask * self.picture).clamp(0, 1)
