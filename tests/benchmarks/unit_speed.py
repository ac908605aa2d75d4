"""UNIT against the authors' loop, and what each piece of fast/ earns.

1. The whole search in wall time: the authors' loop (fp32, weights trainable, one graph over all its images, batch norm,
   ReLU and clip as one writes them down) against unit.tighten(): start, --steps steps with validation, and whatever
   compiling and recording take. --images train, a fourth as many validate.
2. The passes forward and backward, in images per second, of the two.
3. The passes again with one piece of fast/ left out at a time, compiled as in a long search.

The loop runs in this process, where glibc keeps freed memory as for our commands: in a script of its own it is slower.
On a GPU it has torch's own settings, TF32 convolutions among them.
"""

import contextlib
import copy
from unittest import mock

import bench
import torch
import torch.nn.functional as F
from torch import nn

import fast
import models
import unit
import utils


class PlainClip(nn.Module):
    """min(ReLU(x), max(b, 0)) as one would write it down."""

    def __init__(self, bound):
        super().__init__()
        self.bound = nn.Parameter(bound.detach().clone().contiguous())

    def forward(self, x):
        return torch.minimum(x.relu(), self.bound.clamp_min(0))


def authors_net(model, x):
    """Return (the network with its starting bounds, these), from all images at once."""
    net, seen = copy.deepcopy(model), {}
    sites = models.activation_sites(net, x[:2])
    with models.watching(sites, len(x), seen.__setitem__), torch.no_grad():
        net(x)
    for name, a in seen.items():
        net.set_submodule(name, PlainClip(a.mean(0) + 4 * a.std(0)))
    return net, [net.get_submodule(name).bound for name in seen]


def authors_loop(model, x, y, x_valid, y_valid, config):
    """Search as the published code does; return the validation accuracy of each step."""
    accuracies, schedule = [], unit.AlphaSchedule(config)
    with torch.no_grad():
        limit = (model(x_valid).argmax(1) == y_valid).float().mean().item() - config.acc_degrade
    net, bounds = authors_net(model, x)
    optimizer = torch.optim.Adam(bounds, lr=config.lr, betas=config.betas, eps=config.eps)
    for _ in range(config.n_steps):
        net.zero_grad()
        reg = sum(b.clamp_min(0).mean() for b in bounds)
        (F.cross_entropy(net(x), y) + schedule.alpha * reg).backward()
        optimizer.step()
        with torch.no_grad():
            accuracies.append((net(x_valid).argmax(1) == y_valid).float().mean().item())
        schedule.update(accuracies[-1] >= limit)
    return accuracies


def our_passes(model, data, bounds, dtype, size, plain_clip=False, compiled=True, **without):
    """Return the passes as tighten() runs them; without: {name in fast: what stands in for it}."""
    with contextlib.ExitStack() as left_out:
        for name, stand_in in without.items():
            left_out.enter_context(mock.patch.object(fast, name, stand_in))
        net, _, layer = fast.search_network(model, data[0][:2], dtype, 10**9 if compiled else 0)
    sites = models.clips_of(models.set_bounds(net, bounds, models.ClippedReLU if plain_clip else layer))
    parameters = [site.bound for site in sites.values()]
    return lambda: utils.repeatable()(unit.cross_entropy_backward)(net, parameters, *data, size)


def main():
    """Print the figures."""
    args = bench.arguments(n=5, images=200, micro_batch=100, steps=3)
    torch.manual_seed(0)
    model = models.get_model("resnet18").to(args.device).eval()
    x = torch.rand(args.images, 3, 32, 32, device=args.device)
    y = torch.randint(0, 10, (args.images,), device=args.device)
    whole = x, y, x[: args.images // 4], y[: args.images // 4]
    size = utils.pass_size(args.device, args.micro_batch)
    config = unit.UnitConfig(n_steps=args.steps, precision=args.precision, micro_batch=size)
    rivals = {"authors' loop": lambda: authors_loop(model, *whole, config)}
    t = bench.in_turn(rivals | {"unit.tighten": lambda: unit.tighten(model, *whole, config)}, args.n, args.device)
    for name, times in t.items():
        bench.figure(name, times, "s")
    bench.ratios("loop / tighten", *t.values())

    net, _ = authors_net(model, x)
    bounds = unit.initial_bounds(model, models.activation_sites(model, x[:2]), x, size, 4.0)
    variants = {"all of fast/": {}, "without folding": {"fold_batch_norm": lambda net: net}}
    variants["without products"] = {"small_maps_by_products": lambda net, *_, **__: net}
    if args.device.type == "cuda":
        variants["without recording"] = {"record_passes": lambda net: net}
    variants |= {"without the compiled clip": {"compiled": False}, "plain clip": {"plain_clip": True}}
    rivals = {
        name: our_passes(model, (x, y), bounds, args.dtype, size, **without) for name, without in variants.items()
    }
    t = bench.in_turn({"authors' loop": lambda: F.cross_entropy(net(x), y).backward(), **rivals}, args.n, args.device)
    for name, times in t.items():
        bench.figure(name, [args.images / s for s in times], "images/s")
    bench.ratios("loop / all", t["authors' loop"], t["all of fast/"])


if __name__ == "__main__":
    main()
