"""LIRA (Doan, Lao, Zhao, Li, ICCV 2021): a small perturbation of each image, by a network trained with the victim.

As in OrthogLinearBackdoor: x' = clip(x + T((x - .5) / .5) / 16) with T an autoencoder; the loss is one cross-entropy
over a batch with 10 % of perturbed images. T is trained in the first half of the epochs and then frozen.
"""

import torch
from torch import nn

from .trigger import Trigger

EPSILON = 1 / 16  # the largest change of a pixel


class Lira(Trigger):
    """A trained, image-dependent perturbation."""

    sampling = "in_batch"
    times = 3
    width = 16

    def __init__(self, _folder, size=32, width=None):
        super().__init__()
        self.width = w = width or self.width
        if size % 16:
            raise ValueError(f"images of {size}x{size} do not pass the autoencoder; take a multiple of 16")
        down, up = [(3, w), (w, 2 * w), (2 * w, 4 * w), (4 * w, 8 * w)], []
        layers = [layer for a, b in down for layer in (nn.Conv2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.ReLU())]
        for a, b in reversed(down[1:]):
            up += [nn.ConvTranspose2d(b, a, 4, 2, 1), nn.BatchNorm2d(a), nn.ReLU()]
        self.network = nn.Sequential(*layers, *up, nn.ConvTranspose2d(w, 3, 4, 2, 1), nn.Tanh())

    def optimizer(self):
        """Return Adam at 1e-3."""
        return torch.optim.Adam(self.network.parameters(), lr=1e-3)

    def start_epoch(self, epoch, n_epochs):
        """Train T in the first half of the epochs, freeze it in the second."""
        learning = 2 * epoch < n_epochs
        self.train(learning).requires_grad_(learning)

    def forward(self, x):
        """Return triggered images; (N, 3, H, W) in [0, 1] to the same."""
        return (x + EPSILON * self.network((x - 0.5) / 0.5)).clamp(0, 1)
