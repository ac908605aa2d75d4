"""Seconds per step and peak memory of tighten() against the number of defense images, each in a process of its own.

Prints a table and draws growth.png into the current folder. Memory is the process's peak on a CPU and the
allocator's on a GPU; the images themselves (12 KiB each) are part of it.
"""

import json
import statistics
import subprocess
import sys
import time

import bench
import torch
from matplotlib.figure import Figure

import models
import unit
from support.machine import peak_memory, reset_peak_memory

RATES = (0.01, 0.05, 0.10, 0.50)


def measure(args):
    """Print the figures of one size as JSON."""
    generator = torch.Generator().manual_seed(0)
    n_train, n_valid = args.images * 4 // 5, args.images // 5
    x = torch.randint(0, 256, (args.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    y = torch.arange(args.images) % 10
    torch.manual_seed(0)
    model = models.get_model("resnet18").to(args.device).eval()
    reset_peak_memory(args.device)
    marks = []

    def mark(_search):
        marks.append(time.perf_counter())
        return len(marks) > args.steps  # the first one warms up

    # of a whole run's length, by which it is decided what is compiled; the callback ends it
    config = unit.UnitConfig(precision=args.precision)
    unit.tighten(model, x[:n_train], y[:n_train], x[-n_valid:], y[-n_valid:], config, mark)
    per_step = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    print(json.dumps({"images": args.images, "seconds": sorted(per_step), "GiB": peak_memory(args.device)}))


def draw(rows, path):
    """Draw rows of (images, seconds per step, GiB)."""
    fig = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, i, name in zip(fig.subplots(1, 2), (1, 2), ("seconds per step", "peak memory, GiB"), strict=True):
        axis.plot([r[0] for r in rows], [r[i] for r in rows], "o-")
        axis.set_xlabel("defense images")
        axis.set_title(name)
        axis.set_ylim(0, 1.1 * max(r[i] for r in rows))
    fig.savefig(path, dpi=110)


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
        row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
        s = row["seconds"]
        median = statistics.median(s)
        spread = f"{median:.3f} ({s[0]:.3f} to {s[-1]:.3f}, n {len(s)})"
        per_thousand = 1000 * median / row["images"]
        print(f"{rate:9g} {row['images']:7,}  {spread:44s} {per_thousand:20.3f} {row['GiB']:9.2f}", flush=True)
        rows.append((row["images"], median, row["GiB"]))
    draw(rows, "growth.png")


if __name__ == "__main__":
    main()
