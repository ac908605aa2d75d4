"""The passes of unit.py's step against the straightforward loop: fp32, weights trainable, batch norm, ReLU, clip.

Images per second of forward and backward, of validation, and of both together (4 training images to 1 of validation,
as in the default run). The straightforward loop has one graph over all --images, and torch's own settings (on a GPU
TF32 convolutions); unit.py's passes are as tighten() runs them. The loop runs twice: "plain", in a process of its own,
as in any script, and "kept", in this one, where glibc keeps freed memory as it does for our commands.
"""

import multiprocessing

import bench
import torch
import torch.nn.functional as F
from torch import nn

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


def forward_backward(net, x, y):
    """Accumulate the gradient of the summed cross-entropy."""
    F.cross_entropy(net(x).float(), y, reduction="sum").backward()


def workload(args):
    """Return the network and the images that are timed: (model, x, y), the same each time."""
    torch.manual_seed(0)
    model = models.get_model("resnet18").to(args.device).eval()
    x = torch.rand(args.images, 3, 32, 32, device=args.device)
    return model, x, torch.randint(0, 10, (args.images,), device=args.device)


def train(net, x, y, size):
    """The passes over the training images."""
    for xb, yb in zip(x.split(size), y.split(size), strict=True):
        forward_backward(net, xb, yb)


@utils.repeatable()
def train_ours(net, x, y, size):
    """The same as tighten() does it."""
    with models.as_one_batch(net):
        train(net, x, y, size)


def valid(net, x, size):
    """The passes over a step's share of validation images, a fourth of the training images."""
    with torch.no_grad():
        for xb in x[: len(x) // 4].split(size):
            net(xb)


def straightforward(args, bounds):
    """Return {"train", "valid"}: the loop's passes, for timing."""
    model, x, y = workload(args)
    for name, bound in bounds.items():
        model.set_submodule(name, PlainClip(bound.to(args.device)))
    return {"train": lambda: train(model, x, y, len(x)), "valid": lambda: valid(model, x, len(x))}


def serve(asked, args, bounds):
    """Run passes of the loop as they are asked for, in a process that glibc was told nothing in."""
    passes = straightforward(args, bounds)
    for name in iter(asked.recv, None):
        asked.send(bench.seconds(passes[name], args.device))


def main():
    """Print the figures."""
    args = bench.arguments(n=5, images=200, micro_batch=100)
    model, x, y = workload(args)
    ours = unit.frozen_copy(model, args.dtype)
    bounds = unit.initial_bounds(ours, x.split(args.micro_batch), 4.0)
    whole = unit.UnitConfig(precision="fp32" if args.dtype == torch.float32 else "bf16")
    models.set_bounds(ours, bounds, unit.fuse_clips(whole, args.device, whole.n_steps * 2000))
    bounds = {name: bound.cpu() for name, bound in bounds.items()}
    kept = straightforward(args, bounds)
    ours_x = x.contiguous(memory_format=torch.channels_last)
    ask, asked = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=serve, args=(asked, args, bounds), daemon=True).start()
    asked.close()  # so that the end of that process is noticed here

    def plain(name):
        ask.send(name)
        ask.recv()

    rivals = {
        "plain train": lambda: plain("train"),
        "kept train": kept["train"],
        "ours train": utils.recorded(lambda: train_ours(ours, ours_x, y, args.micro_batch), args.device),
        "plain valid": lambda: plain("valid"),
        "kept valid": kept["valid"],
        "ours valid": utils.recorded(lambda: utils.repeatable()(valid)(ours, ours_x, args.micro_batch), args.device),
    }
    t = bench.in_turn(rivals, args.n, args.device)
    ask.send(None)
    for name, times in t.items():
        n = args.images if "train" in name else args.images // 4
        bench.figure(name, [n / s for s in times], "images/s")
    whose = ("plain", "kept", "ours")
    step = {w: [a + b for a, b in zip(t[f"{w} train"], t[f"{w} valid"], strict=True)] for w in whose}
    for loop in ("plain", "kept"):
        bench.ratios(f"train: {loop} / ours", t[f"{loop} train"], t["ours train"])
        bench.ratios(f"both: {loop} / ours", step[loop], step["ours"])


if __name__ == "__main__":
    main()
