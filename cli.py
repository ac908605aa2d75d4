"""What the commands share before torch is imported: their common flags, bad input, and exit statuses.

Exit status of a command: 0 done, 1 a fault of ours, 2 bad input (one line on standard error), 130 interrupted.
"""

import argparse
import contextlib
import ctypes
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

DATASETS = ("cifar10", "cifar10_sample")
NETWORKS = ("resnet18", "resnet34", "resnet50")
DEFENSES = ("ft", "bcu", "ulrl")  # the relatives that start from a victim, as defenses/ has them
ATTACKS = ("badnet", "wanet", "reflection", "blended")


class InputError(ValueError):
    """Bad input that the user can mend; its message is one line that says what to do."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """argparse with the error in one line, and a command line that it cannot read always ending in status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def bounded(kind, low=None, high=None, low_open=False):
    """Return an argparse type: a `kind` (int or float) from `low` to `high`; `low_open` leaves `low` itself out."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole number' if kind is int else 'a number'}"
            ) from None
        if kind is int and abs(value) > 2**53:
            raise argparse.ArgumentTypeError(f"{text[:40]} is too large")
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if low is not None and not (value > low if low_open else value >= low):
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if low_open else 'at least'} {low}")
        if high is not None and not value <= high:
            raise argparse.ArgumentTypeError(f"{text} must be at most {high}")
        return value

    return parse


def bare_parser(prog, description):
    """Return an ArgumentParser without any flag but --help."""
    return _Parser(prog=prog, description=description, formatter_class=_Help)


def parser(prog, description, attacks=ATTACKS):
    """Return an ArgumentParser that knows the flags every command has (names and defaults are the authors')."""
    p = bare_parser(prog, description)
    p.add_argument("--datadir", default=str(ROOT / "data"), help="folder of the data sets")
    p.add_argument("--dataset", default="cifar10", choices=DATASETS, help="cifar10_sample is embedded: no download")
    p.add_argument("--network", default="resnet18", choices=NETWORKS, help="network of the victim")
    p.add_argument("--attack", default="badnet", choices=attacks, help="the victim's; none: a clean or unknown one")
    p.add_argument("--seed", default=1024, type=bounded(int, 0, 2**32 - 1), help="seed of every random draw")
    p.add_argument("--batch_size", default=128, type=bounded(int, 1), help="images per batch: evaluation, train.py")
    p.add_argument("--target", default=0, type=bounded(int, 0, 9), help="class that the trigger should give")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to compute")
    return p


def keep_freed_memory():
    """Let glibc keep the memory of freed tensors for the next ones; another C library is left as it is.

    By default it gives each large one back to the system and fetches it anew, page by page: a tenth of the time of
    training and of UNIT on two cores, a fifth of evaluate.py's.
    """
    trim_threshold, mmap_max = -1, -4  # mallopt's names of the two
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no mallopt here
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def run(main):
    """Call `main()` as a command: turn its outcome into an exit status and leave the process with it."""
    keep_freed_memory()
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(130)
    _leave(0)


def _leave(status):
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # a thread of gloo may still be letting go of the last tensors: it aborts where the interpreter is torn down
        os._exit(status)
    sys.exit(status)
