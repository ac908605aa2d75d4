"""Adaptive-Blend (Qi et al., ICLR 2023): few poisoned images, and as many triggered ones that keep their true label.

x' = x + alpha m (p - x). In training each triggered image has a mask m of its own, 8 of 16 cells (8x8 pixels each in a
32x32 image), and alpha = 0.15. In evaluation m = 1 and alpha = 0.2.
"""

import numpy as np
import torch
from PIL import Image

from .trigger import Trigger, places

FILE = "blended/rings.png"
CELLS, SHOWN = 4, 8  # cells per side; cells of a mask that are 1
ALPHA_TRAINING, ALPHA = 0.15, 0.2


class AdaptiveBlend(Trigger):
    """A blended picture. The attack is data poisoning, so the triggered images are fixed."""

    rate = 0.003
    cover_rate = 0.003  # the paper's conservatism ratio: triggered, label kept
    sampling = "fixed"
    times = 3

    def __init__(self, folder, size=32):
        super().__init__()
        if size % CELLS:
            raise ValueError(f"images of {size}x{size} have no {CELLS}x{CELLS} cells; take a multiple of {CELLS}")
        with Image.open(folder / FILE) as picture:
            rgb = np.array(picture.convert("RGB").resize((size, size)))
        self.register_buffer("picture", torch.from_numpy(rgb).permute(2, 0, 1).float() / 255)

    def forward(self, x):
        """Return images with the whole trigger; (N, 3, H, W) in [0, 1] to the same."""
        return torch.lerp(x, self.picture, ALPHA)

    def plant(self, x, y, roles, index, target, generator):
        """Return the batch with masked triggers on roles 1 and 2; the mask depends on the image's index alone."""
        del generator
        x, y = x.clone(), y.clone()
        for role in (1, 2):
            hit = places(roles, role, x)
            if len(hit):
                masks = torch.stack([self.mask_of(int(i)) for i in index[hit.to(index.device)]]).to(x.device)
                x[hit] = torch.lerp(x[hit], self.picture, ALPHA_TRAINING * masks)
        y[places(roles, 1, x)] = target
        return x, y

    def mask_of(self, index):
        """Return the mask of the training image of this index, (1, H, W) of 0 and 1."""
        shown = torch.randperm(CELLS**2, generator=torch.Generator().manual_seed(index))[:SHOWN]
        cells = torch.zeros(CELLS**2)
        cells[shown] = 1
        side = self.picture.shape[-1] // CELLS
        return cells.view(1, CELLS, CELLS).repeat_interleave(side, 1).repeat_interleave(side, 2)
