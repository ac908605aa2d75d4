"""Bits hidden in images: encoder and decoder of StegaStamp (Tancik et al., CVPR 2020) for 32x32 images."""

import torch
import torch.nn.functional as F
from torch import nn


class SecretEncoder(nn.Module):
    """A U-Net: images (N, 3, size, size) and secrets (N, bits) to residuals (N, 3, size, size), unbounded.

    Channels are width, width, 2 width, 4 width, 8 width on the way down; size is a multiple of 16.
    """

    def __init__(self, width, bits, size):
        super().__init__()
        w, self.size = width, size
        self.secret = nn.Linear(bits, 3 * size * size)
        down = (6, w, 1), (w, w, 2), (w, 2 * w, 2), (2 * w, 4 * w, 2), (4 * w, 8 * w, 2)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride, 1) for a, b, stride in down)
        up = (8 * w, 4 * w), (4 * w, 2 * w), (2 * w, w), (w, w)
        self.up = nn.ModuleList(nn.Conv2d(a, b, 2) for a, b in up)
        joined = (8 * w, 4 * w), (4 * w, 2 * w), (2 * w, w), (2 * w + 6, w)
        self.join = nn.ModuleList(nn.Conv2d(a, b, 3, 1, 1) for a, b in joined)
        self.out = nn.Conv2d(w, 3, 1)
        he_normal(self)

    def forward(self, x, secrets):
        """Return the residuals."""
        hidden = F.relu(self.secret(secrets - 0.5)).view(-1, 3, self.size, self.size)
        maps = [torch.cat((hidden, x - 0.5), 1)]
        for conv in self.down:
            maps.append(F.relu(conv(maps[-1])))
        y = maps[5]
        for up, join, beside in zip(self.up, self.join, (maps[4:5], maps[3:4], maps[2:3], maps[:2]), strict=True):
            y = F.relu(up(F.pad(F.interpolate(y, scale_factor=2), (0, 1, 0, 1))))
            y = F.relu(join(torch.cat((*beside, y), 1)))
        return self.out(y)


def secret_decoder(width, bits, size):
    """Return the network that reads secrets: images minus .5, (N, 3, size, size), to logits (N, bits)."""
    w, layers, last = width, [], 3
    for channels, stride in ((w, 2), (w, 1), (2 * w, 2), (2 * w, 1), (2 * w, 2), (4 * w, 2), (4 * w, 2)):
        layers += [nn.Conv2d(last, channels, 3, stride, 1), nn.ReLU()]
        last = channels
    layers += [nn.Flatten(), nn.Linear(last * (-(-size // 32)) ** 2, 16 * w), nn.ReLU(), nn.Linear(16 * w, bits)]
    return he_normal(nn.Sequential(*layers))


def he_normal(network):
    """Initialize `network` in place, weights Kaiming normal and biases 0; return it."""
    for m in network.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            nn.init.zeros_(m.bias)
    return network
