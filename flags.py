"""The flags of every command, bad input, and exit statuses. It imports no torch and no other module of the project.

A script imports this module first, so that --help and a wrong flag are answered before torch is loaded.
Exit status of a command: 0 done, 1 a fault of ours, a failed run of compare.py or a reader of the output that is gone,
2 bad input (one line on standard error), 130 interrupted.
"""

import argparse
import contextlib
import ctypes
import errno
import io
import math
import os
import re
import signal
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"

DATASETS = ("cifar10", "cifar10_sample", "cifar100", "fashion_mnist", "gtsrb", "stl10", "svhn")
MAX_SIZE = 1024  # side of an image
NETWORKS = ("resnet18", "resnet34", "resnet50", "preactresnet18", "vgg11", "vgg13", "vgg16", "vgg19")
NETWORKS += ("wideresnet16", "wideresnet28", "vit")
LIBRARIES = ("torchvision", "timm")  # their networks are named torchvision:NAME, timm:NAME
# (mean, std) per color channel of the known normalizations
NORMALIZATIONS = {
    "authors": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "backdoorbench": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
LARGEST_MEAN = 10  # and std: those of images in [0, 1] are far below, those of images in [0, 255] above
# the baselines that repair a victim, the keys of defenses.DEFENSES
DEFENSES = ("ft", "fp", "nad", "anp", "seam", "nc", "i_bau", "ft_sam", "clp", "rnp", "fst", "bcu", "ulrl")
ATTACKS = ("badnet", "wanet", "reflection", "blended", "adaptive_blend", "blend", "cl", "composite", "dfst")
ATTACKS += ("dynamic", "filter", "input_aware", "invisible", "lira", "patch", "sig", "trojnn")


class InputError(ValueError):
    """Bad input that the user can correct; its message is one line that says what to do."""


class Unsaid:
    """Marks the default of a flag that the victim's file may answer where the user does not give it."""


class UnsaidName(Unsaid, str):
    """Such a default that is a name."""


class UnsaidNumber(Unsaid, int):
    """Such a default that is a number."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        if isinstance(action.default, Unsaid):
            return f"{action.help} (default: the checkpoint's, else %(default)s)"
        said = action.default is None or "(default:" in action.help
        return action.help if said else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line, with exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def bounded(kind, low=None, high=None, low_open=False):
    """Return an argparse type: a `kind` (int or float) from `low` to `high`, without `low` itself if low_open."""

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


def network(text):
    """Return the name of a network: one of NETWORKS, or torchvision:NAME, timm:NAME."""
    library, colon, name = text.partition(":")
    if text not in NETWORKS and not (library in LIBRARIES and colon and name):
        choices = ", ".join((*NETWORKS, *(f"{library}:NAME" for library in LIBRARIES)))
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {choices})")
    return text


def _of_normalization(text):
    """Return a number, the name of a normalization, or `auto`."""
    return text if text in (*NORMALIZATIONS, "auto") else bounded(float)(text)


def normalization(args):
    """Return the (mean, std) of --mean and --std, "auto", or None without these flags. Raises InputError."""
    mean, std = args.mean, args.std
    names = {v for values in (mean, std) for v in values or () if isinstance(v, str)}
    if mean is None and std is None:
        return None
    if not names and mean and std and len(mean) == len(std) == 3 and min(std) > 0:
        if max(map(abs, mean + std)) > LARGEST_MEAN:
            raise InputError("--mean and --std are of images in [0, 255]; divide them by 255")
        return tuple(mean), tuple(std)
    if len(names) == 1 and all(values is None or len(values) == 1 for values in (mean, std)):
        (name,) = names
        if all(values in (None, [name]) for values in (mean, std)):
            return name if name == "auto" else NORMALIZATIONS[name]
    known = ", ".join((*NORMALIZATIONS, "auto"))
    raise InputError(f"give --mean and --std three numbers each, std above 0, or --mean alone one of {known}")


def place_of(name):
    """Return (kind, path) of a user's own data: ("folder", PATH) for `folder:PATH`, ("npz", PATH) for `npz:PATH` and
    for any name that ends in .npz. Return None for any other name.
    """
    kind, colon, path = name.partition(":")
    if colon and kind in ("folder", "npz"):
        return kind, Path(os.path.expanduser(path))
    return ("npz", Path(os.path.expanduser(name))) if name.lower().endswith(".npz") else None


def one_of(known, *kinds):
    """Return an argparse type: a name in `known`, or a user's own data of one of `kinds`, see place_of()."""

    def parse(text):
        place = place_of(text)
        if text in known or (place and place[0] in kinds and text != f"{place[0]}:"):
            return text
        choices = ", ".join((*known, *(f"{kind}:PATH" for kind in kinds)))
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {choices})")

    return parse


def class_or_all(text):
    """Return the target class, an int, or `all` for all-to-all."""
    return text if text == "all" else bounded(int, 0)(text)


# argparse types of the flags that a victim's file may answer
ATTACK, DATASET = one_of(("none", "file", *ATTACKS), "folder"), one_of(DATASETS, "folder", "npz")
ANSWERS = {"attack": ATTACK, "target": class_or_all, "dataset": DATASET, "size": bounded(int, 8, MAX_SIZE)}


def _network(p, plants=False):
    """Add the flags of network, data and device; names and defaults are the authors'.

    plants: whether the command itself puts triggers on images; all others also take triggered images, and take what
    a flag does not say from the victim's file.
    """
    known = ("none", *ATTACKS) if plants else ("none", "file", *ATTACKS)
    own_images = "; file: the checkpoint's own triggered images; folder:PATH: triggered images in a folder per class"
    also = "" if plants else own_images
    p.add_argument("--datadir", default=str(ROOT / "data"), help="folder of the data sets")
    name, number = (str, int) if plants else (UnsaidName, UnsaidNumber)
    sets = f"{', '.join(DATASETS)}, folder:PATH, npz:PATH"
    p.add_argument("--dataset", default=name("cifar10"), type=DATASET, help=sets)
    p.add_argument("--size", default=number(32), type=ANSWERS["size"], help="side that images are resized to")
    p.add_argument(
        "--network", default=name("resnet18"), type=network, metavar="NAME",
        help=f"network of the victim: {', '.join(NETWORKS)}, torchvision:NAME, timm:NAME",
    )  # fmt: skip
    kind = one_of(known) if plants else ATTACK
    p.add_argument("--attack", default=name("badnet"), type=kind, help=f"{', '.join(known)}{also}")
    names = ", ".join(NORMALIZATIONS) if plants else f"{', '.join(NORMALIZATIONS)}, auto"
    own = "authors" if plants else "the checkpoint's, else the known one of best accuracy"
    for name, usual in (("mean", own), ("std", "that of --mean")):
        p.add_argument(
            f"--{name}", nargs="+", type=_of_normalization, metavar="VALUE",
            help=f"normalization: three numbers or {names} (default: {usual})",
        )  # fmt: skip
    p.add_argument("--seed", default=1024, type=SEED, help="seed of the random draws")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to compute")
    p.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 where it is fast")


def _common(p, plants=False):
    """Add the flags of every command that measures ASR; plants: see _network()."""
    _network(p, plants)
    p.add_argument("--batch_size", default=128, type=COUNT, help="images per batch of evaluation and train.py")
    target = 0 if plants else UnsaidNumber(0)
    p.add_argument("--target", default=target, type=class_or_all, help="target class; all: each class to the next")


def _victim(p):
    p.add_argument("--ckpt", help="the victim (default: the one of --network and --attack)")


def _resume(p):
    p.add_argument("--resume", default=True, action=argparse.BooleanOptionalAction, help="resume an interrupted run")


def _trigger_of(p):
    p.add_argument(
        "--trigger_of", metavar="VICTIM", help="checkpoint that holds the trigger (default: the network's own)"
    )


def _results(p):
    p.add_argument("--results", default=str(RESULTS), help="folder of the records")


def _defense_data(p, usual):
    p.add_argument("--data_rate", type=SHARE, help=f"share of the training set that is defense data (default: {usual})")
    p.add_argument("--draw", default="first", choices=("first", "random"), help="which images of each class; by --seed")


def _flip(p):
    p.add_argument(
        "--flip", action=argparse.BooleanOptionalAction,
        help="mirror images at random in augmentation (default: if that keeps the class; not for folder:, npz:)",
    )  # fmt: skip


def _width(p, whose=""):
    p.add_argument("--width", default=1.0, type=bounded(float, 1 / 64, 16), help=f"{whose}factor on all channels")
    p.add_argument(
        "--poison_rate",
        type=bounded(float, 0, 0.99),
        help=f"{whose}share of the training images that are poisoned; cover images, changed but with their own"
        " label, in proportion (default: the attack's usual)",
    )


def _unit(p):
    _common(p)
    p.add_argument("--phase", default="unit", choices=("unit", "test"), help="test: measure what an earlier run saved")
    p.add_argument("--lr", default=1e-3, type=POSITIVE, help="learning rate of the bounds")
    p.add_argument("--n_steps", default=300, type=COUNT, help="steps of the search")
    p.add_argument("--step_images", type=COUNT, help="training images per step, drawn at each step (default: all)")
    p.add_argument("--acc_degrade", default=0.03, type=bounded(float, 0, 1), help="validation accuracy bounds may cost")
    _defense_data(p, "0.05; all of cifar10_sample")
    _flip(p)
    p.add_argument("--micro_batch", type=COUNT, help="images per forward pass (default: 100 on a CPU, else 1000)")
    p.add_argument("--max_minutes", type=POSITIVE, help="end the search after that time; the same command resumes it")
    _resume(p)
    _victim(p)
    p.add_argument("--out", help="where to save (default: ckpt/{dataset}_{network}_{attack}_unit.pt)")
    p.add_argument("--export", help="also write the defended network as a .pt2 file that needs torch alone")
    p.add_argument("--outdir", default=".", help="folder of the picture")
    _results(p)


def _evaluate(p):
    _common(p)
    p.add_argument("--ckpt", help="victim or defended model (default: the victim of --network and --attack)")
    _trigger_of(p)
    p.add_argument("--activations", action="store_true", help="also the trigger's effect inside: tables and picture")
    p.add_argument("--outdir", default=".", help="folder of the picture")


def _train(p):
    _common(p, plants=True)
    _width(p)
    _flip(p)
    p.add_argument("--epochs", default=30, type=COUNT, help="epochs, of as many images as the training set has")
    p.add_argument("--lr", default=0.1, type=POSITIVE, help="peak learning rate")
    p.add_argument("--weight_decay", default=5e-4, type=bounded(float, 0), help="on all parameters")
    p.add_argument(
        "--sampling", default="resampled", choices=("resampled", "fixed"),
        help="poisoned images drawn at every access, trigger after augmentation; or drawn once, trigger before",
    )  # fmt: skip
    p.add_argument(
        "--trigger_width", type=bounded(int, 1, 256),
        help="channels of a learned trigger's first layer (default: the papers' for dynamic, 64, and lira, 16; less"
        " for dfst and invisible, 16 of 32, and for input_aware, 8 of 32)",
    )  # fmt: skip
    p.add_argument("--surrogate", help="clean network for cl (default: ckpt/{dataset}_resnet18-w0.25_none.pt)")
    _resume(p)
    p.add_argument("--overwrite", action="store_true", help="train again if the victim exists")
    p.add_argument("--ckpt", help="where to write (default: ckpt/{dataset}_{network}_{attack}.pt)")


def _defend(p):
    _common(p)
    p.add_argument("--defense", required=True, choices=("none", *DEFENSES, "dbd"), help="none: measure the victim")
    _defense_data(p, "the method's own; all of cifar10_sample")
    _flip(p)
    p.add_argument(
        "--epochs", nargs="+", type=COUNT, help="one number; for dbd three, one per stage (default: the method's own)"
    )
    _width(p, "dbd: ")
    _resume(p)
    p.add_argument("--overwrite", action="store_true", help="dbd: train again if the result exists")
    _victim(p)
    _trigger_of(p)
    p.add_argument("--out", help="where to save (default: ckpt/{dataset}_{network}_{attack}_{defense}.pt)")
    _results(p)


def _detect(p):
    _network(p)
    _defense_data(p, "0.05; all of cifar10_sample")
    _resume(p)
    p.add_argument("--ckpt", help="the network (default: the victim of --network and --attack)")
    p.add_argument("--outdir", default=".", help="folder of the picture")


def _compare(p):
    p.add_argument("--datadir", default=str(ROOT / "data"), help="folder of the data sets")
    p.add_argument("--victims", nargs="*", help="checkpoints to run defenses on (default: all victims in ckpt/)")
    p.add_argument(
        "--defenses", nargs="*", default=("none", *DEFENSES, "unit", "unit,step_images=250"),
        help="defenses to run; settings after commas, as in unit,acc_degrade=0.05 (default: none, all of defend.py but"
        " dbd, unit, and unit,step_images=250)",
    )  # fmt: skip
    p.add_argument("--jobs", default=1, type=COUNT, help="runs side by side, each on its share of the cores")
    p.add_argument("--run", default=True, action=argparse.BooleanOptionalAction, help="run what has no record")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to compute")
    _results(p)


COMMANDS = {
    "unit.py": ("mitigate a backdoor by tight bounds on activations", _unit),
    "evaluate.py": ("measure BA, ASR and RA, and draw the trigger", _evaluate),
    "train.py": ("train a (backdoored) victim", _train),
    "defend.py": ("repair a victim by another defense than UNIT", _defend),
    "detect.py": ("search for the trigger of a backdoor, class by class", _detect),
    "compare.py": ("run every defense on every victim, and write the tables", _compare),
}


def parser(command):
    """Return the ArgumentParser of a command, a key of COMMANDS."""
    about, add = COMMANDS[command]
    p = _Parser(prog=command, description=about, formatter_class=_Help)
    add(p)
    return p


def keep_freed_memory():
    """Make glibc keep the memory of freed tensors; without effect with another C library.

    By default glibc returns each large block to the system and gets it again page by page, which takes a tenth of the
    time of training and UNIT on two cores, a fifth of evaluate.py's.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no mallopt here
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def run(main):
    """Call `main()` and end the process with its exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"note: {message}\n"
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # a path need not be text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except InputError as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)  # a name in it may have two lines
        _leave(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(130)
    except (MemoryError, RuntimeError) as error:
        # out of memory, in NumPy, torch's CPU allocator or on a GPU
        if not (isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", str(error))):
            raise
        print("error: out of memory; lower --batch_size, --micro_batch or --size", file=sys.stderr)
        _leave(2)
    except BrokenPipeError:  # the reader of standard output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(1)
    except OSError as error:
        # a path that cannot even be asked for
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG) or error.filename is None:
            raise
        print(f"error: cannot use {error.filename}: {error.strerror}; give another path", file=sys.stderr)
        _leave(2)
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
        # a gloo thread may still free tensors, and would abort while the interpreter shuts down
        os._exit(status)
    sys.exit(status)


# this module is the first that a command imports: --help and a wrong flag are answered here
_script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
if _script.name in COMMANDS and _script.resolve().parent == ROOT:
    signal.signal(signal.SIGINT, _interrupted)  # while torch is being imported
    parser(_script.name).parse_args()
