"""Networks by name, the clipping activation, and files from elsewhere.

A new network: a module here whose class takes `num_classes`, `width` and `act_layer`, takes images in [0, 1],
normalizes them itself and casts them to its weights' type, and has one `act_layer()` module per activation, registered
in forward order; then a line in NETWORKS, and its name in flags.NETWORKS.
"""

from functools import partial

from .activations import (
    ClippedNetwork,
    activation_moments,
    activation_sites,
    clipped,
    clips_of,
    logits,
    unclipped,
    watching,
    with_bounds,
)
from .custom_modules import Clip, ClippedReLU, frozen_copy, has_own_modules, set_bounds, weights_device
from .resnet import BasicBlock, Bottleneck, ResNet
from .safe_pickle import MAX_CLASSES, MAX_WIDTH, describe_state_dict, read_pickle, unwrap

__all__ = [
    "MAX_CLASSES",
    "MAX_WIDTH",
    "NETWORKS",
    "Clip",
    "ClippedNetwork",
    "ClippedReLU",
    "activation_moments",
    "activation_sites",
    "clipped",
    "clips_of",
    "describe_state_dict",
    "frozen_copy",
    "get_model",
    "has_own_modules",
    "logits",
    "read_pickle",
    "set_bounds",
    "unclipped",
    "unwrap",
    "watching",
    "weights_device",
    "with_bounds",
]

NETWORKS = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
}


def get_model(name, num_classes=10, width=1.0, **kwargs):
    """Return a freshly initialized network that takes images in [0, 1] and normalizes them itself.

    name: a key of NETWORKS; width: factor on all channels; kwargs go to the network (`act_layer`).
    Raises ValueError for an unknown name.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; there are {', '.join(NETWORKS)}")
    return NETWORKS[name](num_classes=num_classes, width=width, **kwargs)
