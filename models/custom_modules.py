"""The clipping activation, and how it gets into a network and out of it again."""

import contextlib
import functools

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from . import clip_kernels


def _clip(x, c):
    """Return min(max(x, 0), c), c >= 0; x: (N, F), c: (F,) of the same type."""
    return torch.minimum(x, c).clamp_min_(0)


def _clip_gradients(grad, x, c, to_x=True, summed=True):
    """Return the gradients of _clip by x and by c, the latter doubled, and summed over the batch or image by image.

    At a tie, x = c > 0, each gets half, as from torch.minimum, of which the recorded trajectory is made.
    to_x: whether the gradient by x is wanted.
    torch adds bf16 numbers in fp32 and rounds the sum. To ask for an fp32 sum costs six times as long on a CPU.
    """
    above = torch.ops.aten.threshold_backward(grad, x, 0)  # grad where x > 0 and else 0, in one pass
    twice = torch.addcmul(above, above, (x - c).sign_())  # 2 grad where x > c, grad at ties; doubling rounds nothing
    grad_x = torch.add(above, twice, alpha=-0.5) if to_x else None
    return grad_x, twice.sum(0) if summed else twice


@functools.cache
def _fused(function):
    """Return `function` compiled into one pass over memory: in it no intermediate result is written out."""
    return torch.compile(function, dynamic=True)


class _ReLUClip(torch.autograd.Function):
    """_clip for x (N, C, H, W) or (N, F) and c, fp32 without the N.

    fused: whether to compile it; total: an ImageSum that takes the gradient by c in its place, or None.
    It works on flat rows (N, F) in the order in which they lie in memory, which is many times faster.
    """

    @staticmethod
    def forward(ctx, x, c, fused, total):
        rows, level = _rows(x.detach()), _rows(c.detach()[None])[0].to(x.dtype)
        ctx.save_for_backward(rows, level)
        ctx.fused, ctx.total = fused, total
        return _like(x, (_fused(_clip) if fused else _clip)(rows, level))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gradients = _fused(_clip_gradients) if ctx.fused else _clip_gradients
        grad_x, twice = gradients(_rows(grad), *ctx.saved_tensors, ctx.needs_input_grad[0], ctx.total is None)
        grad_c = None
        if ctx.total is None:
            grad_c = _like(grad, twice.float()[None] / 2)[0]
        else:
            ctx.total.add(_like(grad, twice))
        return None if grad_x is None else _like(grad, grad_x), grad_c, None, None


class _ReLUClipByKernels(torch.autograd.Function):
    """_ReLUClip of x + shift, shift: fp32 (C,) or None, by the kernels for a GPU."""

    @staticmethod
    def forward(ctx, x, c, shift):
        rows, level = _rows(x.detach()), _rows(c.detach()[None])[0].contiguous()
        ctx.save_for_backward(rows, level, shift)
        return _like(x, clip_kernels.clip(rows, level, shift))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_x, grad_c = clip_kernels.clip_gradients(_rows(grad), *ctx.saved_tensors, ctx.needs_input_grad[0])
        return None if grad_x is None else _like(grad, grad_x), _like(grad, grad_c[None])[0], None


def _rows(t):
    """Return (N, C, H, W), channels last in memory, or (N, F) as (N, features)."""
    return t.permute(0, 2, 3, 1).flatten(1) if t.dim() == 4 else t


def _like(t, rows):
    """Undo _rows: return `rows` in the shape that t has, but for their number."""
    if t.dim() != 4:
        return rows
    _, c, h, w = t.shape
    return rows.view(-1, h, w, c).permute(0, 3, 1, 2)


class ClippedReLU(nn.Module):
    """min(ReLU(x), max(b, 0)), the activation clipped at its learned upper bound.

    A dead neuron (activation 0, bound 0) moves no bound: where b <= 0 its gradient is 0.

    bound: the raw b, shape (C, H, W), one number per neuron and position; any sign, infinity means no bound.
    Input and output: (N, C, H, W). After a linear layer: (F,) and (N, F).
    fused: compiled, which takes some seconds once, and from then on less than half the time: on a CPU by torch.compile,
    on a GPU by clip_kernels. shift: (C,), what is added to the input first, see ShiftedReLU.
    """

    def __init__(self, bound, fused=False, shift=None):
        super().__init__()
        self.fused = fused
        self.register_buffer("shift", shift, persistent=False)
        self.total = None  # within as_one_batch: where the bound's gradient is added up
        bound = bound.detach().float().clone()
        if bound.dim() == 3:
            # channels last in memory, as the activations are: else every pass over the two is several times slower
            bound = bound.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        self.bound = nn.Parameter(bound)

    def clip_level(self):
        """Return c = max(b, 0), shape (C, H, W), differentiable in b."""
        return self.bound.relu()

    def forward(self, x):
        if self.fused and clip_kernels.available(x.device):
            return _ReLUClipByKernels.apply(x, self.clip_level(), self.shift)
        x = _shifted(x, self.shift)
        return _ReLUClip.apply(x, self.clip_level(), self.fused, self.total if x.dtype == torch.float32 else None)


class ShiftedReLU(nn.ReLU):
    """ReLU(x + shift); shift: fp32 (C,), the biases that the convolutions before it left to it (move_biases)."""

    def __init__(self, shift):
        super().__init__()
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, x):
        return _shifted(x, self.shift).relu()


def _shifted(x, shift):
    return x if shift is None else x + shift.view(-1, 1, 1).to(x.dtype)


class ImageSum:
    """The fp32 sum over images that come a few at a time, to the bit what torch.sum gives for all at once on a CPU.

    torch adds one image after the other, starts afresh after 16, these sums' sums after 16 of them, and so on.
    So it does where an image has a multiple of 32 numbers, as at each site of a ResNet; else some differ by rounding.
    """

    def __init__(self):
        self.n = 0
        self.levels = []  # sums since the last 16th image, since the last 256th, ...

    def add(self, a):
        """Take further images (n, ...)."""
        self.levels = self.levels or [torch.zeros_like(a[0]) for _ in range(4)]
        while len(a):
            some, a = a.tensor_split([16 - self.n % 16])
            if len(some) == 16:
                self.levels[0] = some.sum(0)
            else:
                for image in some:
                    self.levels[0] += image
            self.n += len(some)
            for level in (1, 2, 3):
                if self.n % 16**level:
                    break
                self.levels[level] += self.levels[level - 1]
                self.levels[level - 1].zero_()

    def result(self):
        """Return the sum of all images so far."""
        return sum(self.levels[1:], self.levels[0])


@contextlib.contextmanager
def as_one_batch(model):
    """Within this context, backward passes over some images each give the bounds the gradient of one over all of them.

    In fp32 on a CPU to the bit, elsewhere to rounding; the bounds' .grad is complete when it ends.
    """
    sites = [site for site in activation_sites(model).values() if isinstance(site, ClippedReLU)]
    sites = [site for site in sites if site.bound.device.type == "cpu"]
    for site in sites:
        site.total = ImageSum()
    try:
        yield
        for site in sites:
            if site.total.n:
                site.clip_level().backward(site.total.result() / 2)
    finally:
        for site in sites:
            site.total = None


def activation_sites(model):
    """Return {module path: activation module} in forward order: one after every ReLU, 17 in a ResNet-18.

    Forward order is order of registration, which the networks of this package keep.
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
def site_shapes(model, size=32):
    """Return {site: (C, H, W)}, the shape of each site's bound for square images of `size`; model in eval mode."""
    shapes, device = {}, next(model.parameters()).device
    with watching(model, lambda name, a: shapes.update({name: tuple(a.shape[1:])})):
        model(torch.zeros(1, 3, size, size, device=device))
    return shapes


def set_bounds(model, bounds, fused=False):
    """Clip `model` in place: swap the activation of each site for a ClippedReLU at the given bound.

    bounds: {site: (C, H, W)} with exactly the sites of `activation_sites(model)`, or None: back to plain ReLU.
    fused: see ClippedReLU.
    Raises ValueError for a missing or unknown site.
    """
    sites = activation_sites(model)
    if bounds is not None and set(bounds) != set(sites):
        raise ValueError(f"bounds do not fit the network: sites {sorted(set(bounds) ^ set(sites))} differ")
    device = next(model.parameters()).device
    for name, site in sites.items():
        shift = getattr(site, "shift", None)
        if bounds is not None:
            new = ClippedReLU(bounds[name].to(device), fused, shift)
        else:
            new = nn.ReLU() if shift is None else ShiftedReLU(shift)
        model.set_submodule(name, new.train(model.training))
    return model
