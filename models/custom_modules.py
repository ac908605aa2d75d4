"""The clipping activation, and how it gets into a network and out of it again."""

import torch
from torch import nn


class _ReLUClip(torch.autograd.Function):
    """min(max(x, 0), c) with c >= 0, its two gradients summed in fp32.

    At ties the whole gradient goes to x and none to the bound: a dead neuron (activation 0, bound 0) moves no bound.
    """

    @staticmethod
    def forward(ctx, x, c):
        ctx.save_for_backward(x, c)
        return torch.minimum(x.clamp_min(0), c)

    @staticmethod
    def backward(ctx, grad):
        x, c = ctx.saved_tensors
        clipped = x > c
        grad_c = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_c = (grad * clipped).sum(0, dtype=torch.float32).to(c.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = grad.masked_fill(clipped | (x <= 0), 0)
        return grad_x, grad_c


class ClippedReLU(nn.Module):
    """min(ReLU(x), max(b, 0)), the activation clipped at its learned upper bound (section 3.2 of the paper).

    bound: the raw b, shape (C, H, W), one number per neuron and position; any sign, infinity means no bound.
    Input and output: (N, C, H, W).
    """

    def __init__(self, bound):
        super().__init__()
        self.bound = nn.Parameter(bound.detach().clone().float())

    def clip_level(self):
        """Return c = max(b, 0), shape (C, H, W), differentiable in b."""
        return self.bound.clamp_min(0)

    def forward(self, x):
        return _ReLUClip.apply(x, self.clip_level().to(x.dtype))


def activation_sites(model):
    """Return {module path: activation module} in forward order: one after every ReLU, 17 in a ResNet-18.

    Forward order is order of registration, which the networks of this package keep.
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.ReLU, ClippedReLU))}


def set_bounds(model, bounds):
    """Clip `model` in place: swap the activation of each site for a ClippedReLU at the given bound.

    bounds: {site: (C, H, W)} with exactly the sites of `activation_sites(model)`, or None: back to plain ReLU.
    Raises ValueError for a missing or unknown site.
    """
    sites = activation_sites(model)
    if bounds is not None and set(bounds) != set(sites):
        raise ValueError(f"bounds do not fit the network: sites {sorted(set(bounds) ^ set(sites))} differ")
    device = next(model.parameters()).device
    for name in sites:
        new = nn.ReLU() if bounds is None else ClippedReLU(bounds[name].to(device))
        model.set_submodule(name, new.train(model.training))
    return model
