"""Benign accuracy (BA), attack success rate (ASR) and robust accuracy (RA) of a victim or a defended model.

    python evaluate.py --attack badnet                                                # the victim
    python evaluate.py --attack badnet --ckpt ckpt/cifar10_resnet18_badnet_unit.pt    # after unit.py

prints these three, the target class's own accuracy and the counts, and writes demo_{attack}.png: 16 test images clean,
triggered, and the difference between the two.
"""

import flags  # first: it answers --help and a wrong flag before torch is imported

from pathlib import Path
from typing import NamedTuple

import torch

import data
import utils
from support import activations, inputs, plots


class Measured(NamedTuple):
    """What a network does on the test images: shares in [0, 1], and how many images each was measured on.

    BA: benign accuracy, the share of clean images classified correctly. ASR: attack success rate, the share of
    triggered images of the other classes classified as the target. RA: robust accuracy, the share of the same images
    classified as their true class; ASR + RA <= 1, the rest goes to third classes. target_accuracy: BA on the target
    class alone. ASR and RA are None without a backdoor, target_accuracy without an image of that class.
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
    size = utils.pass_size(device, batch_size)

    def predict(images, trigger=None):
        classes = []
        with utils.autocast(device, dtype):  # one context for all batches: it casts each weight once
            for x in images.split(size):
                x = data.to_float(x)
                if trigger is not None:
                    with torch.autocast(device.type, enabled=False):
                        x = trigger(x).contiguous(memory_format=torch.channels_last)
                classes.append(model(x).argmax(1))
        return torch.cat(classes)

    def share(hits):
        return hits.sum().item() / len(hits) if len(hits) else None

    right, of_target = predict(images) == labels, labels == target
    n = len(images), int((~of_target).sum()), int(of_target.sum())
    if backdoor is None:
        return Measured(share(right), None, None, share(right[of_target]), n[0], 0, n[2])
    backdoor.to(device).eval()
    if hasattr(backdoor, "test_set"):
        others, truth = backdoor.test_set(images, labels, target)
    else:  # any other module
        others, truth = images[~of_target], labels[~of_target]
    if len(others) == 0:
        raise ValueError(f"every image is of the target class {target}: there is none to measure ASR on")
    classes = predict(others, backdoor)
    ra = None if truth is None else share(classes == truth)
    return Measured(share(right), share(classes == target), ra, share(right[of_target]), n[0], len(others), n[2])


def main(argv=None):
    """The command."""
    args = flags.parser("evaluate.py").parse_args(argv)
    device = utils.get_device(args.device)
    dtype = utils.get_dtype(args.precision, device)
    path, model, _, backdoor = inputs.load_victim(args, device)
    images, labels = data.load_dataset(args.dataset, args.datadir, train=False)
    images = images.to(device)
    print(f"{path}, {len(images):,} test images of {args.dataset}")
    print(evaluate(model, images, labels, backdoor, args.target, args.batch_size, dtype), flush=True)
    if backdoor is None:
        return
    for name, (x, truth) in backdoor.control_sets(images, labels.to(device)).items():
        right = evaluate(model, x, truth, None, args.target, args.batch_size, dtype).BA
        print(f"{name} accuracy {100 * right:.2f} %  ({len(x):,} images)", flush=True)
    picture = Path(args.outdir) / f"demo_{args.attack}.png"
    plots.draw_demo(images, labels.to(device), args.target, backdoor, picture)
    print(f"wrote {picture}")
    if args.activations:
        picture = picture.with_name(f"activations_{args.attack}.png")
        others = (labels != args.target).nonzero()[: activations.SEEN, 0]
        some, their = images[others.to(device)], labels[others]

        def measure(model):
            return evaluate(model, some, their, backdoor, args.target, args.batch_size, dtype)

        neurons, sites = activations.trigger_effect(model, some, backdoor, batch_size=args.batch_size)
        plots.draw_moved(neurons, picture)
        print(
            f"{activations.effect_table(sites)}\n\n{activations.tightness_table(model, some, measure)}\nwrote {picture}"
        )


if __name__ == "__main__":
    flags.run(main)
