"""The data sets in memory, augmentation, and the share of them that a defense sees.

A whole split lies on the device as uint8; batches of it become floats in [0, 1], which is what augmentation, triggers
and networks take.
"""

from flags import InputError

from . import backdoorbench, cifar10
from .augment import augment, to_float
from .defense_set import defense_indices, defense_split

__all__ = ["augment", "backdoorbench", "defense_indices", "defense_split", "load_dataset", "to_float"]


def load_dataset(name, datadir, train):
    """Return (images uint8 (N, 3, H, W), labels int64 (N,)) of one split.

    name: `cifar10` (50,000 / 10,000 images; fetched into `datadir` when absent) or `cifar10_sample` (500 / 2,000,
    embedded in the repo). Raises InputError for another name and when the data can be neither found nor fetched.
    """
    if name == "cifar10":
        return cifar10.load(datadir, train)
    if name == "cifar10_sample":
        return cifar10.load_sample(train)
    raise InputError(f"unknown dataset {name!r}; there are cifar10 and cifar10_sample")
