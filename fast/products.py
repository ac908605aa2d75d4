"""Convolutions with small output maps, computed as matrix products: the same sums in another order.

For processors with AMX. There oneDNN (torch 2.13) runs the last stage of a ResNet-18 (4x4 maps) more slowly than a
matrix product: in bf16 at a third of its speed in the forward pass and for the input's gradient, and at a tenth for the
weights' gradient; in fp32 at two thirds.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

LARGEST = 4  # side of the output map; products gain nothing at 8
FEWEST = 256  # input channels


def small_maps_by_products(model, dtype, in_eval=False):
    """Make the wide convolutions of `model`, in place, use matrix products where their output maps are small.

    dtype: of the products; in_eval: whether to use them in eval mode too. The parameters stay the same objects. Returns
    the model.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and child.in_channels >= FEWEST and _is_plain(child):
                setattr(parent, name, _SmallMapConv2d.in_place_of(child, dtype, in_eval))
    return model


def _is_plain(conv):
    """Return whether _ConvByProducts supports `conv`: square, zero padding, no groups, no dilation."""
    pairs = (conv.kernel_size, conv.stride, conv.padding)
    square = all(isinstance(pair, tuple) and pair[0] == pair[1] for pair in pairs)
    usual = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return square and usual and conv.padding[0] < conv.kernel_size[0]


class _SmallMapConv2d(nn.Conv2d):
    """A convolution that uses matrix products where its output map is small, in training or if `in_eval`."""

    @classmethod
    def in_place_of(cls, conv, dtype, in_eval):
        """Return a _SmallMapConv2d with the parameters of `conv`."""
        sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        new = cls(*sizes, bias=False, device="meta")  # where initialization draws no random numbers
        new.weight, new.bias = conv.weight, conv.bias
        new.dtype, new.in_eval = dtype, in_eval
        return new.train(conv.training)

    def forward(self, x):
        out = (x.shape[-1] + 2 * self.padding[0] - self.kernel_size[0]) // self.stride[0] + 1
        if not (self.training or self.in_eval) or out > LARGEST or x.shape[-2] != x.shape[-1]:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        sizes = self.stride[0], self.padding[0]
        return _ConvByProducts.apply(x.to(self.dtype), self.weight.to(self.dtype), bias, *sizes)


class _ConvByProducts(torch.autograd.Function):
    """(N, C, H, H) * (C', C, k, k) to (N, C', H', H'), all channels last."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        patches = _patches(x, weight.shape[2], stride, padding)
        return _maps(F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), bias), x)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        k, stride, padding = weight.shape[2], ctx.stride, ctx.padding
        grad = grad.contiguous(memory_format=torch.channels_last)
        if stride == 1:  # a convolution of the gradient with the flipped kernel
            flipped = weight.permute(2, 3, 0, 1).flip(0, 1).reshape(-1, x.shape[1])  # from (k, k, C', C)
            grad_x = _maps(_patches(grad, k, 1, k - 1 - padding) @ flipped, x)
        else:
            grad_x = torch.nn.grad.conv2d_input(x.shape, weight, grad, stride, padding)
        rows, grad_weight = grad.permute(0, 2, 3, 1).reshape(-1, weight.shape[0]), None
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ _patches(x, k, stride, padding)).view(-1, k, k, x.shape[1]).permute(0, 3, 1, 2)
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None, None, None


def _patches(x, k, stride, padding):
    """Return the patch of x (N, C, H, H) under each position of the output, (N * H' * H', k * k * C)."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    windows = padded.unfold(1, k, stride).unfold(2, k, stride)  # (N, H', H', C, k, k)
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, k * k * x.shape[1])


def _maps(rows, x):
    """Return rows (N * H' * H', C'), one per position, as maps (N, C', H', H'); x: (N, ...)."""
    side = math.isqrt(len(rows) // len(x))
    return rows.view(len(x), side, side, -1).permute(0, 3, 1, 2)
