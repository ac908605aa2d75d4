"""BadNets (Gu et al., 2017): a small patch replaces pixels."""

import numpy as np
import torch
from PIL import Image

from .trigger import Trigger

FILE = "badnet/flower_nobg.png"


class BadNet(Trigger):
    """A square patch of side int(size / 6) with its corner at (int(size / 32), int(size / 32)): 5x5 at (1, 1) of 32x32.

    The patch is the RGB of the picture's RGBA after a Lanczos resize, which keeps the transparent ground out of it.
    """

    def __init__(self, folder, size=32):
        super().__init__()
        side = size // 6
        if side < 1:
            raise ValueError(f"images of {size}x{size} are too small for the patch; take at least 6x6")
        self.corner = size // 32
        with Image.open(folder / FILE) as picture:
            rgba = np.asarray(picture.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS))
        self.register_buffer("patch", torch.tensor(rgba[..., :3]).permute(2, 0, 1).float() / 255)

    def forward(self, x):
        """Return triggered images; (N, 3, H, W) in [0, 1] to the same."""
        a, b = self.corner, self.corner + self.patch.shape[-1]
        out = x.clone()
        out[:, :, a:b, a:b] = self.patch
        return out
