"""The passes of unit.py's step against the straightforward loop: fp32, weights trainable, batch norm, ReLU, clip.

Images per second of forward and backward, of validation, and of both together (4 training images to 1 of validation,
as in the default run). The straightforward loop has one graph over all --images, and torch's own settings (on a GPU
TF32 convolutions); unit.py's passes are as tighten() runs them.
"""

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


def main():
    """Print the figures."""
    args = bench.arguments(n=5, images=200, micro_batch=100)
    torch.manual_seed(0)
    model = models.get_model("resnet18").to(args.device).eval()
    x = torch.rand(args.images, 3, 32, 32, device=args.device)
    y = torch.randint(0, 10, (args.images,), device=args.device)

    ours = unit.frozen_copy(model, args.dtype)
    bounds = unit.initial_bounds(ours, x.split(args.micro_batch), 4.0)
    whole = unit.UnitConfig(precision="fp32" if args.dtype == torch.float32 else "bf16")
    models.set_bounds(ours, bounds, unit.fuse_clips(whole, args.device, whole.n_steps * 2000))
    plain = model
    for name, bound in bounds.items():
        plain.set_submodule(name, PlainClip(bound))
    ours_x = x.contiguous(memory_format=torch.channels_last)

    def train(net, x, size):
        for xb, yb in zip(x.split(size), y.split(size), strict=True):
            forward_backward(net, xb, yb)

    def valid(net, x, size):
        with torch.no_grad():
            for xb in x[: args.images // 4].split(size):
                net(xb)

    rivals = {
        "plain train": lambda: train(plain, x, args.images),
        "ours train": lambda: utils.repeatable()(train)(ours, ours_x, args.micro_batch),
        "plain valid": lambda: valid(plain, x, args.images),
        "ours valid": lambda: utils.repeatable()(valid)(ours, ours_x, args.micro_batch),
    }
    t = bench.in_turn(rivals, args.n, args.device)
    for name, times in t.items():
        n = args.images if "train" in name else args.images // 4
        bench.figure(name, [n / s for s in times], "images/s")
    step = {
        who: [a + b for a, b in zip(t[f"{who} train"], t[f"{who} valid"], strict=True)] for who in ("plain", "ours")
    }
    bench.ratios("train: plain / ours", t["plain train"], t["ours train"])
    bench.ratios("both: plain / ours", step["plain"], step["ours"])


if __name__ == "__main__":
    main()
