"""Seconds per step and peak memory of tighten() against the number of defence images, each in a process of its own.

Prints a table and draws growth.png into the current folder. Memory is the process's peak on a CPU and the
allocator's on a GPU; the images themselves (12 KiB each) are part of it.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import bench
import torch

import models
import unit
import utils

RATES = (0.01, 0.05, 0.10, 0.50)


def measure(args):
    """Print the figures of one size as JSON."""
    generator = torch.Generator().manual_seed(0)
    n_train, n_valid = args.images * 4 // 5, args.images // 5
    x = torch.randint(0, 256, (args.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    y = torch.arange(args.images) % 10
    torch.manual_seed(0)
    model = models.get_model("resnet18").to(args.device).eval()
    marks = []
    precision = "fp32" if args.dtype == torch.float32 else "bf16"
    whole = unit.UnitConfig(precision=precision)  # a run of all steps, which decides what is compiled
    fused = unit.fuse_clips(whole, args.device, whole.n_steps * n_train)
    config = unit.UnitConfig(n_steps=args.steps, precision=precision, compile="on" if fused else "off")
    data = x[:n_train], y[:n_train], x[-n_valid:], y[-n_valid:]
    unit.tighten(model, *data, config, lambda _step, _now: marks.append(time.perf_counter()))
    # the first step warms up
    per_step = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    peak = utils.peak_memory(args.device)
    print(json.dumps({"images": args.images, "seconds": sorted(per_step), "GiB": peak}))


def main():
    """Print the table, draw the picture."""
    args = bench.arguments(steps=3, images=0)
    if args.images:
        measure(args)
        return
    rows = []
    print("data_rate  images  seconds/step (median, lowest to highest, n)  seconds/1,000 images  peak GiB")
    for rate in RATES:
        command = [sys.executable, __file__, f"--device={args.device.type}", f"--precision={args.precision}"]
        command += [f"--steps={args.steps}", f"--images={int(50_000 * rate)}"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        row = json.loads(out.splitlines()[-1])
        s = row["seconds"]
        median = statistics.median(s)
        spread = f"{median:.3f} ({s[0]:.3f} to {s[-1]:.3f}, n {len(s)})"
        print(
            f"{rate:9g} {row['images']:7,}  {spread:44s} {1000 * median / row['images']:20.3f} {row['GiB']:9.2f}",
            flush=True,
        )
        rows.append((row["images"], median, row["GiB"]))

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    images = [r[0] for r in rows]
    for axis, i, name in zip(axes, (1, 2), ("seconds per step", "peak memory, GiB"), strict=True):
        axis.plot(images, [r[i] for r in rows], "o-")
        axis.set_xlabel("defence images")
        axis.set_title(name)
        axis.set_ylim(0, 1.1 * max(r[i] for r in rows))
    fig.savefig(Path("growth.png"), dpi=110)


if __name__ == "__main__":
    main()
