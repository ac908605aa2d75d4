"""Convolutions that end in small maps, computed as matrix products while training: the same sums, in another order.

For processors with AMX: there oneDNN's bf16 gradient of the weights of ResNet-18's last stage, whose maps are 4x4, runs
at a tenth of the speed of a matrix product (torch 2.13), and takes a quarter of a training step.
"""

import torch
import torch.nn.functional as F
from torch import nn

LARGEST = 4  # pixels a side, of the map that comes out; from 8 on products gain nothing
FEWEST = 256  # channels that go in; from there on it was seen to pay


def small_maps_by_products(model):
    """Let the wide convolutions of `model`, in place, train in bf16 through matrix products where their maps are small.

    The parameters stay the same objects. In eval mode nothing changes. Returns the model.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and child.in_channels >= FEWEST and _is_plain(child):
                setattr(parent, name, _SmallMapConv2d.in_place_of(child))
    return model


def _is_plain(conv):
    """Return whether what is written here covers `conv`: square, zeros around it, and nothing out of the ordinary."""
    pairs = (conv.kernel_size, conv.stride, conv.padding)
    square = all(isinstance(pair, tuple) and pair[0] == pair[1] for pair in pairs)
    usual = conv.bias is None and conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return square and usual and conv.padding[0] < conv.kernel_size[0]


class _SmallMapConv2d(nn.Conv2d):
    @classmethod
    def in_place_of(cls, conv):
        """Return this kind of convolution with the parameters of `conv`."""
        sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        new = cls(*sizes, bias=False, device="meta")  # there, so that no random number is drawn
        new.weight = conv.weight
        return new.train(conv.training)

    def forward(self, x):
        out = (x.shape[-1] + 2 * self.padding[0] - self.kernel_size[0]) // self.stride[0] + 1
        if not self.training or out > LARGEST:
            return super().forward(x)
        return _ConvByProducts.apply(x.bfloat16(), self.weight.bfloat16(), self.stride[0], self.padding[0])


class _ConvByProducts(torch.autograd.Function):
    """(N, C, H, H) * (C', C, k, k) to (N, C', H', H'), all channels last."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return _convolve(x, weight, stride, padding)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        k, stride, padding = weight.shape[2], ctx.stride, ctx.padding
        grad = grad.contiguous(memory_format=torch.channels_last)
        if stride == 1:  # a convolution of the gradient with the kernel turned round
            grad_x = _convolve(grad, weight.flip(2, 3).transpose(0, 1), 1, k - 1 - padding)
        else:
            grad_x = torch.nn.grad.conv2d_input(x.shape, weight, grad, stride, padding)
        rows = grad.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])
        grad_weight = (rows.t() @ _patches(x, k, stride, padding)).view(-1, k, k, x.shape[1])
        return grad_x, grad_weight.permute(0, 3, 1, 2), None, None


def _patches(x, k, stride, padding):
    """Return what each place of the output sees of x (N, C, H, H): (N * H' * H', k * k * C)."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    windows = padded.unfold(1, k, stride).unfold(2, k, stride)  # (N, H', H', C, k, k)
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, k * k * x.shape[1])


def _convolve(x, weight, stride, padding):
    out = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
    rows = _patches(x, weight.shape[2], stride, padding) @ weight.permute(0, 2, 3, 1).flatten(1).t()
    return rows.view(len(x), out, out, -1).permute(0, 3, 1, 2)
