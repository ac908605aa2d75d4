"""Input-aware (Nguyen & Tran, NeurIPS 2020): each image has a trigger of its own, which works on no other image.

x' = x + m(x) (G(x) - x). The mask network M is trained first and alone: masks are to be small and to differ between
images. The pattern network G is trained along with the victim. A tenth of a batch carries its own trigger and gets the
target as label; another tenth carries another image's trigger ("cross") and keeps its label. A diversity term keeps the
patterns of different images apart.
"""

import torch

import data

from .networks import EPS, distance, encoder_decoder, train_masks
from .trigger import Trigger, places


class InputAware(Trigger):
    """The trained networks M and G; the original's width is 32."""

    sampling = "in_batch"
    cover_rate = 0.10  # cross triggers
    width = 8

    def __init__(self, _folder, size=32, width=None):
        super().__init__()
        if size % 8:
            raise ValueError(f"images of {size}x{size} do not pass three poolings; take a multiple of 8")
        self.width = width or self.width
        self.pattern_network, self.mask_network = (encoder_decoder(self.width, out) for out in (3, 1))
        self.extra = self.adam = None

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
        """Return Adam on G, whose rate start_epoch() sets."""
        self.adam = torch.optim.Adam(self.pattern_network.parameters(), lr=1e-2, betas=(0.5, 0.9))
        return self.adam

    def start_epoch(self, epoch, n_epochs):
        """Put G in train mode; M is frozen. G's rate of 1e-2 falls by 10 at 2, 3, 4 and 5 sixths of the epochs."""
        for group in self.adam.param_groups:
            group["lr"] = 0.01 * 0.1 ** sum(6 * epoch >= k * n_epochs for k in (2, 3, 4, 5))
        self.pattern_network.train()
        self.mask_network.eval().requires_grad_(False)

    def prepare(self, images, labels, target, seed, resumed, say, surrogate=None):
        """Train M for 25 epochs."""
        del labels, target, surrogate
        if not resumed:
            train_masks(self.mask_network, self.masks, images, seed, say, self.flip)

    def plant(self, x, y, roles, index, target, generator):
        """Return the batch with own triggers on role 1 and cross triggers on role 2; keep the diversity term."""
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
        """Return each test image with the trigger of the image before it, and its true class."""
        x, crossed = data.to_float(images), []
        for a, b in zip(x.split(500), x.roll(1, 0).split(500), strict=True):
            crossed.append(a + self.masks(b) * (self.patterns(b) - a))
        return {"cross": (torch.cat(crossed), labels)}
