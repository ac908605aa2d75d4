"""SimCLR (Chen et al., ICML 2020): random views of images, the projection head and the NT-Xent loss.

Views are computed on the batch, on its device. Parameters are drawn per image; only the order of the color changes is
drawn per batch.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

GRAY = (0.299, 0.587, 0.114)  # weights of red, green, blue


class Projection(nn.Module):
    """The projection head, used in stage 1 of DBD alone: features (N, dim) to unit vectors (N, out)."""

    def __init__(self, dim, out):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, out))

    def forward(self, x):
        """Return unit vectors."""
        return F.normalize(self.layers(x), dim=1)


def nt_xent(a, b, temperature):
    """Return (NT-Xent loss, bool (N,) whether the nearest other view of each first view is its second view).

    a, b: unit vectors (N, D), the first and the second views of N images. Only the first views are anchors, as in
    DBD's code. The loss is the cross-entropy of the second view among the 2N - 1 other views, over the similarities
    divided by the temperature; the mean over the N anchors.
    """
    similarity = a @ torch.cat((a, b)).T / temperature  # (N, 2N)
    similarity.fill_diagonal_(-math.inf)  # of each anchor with itself
    twin = torch.arange(len(a), 2 * len(a), device=a.device)
    return F.cross_entropy(similarity, twin), similarity.detach().argmax(1) == twin


@dataclass(frozen=True)
class Views:
    """The constants of a random view, and of the projection head."""

    crop_area: tuple[float, float] = (0.2, 1.0)  # share of the image, resized to the full size
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip_p: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # of brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    projection: int = 128  # dimensions of the head's output


def view(x, generator, constants=Views()):
    """Return a random view of each image, (N, 3, H, W) in [0, 1] to the same; generator: on the CPU."""
    n, c = len(x), constants

    def draw(low, high):
        return (torch.rand(n, generator=generator) * (high - low) + low).to(x.device)

    def chance(p):
        return (torch.rand(n, generator=generator) < p).to(x.device)[:, None, None, None]

    ratio = draw(*(math.log(r) for r in c.crop_ratio)).exp()
    x = crop_and_flip(x, draw(*c.crop_area), ratio, draw(-1, 1), draw(-1, 1), chance(c.flip_p).flatten())
    jittered = x
    factors = [draw(1 - s, 1 + s) for s in c.jitter[:3]] + [draw(-c.jitter[3], c.jitter[3])]
    for i in torch.randperm(4, generator=generator).tolist():
        jittered = (brightness, contrast, saturation, hue)[i](jittered, factors[i][:, None, None, None])
    x = torch.where(chance(c.jitter_p), jittered, x)
    x = torch.where(chance(c.gray_p), gray(x).expand_as(x), x)
    return torch.where(chance(c.blur_p), blur(x, draw(*c.blur_sigma)[:, None, None, None]), x).clamp(0, 1)


def crop_and_flip(x, area, ratio, right, down, flip):
    """Crop a box of each image and resize it to (H, W): (N, 3, H, W) in [0, 1] to the same.

    Interpolation is bicubic, clamped to [0, 1]. area: (N,), the box's share of the image; ratio: (N,), its width /
    height; right, down: (N,), its position, from -1 (left, top edge) to 1 (right, bottom edge); flip: bool (N,).
    """
    w, h = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0] = torch.where(flip, -w, w)
    theta[:, 1, 1] = h
    theta[:, 0, 2], theta[:, 1, 2] = right * (1 - w), down * (1 - h)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(0, 1)


def gray(x):
    """Return the luminance (N, 1, H, W) of images (N, 3, H, W) in [0, 1]."""
    return (x * x.new_tensor(GRAY)[:, None, None]).sum(1, keepdim=True)


def brightness(x, factor):
    """Multiply each image by its factor. x: (N, 3, H, W) in [0, 1], as is what is returned; factor: (N, 1, 1, 1)."""
    return (x * factor).clamp(0, 1)


def contrast(x, factor):
    """Scale the difference of each pixel from its image's mean luminance; x, factor: as for brightness()."""
    middle = gray(x).mean((2, 3), keepdim=True)
    return (middle + (x - middle) * factor).clamp(0, 1)


def saturation(x, factor):
    """Scale the difference of each pixel from its own luminance; x, factor: as for brightness()."""
    own = gray(x)
    return (own + (x - own) * factor).clamp(0, 1)


def hue(x, turn):
    """Rotate the hue; x: as for brightness(); turn: (N, 1, 1, 1), as a share of the full circle."""
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    spread = value - low
    some = torch.where(spread > 0, spread, torch.ones_like(spread))
    r, g, b = (((value - c) / some) for c in x.split(1, 1))
    sixths = torch.where(x[:, :1] == value, b - g, torch.where(x[:, 1:2] == value, 2 + r - b, 4 + g - r))
    angle = torch.where(spread > 0, sixths, torch.zeros_like(sixths)) + 6 * turn
    # each channel is a piecewise linear function of the angle
    parts = []
    for start in (5, 3, 1):
        k = (start + angle) % 6
        parts.append(value - spread * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.cat(parts, 1)


def blur(x, sigma):
    """Blur by a Gaussian on 3x3 pixels, reflected at the edge; x: as for brightness(); sigma: (N, 1, 1, 1), pixels."""
    side = torch.exp(-0.5 / sigma.square())
    side, middle = side / (1 + 2 * side), 1 / (1 + 2 * side)
    x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    x = middle * x[:, :, 1:-1] + side * (x[:, :, :-2] + x[:, :, 2:])
    return middle * x[..., 1:-1] + side * (x[..., :-2] + x[..., 2:])
