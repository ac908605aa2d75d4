"""The clipping activation and its gradients in few passes over memory; the same values as models.ClippedReLU."""

import functools
import shutil
import sysconfig
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

import models

from . import kernels


def clip_layer(device, dtype, n_images):
    """Return the class of the clipping activation for a search that passes n_images forward in all steps together.

    Its passes are compiled in bf16 on a CPU with a C++ compiler, if the search is long enough to gain from it.
    """
    compiled = dtype == torch.bfloat16 and device.type == "cpu" and can_compile() and n_images > 20_000
    return functools.partial(FastClippedReLU, compiled=compiled)


def can_compile():
    """Return whether torch.compile can target this CPU: it needs a C++ compiler and Python's headers."""
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return headers and any(map(shutil.which, ("g++", "clang++")))


class FastClippedReLU(models.ClippedReLU):
    """min(ReLU(x), max(b, 0)); compiled: whether torch.compile fuses forward and backward into one pass each."""

    def __init__(self, bound, compiled=False):
        super().__init__(bound)
        self.compiled = compiled

    def forward(self, x):
        return _ReLUClip.apply(x, self.clip_level(), self.compiled)


class _ReLUClip(torch.autograd.Function):
    """min(ReLU(x), c) with its gradients; x: (N, C, H, W) or (N, ...), c: fp32 (C, H, W) or (...).

    It works on flat rows (N, features), for maps in channels-last order.
    """

    @staticmethod
    def forward(ctx, x, c, compiled):
        rows, level = _rows(x.detach()), _rows(c.detach()[None])[0]
        ctx.by_kernels, ctx.compiled = kernels.available(x.device), compiled
        level = level.contiguous() if ctx.by_kernels else level.to(x.dtype)
        ctx.save_for_backward(rows, level)
        function = kernels.clip if ctx.by_kernels else _compiled(_clip) if compiled else _clip
        return _unrows(function(rows, level), x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        function = kernels.clip_gradients if ctx.by_kernels else _gradients
        if ctx.compiled and not ctx.by_kernels:
            function = _compiled(_gradients)
        grad_x, grad_c = function(_rows(grad), *ctx.saved_tensors, ctx.needs_input_grad[0])
        return None if grad_x is None else _unrows(grad_x, grad), _unrows(grad_c[None], grad)[0], None


def _clip(rows, level):
    """Return min(max(rows, 0), level), level >= 0; rows: (N, F), level: (F,) of the same type."""
    return torch.minimum(rows, level).clamp_min_(0)


def _gradients(grad, rows, level, to_rows=True):
    """Return the gradients of _clip() for rows (None unless to_rows) and for level, fp32 (F,), summed over the images.

    At a tie, rows = level > 0, each of the two gets half, as in torch.minimum.
    """
    above = torch.ops.aten.threshold_backward(grad, rows, 0)  # grad where rows > 0, else 0, in one pass
    twice = torch.addcmul(above, above, (rows - level).sign_())  # 2 grad above the level, grad at a tie, else 0
    return torch.add(above, twice, alpha=-0.5) if to_rows else None, twice.sum(0).float() / 2


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=True)


def _rows(t):
    """Return (N, C, H, W), channels last in memory, or (N, ...) as (N, features)."""
    return (t.permute(0, 2, 3, 1) if t.dim() == 4 else t).flatten(1)


def _unrows(rows, like):
    """Return rows (N, features) as (N, *like.shape[1:]): the inverse of _rows()."""
    if like.dim() != 4:
        return rows.view(len(rows), *like.shape[1:])
    _, c, h, w = like.shape
    return rows.view(-1, h, w, c).permute(0, 3, 1, 2)
