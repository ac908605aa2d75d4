"""Networks by name, the clipping activation, and files from elsewhere.

A new network is a module here with a subclass of common.Normalized, a line in networks.NETWORKS, and its name in
flags.NETWORKS. The class takes `num_classes`, `width`, `act_layer`, `mean` and `std`. Its forward pass takes images in
[0, 1], normalizes them by self.normalize() and casts them to the type of its weights. It has one `act_layer()` module
per activation, registered in forward order, and each batch norm right after the convolution whose output it takes
(else bf16 does not fold it).
"""

from .activations import (
    ClippedNetwork,
    activation_moments,
    activation_sites,
    clipped,
    clips_of,
    logits,
    replacing,
    unclipped,
    watching,
    with_bounds,
)
from .common import Normalized
from .custom_modules import Clip, ClippedReLU, frozen_copy, has_own_modules, set_bounds, weights_device
from .describe import MAX_CLASSES, MAX_WIDTH, describe_state_dict, shapes, shown_size
from .networks import NETWORKS, get_model
from .safe_pickle import read_file, read_pickle, unwrap

__all__ = [
    "MAX_CLASSES",
    "MAX_WIDTH",
    "NETWORKS",
    "Clip",
    "ClippedNetwork",
    "ClippedReLU",
    "Normalized",
    "activation_moments",
    "activation_sites",
    "clipped",
    "clips_of",
    "describe_state_dict",
    "frozen_copy",
    "get_model",
    "has_own_modules",
    "logits",
    "read_file",
    "read_pickle",
    "set_bounds",
    "replacing",
    "shapes",
    "shown_size",
    "unclipped",
    "unwrap",
    "watching",
    "weights_device",
    "with_bounds",
]
