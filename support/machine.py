"""Machine, peak memory and version of the code, for the records."""

import contextlib
import platform
import subprocess
import sys
import time
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

from flags import ROOT

import torch

import utils


def machine(device):
    """Return versions, device, number of threads and date as plain values."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else utils.cpu_name(),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def peak_memory(device):
    """Return the peak memory in GiB: of the allocator on a GPU, else of the process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the memory of the parent process at the fork too
        kib = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(kib[0]) / 2**20 if kib else None
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def reset_peak_memory(device):
    """Reset peak_memory() where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # Linux only, and not in every sandbox
        Path("/proc/self/clear_refs").write_text("5")


def commit():
    """Return the commit of the code, ending in + if tracked *.py files are changed; None outside a checkout."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
