"""Faster code for what the plain path computes, equal up to rounding. Nothing here changes a method.

search_network() is for UNIT; training_step(), training_copy() and training_layout() are for training. The pieces: bf16
arithmetic and frozen weights; batch norm folded into convolutions (folding); the clip in one pass over memory forward
and one backward (clip, and kernels on a GPU); matrix products for convolutions with small outputs (products); CUDA
graphs of whole passes (graphs); the images shared among processes (ranks).
"""

import copy

import torch

import models
import utils
from data import to_float

from .clip import clip_layer
from .folding import fold_batch_norm
from .graphs import record_passes
from .products import small_maps_by_products
from .training import training_copy, training_layout, training_step

__all__ = ["search_network", "training_copy", "training_layout", "training_step"]


def search_network(model, x, dtype, n_images, plain=False):
    """Return (frozen copy of `model` to search bounds on, {site: shape}, class of its clipping modules).

    model: any network that models.activation_sites() accepts; x: two or more images (N, 3, H, W); dtype: of its
    convolutions, activations and logits; n_images: images that pass forward in all steps together; plain: True for the
    reference, models.frozen_copy() and models.ClippedReLU. Raises ValueError as models.activation_sites() does.
    In bf16 batch norm is folded if that gives the same function; in fp32 it is not, because the rounding of folded
    weights shows late in a search. A network that does not cast its input to its weights' type runs under autocast.
    """
    device = next(model.parameters()).device
    x, whole = to_float(x.to(device)), models.frozen_copy(model)
    if not plain:
        _keep_inputs(whole, x)
    sites = models.activation_sites(whole, x)
    net = models.frozen_copy(whole, dtype)
    if not _takes(net, x):
        return _UnderAutocast(whole, device, dtype), sites, models.ClippedReLU
    if plain:
        return net, sites, models.ClippedReLU
    if dtype != torch.float32:
        folded = fold_batch_norm(copy.deepcopy(whole).cpu()).to(device)
        # folding assumes that each batch norm runs right after the convolution registered before it
        with torch.no_grad():
            net = (
                models.frozen_copy(folded, dtype) if torch.allclose(folded(x), whole(x), rtol=1e-3, atol=1e-3) else net
            )
    if dtype == torch.bfloat16 and utils.has_amx(device):
        small_maps_by_products(net, dtype, in_eval=True)
    if device.type == "cuda" and models.has_own_modules(net, sites):
        record_passes(net)
    return net, sites, clip_layer(device, dtype, n_images)


@torch.no_grad()
def _keep_inputs(net, x):
    """Turn the in-place modules of `net` into ordinary ones, unless that changes its logits for x.

    An activation that is computed in place costs one more pass over memory when it is clipped.
    """
    before, changed = models.logits(net(x)), [m for m in net.modules() if getattr(m, "inplace", False) is True]
    for module in changed:
        module.inplace = False
    if not torch.equal(models.logits(net(x)), before):  # the network uses an overwritten input again
        for module in changed:
            module.inplace = True


@torch.no_grad()
def _takes(net, x):
    """Return whether `net` takes x without autocast and returns a tensor."""
    try:
        return isinstance(net(x), torch.Tensor)
    except RuntimeError:  # the input has another type than a layer's weights
        return False


class _UnderAutocast(torch.nn.Module):
    """Runs a network under autocast and returns its logits, see models.logits()."""

    def __init__(self, model, device, dtype):
        super().__init__()
        self.model, self.device, self.dtype = model, device, dtype

    def forward(self, x):
        with utils.autocast(self.device, self.dtype):
            return models.logits(self.model(x))
