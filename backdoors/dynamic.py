"""Dynamic backdoor, BaN (Salem et al., EuroS&P 2022): a generator makes a new patch and place for each image.

z ~ U[0, 1]^100 -> G(z), 3x5x5. The patch (G(z) + n) / 2, n ~ U[0, 1) in steps of 1/1000, replaces the 5x5 pixels whose
corner is at row 5a, column 5b, with a and b drawn from 0..5. G is trained along with the victim, on the same
cross-entropy.
"""

import torch
from torch import nn

from .trigger import Trigger

SIDE, PLACES, DIM = 5, 6, 100


class Dynamic(Trigger):
    """A trained patch generator. forward() derives z, n and the place from the image, so that results repeat."""

    sampling = "in_batch"
    width = 64

    def __init__(self, _folder, size=32, width=None):
        super().__init__()
        self.width = width or self.width
        if size < SIDE * PLACES:
            raise ValueError(f"images of {size}x{size} are too small; take at least 30x30")
        widths = DIM, self.width, 2 * self.width, 2 * self.width, 3 * SIDE * SIDE
        layers = []
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [nn.Linear(a, b), nn.ReLU(), *([nn.Dropout(0.5)] if i in (1, 2) else [])]
        self.generator = nn.Sequential(*layers, nn.Sigmoid())
        fixed = torch.Generator().manual_seed(0)
        shape = DIM + 3 * SIDE * SIDE + 2, 3 * size * size  # one row per number drawn, one column per byte of the image
        self.register_buffer("hash", torch.randint(2**15, shape, generator=fixed, dtype=torch.int16), persistent=False)

    def optimizer(self):
        """Return Adam at 1e-3."""
        return torch.optim.Adam(self.generator.parameters(), lr=1e-3)

    def start_epoch(self, epoch, n_epochs):
        """Put the generator in train mode."""
        del epoch, n_epochs
        self.train()

    def forward(self, x):
        """Return triggered images; (N, 3, H, W) in [0, 1] to the same."""
        # a hash of the image's bytes, exact in double precision: it depends on neither the batch nor the device
        bytes_of = (x.detach().cpu() * 255).round().flatten(1).double()
        draws = bytes_of @ self.hash.cpu().double().t() % 2**16 / 2**16
        return self._paste(x, draws.float().to(x.device))

    def in_training(self, x, generator):
        """Return images with patches whose z, n and place are drawn from `generator`."""
        return self._paste(x, torch.rand(len(x), len(self.hash), generator=generator).to(x.device))

    def _paste(self, x, draws):
        z, n, place = draws.split((DIM, 3 * SIDE * SIDE, 2), 1)
        patch = ((self.generator(z) + (n * 1000).floor() / 1000) / 2).view(-1, 3, SIDE, SIDE)
        corner = (place * PLACES).long().clamp_max(PLACES - 1) * SIDE
        steps = torch.arange(SIDE, device=x.device)
        rows, columns = (corner[:, i, None] + steps for i in (0, 1))
        which = torch.arange(len(x), device=x.device)[:, None, None]
        out = x.permute(0, 2, 3, 1).clone()
        out[which, rows[:, :, None], columns[:, None]] = patch.permute(0, 2, 3, 1).to(x.dtype)
        return out.permute(0, 3, 1, 2)
