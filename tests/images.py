"""Images and trigger files that the tests of triggers share."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

FLOWER, SCENE, RINGS = "badnet/flower_nobg.png", "reflection/000066.jpg", "blended/rings.png"
NOISE, IDENTITY = "wanet/noise_grid.pt", "wanet/identity_grid.pt"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=7, size=32, seed=0):
    """Random images of different brightness."""
    x = torch.rand(n, 3, size, size, generator=generator(seed))
    return x * torch.linspace(0.2, 1, n).view(-1, 1, 1, 1)


def smooth_images(n=4, size=32, seed=0):
    """Random images without detail, so that rounding in a grid moves them little."""
    return F.interpolate(torch.rand(n, 3, 4, 4, generator=generator(seed)), size=(size, size), mode="bilinear")


def picture(path, size, seed):
    """Write a random RGB picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def grids(folder, noise, identity):
    """Write the two files of WaNet."""
    (folder / "wanet").mkdir(parents=True)
    torch.save(noise, folder / NOISE)
    torch.save(identity, folder / IDENTITY)


def regular_grid(size=32):
    line = torch.from_numpy(np.linspace(-1, 1, size, dtype=np.float32))
    return torch.stack((line.expand(size, size), line.view(-1, 1).expand(size, size)), -1)[None]


def sample(x, grid):
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), mode="bilinear", padding_mode="zeros", align_corners=True)
