"""The clipping activation; how it is put into a network and taken out."""

import copy

import torch
from torch import nn


class Clip(nn.Module):
    """min(a, max(b, 0)): an activation a clipped at its learned upper bound.

    bound: the raw b, fp32, one number per neuron and position, of any sign; infinity means no bound. Shape (C, H, W)
    for activations (N, C, H, W), (F,) for (N, F), (tokens, channels) for (N, tokens, channels).
    The result has the activation's dtype. A bound at or below 0 gets gradient 0.
    """

    def __init__(self, bound):
        super().__init__()
        self.bound = nn.Parameter(bound.detach().float().clone())

    def clip_level(self):
        """Return c = max(b, 0), of the bound's shape, differentiable in b."""
        return self.bound.relu()

    def forward(self, a):
        return torch.minimum(a, self.clip_level().to(a.dtype))


class ClippedReLU(Clip):
    """min(ReLU(x), max(b, 0)): replaces an nn.ReLU module; b as in Clip."""

    def __init__(self, bound):
        if bound.dim() == 3:  # channels last in memory, as the activations are, which makes the clip much faster
            bound = bound.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        super().__init__(bound)

    def forward(self, x):
        return super().forward(x.relu())


def weights_device(model):
    """Return the device of the network's weights. Raises ValueError for TorchScript, and unless all are float32."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("the network is TorchScript, which hides its activations; give its nn.Module")
    weights = [p for p in model.parameters() if p.is_floating_point()]
    if other := {p.dtype for p in weights} - {torch.float32}:
        raise ValueError(f"the network has weights of {other.pop()}; model.float() makes them float32")
    if not weights:
        raise ValueError("the network has no weights")
    return weights[0].device


def frozen_copy(model, dtype=torch.float32):
    """Return a copy of `model` for the search of bounds: in eval mode, weights frozen, channels last.

    dtype: of its convolutions and linear layers, and so of its activations and logits.
    """
    net = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.to(dtype)
    return net.to(memory_format=torch.channels_last)


def _activation_modules(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.ReLU, ClippedReLU))}


def set_bounds(model, bounds, layer=ClippedReLU):
    """Replace each nn.ReLU module of `model`, in place, by a clipping activation; return the model.

    model: a network that calls each of its nn.ReLU modules once per forward pass, as ours do. bounds: {path of module:
    bound} of exactly these modules, or None to restore nn.ReLU. layer: the class of the clipping activation, called
    with the bound.
    Raises ValueError for a missing or unknown module.
    """
    modules = _activation_modules(model)
    if bounds is not None and set(bounds) != set(modules):
        raise ValueError(f"bounds do not fit the network: sites {sorted(set(bounds) ^ set(modules))} differ")
    device = next(model.parameters()).device
    for name in modules:
        new = nn.ReLU() if bounds is None else layer(bounds[name].to(device))
        model.set_submodule(name, new.train(model.training))
    return model


def has_own_modules(model, sites):
    """Return whether set_bounds() works: the sites are exactly the nn.ReLU modules, each called once, none in place."""
    modules = _activation_modules(model)
    return set(sites) == set(modules) and not any(m.inplace for m in modules.values() if type(m) is nn.ReLU)
