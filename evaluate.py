"""Benign accuracy (BA) and attack success rate (ASR) of a victim or a defended model.

    python evaluate.py --attack badnet                                          # the victim
    python evaluate.py --attack badnet --ckpt ckpt/cifar10_resnet18_badnet_unit.pt    # after unit.py

prints `BA 93.56 %  ASR 100.00 %  RA 0.00 %  target class 94.20 %` with the counts, and writes demo_{attack}.png.
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
    """What a network does on the test images: shares in [0, 1], and how many images each was measured on.

    BA: benign accuracy, the share of clean images that are right. ASR: attack success rate, the share of triggered
    images of the other classes that come out as the target. RA: robust accuracy, the share of these same images that
    come out as what they are; ASR + RA <= 1, the rest goes to third classes. target_accuracy: BA on the target class
    alone. ASR and RA are None without a backdoor, target_accuracy without an image of that class.
    """

    BA: float
    ASR: float | None
    RA: float | None
    target_accuracy: float | None
    n_clean: int
    n_triggered: int
    n_target: int

    def __str__(self):
        shares = {"BA": self.BA, "ASR": self.ASR, "RA": self.RA, "target class": self.target_accuracy}
        line = "  ".join(f"{name} {100 * share:.2f} %" for name, share in shares.items() if share is not None)
        return (
            f"{line}  ({self.n_clean:,} clean, {self.n_triggered:,} triggered, {self.n_target:,} of the target class)"
        )


@torch.no_grad()
@utils.repeatable()
def evaluate(model, images, labels, backdoor, target, batch_size=128, dtype=torch.float32):
    """Measure BA on all images, ASR and RA on the triggered images of every class but `target`.

    model: images in [0, 1] to logits (N, num_classes), put into eval mode; images: uint8 (N, 3, H, W), or float in
    [0, 1]; labels: int64 (N,); backdoor: the trigger, or None to measure clean images alone; batch_size: images at a
    time, on a GPU 1,000 at least; dtype: what autocast computes in.
    Returns a Measured. Raises ValueError without images, and without one of another class than the target.
    """
    if len(images) == 0:
        raise ValueError("there are no images to measure on")
    model.eval()
    device = next((t.device for t in model.parameters()), images.device)
    images, labels = images.to(device), labels.to(device)
    size = pass_size(device, batch_size)

    def predict(images, trigger=None):
        classes = []
        with utils.autocast(device, dtype):  # one context for all batches: it casts each weight once
            for x in images.split(size):
                x = utils.to_float(x)
                if trigger is not None:
                    with torch.autocast(device.type, enabled=False):
                        x = trigger(x).contiguous(memory_format=torch.channels_last)
                classes.append(model(x).argmax(1))
        return torch.cat(classes)

    def share(hits):
        return hits.double().mean().item() if len(hits) else None

    right, of_target = predict(images) == labels, labels == target
    n = len(images), int((~of_target).sum()), int(of_target.sum())
    if backdoor is None:
        return Measured(share(right), None, None, share(right[of_target]), n[0], 0, n[2])
    if n[1] == 0:
        raise ValueError(f"every image is of the target class {target}: there is none to measure ASR on")
    classes = predict(images[~of_target], backdoor.to(device).eval())
    asr, ra = share(classes == target), share(classes == labels[~of_target])
    return Measured(share(right), asr, ra, share(right[of_target]), *n)


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
