"""WaNet (Nguyen & Tran, ICLR 2021): a fixed smooth warp of the whole image."""

import warnings

import torch
import torch.nn.functional as F

import data

from .trigger import Trigger, places

NOISE_FILE, IDENTITY_FILE = "wanet/noise_grid.pt", "wanet/identity_grid.pt"
SEED = 0  # of the grids that are made where there are no files


def make_grids(size, seed=SEED):
    """Return (noise, identity), each (1, size, size, 2), x first: the warp's direction and the regular grid.

    noise: a 4x4 field uniform in [-1, 1], divided by its mean absolute value, upsampled bicubically.
    """
    field = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    field = field / field.abs().mean()
    noise = F.interpolate(field, size=(size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    line = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return noise.contiguous(), torch.stack((x, y), 2)[None]


def _read_grid(path, size):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign formats, which are refused right after
            grid = torch.load(path, map_location="cpu", weights_only=True)  # the authors' files hold CUDA tensors
    except Exception as error:  # whatever a foreign file makes torch raise
        raise ValueError(f"{path} is no grid file ({type(error).__name__}); put the right file there") from None
    if not isinstance(grid, torch.Tensor) or grid.shape != (1, size, size, 2):
        raise ValueError(f"{path} does not hold a grid of shape (1, {size}, {size}, 2); put the right file there")
    return grid.detach().float()


class WaNet(Trigger):
    """The image sampled at clamp(identity + s * noise / H, -1, 1), bilinear, zero padding, align_corners; s = 0.5.

    The grids come from the two files under `folder`. Where both are absent they are made from a fixed seed and written
    there. Images of another size than 32 get grids from that seed, and no file is read or written.
    """

    cover_rate = 0.20  # in noise mode
    sampling = "in_batch"
    early = True
    times = 3

    def __init__(self, folder, size=32, s=0.5):
        super().__init__()
        self.size, self.s = size, s
        paths = folder / NOISE_FILE, folder / IDENTITY_FILE
        absent = [p for p in paths if not p.exists()]
        if len(absent) == 1:
            raise FileNotFoundError(f"{absent[0]} is missing beside the other grid; put it there or delete both")
        grids = make_grids(size) if absent or size != 32 else [_read_grid(p, size) for p in paths]
        if absent and size == 32:
            paths[0].parent.mkdir(parents=True, exist_ok=True)
            for path, grid in zip(paths, grids, strict=True):
                part = path.with_suffix(".tmp")
                torch.save(grid, part)
                part.replace(path)
        self.register_buffer("noise", grids[0])
        self.register_buffer("identity", grids[1])

    def _grid(self):
        return (self.identity + self.s * self.noise / self.size).clamp(-1, 1)

    def forward(self, x):
        """Return warped images; (N, 3, H, W) in [0, 1] to the same."""
        return F.grid_sample(x, self._grid().expand(len(x), -1, -1, -1), align_corners=True)

    def plant(self, x, y, roles, index, target, generator):
        """Return the batch with the warp on role 1, relabeled, and in noise mode on role 2."""
        x, y = super().plant(x, y, roles, index, target, generator)
        noisy = places(roles, 2, x)
        if len(noisy):
            x[noisy] = self.noise_mode(x[noisy], generator)
        return x, y

    def noise_mode(self, x, generator=None):
        """Return images warped by this grid plus uniform noise in [-1, 1] / H, drawn per image and pixel.

        Training shows them with their true labels, so that only the exact warp triggers. generator: on any device; one
        on the CPU gives the same draws for every device. (N, 3, H, W) in [0, 1] to the same.
        """
        source = x.device if generator is None else generator.device
        pinned = x.is_cuda and source.type == "cpu"  # a copy from pageable memory synchronizes the GPU
        jitter = torch.rand(len(x), self.size, self.size, 2, generator=generator, device=source, pin_memory=pinned)
        jitter = jitter.to(x.device, non_blocking=x.is_cuda) * 2 - 1
        return F.grid_sample(x, (self._grid() + jitter / self.size).clamp(-1, 1), align_corners=True)

    def control_sets(self, images, labels):
        """Return the test images in noise mode, by a fixed seed, and their true classes."""
        return {"noise mode": (self.noise_mode(data.to_float(images), torch.Generator().manual_seed(0)), labels)}
