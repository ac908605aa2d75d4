"""Networks by name."""

from flags import LIBRARIES

from functools import partial

from .libraries import FromLibrary
from .preactresnet import PreActResNet18
from .resnet import BasicBlock, Bottleneck, ResNet
from .vgg import VGG
from .vit import ViT
from .wideresnet import WideResNet

NETWORKS = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "preactresnet18": PreActResNet18,
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
    "wideresnet16": partial(WideResNet, 16),
    "wideresnet28": partial(WideResNet, 28),
    "vit": ViT,
}


def get_model(name, num_classes=10, width=1.0, **kwargs):
    """Return a freshly initialized network that takes images in [0, 1] and normalizes them itself.

    name: a key of NETWORKS, or `torchvision:NAME` or `timm:NAME`; width: factor on all channels, 1 for a library's;
    kwargs go to the network: `mean` and `std` (the authors' by default), `act_layer` (not of a library's), `size` (vit,
    and a library's).
    Raises ValueError for an unknown name or an impossible width, InputError for a library that is not installed.
    """
    if name.partition(":")[0] in LIBRARIES:
        return FromLibrary(name, num_classes, width, **kwargs)
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; there are {', '.join(NETWORKS)}, torchvision:NAME and timm:NAME")
    return NETWORKS[name](num_classes=num_classes, width=width, **kwargs)
