"""Data sets, augmentation, and the clean images of a defense.

A whole split is on the device as uint8. Batches of it are converted to floats in [0, 1], the range that augmentation,
triggers and networks take.
"""

from flags import DATASETS, InputError, place_of

from pathlib import Path

import torch

from . import arrays, backdoorbench, cifar10, fetched, pictures
from .augment import augment, to_float
from .checks import check_images, check_labels
from .defense_set import defense_indices, defense_split
from .pictures import load_triggered

__all__ = [
    "augment",
    "backdoorbench",
    "check_images",
    "check_labels",
    "class_names",
    "defense_indices",
    "defense_split",
    "few",
    "flips",
    "load_dataset",
    "load_triggered",
    "to_float",
]

N_CLASSES = dict.fromkeys(DATASETS, 10) | {"cifar100": 100, "gtsrb": 43}
# the sets in which a mirrored image keeps its class; a user's own set is not among them
FLIPS = ("cifar10", "cifar10_sample", "cifar100", "fashion_mnist", "stl10")


def load_dataset(name, datadir, train, size=32):
    """Return (images uint8 (N, 3, size, size), labels int64 (N,)) of one split.

    name: `cifar10` (50,000 / 10,000 images; fetched into `datadir` when absent), `cifar10_sample` (500 / 2,000,
    embedded in the repo), `fashion_mnist` (IDX files), `cifar100`, `gtsrb`, `stl10` or `svhn` (through torchvision);
    or a user's own set, `folder:PATH` (pictures.load_folder) or `npz:PATH` (arrays.load_npz), PATH relative to the
    working directory. Images of another size are resized, see pictures.resize(); gray images get three equal channels.
    Raises InputError for an unknown name, and for data that are damaged or can be neither found nor fetched.
    """
    if place := place_of(name):
        load = {"folder": pictures.load_folder, "npz": arrays.load_npz}[place[0]]
        return load(place[1], train, size)
    if name in ("cifar10", "cifar10_sample"):
        images, labels = cifar10.load(datadir, train) if name == "cifar10" else cifar10.load_sample(train)
        return images if size == 32 else pictures.resize(images.permute(0, 2, 3, 1).numpy(), size), labels
    if name == "fashion_mnist":
        folder = arrays.idx_folder(datadir)
        if folder is None:
            fetched.fetch(name, datadir, train)
            folder = Path(datadir) / arrays.IDX_FOLDERS[1]
        return arrays.load_idx(folder, train, size)
    if name in fetched.SETS:
        return fetched.load(name, datadir, train, size)
    raise InputError(f"unknown dataset {name!r}; there are {', '.join(DATASETS)}, folder:PATH and npz:PATH")


def class_names(name):
    """Return the names of a data set's classes in the order of the labels, or their numbers where there are no names.

    name: see load_dataset(), also for the InputError.
    """
    if place := place_of(name):
        return {"folder": pictures.class_names, "npz": arrays.npz_classes}[place[0]](place[1])
    if name not in N_CLASSES:
        raise InputError(f"unknown dataset {name!r}; there are {', '.join(DATASETS)}, folder:PATH and npz:PATH")
    if name in ("cifar10", "cifar10_sample"):
        return cifar10.CLASSES
    return tuple(map(str, range(N_CLASSES[name])))


def flips(name):
    """Return whether augmentation mirrors the images of a data set, which it does where that keeps their class."""
    return name in FLIPS


def few(labels, n):
    """Return the indices of n images, int64: the first ones, or evenly spaced ones in a set sorted by class."""
    if len(labels) > n and (labels[1:] >= labels[:-1]).all():
        return torch.arange(n) * len(labels) // n
    return torch.arange(min(n, len(labels)))
