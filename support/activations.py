"""Why bounds work or fail: at which sites a trigger moves activations away from the clean ones, and how far."""

from typing import NamedTuple

import torch

import data
import models
import utils

SEEN = 1000  # test images that evaluate.py takes
N_SIGMA = (4, 3, 2.5, 2, 1.5, 1)  # tightness of the uniform bounds of tightness_table()


class Moved(NamedTuple):
    """A neuron, its activations on clean and on triggered images, and its bound."""

    site: str
    place: tuple[int, int, int]
    clean: torch.Tensor  # (N,), unclipped
    triggered: torch.Tensor  # (N,), unclipped
    bound: float | None  # None in a network without bounds


class SiteEffect(NamedTuple):
    """What a trigger does to one site. Shares are of all activations, those of every neuron on every image."""

    site: str
    distance: float  # largest shift of a neuron's mean by the trigger, in units of its clean std
    clean_above: float  # share above UNIT's start, the neuron's clean mean + 4 std
    triggered_above: float
    clean_clipped: float | None  # share above the bound; None in a network without bounds
    triggered_clipped: float | None


@torch.no_grad()
def trigger_effect(model, images, backdoor, n_neurons=6, batch_size=128):
    """Compare a network's activations on clean and on triggered images.

    model: a network with or without bounds; activations are taken unclipped. images: uint8 (N, 3, H, W), none of the
    target class; backdoor: on the model's device.
    Returns a list of Moved, the neurons with the `n_neurons` largest shifts, at most one per site, largest first; and a
    list of SiteEffect, one per site in forward order.
    """
    bounds = {site: clip.clip_level() for site, clip in models.clips_of(model).items()}
    net, sites, images = _bare(model, images)

    farthest, levels = [], {}
    clean, triggered = (
        models.activation_moments(net, sites, _batches(images, trigger, batch_size)) for trigger in (None, backdoor)
    )
    for name, (mean, std) in clean.items():
        # the floor keeps neurons that are almost dead on clean images from dominating
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
    """Return a table of a trigger's effect on each site, a list of SiteEffect, as text."""

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
    """Return a table of accuracy, ASR and RA under bounds of mean + k std at every neuron, as text.

    Where ASR falls long before accuracy does, the trigger needs activations that clean images rarely reach.
    images: uint8 (N, 3, H, W), none of the target class, from which mean and std are taken; the model's own bounds are
    ignored; measure: a function of a network that returns its evaluate.Measured on these images.
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
def own_bounds(model, images, backdoor, batch_size=128, dtype=torch.float32):
    """Classify triggered images, each under bounds of its own: its activations without the trigger.

    Bounds for all images cannot be tighter anywhere without changing clean activations. What a trigger still does
    mostly goes around the activation functions, through attention for example.
    images: uint8 (N, 3, H, W); dtype: of autocast. Returns the classes, int64 (N,).
    """
    net, sites, images = _bare(model, images)
    classes = []
    for x, triggered in zip(*(_batches(images, t, batch_size) for t in (None, backdoor)), strict=True):
        own = {}
        with utils.autocast(images.device, dtype):
            with models.watching(sites, len(x), lambda site, a, own=own: own.update({site: a.relu()})):
                net(x)
            with models.replacing(sites, len(x), lambda site, a, own=own: torch.minimum(a, own[site].to(a.dtype))):
                classes.append(models.logits(net(triggered)).argmax(1))
    return torch.cat(classes)


@torch.no_grad()
def uniform_bounds(model, images, n_sigma, batch_size=128):
    """Return [{site: bounds (C, H, W)}], one for each k in n_sigma: mean + k * std of the unclipped activations.

    images: uint8 (N, 3, H, W).
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
    """Return ({site: activations (N,)} of the neurons in `places`, {site: [L shares of activations above a level]}).

    places: {site: index of a neuron}; levels: {site: (L, C, H, W)}.
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
    """Yield the images as floats, `batch_size` at a time, with the trigger if there is one."""
    for x in images.split(batch_size):
        x = data.to_float(x)
        yield x if trigger is None else trigger(x)
