"""What the benchmarks share: the repo on the path, rivals timed in turn, one line per figure."""

import argparse
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import flags  # noqa: E402

import torch  # noqa: E402

import utils  # noqa: E402
from support.machine import machine  # noqa: E402


def arguments(**defaults):
    """Parse --device, --precision and whole-number flags with the given defaults; print the machine."""
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--device", default="auto")
    p.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    for name, value in defaults.items():
        p.add_argument(f"--{name}", type=int, default=value)
    args = p.parse_args()
    flags.keep_freed_memory()  # as the commands do
    args.device = utils.get_device(args.device)
    args.dtype = utils.get_dtype(args.precision, args.device)
    args.precision = str(args.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    m = machine(args.device)
    print(f"{m['device']}, {m['threads']} threads, torch {m['torch']}, {m['kind']}, {args.precision}, {m['date']}")
    return args


def seconds(work, device):
    """Return how long work() takes, the device's queue emptied before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(rivals, n, device):
    """Time the rivals {name: function} in turn, n times after a warm-up; return {name: [seconds]}."""
    for work in rivals.values():
        work()
    times = {name: [] for name in rivals}
    for _ in range(n):
        for name, work in rivals.items():
            times[name].append(seconds(work, device))
    return times


def figure(name, values, unit):
    """Print a figure: median, lowest to highest, n."""
    print(
        f"{name:32s} {statistics.median(values):9.4g} {unit}  ({min(values):.4g} to {max(values):.4g}, n {len(values)})"
    )


def ratios(name, above, below):
    """Print the ratio of two rivals' times, pair by pair."""
    figure(name, [a / b for a, b in zip(above, below, strict=True)], "times")
