"""Faster code for what the plain path computes, equal to rounding. Nothing here changes a method.

search_network() is for UNIT; training_step(), training_copy() and training_layout() are for all that trains. The
pieces: bf16 arithmetic, frozen weights, batch norm folded into the convolutions
(folding), the clip in one pass forward and one back (clip; kernels on a GPU), matrix products for convolutions over
small maps (products), whole passes recorded on a GPU (graphs), a run's images shared among processes (ranks).
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


def search_network(model, dtype, n_images, probe=None, plain=False):
    """Return (frozen copy of `model` to search bounds on, class of its clipping activation).

    dtype: of its convolutions, activations and logits; n_images: that pass through it over all steps; probe: a few
    images (N, 3, H, W) to compare on, None for a ramp of 32x32; plain: whether to leave it at models.frozen_copy() and
    models.ClippedReLU, the reference.
    In bf16 batch norm is folded where that gives the same function; in fp32 it stays, for the folded weights' rounding
    shows late in a search.
    """
    if plain:
        return models.frozen_copy(model, dtype), models.ClippedReLU
    device = next(model.parameters()).device
    net = copy.deepcopy(model).cpu().eval()
    if dtype != torch.float32:
        folded = fold_batch_norm(copy.deepcopy(net))
        probe = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32) if probe is None else to_float(probe.cpu())
        # a network that does not run each batch norm right after the convolution registered before it stays as it is
        with torch.no_grad():
            net = folded if torch.allclose(folded(probe), net(probe), rtol=1e-3, atol=1e-3) else net
    net = models.frozen_copy(net, dtype)
    if dtype == torch.bfloat16 and utils.has_amx(device):
        small_maps_by_products(net, dtype, in_eval=True)
    net.to(device)
    if device.type == "cuda":
        record_passes(net)
    return net, clip_layer(device, dtype, n_images)
