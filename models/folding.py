"""Batch norm folded into the convolution before it: the same function in eval mode, passes over memory less."""

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .custom_modules import ShiftedReLU


def fold_batch_norm(model):
    """Fold every batch norm of `model`, on the CPU and in place, into the convolution registered just before it.

    In double precision, so that each weight is rounded once. The networks of this package register a batch norm right
    after its convolution. Returns the model. Raises ValueError in training mode, where batch norm is no fixed scale.
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


def move_biases(model):
    """Let each nn.ReLU of `model`, in place, add the biases of the convolutions registered between the last and itself.

    A GPU adds a bias in a pass of its own; the kernel that clips adds it for nothing. The networks of this package
    register modules in the order in which they run, so that these biases add up. Returns the model.
    """
    waiting = None
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            bias = module.bias.detach()
            waiting, module.bias = bias if waiting is None else waiting + bias, None
        elif isinstance(module, nn.ReLU) and waiting is not None:
            model.set_submodule(name, ShiftedReLU(waiting).train(model.training))
            waiting = None
    return model
