"""Benign accuracy (BA) and attack success rate (ASR) of a victim or a defended model.

    python evaluate.py --attack badnet                                          # the victim
    python evaluate.py --attack badnet --ckpt ckpt/cifar10_resnet18_badnet_unit.pt    # after unit.py

prints `Benign accuracy: 93.56%, ASR: 100.00% (10,000 / 9,000 images)` and writes demo_{attack}.png.
19,000 images: half a minute on two cores with bf16, some minutes without.
"""

import cli


def parser():
    """Return the command's parser."""
    p = cli.parser("evaluate.py", "measure benign accuracy and attack success rate", attacks=("none", *cli.ATTACKS))
    p.add_argument("--ckpt", help="checkpoint, victim or defended (default: the victim of --network and --attack)")
    p.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 where it is fast")
    p.add_argument("--activations", action="store_true", help="also what the trigger does inside: table and picture")
    p.add_argument("--outdir", default=".", help="folder of the picture")
    return p


if __name__ == "__main__":
    parser().parse_args()  # answers --help and a wrong flag before the seconds that torch takes

import copy
from pathlib import Path
from typing import NamedTuple

import torch

import models
import pictures
import report
import utils
from activations import trigger_effect, uniform_bounds
from backdoors import get_backdoor

SEEN = 1000  # test images whose activations are looked at
N_SIGMA = (4, 3, 2.5, 2, 1.5, 1)  # of the bounds that --activations tries on all neurons alike


class Measured(NamedTuple):
    """BA and ASR as shares in [0, 1], and how many images each was measured on. ASR is None without a backdoor."""

    BA: float
    ASR: float | None
    n_clean: int
    n_triggered: int

    def __str__(self):
        asr = "not measured" if self.ASR is None else f"{100 * self.ASR:.2f}%"
        return f"Benign accuracy: {100 * self.BA:.2f}%, ASR: {asr} ({self.n_clean:,} / {self.n_triggered:,} images)"


@torch.no_grad()
@utils.repeatable()
def evaluate(model, images, labels, backdoor, target, batch_size=128, dtype=torch.float32):
    """Measure BA on all images, and ASR, the share of triggered images of another class that come out as `target`.

    model: images in [0, 1] to logits (N, num_classes), put into eval mode; images: uint8 (N, 3, H, W), or float in
    [0, 1]; labels: int64 (N,); backdoor: the trigger, or None to measure BA alone; batch_size: images at a time, on a
    GPU 1,000 at least; dtype: what autocast computes in.
    Returns a Measured. Raises ValueError without images, and without one of another class than the target.
    """
    if len(images) == 0:
        raise ValueError("there are no images to measure on")
    model.eval()
    device = next((t.device for t in model.parameters()), images.device)
    images, labels = images.to(device), labels.to(device)
    size = pass_size(device, batch_size)

    def count(images, wanted, trigger):
        hits = torch.zeros((), dtype=torch.int64, device=device)
        with utils.autocast(device, dtype):  # one context for all batches: it casts each weight once
            for x, y in zip(images.split(size), wanted.split(size), strict=True):
                x = utils.to_float(x)
                if trigger is not None:
                    with torch.autocast(device.type, enabled=False):
                        x = trigger(x).contiguous(memory_format=torch.channels_last)
                hits += (model(x).argmax(1) == y).sum()
        return hits.item()

    n = len(images)
    ba = count(images, labels, None) / n
    if backdoor is None:
        return Measured(ba, None, n, 0)
    others = images[labels != target]
    if len(others) == 0:
        raise ValueError(f"every image is of the target class {target}: there is none to measure ASR on")
    hits = count(others, torch.full((len(others),), target, device=device), backdoor.to(device).eval())
    return Measured(ba, hits / len(others), n, len(others))


def pass_size(device, batch_size):
    """Return how many images to take at a time: on a GPU, which small batches would keep waiting, 1,000 at least."""
    return batch_size if device.type == "cpu" else max(batch_size, 1000)


def victim_backdoor(attack, checkpoint, device):
    """Return the trigger a checkpoint was trained with, else that of the trigger files; None for the attack `none`."""
    if attack == "none":
        return None
    try:
        backdoor = get_backdoor(attack)
        if checkpoint["trigger"] is not None and checkpoint["attack"] == attack:
            backdoor.load_state_dict(checkpoint["trigger"])
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise cli.InputError(f"no trigger for {attack}: {' '.join(str(error).split())[:200]}") from None
    return backdoor.to(device)


def load_victim(args, device):
    """Return (path, model, checkpoint, backdoor, target) that the flags mean; say where file and flags differ."""
    path = utils.victim_path(args)
    model, checkpoint = utils.load_model(path, device)
    model.to(memory_format=torch.channels_last)
    backdoor = victim_backdoor(args.attack, checkpoint, device)
    for flag in ("attack", "target"):
        trained = checkpoint[flag]
        differs = trained is not None and trained != getattr(args, flag) and args.attack != "none"
        if differs and utils.ranks()[0] == 0:
            print(f"note: {path} was trained with {flag} {trained}, measured with {getattr(args, flag)}")
    return path, model, checkpoint, backdoor, args.target


def effect_table(sites):
    """Return what a trigger does to each site (a list of SiteEffect) as a Markdown table."""

    def pair(clean, triggered):
        return f"{100 * clean:.3f} / {100 * triggered:.3f}"

    head = ["site", "farthest neuron, std", "above mean + 4 std, clean / triggered %"]
    rows = [[s.site, f"{s.distance:.1f}", pair(s.clean_above, s.triggered_above)] for s in sites]
    if sites[0].clean_clipped is not None:
        head.append("above the bound, clean / triggered %")
        rows = [[*row, pair(s.clean_clipped, s.triggered_clipped)] for row, s in zip(rows, sites, strict=True)]
    return report.markdown(head, rows)


def tightness_table(model, images, labels, backdoor, target, batch_size, dtype):
    """Return accuracy and ASR under bounds that are equally tight at every neuron, as a Markdown table.

    Where ASR falls long before accuracy does, the trigger needs activations that clean images hardly have.
    images: uint8 (N, 3, H, W), none of the target class; the bounds are at their mean + k std, and the model's own are
    put aside; the rest as for evaluate().
    """
    net = copy.deepcopy(model)
    tried = {"none": None}
    for k, bounds in zip(N_SIGMA, uniform_bounds(net, images, N_SIGMA, batch_size), strict=True):
        tried[f"clean mean + {k} std"] = bounds
    rows = []
    for name, bounds in tried.items():
        held = evaluate(models.set_bounds(net, bounds), images, labels, backdoor, target, batch_size, dtype)
        rows.append([name, report.percent(held.BA), report.percent(held.ASR)])
    return report.markdown(["bounds of all neurons", "accuracy, target class left out, %", "ASR %"], rows)


def main(argv=None):
    """The command."""
    args = parser().parse_args(argv)
    device = utils.get_device(args.device)
    dtype = utils.get_dtype(args.precision, device)
    path, model, _, backdoor, target = load_victim(args, device)
    images, labels = utils.load_dataset(args.dataset, args.datadir, train=False)
    if args.dataset != "cifar10":
        print(f"on {args.dataset}: {len(images):,} test images, a part of CIFAR-10's 10,000")
    images = images.to(device)
    measured = evaluate(model, images, labels, backdoor, target, args.batch_size, dtype)
    print(f"{path}\n{measured}")
    if backdoor is not None:
        picture = Path(args.outdir) / f"demo_{args.attack}.png"
        pictures.draw_demo(images, backdoor, picture, times=3 if args.attack == "wanet" else 1)
        print(f"wrote {picture}")
    if backdoor is not None and args.activations:
        other = (labels != target).nonzero()[:SEEN, 0]
        others = images[other.to(device)]
        picture = Path(args.outdir) / f"activations_{args.attack}.png"
        neurons, sites = trigger_effect(model, others, backdoor, batch_size=args.batch_size)
        pictures.draw_moved(neurons, picture)
        print(f"{effect_table(sites)}\n")
        print(tightness_table(model, others, labels[other], backdoor, target, args.batch_size, dtype))
        print(f"wrote {picture}")


if __name__ == "__main__":
    cli.run(main)
