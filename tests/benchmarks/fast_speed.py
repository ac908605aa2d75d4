"""What each piece of fast/ earns in UNIT: its passes forward and backward, in images per second.

1. The plain passes, as the authors' loop makes them (fp32, weights trainable, one graph over all its images; batch
   norm, ReLU and clip as one writes them down), against those of unit.tighten().
2. Those of unit.tighten() again with one piece of fast/ left out at a time, compiled as in a long search.

On a GPU the plain passes have torch's own settings, TF32 convolutions among them.
"""

import contextlib
from unittest import mock

import bench
import torch.nn.functional as F
from unit_speed import authors_net, some_data

import fast
import models
import unit
import utils


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
    args = bench.arguments(n=5, images=200, micro_batch=100)
    model, x, y = some_data(args.images, args.device)
    size = utils.pass_size(args.device, args.micro_batch)
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
