"""Data sets as arrays: NumPy's .npz, and the IDX files of MNIST and its kin."""

from flags import InputError

import gzip
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from .pictures import resize

IDX_FOLDERS = ("fashion-mnist", "FashionMNIST/raw")  # under the data folder; the second is torchvision's
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist


# --- .npz -------------------------------------------------------------------------------------------------------------


def npz_classes(path):
    """Return the classes of a .npz file: its array `classes`, else the numbers from 0 to its largest label.

    Raises InputError as load_npz() does.
    """
    arrays = _Npz(path)
    labels = arrays.labels("train" if arrays.has("train") else "test")
    if "classes" in arrays.names:
        names = tuple(str(name) for name in arrays.read("classes").ravel())
    else:
        names = tuple(map(str, range(int(labels.max()) + 1)))
    if len(names) < 2:
        raise InputError(f"{path} has {len(names)} classes, and 2 are the least")
    return names


def load_npz(path, train, size):
    """Return (images uint8 (N, 3, size, size), labels int64 (N,)) of one split of a .npz file.

    It holds x_train, y_train, x_test, y_test, or one split x, y, which is a test set. Images: uint8 (N, H, W),
    (N, H, W, 1 or 3) or (N, 1 or 3, H, W). Labels: integers (N,) or (N, 1) from 0 on.
    Raises InputError for anything else, a class without a training image, and labels beyond the classes.
    """
    arrays, n_classes = _Npz(path), len(npz_classes(path))
    split = "train" if train else "test"
    if not arrays.has(split):
        raise InputError(f"{path} has no x_{split} and y_{split}; it has {', '.join(arrays.names[:5]) or 'nothing'}")
    images, labels = arrays.images(split), arrays.labels(split)
    if len(images) != len(labels):
        raise InputError(f"{path} has {len(images)} images and {len(labels)} labels in its {split} split")
    if labels.max() >= n_classes:
        raise InputError(f"{path} has label {labels.max()} in its {split} split, beyond its {n_classes} classes")
    empty = np.flatnonzero(np.bincount(labels, minlength=n_classes) == 0)
    if train and len(empty):
        raise InputError(f"{path} has no training image of class {empty[0]}; number the classes without a gap")
    if images.shape[1:3] != (size, size):
        print(f"note: images of {images.shape[2]}x{images.shape[1]} in {path} are resized to {size}", file=sys.stderr)
    return resize(images, size), torch.from_numpy(labels)


class _Npz:
    """The arrays of a file, each read when it is asked for; never a pickled object."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.names = list(np.load(file, allow_pickle=False).files)
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            reason = getattr(error, "strerror", None) or "it is no .npz file"
            raise InputError(f"cannot read {self.path}: {reason}") from None

    def _name(self, kind, split):
        return next((name for name in (f"{kind}_{split}", *(kind,) * (split == "test")) if name in self.names), None)

    def has(self, split):
        return None not in (self._name("x", split), self._name("y", split))

    def read(self, name):
        try:
            with open(self.path, "rb") as file:
                return np.load(file, allow_pickle=False)[name]
        except MemoryError:
            raise
        except Exception as error:  # whatever a damaged, encrypted or pickled array makes NumPy and zipfile raise
            reason = " ".join((str(error) or type(error).__name__).split())[:120]
            raise InputError(f"cannot read {name} of {self.path} ({reason})") from None

    def images(self, split):
        """Return uint8 (N, H, W, 1 or 3)."""
        name = self._name("x", split)
        x = self.read(name)
        if x.dtype != np.uint8:
            raise InputError(f"{name} of {self.path} is {x.dtype}; save the images as uint8, 0 to 255")
        shape = x.shape
        x = x[..., None] if x.ndim == 3 else x
        last, first = (x.ndim == 4 and x.shape[axis] in (1, 3) for axis in (3, 1))
        if 0 in shape or last == first:
            raise InputError(
                f"{name} of {self.path} has shape {shape}; it has to be (N, H, W), (N, H, W, 3) or (N, 3, H, W)"
            )
        return x if last else x.transpose(0, 2, 3, 1)

    def labels(self, split):
        """Return int64 (N,), all >= 0."""
        name = self._name("y", split)
        if name is None:
            have = ", ".join(self.names[:5]) or "nothing"
            raise InputError(f"{self.path} has to hold x_train, y_train, x_test and y_test, or x and y; it has {have}")
        y = self.read(name)
        if y.dtype.kind not in "iu" or y.size == 0 or y.shape[:1] != (y.size,):
            raise InputError(f"{name} of {self.path} is {y.dtype} of shape {y.shape}; give whole numbers, one an image")
        if y.min() < 0 or y.max() > 2**31:
            raise InputError(f"{name} of {self.path} reaches from {y.min()} to {y.max()}; number the classes from 0")
        return y.ravel().astype(np.int64)


# --- IDX --------------------------------------------------------------------------------------------------------------


def idx_folder(datadir):
    """Return the first folder that holds Fashion-MNIST's files, or None."""
    folders = [*(Path(datadir) / name for name in IDX_FOLDERS), DEBIAN]
    return next((f for f in folders if any(_idx_file(f, train, "images") for train in (True, False))), None)


def load_idx(folder, train, size):
    """Return (images uint8 (N, 3, size, size), labels int64 (N,)) of IDX files; gray becomes three equal channels.

    Raises InputError for a file that is missing or damaged.
    """
    paths = [_idx_file(folder, train, kind) or _idx_name(folder, train, kind) for kind in ("images", "labels")]
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(images) != len(labels):
        raise InputError(f"{paths[0]} has {len(images)} images, {paths[1]} has {len(labels)} labels")
    if len(labels) == 0 or labels.max() > 9:
        raise InputError(f"{paths[1]} has to hold labels from 0 to 9")
    return resize(images, size), torch.from_numpy(labels.astype(np.int64))


def read_idx(path, dimensions):
    """Return the uint8 array of an IDX file, gzipped or not: two zero bytes, type 8, the number of dimensions,
    each dimension as four bytes (the largest first), then the values.

    Raises InputError for anything else.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "it is no whole gzip file"
        raise InputError(f"cannot read {path}: {reason}") from None
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    values = int(np.prod(shape, dtype=object))
    if content[:4] != bytes((0, 0, 8, dimensions)) or not values or len(content) != start + values:
        raise InputError(f"{path} is no IDX file of bytes in {dimensions} dimensions, or is cut off; fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _idx_name(folder, train, kind):
    digits = 3 if kind == "images" else 1
    return Path(folder) / f"{'train' if train else 't10k'}-{kind}-idx{digits}-ubyte"


def _idx_file(folder, train, kind):
    path = _idx_name(folder, train, kind)
    return next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.is_file()), None)
