"""What a file from elsewhere leaves open: how its images are normalized, and the triggered images that come with it.

A network does best on clean images under the normalization that it was trained with. So the known ones are tried on
clean training images: all of them on a few, and those that are not clearly worse than the best on more. One is clearly
better than another by McNemar's test: of the images that only one of the two classifies correctly, it has more, by
three standard deviations.
"""

from flags import NORMALIZATIONS, InputError

from typing import NamedTuple

import torch

import data
import utils

ROUNDS = (250, 500, 1000, 2500)  # images seen after each round
CLEARLY = 3.0  # standard deviations
LOW = 0.5  # accuracy on training images under which no normalization is believed


class Tried(NamedTuple):
    """A normalization, and the share of n clean images that the network then classifies correctly."""

    name: str
    mean: tuple
    std: tuple
    accuracy: float
    n: int


@torch.no_grad()
def try_normalizations(model, images, labels, batch_size=128, dtype=torch.float32, also=None):
    """Return (list of Tried, the best first; how many of them, from the first on, are too close to tell apart).

    model: a models.Normalized, whose normalization is restored at the end; images: clean, uint8 (N, 3, H, W), in no
    order of classes; labels: int64 (N,); also: (mean, std) to try besides the known ones.
    """
    candidates = dict(NORMALIZATIONS)
    if also is not None and also not in candidates.values():
        candidates = {"its own": also, **candidates}
    own = model.mean.flatten().tolist(), model.std.flatten().tolist()
    device = model.mean.device
    right = {name: torch.zeros(0, dtype=torch.bool) for name in candidates}
    left = list(candidates)
    for start, end in zip((0, *ROUNDS), ROUNDS, strict=False):
        x, y = images[start:end].to(device), labels[start:end]
        if len(left) == 1 or len(y) == 0:
            break
        for name in left:
            model.set_normalization(*candidates[name])
            with utils.autocast(device, dtype):
                said = torch.cat([model(data.to_float(part)).argmax(1) for part in x.split(batch_size)])
            right[name] = torch.cat((right[name], said.cpu() == y.cpu()))
        best = right[max(left, key=lambda name: int(right[name].sum()))]
        left = [name for name in left if not clearly_better(best, right[name])]
    model.set_normalization(*own)
    tried = [Tried(name, *candidates[name], hits.float().mean().item(), len(hits)) for name, hits in right.items()]
    tried.sort(key=lambda t: (t.name in left, t.accuracy), reverse=True)
    return tried, len(left)


def clearly_better(a, b):
    """Return whether `a` is clearly better than `b`; bool (N,) each: which images are classified correctly."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return only_a - only_b > CLEARLY * (only_a + only_b) ** 0.5


def settle_normalization(path, model, checkpoint, asked, clean, batch_size=128, dtype=torch.float32):
    """Let `model` normalize as asked, else as its file says, else as suits clean images best; return a line or None.

    checkpoint: of the file; its "mean" and "std" are replaced by those taken. asked: (mean, std), "auto" or None, see
    flags.normalization(). clean: a function that returns clean training images and their labels, see
    try_normalizations(); for a file from elsewhere the stated or asked normalization is checked against them.
    The line says how the normalization was chosen, or that it may be wrong; None where it is a file of ours with its
    own, or the check finds no better one.
    Raises InputError where the normalization has to be tried and there are no such images.
    """
    stated = None if checkpoint["mean"] is None else (tuple(checkpoint["mean"]), tuple(checkpoint["std"]))
    taken, line = stated if asked in (None, "auto") else asked, None
    if "format" in checkpoint and asked != "auto":  # one of ours, which was trained so
        if taken != stated:
            mean, std = (" ".join(f"{v:g}" for v in values) for values in stated)
            line = f"warning: {path} was trained with mean {mean} and std {std}, not with the ones given"
    elif taken is None or asked == "auto":
        try:
            taken, line = _best(path, *try_normalizations(model, *clean(), batch_size, dtype, stated))
        except InputError as error:
            raise InputError(
                f"how {path} normalizes its images is not known; give --mean and --std ({error})"
            ) from None
    else:
        try:
            line = _doubt(path, taken, *try_normalizations(model, *clean(), batch_size, dtype, taken))
        except InputError as error:
            line = f"note: the normalization of {path} could not be checked ({error})"
    checkpoint["mean"], checkpoint["std"] = taken
    model.set_normalization(*taken)
    return line


def _best(path, tried, close):
    """Return ((mean, std) of the best, the line that says so)."""
    best = tried[0]
    line = f"warning: how {path} normalizes its images was tried on clean ones: {_shares(tried)}. Taking {best.name}"
    if close > 1:
        line += f", hard to tell from {', '.join(t.name for t in tried[1:close])}"
    if best.accuracy < LOW:
        line += ", though none does well: the file may be of another data set, or have a normalization of its own"
    return (best.mean, best.std), f"{line}; give --mean and --std if you know"


def _doubt(path, taken, tried, close):
    """Return the line that says why (mean, std) `taken` may be wrong, or None."""
    if taken not in [(t.mean, t.std) for t in tried[:close]]:
        return f"warning: {path} does better on clean images with --mean {tried[0].name}: {_shares(tried)}"
    if tried[0].accuracy < LOW:
        return f"warning: {path} does well on clean images under no known normalization: {_shares(tried)}"
    return None


def _shares(tried):
    seen = sorted({t.n for t in tried}, reverse=True)
    groups = [(", ".join(f"{t.name} {100 * t.accuracy:.1f}" for t in tried if t.n == n), n) for n in seen]
    return "; ".join(f"{names} % of {n:,}" for names, n in groups)


def target_of(checkpoint):
    """Return the target class of the triggered images that come with a checkpoint, `all` for all-to-all.

    Raises InputError where there are none, and where they have several targets that are not each class's next.
    """
    if not checkpoint["bd_test"]:
        raise InputError("the checkpoint brings no triggered images; give --attack another")
    pairs = {(under_attack, original) for _, _, under_attack, original, _ in checkpoint["bd_test"]}
    if not all(0 <= label < checkpoint["num_classes"] for pair in pairs for label in pair):
        n = checkpoint["num_classes"]
        raise InputError(f"its triggered images have labels that are none of its {n} classes; give --attack another")
    targets = {under_attack for under_attack, _ in pairs}
    if len(targets) == 1:
        return targets.pop()
    if all(under_attack == (original + 1) % checkpoint["num_classes"] for under_attack, original in pairs):
        return "all"
    raise InputError(
        f"its triggered images have {len(targets)} targets, and not each class the next; that is not taken"
    )


def triggered_images(checkpoint, size):
    """Return (images uint8 (N, 3, size, size), true labels int64 (N,), indices in the test set as strings) of a file.

    Those whose true class is the label under attack are left out. Raises InputError where the images have another size,
    and as data.backdoorbench.triggered_images() does.
    """
    images, original, under_attack = data.backdoorbench.triggered_images(checkpoint["bd_test"], checkpoint["folder"])
    if images.shape[2:] != (size, size):
        sizes = f"{images.shape[3]}x{images.shape[2]}, its network takes {size}x{size}"
        raise InputError(f"the checkpoint's triggered images are {sizes}; give --attack another, or none")
    counts = original != under_attack
    indices = [str(entry[0]) for entry, yes in zip(checkpoint["bd_test"], counts.tolist(), strict=True) if yes]
    return images[counts], original[counts], indices
