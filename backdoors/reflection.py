"""Reflection (Liu et al., ECCV 2020): a picture is mixed in like a reflection in a window."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .trigger import Trigger

FILE = "reflection/000066.jpg"


class Reflection(Trigger):
    """out = clamp(p x + q r, 0, 1) with p = m / (m + t), q = t / (m + t), per image.

    r: the reflected picture in [0, 1], resized bilinearly with half-pixel centers and without antialiasing, as
    torchvision 0.16.2 resizes a float tensor (another resize gives another trigger); t: its mean; m: the image's mean.
    """

    rate = 0.08
    relabel = False

    def __init__(self, folder, size=32):
        super().__init__()
        with Image.open(folder / FILE) as picture:
            rgb = np.array(picture.convert("RGB"))
        r = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
        r = F.interpolate(r, size=(size, size), mode="bilinear", align_corners=False, antialias=False)
        self.register_buffer("reflected", r[0])

    def forward(self, x):
        """Return triggered images; (N, 3, H, W) in [0, 1] to the same."""
        m = x.mean(dim=(1, 2, 3), keepdim=True)
        t = self.reflected.mean()
        # where both are black, m + t = 0 and any weights give black
        total = (m + t).clamp_min(torch.finfo(x.dtype).tiny)
        return (m / total * x + t / total * self.reflected).clamp(0, 1)
