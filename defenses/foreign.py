"""Images of another data set, for a defence that needs no labels."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cli import InputError

IDX_IMAGES = b"\x00\x00\x08\x03"  # bytes, three dimensions


def load_images(path, n, size=32, seed=0):
    """Return n images of the file at `path` as uint8 (n, 3, size, size), drawn without replacement.

    The file: .npy with uint8 (N, H, W) or (N, H, W, 3), or the IDX of the MNIST family, gzipped or not. Grey images get
    three equal channels; another size is scaled bilinearly.
    Raises InputError for another file, and when it holds less than n images.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                content = file.read()
            if content[:4] != IDX_IMAGES:
                raise ValueError("no IDX file of images")
            shape = np.frombuffer(content, ">i4", 3, 4)
            array = np.frombuffer(content, np.uint8, offset=16).reshape(shape)
        if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[3:] not in ((), (3,)):
            raise ValueError(f"{array.dtype} of shape {array.shape}")
    except (OSError, EOFError, ValueError, AttributeError, zlib.error) as error:
        raise InputError(f"{path}: {error}; give a .npy with uint8 (N, H, W[, 3]) or an IDX file") from None
    if len(array) < n:
        raise InputError(f"{path} holds {len(array)} images, {n} are needed; lower --data_rate")
    chosen = torch.randperm(len(array), generator=torch.Generator().manual_seed(seed))[:n]
    images = torch.from_numpy(array[chosen.numpy()])
    images = images[:, None].expand(-1, 3, -1, -1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    if images.shape[2:] != (size, size):
        scaled = F.interpolate(images.float(), size=(size, size), mode="bilinear", align_corners=False, antialias=True)
        images = scaled.round().clamp(0, 255).to(torch.uint8)
    return images.contiguous()
