"""CLP: channel Lipschitz pruning (Zheng et al., ECCV 2022), which needs no data.

A channel that responds to the trigger is more sensitive than the others of its layer. Channels with an outlying upper
bound on their Lipschitz constant, computed from the weights, are pruned.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from .common import Repaired


@dataclass(frozen=True)
class Config:
    """The constant of CLP."""

    uses_labels: ClassVar[bool] = False
    data_rate: float = 0.0  # no images
    u: float = 3.0  # a channel is pruned above its layer's mean + u standard deviations


@torch.no_grad()
def convolutions_before_norms(model, x):
    """Return [(path of a batch norm, batch norm, the convolution whose output is its input)] in the order of the calls.

    x: a float batch (N, C, H, W) to call the model with. Left out is a batch norm with another input, such as the first
    one of a pre-activation block, and one without a scale or running statistics.
    """
    outputs, found = {}, {}
    names = {m: name for name, m in model.named_modules()}

    def made(conv, _args, output):
        outputs[id(output)] = output, conv  # keeping the tensor keeps its id unique

    def read(norm, args):
        usable = norm.affine and norm.running_var is not None
        if usable and id(args[0]) in outputs:
            found.setdefault(norm, outputs[id(args[0])][1])

    hooks = []
    for m in names:
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            hooks.append(m.register_forward_hook(made))
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            hooks.append(m.register_forward_pre_hook(read))
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [(names[norm], norm, conv) for norm, conv in found.items()]


@torch.no_grad()
def lipschitz_bounds(conv, norm):
    """Return the bound on each channel's Lipschitz constant, float64 (channels,), on the CPU.

    It is the largest singular value of the channel's filter, reshaped to (input channels, kernel area), times
    |gamma| / sqrt(running variance), without epsilon. A channel of variance 0 is constant, and its bound is 0.
    """
    filters, gamma, variance = (t.detach().cpu().double() for t in (conv.weight, norm.weight, norm.running_var))
    bounds = torch.linalg.svdvals(filters.flatten(2))[:, 0] * gamma.abs() / variance.sqrt()
    return torch.where(variance > 0, bounds, 0)


def outlying(bounds, u):
    """Return bool (channels,): which bounds lie above the mean + u standard deviations (unbiased) of the layer."""
    return bounds > bounds.mean() + u * bounds.std()


def repair(model, images, labels=None, config=Config(), seed=0, dtype=torch.float32, callback=None, state=None):
    """Set gamma = beta = 0 in a copy of `model` for the channels with an outlying Lipschitz bound.

    images: uint8 (N, 3, H, W) on the model's device, used for their shape alone, so N may be 0; labels, seed, dtype,
    callback, state: ignored. Returns a Repaired whose findings name the pruned channels of each batch norm.
    Raises ValueError where no batch norm follows a convolution.
    """
    del labels, seed, dtype, callback, state
    net = copy.deepcopy(model).eval()
    pairs = convolutions_before_norms(net, torch.zeros(1, *images.shape[1:], device=images.device))
    if not pairs:
        raise ValueError("no batch norm of the network follows a convolution, and CLP prunes only such channels")
    pruned, n = {}, 0
    for name, norm, conv in pairs:
        out = outlying(lipschitz_bounds(conv, norm), config.u)
        n += len(out)
        if out.any():
            pruned[name] = out.nonzero()[:, 0].tolist()
            with torch.no_grad():
                norm.weight[pruned[name]] = 0
                norm.bias[pruned[name]] = 0
    outcome = f"{sum(map(len, pruned.values()))} of {n:,} channels pruned"
    return Repaired(net, {}, {"outcome": outcome, "pruned": pruned})
