"""Batch norm folded into the convolution before it: the same function in eval mode with fewer passes over memory."""

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norm(model):
    """Fold every batch norm of `model`, on the CPU and in place, into the convolution registered just before it.

    It is computed in double precision, so that each weight is rounded once. The networks of `models` register a batch
    norm right after its convolution. Returns the model. Raises ValueError in training mode.
    """
    if model.training:
        raise ValueError("batch norm can be folded in eval mode only; call model.eval() first")
    for parent in list(model.modules()):
        conv = None
        for name, child in list(parent.named_children()):
            norm = isinstance(child, nn.BatchNorm2d) and conv is not None
            if norm and conv[1].out_channels == child.num_features:
                dtype = conv[1].weight.dtype
                setattr(parent, conv[0], fuse_conv_bn_eval(conv[1].double(), child.double()).to(dtype))
                setattr(parent, name, nn.Identity())
            conv = (name, child) if isinstance(child, nn.Conv2d) else None
    return model
