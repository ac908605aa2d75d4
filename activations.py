"""Why bounds work: the neurons that a trigger moves most, and how far."""

import copy
from typing import NamedTuple

import torch

import models
import utils


class Moved(NamedTuple):
    """A neuron that the trigger moves: where it is, its activations on clean and on triggered images, its bound."""

    site: str
    place: tuple[int, int, int]
    clean: torch.Tensor  # (N,), unclipped
    triggered: torch.Tensor  # (N,), unclipped
    bound: float | None  # None in a network without bounds


@torch.no_grad()
def most_moved(model, images, backdoor, n_neurons=6, batch_size=128):
    """Find the neurons that a trigger moves most, measured in standard deviations of their clean activations.

    model: a network, with bounds or without; its activations are those without. images: uint8 (N, 3, H, W), none of
    the target class; backdoor: on the model's device. One neuron per site at most.
    Returns a list of Moved, the farthest first.
    """
    bounds = {k: m.clip_level() for k, m in models.activation_sites(model).items() if hasattr(m, "clip_level")}
    net = models.set_bounds(copy.deepcopy(model).eval(), None)
    images = images.to(next(net.parameters()).device)

    farthest = []
    clean, triggered = (_moments(net, images, trigger, batch_size) for trigger in (None, backdoor))
    for name, (mean, std) in clean.items():
        # a neuron that is all but dead on clean images is no measure of distance
        distance = (triggered[name][0] - mean) / std.clamp_min(0.1 * std.mean())
        place = tuple(int(i) for i in torch.unravel_index(distance.argmax(), distance.shape))
        farthest.append((distance[place].item(), name, place))
    chosen = {name: place for _, name, place in sorted(farthest, reverse=True)[:n_neurons]}

    moved = []
    clean, triggered = (_values(net, images, trigger, batch_size, chosen) for trigger in (None, backdoor))
    for name, place in chosen.items():
        bound = bounds[name][place].item() if bounds else None
        moved.append(Moved(name, place, clean[name], triggered[name], bound))
    return moved


def _moments(net, images, trigger, batch_size):
    """Return {site: (mean, std)} of the activations, each (C, H, W)."""
    sums = {}

    def look(name, a):
        s1, s2 = sums.get(name, (0, 0))
        sums[name] = s1 + a.sum(0), s2 + a.square().sum(0)

    _watch(net, images, trigger, batch_size, look)
    n = len(images)
    return {k: (s1 / n, (s2 / n - (s1 / n).square()).clamp_min(0).sqrt()) for k, (s1, s2) in sums.items()}


def _values(net, images, trigger, batch_size, places):
    """Return {site: activations (N,)} of one neuron in each site of `places`."""
    seen = {name: [] for name in places}

    def look(name, a):
        if name in places:
            seen[name].append(a[(slice(None), *places[name])].cpu())

    _watch(net, images, trigger, batch_size, look)
    return {name: torch.cat(values) for name, values in seen.items()}


def _watch(net, images, trigger, batch_size, look):
    """Run all images through the network, and call look(site, activations) for every site and batch."""
    handles = [
        site.register_forward_hook(lambda _module, _inputs, out, name=name: look(name, out))
        for name, site in models.activation_sites(net).items()
    ]
    try:
        for x in images.split(batch_size):
            x = utils.to_float(x)
            net(x if trigger is None else trigger(x))
    finally:
        for handle in handles:
            handle.remove()
