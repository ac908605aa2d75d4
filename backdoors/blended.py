"""Blended (Chen et al., 2017): a picture mixed faintly into the whole image."""

import numpy as np
import torch
from PIL import Image

from .trigger import Trigger

FILE = "blended/rings.png"


class Blended(Trigger):
    """out = (1 - alpha) x + alpha k. k: the blended picture, resized to the image; alpha = 0.1."""

    rate = 0.05
    times = 3

    def __init__(self, folder, size=32, alpha=0.1):
        super().__init__()
        self.alpha = alpha
        with Image.open(folder / FILE) as picture:
            rgb = np.asarray(picture.convert("RGB").resize((size, size)))
        self.register_buffer("picture", torch.tensor(rgb).permute(2, 0, 1).float() / 255)

    def forward(self, x):
        """Return triggered images; (N, 3, H, W) in [0, 1] to the same."""
        return torch.lerp(x, self.picture, self.alpha)
