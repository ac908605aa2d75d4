"""Why bounds work, or do not: where in the network a trigger's activations leave the clean ones, and how far."""

from typing import NamedTuple

import torch

import data
import models

SEEN = 1000  # test images whose activations are looked at
N_SIGMA = (4, 3, 2.5, 2, 1.5, 1)  # of the bounds that tightness_table() tries on all neurons alike


class Moved(NamedTuple):
    """A neuron that the trigger moves: where it is, its activations on clean and on triggered images, its bound."""

    site: str
    place: tuple[int, int, int]
    clean: torch.Tensor  # (N,), unclipped
    triggered: torch.Tensor  # (N,), unclipped
    bound: float | None  # None in a network without bounds


class SiteEffect(NamedTuple):
    """What a trigger does to one site. Shares are of all activations, those of every neuron on every image."""

    site: str
    distance: float  # largest shift of a neuron's mean by the trigger, in its clean std
    clean_above: float  # share above UNIT's start, the neuron's clean mean + 4 std
    triggered_above: float
    clean_clipped: float | None  # share above the bound; None in a network without bounds
    triggered_clipped: float | None


@torch.no_grad()
def trigger_effect(model, images, backdoor, n_neurons=6, batch_size=128):
    """Compare a network's activations on clean and on triggered images.

    model: a network, with bounds or without; its activations are those without. images: uint8 (N, 3, H, W), none of
    the target class; backdoor: on the model's device.
    Returns the `n_neurons` neurons that the trigger moves farthest, one per site at most, as a list of Moved, the
    farthest first; and a list of SiteEffect, one for each site in forward order.
    """
    bounds = {site: clip.clip_level() for site, clip in models.clips_of(model).items()}
    net, sites, images = _bare(model, images)

    farthest, levels = [], {}
    clean, triggered = (
        models.activation_moments(net, sites, _batches(images, trigger, batch_size)) for trigger in (None, backdoor)
    )
    for name, (mean, std) in clean.items():
        # a neuron that is all but dead on clean images is no measure of distance
        distance = (triggered[name][0] - mean) / std.clamp_min(0.1 * std.mean())
        place = tuple(int(i) for i in torch.unravel_index(distance.argmax(), distance.shape))
        farthest.append((distance[place].item(), name, place))
        levels[name] = torch.stack([mean + 4 * std, bounds[name]] if bounds else [mean + 4 * std])
    chosen = {name: place for _, name, place in sorted(farthest, reverse=True)[:n_neurons]}

    moved, effects = [], []
    (clean, clean_over), (triggered, triggered_over) = (
        _values(net, sites, images, trigger, batch_size, chosen, levels) for trigger in (None, backdoor)
    )
    for name, place in chosen.items():
        bound = bounds[name][place].item() if bounds else None
        moved.append(Moved(name, place, clean[name], triggered[name], bound))
    for distance, name, _ in farthest:
        (a, *b), (c, *d) = clean_over[name], triggered_over[name]
        effects.append(SiteEffect(name, distance, a, c, *(b or [None]), *(d or [None])))
    return moved, effects


def effect_table(sites):
    """Return what a trigger does to each site (a list of SiteEffect) as lines of text."""

    def pair(clean, triggered):
        return f"{100 * clean:7.3f} {100 * triggered:7.3f}"

    clipped = sites[0].clean_clipped is not None
    head = f"{'site':16s} {'farthest':>8s}   {'above mean + 4 std':^15s}" + (
        f"   {'above the bound':^15s}" if clipped else ""
    )
    under = f"{'':16s} {'std':>8s}   " + "   ".join(["clean %  trig. %"] * (1 + clipped))
    lines = [head, under]
    for s in sites:
        line = f"{s.site:16s} {s.distance:8.1f}   {pair(s.clean_above, s.triggered_above)}"
        lines.append(line + (f"   {pair(s.clean_clipped, s.triggered_clipped)}" if clipped else ""))
    return "\n".join(lines)


def tightness_table(model, images, measure):
    """Return what bounds equally tight at every neuron leave, as lines of text.

    Where ASR falls long before accuracy does, the trigger needs activations that clean images hardly have.
    images: uint8 (N, 3, H, W), none of the target class; the bounds are at their mean + k std, and the model's own are
    put aside; measure: takes a network and returns its BA, ASR and RA on these images.
    """
    net = models.unclipped(model)
    tried = {"none": None}
    for k, bounds in zip(N_SIGMA, uniform_bounds(net, images, N_SIGMA), strict=True):
        tried[f"mean + {k} std"] = bounds
    lines = [f"{'bounds of all neurons':24s} accuracy %   ASR %    RA %"]
    for name, bounds in tried.items():
        held = measure(net if bounds is None else models.clipped(net, bounds))
        lines.append(f"{name:24s} {100 * held.BA:10.2f} {100 * held.ASR:7.2f} {100 * held.RA:7.2f}")
    return "\n".join(lines)


@torch.no_grad()
def uniform_bounds(model, images, n_sigma, batch_size=128):
    """Return {site: bounds (C, H, W)} at mean + n_sigma * std of the unclipped activations on `images`, for each of
    `n_sigma` in a list: what tightening all neurons alike comes to.
    """
    net, sites, images = _bare(model, images)
    moments = models.activation_moments(net, sites, _batches(images, None, batch_size))
    return [{name: mean + k * std for name, (mean, std) in moments.items()} for k in n_sigma]


def _bare(model, images):
    """Return the network without bounds, its sites, and the images on its device."""
    net = models.unclipped(model)
    images = images.to(next(net.parameters()).device)
    return net, models.activation_sites(net, data.to_float(images[:2])), images


def _values(net, sites, images, trigger, batch_size, places, levels):
    """Return {site: activations (N,)} of one neuron in each site of `places`, and {site: [shares]} above `levels`.

    levels: {site: (L, C, H, W)}.
    """
    seen, over = {name: [] for name in places}, dict.fromkeys(levels, 0)

    def look(name, a):
        over[name] = over[name] + torch.stack([(a > level).sum() for level in levels[name]])
        if name in places:
            seen[name].append(a[(slice(None), *places[name])].cpu())

    for x in _batches(images, trigger, batch_size):
        with models.watching(sites, len(x), look):
            net(x)
    shares = {k: (n.cpu().double() / (len(images) * levels[k][0].numel())).tolist() for k, n in over.items()}
    return {k: torch.cat(values) for k, values in seen.items()}, shares


def _batches(images, trigger, batch_size):
    """Yield the images as floats, `batch_size` at a time, triggered if there is a trigger."""
    for x in images.split(batch_size):
        x = data.to_float(x)
        yield x if trigger is None else trigger(x)
