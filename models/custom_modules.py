"""The clipping activation, and how it gets into a network and out of it again."""

import contextlib
import copy
import functools

import torch
from torch import nn


class ClippedReLU(nn.Module):
    """min(ReLU(x), max(b, 0)): the activation clipped at its learned upper bound.

    bound: the raw b, fp32 (C, H, W), one number per neuron and position, of any sign; infinity means no bound.
    Input and output: (N, C, H, W); after a linear layer (N, F), with b (F,). The result has the input's type.
    A bound at or below 0 gets gradient 0.
    """

    def __init__(self, bound):
        super().__init__()
        bound = bound.detach().float().clone()
        if bound.dim() == 3:  # channels last in memory, as the activations are: each pass over the two is much faster
            bound = bound.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        self.bound = nn.Parameter(bound)

    def clip_level(self):
        """Return c = max(b, 0), shape (C, H, W), differentiable in b."""
        return self.bound.relu()

    def forward(self, x):
        return torch.minimum(x.relu(), self.clip_level().to(x.dtype))


def frozen_copy(model, dtype=torch.float32):
    """Return a copy of `model` to search bounds on: eval mode, no gradients for weights.

    dtype: of its convolutions and linear layers, and so of its activations and logits.
    """
    net = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.to(dtype)
    return net.to(memory_format=torch.channels_last)


def activation_sites(model):
    """Return {site: activation module} in forward order: one per ReLU, 17 in a ResNet-18.

    A site is named by its module's path. Forward order is the order of registration, which the networks of this
    package keep.
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.ReLU, ClippedReLU))}


@contextlib.contextmanager
def watching(model, look):
    """Within this context, call look(site, activations (N, C, H, W)) at every site of each forward pass."""

    def hook(name, _module, _inputs, out):
        look(name, out)  # and returns nothing: what a hook returns takes the activations' place

    handles = [s.register_forward_hook(functools.partial(hook, name)) for name, s in activation_sites(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def activation_moments(net, batches):
    """Return {site: (mean, std)} of each neuron's activation over all images, float64 (C, H, W), std by n - 1.

    batches: images float (n, 3, H, W) in [0, 1], a few at a time; no activation is kept.
    Raises ValueError for a site that a forward pass does not run just once.
    """
    sums, passed, n = dict.fromkeys(activation_sites(net), (0, 0)), set(), 0

    def look(name, a):
        if name in passed:
            raise ValueError(f"the network does not run {name} just once; give each activation a module of its own")
        passed.add(name)
        a = (a.cpu() if a.device.type == "mps" else a).double()  # mps has no double precision
        sums[name] = (sums[name][0] + a.sum(0), sums[name][1] + a.square().sum(0))

    with watching(net, look):
        for x in batches:
            passed.clear()
            net(x)
            if missing := set(sums) - passed:
                raise ValueError(f"the network does not run {min(missing)} just once; take that module out")
            n += len(x)
    moments = {}
    for name, (s1, s2) in sums.items():
        variance = (s2 - s1.square() / n).clamp_min(0) / max(n - 1, 1)
        moments[name] = (s1 / n, variance.sqrt())
    return moments


@torch.no_grad()
def site_shapes(model, size=32):
    """Return {site: (C, H, W)}, the shape of each site's bound for square images of `size`; model in eval mode."""
    shapes, device = {}, next(model.parameters()).device
    with watching(model, lambda name, a: shapes.update({name: tuple(a.shape[1:])})):
        model(torch.zeros(1, 3, size, size, device=device))
    return shapes


def set_bounds(model, bounds, layer=ClippedReLU):
    """Clip `model` in place: put a clipping activation in the place of each site's; return the model.

    bounds: {site: (C, H, W)} with exactly the sites of `activation_sites(model)`, or None: back to plain ReLU.
    layer: the class of the clipping activation, called with the bound.
    Raises ValueError for a missing or unknown site.
    """
    sites = activation_sites(model)
    if bounds is not None and set(bounds) != set(sites):
        raise ValueError(f"bounds do not fit the network: sites {sorted(set(bounds) ^ set(sites))} differ")
    device = next(model.parameters()).device
    for name in sites:
        new = nn.ReLU() if bounds is None else layer(bounds[name].to(device))
        model.set_submodule(name, new.train(model.training))
    return model
