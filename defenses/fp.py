"""FP: fine-pruning (Liu et al., RAID 2018).

A backdoor uses features that are dormant on clean images. They are pruned, the most dormant first, as long as accuracy
holds; then the network is fine-tuned.
"""

from dataclasses import dataclass

import torch
from torch import nn

import data
import utils
from fast import training_copy

from . import finetune
from .common import Repaired
from .pruning import accuracy, held_out


@dataclass(frozen=True)
class Config(finetune.Config):
    """The constants of fine-pruning: those of pruning, and those of the fine-tuning after it."""

    step: float = 6 / 512  # share of the features pruned per step, at least one feature
    max_drop: float = 0.10  # relative loss of held-out accuracy, at which pruning stops
    valid_share: float = 0.2  # of the clean images, held out to measure it


@torch.no_grad()
def reader_of_features(model, x):
    """Return the linear layer that takes the last convolution's features as input.

    It is the first linear layer called after that convolution with one vector per image. x: a float batch (N, C, H, W)
    to call the model with. Raises ValueError where there is no such layer.
    """
    calls, convolutions = [], (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = [m for m in model.modules() if isinstance(m, (*convolutions, nn.Linear))]
    hooks = [m.register_forward_pre_hook(lambda m, args: calls.append((m, args[0].dim()))) for m in layers]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    last = max((i for i, (m, _) in enumerate(calls) if isinstance(m, convolutions)), default=None)
    if last is None:
        raise ValueError("the network has no convolution, whose features FP would prune")
    readers = [m for m, dim in calls[last:] if isinstance(m, nn.Linear) and dim == 2]
    if not readers:
        raise ValueError("no linear layer takes the last convolution's features as input, where FP would prune them")
    return readers[0]


@torch.no_grad()
def mean_features(model, layer, images, dtype, batch_size=250):
    """Return the mean of each input of `layer` over images uint8 (N, 3, H, W), in eval mode: float64, on the CPU."""
    total = 0

    def look(_layer, args):
        nonlocal total
        total = total + args[0].cpu().double().sum(0)  # mps has no double precision

    hook = layer.register_forward_pre_hook(look)
    try:
        with utils.autocast(images.device, dtype):
            for x in images.split(batch_size):
                model.eval()(data.to_float(x))
    finally:
        hook.remove()
    return total / len(images)


@torch.no_grad()
def prune(net, layer, order, config, images, labels, dtype):
    """Zero columns of `layer`, a layer of `net`, in place and in the order given; return their number.

    order: int64 (features,); images, labels: held out. The first step with accuracy at or below (1 - max_drop) times
    the accuracy before pruning is undone, and pruning ends.
    """
    floor, n = (1 - config.max_drop) * accuracy(net, images, labels, dtype), 0
    for columns in order.split(max(1, round(config.step * len(order)))):
        before = layer.weight[:, columns].clone()
        layer.weight[:, columns] = 0
        if accuracy(net, images, labels, dtype) <= floor:
            layer.weight[:, columns] = before
            break
        n += len(columns)
    return n


def repair(model, images, labels, config=Config(), seed=0, dtype=torch.float32, callback=None, state=None):
    """Prune the features of the last convolution that are dormant on clean images, then fine-tune.

    images: uint8 (N, 3, H, W); labels: int64 (N,), both on the model's device; a fifth of them is held out to choose
    how much is pruned, and all are used to fine-tune. dtype: autocast's; callback, state: see defenses/__init__.py; an
    epoch's figures are "loss" and "accuracy". Returns a Repaired whose findings are the pruned features.
    Raises ValueError for a network without such features (reader_of_features()), and for too few images.
    """
    state = {} if state is None else state
    net = training_copy(model, dtype)
    layer = reader_of_features(net.eval(), data.to_float(images[:2]))
    pruned = state.get("pruned")
    if pruned is None:
        learn, valid = held_out(labels, config.valid_share)
        order = mean_features(net, layer, images[learn], dtype).argsort()
        pruned = order[: prune(net, layer, order, config, images[valid], labels[valid], dtype)].tolist()
    kept = torch.ones(layer.in_features, device=images.device)
    kept[pruned] = 0
    with torch.no_grad():
        layer.weight *= kept
    # a masked input gives its weights no gradient, and weight decay keeps 0 at 0: pruned columns stay 0
    hook = layer.register_forward_pre_hook(lambda _layer, args: (args[0] * kept,))
    keep = callback and (lambda now, state_of: callback(now, lambda: {"pruned": pruned, "tuning": state_of()}))
    history = finetune.tune(net, images, labels, config, seed, dtype, keep, state.get("tuning"))
    hook.remove()
    outcome = f"{len(pruned)} of {len(kept)} features pruned"
    return Repaired(net.eval(), history, {"outcome": outcome, "pruned": sorted(pruned)})
