"""Benign accuracy (BA), attack success rate (ASR) and robust accuracy (RA) of a victim or a defended model.

    python evaluate.py --attack badnet                                                # the victim
    python evaluate.py --attack badnet --ckpt ckpt/cifar10_resnet18_badnet_unit.pt    # after unit.py
    python evaluate.py --attack folder:bd_test_dataset --ckpt theirs.pt               # triggered images in a folder

It prints these three, the accuracy on the target class and the numbers of images. It writes demo_{attack}.png: 16 test
images, clean, triggered, and the difference of the two.
"""

import flags  # first: it answers --help and a wrong flag before torch is imported

from pathlib import Path
from typing import NamedTuple

import torch

import data
import models
import utils
from support import activations, inputs, plots

EDGE = 1e-4  # rounding by which a trigger's pixels may leave [0, 1]


class Measured(NamedTuple):
    """Rates in [0, 1] on the test images, and the number of images of each.

    BA: benign accuracy, the share of clean images classified correctly. ASR: attack success rate, the share of
    triggered images of the other classes classified as the target. RA: robust accuracy, the share of the same images
    classified as their true class; ASR + RA <= 1, the rest goes to third classes. target_accuracy: BA on the target
    class alone. ASR and RA are None without a backdoor, target_accuracy without an image of the target class.
    All-to-all (target "all"): ASR is the share of all triggered images classified as the class after their true one.
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
        n = f"{self.n_clean:,} clean, {self.n_triggered:,} triggered, {self.n_target:,} of the target class"
        return f"{line}  ({n})"


@torch.no_grad()
@utils.repeatable()
def evaluate(model, images, labels, backdoor, target, batch_size=128, dtype=torch.float32, triggered=None):
    """Measure BA on all images, ASR and RA on the triggered images of every class but `target`.

    model: images in [0, 1] to logits (N, num_classes) or an object with `.logits`; it is put into eval mode; images:
    uint8 or float in [0, 1], (N, 3, H, W); labels: int64 (N,); backdoor: the trigger, or None for BA alone; target: a
    class, or "all" for all-to-all; batch_size: images per forward pass, on a GPU at least 1,000; dtype: of autocast.
    triggered: instead of a backdoor, a tuple whose first items are images that carry a trigger and their true labels.
    Returns a Measured. Raises InputError without images, without one of another class than the target, for all-to-all
    without true classes, and for outputs that are NaN or infinite; ValueError where both backdoor and triggered are
    given.
    """
    if len(images) == 0:
        raise flags.InputError("there are no images to measure on")
    if backdoor is not None and triggered is not None:
        raise ValueError("give either a backdoor or triggered images, not both")
    model.eval()
    device = next((t.device for t in model.parameters()), images.device)
    images, labels = images.to(device), labels.to(device)
    size = utils.pass_size(device, batch_size)

    def predict(images, trigger=None):
        """Return (predicted classes, number of classes)."""
        classes = []
        with utils.autocast(device, dtype):  # one context for all batches, so that each weight is cast once
            for x in images.split(size):
                x = data.to_float(x)
                if trigger is not None:
                    with torch.autocast(device.type, enabled=False):
                        x = trigger(x).contiguous(memory_format=torch.channels_last)
                    if not (x.amin() >= -EDGE and x.amax() <= 1 + EDGE):  # also for NaN
                        raise flags.InputError("the trigger gives pixels outside [0, 1]; clamp them, or take another")
                logits = models.logits(model(x))
                if not logits.isfinite().all():
                    raise flags.InputError("the network's outputs are NaN or infinite; take one that is whole")
                classes.append(logits.argmax(1))
        return torch.cat(classes), logits.shape[1]

    def share(hits):
        return hits.sum().item() / len(hits) if len(hits) else None

    target = -1 if target == "all" else target  # no image is of that class
    classes, n_classes = predict(images)
    right, of_target = classes == labels, labels == target
    n = len(images), int((~of_target).sum()), int(of_target.sum())
    if backdoor is not None:
        backdoor.to(device).eval()
    if triggered is not None:
        others, truth = (t.to(device) for t in triggered[:2])
        others, truth = others[truth != target], truth[truth != target]
    elif backdoor is None:
        return Measured(share(right), None, None, share(right[of_target]), n[0], 0, n[2])
    elif hasattr(backdoor, "test_set"):
        others, truth = backdoor.test_set(images, labels, target)
    else:  # a module that is no Trigger
        others, truth = images[~of_target], labels[~of_target]
    if len(others) == 0:
        raise flags.InputError(f"there are no images to measure ASR on, only those of the target class {target}")
    if target < 0 and truth is None:
        raise flags.InputError(
            "images with this trigger have no single true class, as all-to-all needs it; give --target a class"
        )
    classes, _ = predict(others, backdoor)
    asr = share(classes == (target if target >= 0 else (truth + 1) % n_classes))
    ra = None if truth is None else share(classes == truth)
    return Measured(share(right), asr, ra, share(right[of_target]), n[0], len(others), n[2])


def main(argv=None):
    """The command."""
    args = flags.parser("evaluate.py").parse_args(argv)
    device = utils.get_device(args.device)
    dtype = utils.get_dtype(args.precision, device)
    path, model, checkpoint, backdoor = inputs.load_victim(args, device)
    if args.activations and backdoor is None and args.attack != "none":
        raise flags.InputError("--activations needs a trigger; leave it out with triggered images")
    if args.activations and backdoor is None:
        print("note: --activations shows what a trigger does; with --attack none there is nothing to show")
    images, labels, triggered = inputs.test_data(args, checkpoint, device)
    picture = Path(args.outdir) / f"demo_{utils.file_tag(args.attack)}.png"
    if backdoor is not None or triggered is not None:
        utils.check_place(picture)
    if args.activations and backdoor is not None and backdoor.test_set(images[:1], labels[:1], -1)[1] is None:
        raise flags.InputError(
            f"--activations needs images without the trigger; {args.attack} mixes several, leave it out"
        )
    print(f"{path}, {len(images):,} test images of {args.dataset}")
    ready = (args.target, args.batch_size, dtype)
    print(evaluate(model, images, labels, backdoor, *ready, triggered), flush=True)
    if triggered is not None:
        rows = plots.rows_of(*inputs.beside_their_originals(images, labels, triggered))
    elif backdoor is not None:
        rows = plots.trigger_rows(images, labels, -1 if args.target == "all" else args.target, backdoor)
    else:
        return
    for name, (x, truth) in ({} if backdoor is None else backdoor.control_sets(images, labels)).items():
        right = evaluate(model, x, truth, None, args.target, args.batch_size, dtype).BA
        print(f"{name} accuracy {100 * right:.2f} %  ({len(x):,} images)", flush=True)
    plots.draw_demo(rows, picture)
    print(f"wrote {picture}")
    if args.activations:
        picture = picture.with_name(f"activations_{args.attack}.png")
        others = (labels != args.target).nonzero()[:, 0] if args.target != "all" else torch.arange(len(labels))
        others = others[data.few(labels[others], activations.SEEN)]
        some, their = images[others], labels[others]

        def measure(model):
            return evaluate(model, some, their, backdoor, *ready)

        neurons, sites = activations.trigger_effect(model, some, backdoor, batch_size=args.batch_size)
        plots.draw_moved(neurons, picture)
        print(f"{activations.effect_table(sites)}\n\n{activations.tightness_table(model, some, measure)}")
        classes = activations.own_bounds(model, some, backdoor, args.batch_size, dtype)
        wanted = (their + 1) % checkpoint["num_classes"] if args.target == "all" else args.target
        asr, ra = (100 * (classes == c).double().mean().item() for c in (wanted, their))
        print(f"each image bounded by its own activations without the trigger: ASR {asr:.2f} %  RA {ra:.2f} %")
        print(f"wrote {picture}")


if __name__ == "__main__":
    flags.run(main)
