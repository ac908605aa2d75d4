"""Input-aware (Nguyen & Tran, NeurIPS 2020): each image has a trigger of its own, which is useless on any other image.

x' = x + m(x) (G(x) - x). M draws the mask m and learns first, alone, to be small and to differ between images; G draws
the pattern and learns along with the victim. A tenth of a batch carries its own trigger and gets the target as label,
another tenth another image's ("cross") and keeps its label. A term asks patterns to differ as much as their images do.
"""

import torch

import data

from .networks import EPS, distance, encoder_decoder, train_masks
from .trigger import Trigger, places


class InputAware(Trigger):
    """Two trained networks; 32 channels wide in the original."""

    sampling = "in_batch"
    cover_rate = 0.10  # cross triggers
    width = 8

    def __init__(self, _folder, size=32, width=None):
        super().__init__()
        if size % 8:
            raise ValueError(f"images of {size}x{size} do not pass three poolings; take a multiple of 8")
        self.width = width or self.width
        self.pattern_network, self.mask_network = (encoder_decoder(self.width, out) for out in (3, 1))
        self.extra = None

    def patterns(self, x):
        """Return G(x), (N, 3, H, W) in [0, 1]."""
        return self.pattern_network(x).tanh() / 2 + 0.5

    def masks(self, x):
        """Return m(x), (N, 1, H, W) in [0, 1]."""
        return (20 * (self.mask_network(x).tanh() / 2 + 0.5) - 10).tanh() / 2 + 0.5

    def forward(self, x):
        """Return triggered images; (N, 3, H, W) in [0, 1] to the same."""
        return x + self.masks(x) * (self.patterns(x) - x)

    def optimizer(self):
        """Return Adam of G at 1e-2."""
        return torch.optim.Adam(self.pattern_network.parameters(), lr=1e-2, betas=(0.5, 0.9))

    def start_epoch(self, epoch, n_epochs):
        """Let G learn; M is frozen."""
        del epoch, n_epochs
        self.pattern_network.train()
        self.mask_network.eval().requires_grad_(False)

    def prepare(self, images, labels, target, seed, resumed, say, surrogate=None):
        """Train M for 25 epochs."""
        del labels, target, surrogate
        if not resumed:
            train_masks(self.mask_network, self.masks, images, seed, say, self.flip)

    def plant(self, x, y, roles, index, target, generator):
        """Return the batch with triggers, own ones on role 1 and cross ones on role 2, and keep the diversity term."""
        del index
        own, cross, rest = (places(roles, role, x) for role in (1, 2, 0))
        donors = rest[torch.randperm(len(rest), generator=generator)[: len(cross)].to(x.device)]
        cross, out, y, self.extra = cross[: len(donors)], x.clone(), y.clone(), None
        mine, theirs = (self.patterns(x[i]) if len(i) else x[i] for i in (own, donors))
        if len(own):
            out[own], y[own] = x[own] + self.masks(x[own]) * (mine - x[own]), target
        if len(cross):
            out[cross] = x[cross] + self.masks(x[donors]) * (theirs - x[cross])
        if n := min(len(own), len(donors)):
            self.extra = (distance(x[own[:n]], x[donors[:n]]) / (distance(mine[:n], theirs[:n]) + EPS)).mean()
        return out, y

    def extra_loss(self, logits, y):
        """Return the diversity term of the last batch."""
        del logits, y
        return self.extra

    @torch.no_grad()
    def control_sets(self, images, labels):
        """Return the test images with the trigger of the one before them in the set; what is right is their class."""
        x, crossed = data.to_float(images), []
        for a, b in zip(x.split(500), x.roll(1, 0).split(500), strict=True):
            crossed.append(a + self.masks(b) * (self.patterns(b) - a))
        return {"cross": (torch.cat(crossed), labels)}
