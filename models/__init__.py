"""Networks by name. A new one: a module here, and a line in NETWORKS."""

from functools import partial

from .custom_modules import ClippedReLU, ImageSum, activation_sites, as_one_batch, set_bounds, site_shapes, watching
from .pickled import MAX_CLASSES, MAX_WIDTH, describe_state_dict, read_pickle, unwrap
from .resnet import BasicBlock, Bottleneck, ResNet
from .small_maps import small_maps_by_products

__all__ = [
    "MAX_CLASSES",
    "MAX_WIDTH",
    "NETWORKS",
    "ClippedReLU",
    "ImageSum",
    "activation_sites",
    "as_one_batch",
    "describe_state_dict",
    "get_model",
    "read_pickle",
    "set_bounds",
    "site_shapes",
    "small_maps_by_products",
    "unwrap",
    "watching",
]

NETWORKS = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
}


def get_model(name, num_classes=10, width=1.0, **kwargs):
    """Return a freshly initialised network that takes images in [0, 1] and normalises them itself.

    name: a key of NETWORKS; width: factor on all channels; kwargs go to the network (`act_layer`).
    Raises ValueError for an unknown name.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; there are {', '.join(NETWORKS)}")
    return NETWORKS[name](num_classes=num_classes, width=width, **kwargs)
