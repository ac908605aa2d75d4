"""Networks of torchvision and timm in a wrapper that normalizes, resizes to a fixed input size, and returns logits."""

from flags import InputError

import importlib
import re

import torch
import torch.nn.functional as F

from .common import MEAN, STD, Normalized

_declared = []  # keeps alive what _torchvision() declares


def _torchvision():
    """Return the module torchvision, even if it was built for another torch than the one here.

    Its import then fails because its compiled operators are missing. No network needs them, so they are only declared.
    """
    for _ in range(99):
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
            _declared[-1].define(f"{missing[1]}(...) -> ...")
    raise ImportError("torchvision does not import")


def library(name):
    """Return the module of a library, torchvision or timm. Raises InputError where it cannot be imported."""
    try:
        torchvision = _torchvision()  # timm needs it too
        return torchvision if name == "torchvision" else importlib.import_module(name)
    except (ImportError, AttributeError, RuntimeError) as error:  # as a broken torchvision fails
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{name} does not import here ({reason}); pip install {name}") from None


def _build(name, num_classes, size):
    """Return (the network of the library, the side of the images that it takes, None if it takes any)."""
    where, _, name = name.partition(":")
    module = library(where)
    if where == "torchvision":
        if name not in module.models.list_models(module=module.models):
            raise ValueError(f"torchvision has no network {name!r} for classes")
        sized = {"image_size": size} if name.startswith("vit_") and size else {}
        drawn = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}  # else they warn
        net = module.models.get_model(name, weights=None, num_classes=num_classes, **sized, **drawn)
        return net, getattr(net, "image_size", 224 if name.startswith("maxvit") else None)
    if name not in module.list_models():
        raise ValueError(f"timm has no network {name!r}")
    net = module.create_model(name, pretrained=False, num_classes=num_classes, **({"img_size": size} if size else {}))
    fixed = net.default_cfg.get("fixed_input_size")
    return net, (size or net.default_cfg["input_size"][-1]) if fixed else None


class FromLibrary(Normalized):
    """A network of torchvision's or timm's: images (N, 3, H, W) in [0, 1] to logits (N, num_classes).

    name: `torchvision:NAME` or `timm:NAME`; width: 1, as these networks have no other. size: the side of the images
    for a network that takes one size alone (position embeddings), None for the library's default; images of another
    size are resized to it bilinearly. The state dict is that of the library's network.
    Raises InputError where the library cannot be imported, ValueError for an unknown name and for another width.
    """

    def __init__(self, name, num_classes=10, width=1.0, mean=MEAN, std=STD, size=None):
        super().__init__(mean, std)
        if width != 1:
            raise ValueError(f"{name} has no width; leave it at 1")
        self.network, self.side = _build(name, num_classes, size)

    def state_dict(self, *args, **kwargs):
        """Return the library network's state dict."""
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Load a state dict of the library's network."""
        return self.network.load_state_dict(state_dict, *args, **kwargs)

    def forward(self, x):
        x = self.normalize(x)
        if self.side is not None and x.shape[2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        out = self.network(x.to(next(self.network.parameters()).dtype))
        return getattr(out, "logits", out)
