"""What it costs to clip a network by its activation calls instead of by modules of its own: forward and backward.

python tests/benchmarks/calls_speed.py --n 5 --images 100
"""

import copy

import bench  # first of these: it puts the repo on the path
import torch

import models


def main():
    """Print the figures."""
    args = bench.arguments(n=5, images=100)
    torch.manual_seed(0)
    x = torch.rand(args.images, 3, 32, 32, device=args.device)
    for width in (1, 0.25):
        net = models.frozen_copy(models.get_model("resnet18", width=width).to(args.device), args.dtype)
        bounds = {k: torch.rand(shape) for k, shape in models.activation_sites(net, x[:2]).items()}
        # the same clip in both, out of place, bounds laid out as the activations are
        by_modules = models.set_bounds(copy.deepcopy(net), bounds)
        by_calls = models.clipped(net, {k: clip.bound for k, clip in models.clips_of(by_modules).items()})
        rivals = {
            f"by {how}, width {width:g}": lambda model=model: model(x).sum().backward()
            for how, model in (("modules", by_modules), ("calls", by_calls))
        }
        times = bench.in_turn(rivals, args.n, args.device)
        for name, seconds in times.items():
            bench.figure(name, seconds, "s")
        modules, calls = times.values()
        bench.ratios("calls / modules", calls, modules)


if __name__ == "__main__":
    main()
