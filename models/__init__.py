"""Networks by name, the clipping activation, and files from elsewhere.

A new network: a module here whose class is a common.Normalized and takes `num_classes`, `width`, `act_layer`, `mean`
and `std`, takes images in [0, 1], normalizes them by self.normalize() and casts them to its weights' type, and has one
`act_layer()` module per activation, registered in forward order; then a line in networks.NETWORKS, and its
name in flags.NETWORKS.
"""

from .common import Normalized
from .custom_modules import (
    ClippedReLU,
    activation_moments,
    activation_sites,
    frozen_copy,
    set_bounds,
    site_shapes,
    watching,
)
from .describe import MAX_CLASSES, MAX_WIDTH, describe_state_dict, shown_size
from .networks import NETWORKS, get_model
from .safe_pickle import read_file, read_pickle, unwrap

__all__ = [
    "MAX_CLASSES",
    "MAX_WIDTH",
    "NETWORKS",
    "ClippedReLU",
    "Normalized",
    "activation_moments",
    "activation_sites",
    "describe_state_dict",
    "frozen_copy",
    "get_model",
    "read_file",
    "read_pickle",
    "set_bounds",
    "shown_size",
    "site_shapes",
    "unwrap",
    "watching",
]
