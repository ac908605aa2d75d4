"""The flags of every command, bad input, and exit statuses; the bottom floor, without torch.

A script imports this module first. It then answers --help and a wrong flag before the seconds that torch takes.
Exit status of a command: 0 done, 1 a fault of ours, 2 bad input (one line on standard error), 130 interrupted.
"""

import argparse
import contextlib
import ctypes
import math
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"

DATASETS = ("cifar10", "cifar10_sample")
NETWORKS = ("resnet18", "resnet34", "resnet50")
DEFENSES = ("ft", "bcu", "ulrl")  # the baselines that start from a victim, as defenses/ has them
ATTACKS = ("badnet", "wanet", "reflection", "blended", "adaptive_blend", "blend", "cl", "composite", "dfst")
ATTACKS += ("dynamic", "filter", "input_aware", "invisible", "lira", "patch", "sig", "trojnn")


class InputError(ValueError):
    """Bad input that the user can mend; its message is one line that says what to do."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """argparse with the error in one line, and a command line that it cannot read always ending in status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


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


COUNT = bounded(int, 1)
SHARE = bounded(float, 0, 1, low_open=True)
POSITIVE = bounded(float, 0, low_open=True)
SEED = bounded(int, 0, 2**32 - 1)


def _common(p):
    """Add the flags that every command on a network has; names and defaults are the authors'."""
    p.add_argument("--datadir", default=str(ROOT / "data"), help="folder of the data sets")
    p.add_argument("--dataset", default="cifar10", choices=DATASETS, help="cifar10_sample is embedded: no download")
    p.add_argument("--network", default="resnet18", choices=NETWORKS, help="network of the victim")
    p.add_argument("--attack", default="badnet", choices=("none", *ATTACKS), help="none: a clean or unknown network")
    p.add_argument("--seed", default=1024, type=SEED, help="seed of the random draws")
    p.add_argument("--batch_size", default=128, type=COUNT, help="images per batch: evaluation, train.py")
    p.add_argument("--target", default=0, type=bounded(int, 0, 9), help="class that the trigger should give")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to compute")
    p.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 where it is fast")


def _victim(p):
    p.add_argument("--ckpt", help="the victim (default: the one of --network and --attack)")


def _resume(p):
    p.add_argument("--resume", default=True, action=argparse.BooleanOptionalAction, help="go on after a cut-off run")


def _results(p):
    p.add_argument("--results", default=str(RESULTS), help="folder of the records")


def _defense_data(p, usual):
    p.add_argument("--data_rate", type=SHARE, help=f"share of the training set that is defense data (default: {usual})")
    p.add_argument("--draw", default="first", choices=("first", "random"), help="which images of each class; by --seed")


def _width(p):
    p.add_argument("--width", default=1.0, type=bounded(float, 1 / 64, 8), help="factor on all channels")
    p.add_argument("--poison_rate", type=bounded(float, 0, 0.99), help="share poisoned (default: the attack's usual)")


def _unit(p):
    _common(p)
    p.add_argument("--phase", default="unit", choices=("unit", "test"), help="test: measure what an earlier run saved")
    p.add_argument("--lr", default=1e-3, type=POSITIVE, help="learning rate of the bounds")
    p.add_argument("--n_steps", default=300, type=COUNT, help="steps of the search")
    p.add_argument("--step_images", type=COUNT, help="training images of a step, drawn anew each time (default: all)")
    p.add_argument("--acc_degrade", default=0.03, type=bounded(float, 0, 1), help="validation accuracy it may cost")
    _defense_data(p, "0.05; all of cifar10_sample")
    p.add_argument("--micro_batch", type=COUNT, help="images in memory at a time (default: 100 on a CPU, else 1000)")
    p.add_argument("--max_minutes", type=POSITIVE, help="end the search then; given again, the command goes on")
    _resume(p)
    _victim(p)
    p.add_argument("--out", help="where to save (default: ckpt/{dataset}_{network}_{attack}_unit.pt)")
    p.add_argument("--outdir", default=".", help="folder of the picture")
    _results(p)


def _evaluate(p):
    _common(p)
    p.add_argument("--ckpt", help="victim or defended model (default: the victim of --network and --attack)")
    p.add_argument("--activations", action="store_true", help="also what the trigger does inside: table and picture")
    p.add_argument("--outdir", default=".", help="folder of the picture")


def _train(p):
    _common(p)
    _width(p)
    p.add_argument("--epochs", default=30, type=COUNT, help="as many images each as the training set has")
    p.add_argument("--lr", default=0.1, type=POSITIVE, help="peak learning rate")
    p.add_argument("--weight_decay", default=5e-4, type=bounded(float, 0), help="on all parameters")
    p.add_argument(
        "--sampling", default="resampled", choices=("resampled", "fixed"),
        help="poisoned images drawn anew at every access, trigger after augmentation; or drawn once, trigger before",
    )  # fmt: skip
    p.add_argument(
        "--trigger_width", type=bounded(int, 1, 256),
        help="channels of a learned trigger's first layer (default: as in the papers for dynamic, 64, and lira, 16;"
        " what two cores allow for dfst and invisible, 16 of 32, and input_aware, 8 of 32)",
    )  # fmt: skip
    p.add_argument("--surrogate", help="clean network for cl (default: ckpt/cifar10_resnet18-w0.25_none.pt)")
    _resume(p)
    p.add_argument("--overwrite", action="store_true", help="train again although the victim lies there already")
    p.add_argument("--ckpt", help="where to write (default: ckpt/{dataset}_{network}_{attack}.pt)")


def _defend(p):
    _common(p)
    p.add_argument("--defense", required=True, choices=("none", *DEFENSES, "dbd"), help="none: measure the victim")
    _defense_data(p, "the method's own; all of cifar10_sample")
    p.add_argument("--epochs", nargs="+", type=COUNT, help="one number for ft and bcu, three stages' for dbd")
    _width(p)
    _resume(p)
    p.add_argument("--overwrite", action="store_true", help="dbd: train again although the result lies there already")
    _victim(p)
    p.add_argument("--out", help="where to save (default: ckpt/{dataset}_{network}_{attack}_{defense}.pt)")
    _results(p)


def _compare(p):
    p.add_argument("--datadir", default=str(ROOT / "data"), help="folder of the data sets")
    p.add_argument("--victims", nargs="*", help="checkpoints (default: all victims in ckpt/)")
    p.add_argument(
        "--defenses", nargs="*", default=("none", *DEFENSES, "unit", "unit,step_images=250"),
        help="columns to fill; other settings behind commas, as in unit,acc_degrade=0.05",
    )  # fmt: skip
    p.add_argument("--run", default=True, action=argparse.BooleanOptionalAction, help="run what has no record")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to compute")
    _results(p)


COMMANDS = {
    "unit.py": ("mitigate a backdoor by tight bounds on activations", _unit),
    "evaluate.py": ("measure BA, ASR and RA, and draw the trigger", _evaluate),
    "train.py": ("train a (backdoored) victim", _train),
    "defend.py": ("repair a victim by another defense than UNIT", _defend),
    "compare.py": ("run every defense on every victim, and write the tables", _compare),
}


def parser(command):
    """Return the ArgumentParser of a command, a key of COMMANDS."""
    about, add = COMMANDS[command]
    p = _Parser(prog=command, description=about, formatter_class=_Help)
    add(p)
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
    signal.signal(signal.SIGINT, signal.default_int_handler)
    keep_freed_memory()
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(130)
    except BrokenPipeError:  # whoever read what is printed has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(1)
    _leave(0)


def _interrupted(*_):
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def _leave(status):
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # a thread of gloo may still be letting go of the last tensors: it aborts where the interpreter is torn down
        os._exit(status)
    sys.exit(status)


# this module is the first that a command imports: --help and a wrong flag are answered here
_script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
if _script.name in COMMANDS and _script.resolve().parent == ROOT:
    signal.signal(signal.SIGINT, _interrupted)  # while torch is being imported
    parser(_script.name).parse_args()
