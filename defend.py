"""The defences that UNIT is compared with: one of them on one victim, saved so that evaluate.py takes it.

    python defend.py --defense bcu --attack badnet

A run that was cut off goes on, from a minute and an epoch before at most, when the same command is given again.
ft: fine-tuning; bcu: Backdoor Cleansing with Unlabeled Data (CVPR 2023); ulrl: UnLearn and ReLearn (2024); none:
nothing is changed, the victim is measured. Each runs at its published constants. The methods are in defenses/.
"""

import argparse

import cli
from cli import InputError, bounded


def parser():
    """Return the command's parser."""
    p = cli.parser("defend.py", "repair a victim by another defence than UNIT", attacks=("none", *cli.ATTACKS))
    p.add_argument("--defense", required=True, choices=("none", *cli.DEFENSES), help="which one")
    p.add_argument(
        "--data_rate", type=bounded(float, 0, 1, low_open=True),
        help="share of the training set that is clean data (default: the method's own; all of cifar10_sample)",
    )  # fmt: skip
    p.add_argument("--epochs", type=bounded(int, 1), help="of ft and bcu, instead of the published number")
    p.add_argument("--draw", default="first", choices=("first", "random"), help="which images of each class; by --seed")
    p.add_argument("--ood", metavar="FILE", help="images of another set for bcu: .npy, or IDX as of Fashion-MNIST")
    p.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 where it is fast")
    p.add_argument("--resume", default=True, action=argparse.BooleanOptionalAction, help="go on after a cut-off run")
    p.add_argument("--ckpt", help="victim to defend (default: the one of --network and --attack)")
    p.add_argument("--out", help="where to save (default: ckpt/{dataset}_{network}_{attack}_{defense}[_ood].pt)")
    p.add_argument("--results", default=str(cli.ROOT / "results"), help="folder of the JSON record")
    return p


if __name__ == "__main__":
    parser().parse_args()  # answers --help and a wrong flag before the seconds that torch takes

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm

import resuming
import utils
from defenses import DEFENSES
from defenses.foreign import load_images
from evaluate import evaluate, load_victim
from records import save_record


@dataclass(frozen=True)
class NoDefence:
    """The constants of doing nothing."""

    uses_labels: ClassVar[bool] = False
    data_rate: float = 0.0


def configure(args):
    """Return the constants of the method that the flags mean. Raises InputError for a flag it has no use for."""
    if args.defense == "none":
        if args.epochs or args.data_rate or args.ood:
            raise InputError("without a defense --epochs, --data_rate and --ood are of no use; leave them out")
        return NoDefence()
    config = DEFENSES[args.defense].Config()
    changes = {"data_rate": args.data_rate or (1.0 if args.dataset == "cifar10_sample" else config.data_rate)}
    if args.epochs is not None:
        if not hasattr(config, "epochs"):
            raise InputError(f"{args.defense} has no --epochs; leave it out")
        changes["epochs"] = args.epochs
    if args.ood and config.uses_labels:
        raise InputError(f"{args.defense} needs labels, so --ood is of no use to it; leave it out")
    return replace(config, **changes)


def clean_data(args, config, device):
    """Return (images uint8 (N, 3, H, W), labels int64 (N,) or None) that the defence may see."""
    images, labels = utils.load_dataset(args.dataset, args.datadir, train=True)
    drawing = torch.Generator().manual_seed(args.seed) if args.draw == "random" else None
    chosen = torch.cat(utils.defence_split(labels, config.data_rate, generator=drawing))
    if args.ood:
        return load_images(args.ood, len(chosen), seed=args.seed).to(device), None
    return images[chosen].to(device), labels[chosen].to(device) if config.uses_labels else None


def repair_settings(args, config, victim_sum, dtype, device):
    """Return what the bits of a repair follow from, as plain values. Raises InputError where --ood cannot be read."""
    settings = resuming.settings_of(args, config, victim_sum, device)
    return settings | {"defense": args.defense, "precision": str(dtype), "ood": args.ood and utils.sha256(args.ood)}


def repair(args, model, data, config, dtype, partial, keep):
    """Run the method on `model`; return (Repaired, seconds, those before it was cut off too).

    data: what clean_data() returns; partial: {"state", "step", "seconds", ...} to go on from; keep: see
    defenses/__init__.py.
    """
    images, labels = data
    source = f" of {Path(args.ood).name}" if args.ood else ""
    print(f"{args.defense}: {len(images):,} clean images{source}, labels{'' if config.uses_labels else ' not'} used")
    start = time.perf_counter()
    total = getattr(config, "epochs", None)  # ulrl ends when it has unlearned enough
    with tqdm(total=total, unit="epoch", initial=partial["step"]) as progress:

        def on_epoch(epoch, now):
            progress.update()
            progress.write(f"epoch {epoch + 1:3d}  " + "  ".join(f"{k} {v:.4f}" for k, v in now.items()))

        try:
            repaired = DEFENSES[args.defense].repair(
                model, images, labels, config, args.seed, on_epoch, dtype, keep, partial["state"]
            )
        except ValueError as error:  # of this victim, or of weights that went astray
            raise InputError(f"{args.defense} cannot repair this victim: {error}") from None
    seconds = partial["seconds"] + time.perf_counter() - start
    for name, value in repaired.findings.items():
        print(f"{name}: {value}")
    return repaired, seconds


@utils.repeatable()
def main(argv=None):
    """The command."""
    args = parser().parse_args(argv)
    config = configure(args)
    device = utils.get_device(args.device)
    dtype = utils.get_dtype(args.precision, device)
    utils.reset_peak_memory(device)
    path, model, checkpoint, backdoor, target = load_victim(args, device)
    if checkpoint["bounds"] is not None or checkpoint.get("defence"):
        raise InputError(f"{path} is a defended model; give --ckpt the victim")
    tag = utils.network_tag(checkpoint["network"], checkpoint["width"])
    what = f"{args.defense}_ood" if args.ood else args.defense
    out = Path(args.out or utils.CKPT / f"{args.dataset}_{tag}_{args.attack}_{what}.pt")
    if out.resolve() == path.resolve():
        raise InputError(f"--out is the victim {path} itself; give another place")
    for place in (out, Path(args.results) / "record.json"):
        utils.check_place(place)
    victim = {"file": path.name, "sha256": utils.sha256(path)}
    partial = resuming.FRESH
    if args.defense != "none":
        settings = repair_settings(args, config, victim["sha256"], dtype, device)
        kept_at = resuming.partial_path(out, settings)
        partial = (resuming.load_partial(kept_at, settings) if args.resume else None) or partial
        data = clean_data(args, config, device)
    test = tuple(t.to(device) for t in utils.load_dataset(args.dataset, args.datadir, train=False))
    before = evaluate(model, *test, backdoor, target, args.batch_size, dtype)
    print(f"before  {before}", flush=True)
    figures = {"data": 0, "labels": False, "seconds": 0.0, "before": before._asdict(), "after": before._asdict()}

    if args.defense != "none":
        if partial["step"]:
            print(f"going on after {partial['step']} epochs ({kept_at})", flush=True)
        keep = resuming.keeping(kept_at, settings, partial, device)
        try:
            repaired, seconds = repair(args, model, data, config, dtype, partial, keep)
        except InputError:  # it would be the same again
            kept_at.unlink(missing_ok=True)
            raise
        # measured as it is saved: with weights in half precision
        state = utils.half_weights(repaired.model.state_dict())
        repaired.model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        repaired.model.to(memory_format=torch.channels_last)
        after = evaluate(repaired.model, *test, backdoor, target, args.batch_size, dtype)
        print(f"after   {after}\n{seconds:.1f} s")
        defence = {"name": args.defense, **asdict(config), "findings": repaired.findings}
        utils.save_checkpoint({**checkpoint, **after._asdict(), "state_dict": state, "defence": defence}, out)
        print(f"wrote {out}")
        figures |= {"data": len(data[0]), "labels": config.uses_labels, "seconds": seconds, "after": after._asdict()}
        figures |= {"history": repaired.history, "findings": repaired.findings, "resumed_after": partial["step"]}
    figures |= {
        "peak_GiB": resuming.peak_so_far(partial["peak"], device),
        "precision": str(dtype).removeprefix("torch."),
    }
    args.ood = args.ood and Path(args.ood).name  # the record names no place of this machine
    print(f"wrote {save_record(args.defense, args, config, victim, device, tag, **figures)}")
    if args.defense != "none":
        kept_at.unlink(missing_ok=True)


if __name__ == "__main__":
    cli.run(main)
