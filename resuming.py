"""Runs that were cut off: what they keep on disk of what they have done, and how they find it again."""

import hashlib
import json
import sys
import time
from dataclasses import asdict

import torch

import utils
from cli import InputError

FRESH = {"state": None, "step": 0, "seconds": 0.0, "peak": None}  # what keeping() keeps, before there is anything
KEEP_EVERY = 60  # seconds, after which keeping() saves again


def partial_path(out, settings=None):
    """Return where a run that is to write `out` keeps what it has done: x.partial.pt for x.pt.

    settings: plain values, of which a mark comes into the name, so that runs of different settings lie side by side.
    """
    stem = out.name.removesuffix(".pt")
    if settings is not None:
        stem += "." + hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return out.with_name(f"{stem}.partial.pt")


def settings_of(args, config, victim_sum, device):
    """Return what the bits of a search follow from, as plain values; those of a repair from a little more.

    args: the command's flags; config: its constants, a dataclass; victim_sum: sha256 of the victim's file.
    """
    machine = utils.machine(device) | {"processes": utils.ranks()[1]}
    flags = {k: getattr(args, k) for k in ("dataset", "data_rate", "draw", "seed")}
    return {**flags, **asdict(config), "victim": victim_sum, "machine": {k: machine[k] for k in machine if k != "date"}}


def load_partial(path, config):
    """Return what a cut-off run with the same settings kept at `path`, or None where nothing lies.

    config: the settings, plain values; the file has them under the same name.
    Raises InputError where they differ, or the file cannot be read.
    """
    if not path.exists():
        return None
    try:
        partial = torch.load(path, map_location="cpu", weights_only=True)
        before = partial["config"]
    except Exception as error:  # whatever a damaged file makes torch raise
        raise InputError(f"{path} cannot be read ({type(error).__name__}); delete it or give --no-resume") from None
    differ = [k for k in config if before.get(k) != config[k]]
    if differ:
        raise InputError(f"{path} is a cut-off run with another {', '.join(differ)}; delete it or give --no-resume")
    return partial


def keeping(path, settings, before, device):
    """Return what tighten() and repair() take as `keep`: it saves their state at `path`, if the last time is long ago.

    settings: plain values that load_partial() compares; before: what it returned of the run's first part.
    A disk that refuses costs the run nothing.
    """
    start = last = time.perf_counter()
    done = before["step"]

    def keep(state, at_once=False):
        nonlocal last, done
        done += 1
        now = time.perf_counter()
        if now - last < KEEP_EVERY and not at_once:
            return
        so_far = {"state": state(), "step": done, "seconds": before["seconds"] + now - start}
        so_far["peak"] = peak_so_far(before["peak"], device)
        try:
            utils.save_checkpoint({"config": settings, **so_far}, path)
        except InputError as error:
            print(f"warning: {error}", file=sys.stderr)
        last = now

    return keep


def peak_so_far(before, device):
    """Return the peak of memory in GiB, or None where it is unknown; before: that of the process before this one."""
    return max(before or 0, utils.peak_memory(device) or 0) or None
