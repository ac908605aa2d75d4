"""The sets that torchvision fetches and reads: its classes, into the data folder, each file's sum checked by it."""

from flags import InputError

import contextlib
import socket
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .pictures import to_bytes

# torchvision's class, and what may be put into the data folder by hand
SETS = {
    "cifar100": ("CIFAR100", "cifar-100-python.tar.gz, unpacked"),
    "fashion_mnist": ("FashionMNIST", "fashion-mnist/ with the four IDX files, gzipped or not"),
    "gtsrb": ("GTSRB", "gtsrb/GTSRB/Training, gtsrb/GTSRB/Final_Test and gtsrb/GT-final_test.csv"),
    "stl10": ("STL10", "stl10_binary.tar.gz, unpacked"),
    "svhn": ("SVHN", "train_32x32.mat and test_32x32.mat"),
}


def fetch(name, datadir, train):
    """Return torchvision's data set, a sequence of (Pillow picture, label); fetched into `datadir` when absent.

    Raises InputError, with where to put the files, when it can be neither found nor fetched.
    """
    cls, by_hand = SETS[name]
    split = {"train": train} if name in ("cifar100", "fashion_mnist") else {"split": "train" if train else "test"}
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            Path(datadir).mkdir(parents=True, exist_ok=True)
            from torchvision import datasets

            return getattr(datasets, cls)(str(datadir), **split, download=True)
    except MemoryError:
        raise
    except Exception as error:  # a host that is not there, files that are damaged, a torchvision of another torch
        reason = " ".join((str(error) or type(error).__name__).split())[:120]
        raise InputError(
            f"torchvision finds no {name} in {datadir} and fetches none ({reason}); put there: {by_hand}; "
            "or give the pictures by --dataset folder:PATH"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def load(name, datadir, train, size):
    """Return (images uint8 (N, 3, size, size), labels int64 (N,)) of one split; errors as fetch()."""
    pairs = fetch(name, datadir, train)
    images, labels = np.empty((len(pairs), 3, size, size), np.uint8), np.empty(len(pairs), np.int64)
    try:
        for i in tqdm(range(len(pairs)), desc=f"read {name}", unit="img", delay=1, leave=False):
            picture, labels[i] = pairs[i]
            images[i] = to_bytes(picture, size)
    except OSError as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"a picture of {name} in {datadir} cannot be read ({reason}): remove the set there") from None
    return torch.from_numpy(images), torch.from_numpy(labels)
