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


def search_network(model, x, dtype, n_images, plain=False):
    """Return (frozen copy of `model` to search bounds on, {site: shape}, class of its clipping modules).

    model: any network, see models.activation_sites(), which says what is raised; x: two images (N, 3, H, W) or more;
    dtype: of its convolutions, activations and logits; n_images: that pass through it over all steps; plain: whether
    to leave it at models.frozen_copy() and models.ClippedReLU, the reference.
    In bf16 batch norm is folded where that gives the same function; in fp32 it stays, for the folded weights' rounding
    shows late in a search. A network that does not cast its input to its weights' type computes under autocast.
    """
    device = next(model.parameters()).device
    x, whole = to_float(x.to(device)), models.frozen_copy(model)
    if not plain:
        _keep_inputs(whole, x)
    sites = models.activation_sites(whole, x)
    net = models.frozen_copy(whole, dtype)
    if not _takes(net, x):
        return _Door(whole, device, dtype), sites, models.ClippedReLU
    if plain:
        return net, sites, models.ClippedReLU
    if dtype != torch.float32:
        folded = fold_batch_norm(copy.deepcopy(whole).cpu()).to(device)
        # a network that does not run each batch norm right after the convolution registered before it stays as it is
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
    """Let the modules of `net` that overwrite their input keep it, where the logits for x stay the same to the bit.

    Each activation that is clipped in place of its input costs a pass over memory more.
    """
    before, changed = models.logits(net(x)), [m for m in net.modules() if getattr(m, "inplace", False) is True]
    for module in changed:
        module.inplace = False
    if not torch.equal(models.logits(net(x)), before):  # what is overwritten is used again
        for module in changed:
            module.inplace = True


@torch.no_grad()
def _takes(net, x):
    """Return whether `net` gives logits for x as it is, its layers in their own type, and no output object."""
    try:
        return isinstance(net(x), torch.Tensor)
    except RuntimeError:  # an input of another type than a layer's weights
        return False


class _Door(torch.nn.Module):
    """A network that computes under autocast and gives logits, whatever it returns them in."""

    def __init__(self, model, device, dtype):
        super().__init__()
        self.model, self.device, self.dtype = model, device, dtype

    def forward(self, x):
        with utils.autocast(self.device, self.dtype):
            return models.logits(self.model(x))
