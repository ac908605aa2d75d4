"""UNIT against the authors' loop, in wall time: the start and --steps steps with validation, a fourth as many images.

The loop is theirs as one writes it down: fp32, weights trainable, one graph over all its images, batch norm, ReLU and
clip. It runs in a process of its own, as their script does, where glibc gives the memory of freed tensors back; and in
this one, which keeps it, as our commands do. unit.tighten() includes what compiling and recording take.
"""

import copy
import subprocess
import sys

import bench
import torch
import torch.nn.functional as F
from torch import nn

import models
import unit
import utils

ALONE = "import sys; sys.path.insert(0, sys.argv[1]); import unit_speed; unit_speed.loop_alone(*sys.argv[2:])"


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


def some_data(n, device):
    """Return (ResNet-18 in eval mode, n images, their labels), all random."""
    torch.manual_seed(0)
    model = models.get_model("resnet18").to(device).eval()
    return model, torch.rand(n, 3, 32, 32, device=device), torch.randint(0, 10, (n,), device=device)


def loop_alone(images, steps, device):
    """Print how long the authors' loop takes; arguments as words, because it runs in a process of its own."""
    model, x, y = some_data(int(images), torch.device(device))
    config = unit.UnitConfig(n_steps=int(steps))
    print(bench.seconds(lambda: authors_loop(model, x, y, x[: len(x) // 4], y[: len(x) // 4], config), x.device))


def main():
    """Print the figures."""
    args = bench.arguments(n=3, images=500, micro_batch=100, steps=4)
    model, x, y = some_data(args.images, args.device)
    whole = x, y, x[: args.images // 4], y[: args.images // 4]
    size = utils.pass_size(args.device, args.micro_batch)
    config = unit.UnitConfig(n_steps=args.steps, precision=args.precision, micro_batch=size)
    words = [sys.executable, "-c", ALONE, str(bench.HERE), *map(str, (args.images, args.steps, args.device))]
    t = {"authors' loop, a process of its own": [], "authors' loop": [], "unit.tighten": []}
    for _ in range(args.n):
        own, kept, ours = t.values()
        own.append(float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1]))
        kept.append(bench.seconds(lambda: authors_loop(model, *whole, config), args.device))
        ours.append(bench.seconds(lambda: unit.tighten(model, *whole, config), args.device))
    for name, times in t.items():
        bench.figure(name, times, "s")
    own, kept, ours = t.values()
    bench.ratios("process of its own / tighten", own, ours)
    bench.ratios("loop / tighten", kept, ours)


if __name__ == "__main__":
    main()
