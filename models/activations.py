"""The activations of any network, found by their calls in a forward pass, and the network that clips them there.

An activation is a call of one of FUNCTIONS, or a clamp to [0, infinity), by any module or function. A call on images is
a site. Its name is the path of the module in which it happens, `root` for the network itself; the second call in the
same module ends in #2: `layer1.0.act1`, `layer1.0.act1#2`.
"""

import contextlib
import copy
import inspect
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .custom_modules import Clip, ClippedReLU, has_own_modules, set_bounds

# in-place functions and their ordinary versions, which are clipped alike
IN_PLACE = {torch.relu_: torch.relu, torch.Tensor.relu_: torch.relu, F.hardtanh_: F.hardtanh}
IN_PLACE |= {F.leaky_relu_: F.leaky_relu, F.elu_: F.elu, F.threshold_: F.threshold, torch.selu_: F.selu}
IN_PLACE |= {torch.celu_: F.celu, torch.rrelu_: F.rrelu}
FUNCTIONS = {torch.relu, torch.Tensor.relu, F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, torch.selu, F.selu}
FUNCTIONS |= {torch.celu, F.celu, torch.rrelu, F.rrelu, F.threshold, torch.threshold, torch.prelu, torch.Tensor.prelu}
FUNCTIONS |= {F.gelu, F.silu, F.mish, F.hardswish, F.softplus, F.glu, *IN_PLACE}
CLAMPS = {torch.clamp, torch.clip, torch.Tensor.clamp, torch.Tensor.clip, torch.clamp_min, torch.Tensor.clamp_min}
CLAMPS_IN_PLACE = {torch.clamp_, torch.clip_, torch.Tensor.clamp_, torch.Tensor.clip_}
CLAMPS_IN_PLACE |= {torch.clamp_min_, torch.Tensor.clamp_min_}
SIGNATURES = {f: inspect.signature(f) for f in (*FUNCTIONS, *IN_PLACE.values()) if inspect.isfunction(f)}
# the kernels of these functions, by which _Kernels notices an activation whose call _Calls does not see
KERNELS = {"relu", "gelu", "silu", "mish", "hardswish", "hardtanh", "leaky_relu", "elu", "threshold", "softplus"}
KERNELS |= {"glu", "_prelu_kernel", "rrelu", "rrelu_with_noise"}


class _Calls(TorchFunctionMode):
    """Within this context, each activation a is replaced by at(a), a tensor of the same shape and type."""

    def __init__(self, at):
        super().__init__()
        self.at, self.within = at, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        clamp = function in CLAMPS or function in CLAMPS_IN_PLACE
        if not (function in FUNCTIONS or clamp and _is_relu(args, kwargs)):
            return function(*args, **kwargs)
        self.within = True
        try:
            if clamp:
                a, target = torch.relu(args[0]), args[0] if function in CLAMPS_IN_PLACE else None
            else:
                a, target = _out_of_place(function, args, kwargs)
        finally:
            self.within = False
        a = self.at(a)
        return a if target is None or a is target else target.copy_(a)


def _is_relu(args, kwargs):
    """Return whether a clamp with these arguments is a ReLU: of floats, from 0, without an upper limit."""
    low, high = (list(args[1:]) + [None, None])[:2]
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    return isinstance(low, (int, float)) and low == 0 and high is None and bool(args) and args[0].is_floating_point()


def _out_of_place(function, args, kwargs):
    """Return (activation, tensor that an in-place call overwrites, or None).

    With gradients enabled the activation is computed out of place, and the caller copies it there.
    """
    plain = IN_PLACE.get(function, function)
    given = SIGNATURES[plain].bind(*args, **kwargs) if plain in SIGNATURES else None
    if plain is function and not (given and given.arguments.get("inplace")):
        return function(*args, **kwargs), None
    target = args[0] if args else kwargs["input"]
    if not torch.is_grad_enabled() and not torch.jit.is_tracing():  # a trace is used with and without gradients
        return function(*args, **kwargs), target
    if plain in (torch.relu, F.relu):  # the gradient of ReLU needs no copy of the input
        return torch.relu(target), target
    given.arguments |= {"input": target.clone(), "inplace": False}
    return plain(*given.args, **given.kwargs), target


class _Sites(_Calls):
    """Within this context, each site's activations a are replaced by at(site, a) in one forward pass of n images.

    sites: {site: shape without the batch axis}, in the order of the calls. A call without images, such as that of a
    network on its position bias, is left alone. Raises ValueError when the calls do not match the sites.
    """

    def __init__(self, sites, n, at):
        super().__init__(self.next)
        self.sites, self.n, self.at_site = list(sites.items()), n, at
        self.done = 0

    def next(self, a):
        site, shape = self.sites[self.done] if self.done < len(self.sites) else ("the end", None)
        if tuple(a.shape[1:]) == shape:
            self.done += 1
            return self.at_site(site, a)
        if a.shape[0] == self.n and self.n > 1:
            raise ValueError(
                f"an activation of shape {tuple(a.shape[1:])} where {site} of {shape} was expected: images of another "
                "size, or a network that takes another path from call to call"
            )
        return a

    def __exit__(self, kind, *rest):
        super().__exit__(kind, *rest)
        if kind is None and self.done < len(self.sites):
            site, shape = self.sites[self.done]
            raise ValueError(
                f"the activation {site} of shape {shape} is missing: images of another size, or a network that "
                "takes another path from call to call"
            )


def logits(output):
    """Return a network's logits (N, classes) from its output: a tensor, or an object with `.logits`.

    Raises ValueError for any other output, such as a tuple.
    """
    output = getattr(output, "logits", output)
    if not isinstance(output, torch.Tensor) or output.dim() != 2:
        what = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(f"the network returns {what}, not logits (N, classes); wrap it")
    return output


@torch.enable_grad()
def activation_sites(model, x):
    """Return {site: shape of its bound}, in the order of the calls: (C, H, W), (F,), or (tokens, channels).

    model: images to logits, in eval mode, without bounds; x: two or more images, float (N, 3, H, W) in [0, 1].
    Warns of activations that cannot get a bound: in compiled code, or written out as a product with a sigmoid or tanh.
    Raises ValueError for a network without activations, for activations whose first axis is not the images, that vary
    from call to call, or that pass no gradient.
    """
    if any(isinstance(m, Clip) for m in model.modules()):
        raise ValueError("the network has bounds already; models.unclipped(model) takes them off")
    (two, hidden), (three, _) = (_calls(model, x[torch.arange(n, device=x.device) % 2]) for n in (2, 3))
    if [name for name, _ in two] != [name for name, _ in three]:
        raise ValueError("the network takes another path from call to call; there is no fixed set of activations")
    sites = {}
    for (name, shape), (_, other) in zip(two, three, strict=True):
        if shape == other:  # a call without images
            continue
        if shape[1:] != other[1:] or shape[0] * 3 != other[0] * 2:
            raise ValueError(
                f"the activations of {name} have shape {shape} for 2 images and {other} for 3: a bound per neuron "
                "needs the images first"
            )
        sites[name] = shape[1:]
    if hidden:
        named = ", ".join(f"{what} in {where}" for where, what in sorted(hidden))
        warnings.warn(f"activations without a bound: {named}", stacklevel=2)
    if not sites:
        raise ValueError(
            "the network has no activation to clip; seen are ReLU, GELU, SiLU and the like, called in Python (no "
            "TorchScript)"
        )
    return sites


def _calls(model, x):
    """Return [(name, shape)] of all activation calls in a forward pass, and {(module, kernel)} of the unseen ones."""
    stack, calls, counts = [], [], {}

    def enter(name):
        return lambda *_: stack.append(name)

    def leave(*_):
        stack.pop()

    def at(a):
        name = stack[-1] if stack else "root"
        if not torch.is_grad_enabled():
            raise ValueError(f"no gradient passes the activation of {name}: it runs in an autograd function or no_grad")
        counts[name] = counts.get(name, 0) + 1
        calls.append((name if counts[name] == 1 else f"{name}#{counts[name]}", tuple(a.shape)))
        return a

    handles = []
    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(enter(name or "root")), module.register_forward_hook(leave)]
    mode = _Calls(at)
    try:
        with _Kernels(mode, stack) as kernels, mode:
            logits(model(x))
    finally:
        for handle in handles:
            handle.remove()
    return calls, kernels.hidden


class _Kernels(TorchDispatchMode):
    """Collects activation kernels that run outside a call that _Calls sees, in `hidden`: {(module, what)}."""

    def __init__(self, calls, stack):
        super().__init__()
        self.calls, self.stack, self.hidden, self.gates = calls, stack, set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__.removesuffix("_")
        if self.calls.within:
            return out
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        gated = [any(a is g for g in self.gates) for a in tensors]
        if name in ("sigmoid", "tanh", "hardsigmoid") or (name in ("add", "mul") and gated == [True]):
            self.gates.append(out)  # a gate, possibly scaled or shifted by a number
        elif name in KERNELS or name == "clamp_min" and args[1] == 0:
            self.hidden.add((self.stack[-1] if self.stack else "root", name))
        elif name == "mul" and len(tensors) == 2 and any(gated) and tensors[0].shape == tensors[1].shape:
            if out.shape[2:] == (1, 1):  # what looks like one is the weight of a channel, on maps of one pixel
                return out
            self.hidden.add((self.stack[-1] if self.stack else "root", "a product with a sigmoid or tanh"))
        return out


@contextlib.contextmanager
def watching(sites, n, look):
    """Within this context, call look(site, activations (n, ...)) at every site of one forward pass of n images.

    sites: activation_sites() of the network that runs. Raises ValueError when its activations do not match them.
    """

    def at(site, a):
        look(site, a)
        return a

    with replacing(sites, n, at):
        yield


def replacing(sites, n, at):
    """Return a context in which each site's activations a are at(site, a), in one forward pass of n images.

    sites: as for watching(); at: returns a tensor of the same shape and type. Errors as there.
    """
    return _Sites(sites, n, at)


@torch.no_grad()
def activation_moments(net, sites, batches):
    """Return {site: (mean, std)} of each neuron's activation over all images, float64 (C, H, W), std by n - 1.

    sites: activation_sites(net, ...); batches: an iterable of images, float (n, 3, H, W) in [0, 1]. Only sums are kept
    in memory. Raises ValueError when the network takes another path from call to call.
    """
    sums = dict.fromkeys(sites, (0, 0, 0))

    def look(name, a):
        a = (a.cpu() if a.device.type == "mps" else a).double()  # mps has no double precision
        n, s1, s2 = sums[name]
        sums[name] = n + len(a), s1 + a.sum(0), s2 + a.square().sum(0)

    for x in batches:
        with watching(sites, len(x), look):
            net(x)
    moments = {}
    for name, (n, s1, s2) in sums.items():
        variance = (s2 - s1.square() / n).clamp_min(0) / max(n - 1, 1)
        moments[name] = (s1 / n, variance.sqrt())
    return moments


class ClippedNetwork(nn.Module):
    """`model` with the activations of its sites clipped: a becomes min(a, max(b, 0)) where it is computed.

    model: any network that takes images (N, 3, H, W) in [0, 1]; it is shared, not copied, and not changed. bounds:
    {site: raw b}, in the order of the calls. Output: logits (N, classes); with infinite bounds, those of `model`.
    The state dict holds `model.*` and `clips.<site with / for .>.bound`.
    """

    def __init__(self, model, bounds):
        super().__init__()
        self.model = model
        self.clips = nn.ModuleDict({site.replace(".", "/"): Clip(bound) for site, bound in bounds.items()})

    # the interface of common.Normalized
    mean = property(lambda self: self.model.mean)
    std = property(lambda self: self.model.std)

    def set_normalization(self, mean, std):
        """Set mean and std of `model`, see common.Normalized."""
        self.model.set_normalization(mean, std)

    def sites(self):
        """Return {site: its clip}, in the order of the calls."""
        return {key.replace("/", "."): clip for key, clip in self.clips.items()}

    def forward(self, x):
        clips = self.sites()
        shapes = {site: tuple(clip.bound.shape) for site, clip in clips.items()}
        with _Sites(shapes, x.shape[0], lambda site, a: clips[site](a)):
            return logits(self.model(x))


def clipped(model, bounds):
    """Return `model` clipped at {site: bound}, as a ClippedNetwork in eval mode; `model` itself is not changed.

    bounds: UnitResult.bounds of this model. The result can be saved by its state dict, exported by torch.export and
    traced by torch.jit.trace. Its forward pass raises ValueError if the bounds do not fit the network or the images.
    """
    device = next((p.device for p in model.parameters()), None)
    return ClippedNetwork(model, {site: bound.to(device) for site, bound in bounds.items()}).eval()


def clips_of(model):
    """Return {site: its clip module}, in the order of the calls; {} for a network without bounds."""
    if isinstance(model, ClippedNetwork):
        return model.sites()
    return {name: m for name, m in model.named_modules() if isinstance(m, ClippedReLU)}


def with_bounds(model, bounds, layer=ClippedReLU):
    """Return `model` clipped at {site: bound}: in place by set_bounds(layer=layer) if possible, else by clipped()."""
    return set_bounds(model, bounds, layer) if has_own_modules(model, bounds) else clipped(model, bounds)


def unclipped(model):
    """Return the network without its bounds, in eval mode; `model` itself keeps them."""
    if isinstance(model, ClippedNetwork):
        return model.model.eval()
    model = copy.deepcopy(model).eval()
    return set_bounds(model, None) if clips_of(model) else model
