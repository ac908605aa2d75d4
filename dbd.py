"""DBD, a defence for whoever trains on images that may be poisoned (Huang et al., ICLR 2022): poison, defend, measure.

    python dbd.py --attack badnet

Three stages: SimCLR without labels, a linear layer, MixMatch with the labels that are easy to believe. A run that was
cut off goes on after its last whole epoch when the same command is given again. The published length is 100 + 10 + 190
epochs (of SimCLR the first 100 of a schedule of 1,000, whatever --epochs says), the published setting is
--poison_rate 0.05 --target 3.
"""

import argparse

import cli
from cli import InputError, bounded

# WaNet poisons each batch anew while it trains: there is no poisoned set on a disk that DBD could be given
ATTACKS = tuple(a for a in cli.ATTACKS if a != "wanet")


def parser():
    """Return the command's parser."""
    p = cli.parser("dbd.py", "train on poisoned images with DBD", attacks=("none", *ATTACKS))
    p.add_argument("--width", default=1.0, type=bounded(float, 1 / 64, 8), help="factor on all channels")
    p.add_argument(
        "--epochs", nargs=3, metavar=("SIMCLR", "LINEAR", "MIXMATCH"), type=bounded(int, 1),
        help="of the three stages (default: 100 10 190)",
    )  # fmt: skip
    p.add_argument("--poison_rate", type=bounded(float, 0, 0.99), help="share poisoned (default: the attack's usual)")
    p.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 where it is fast")
    p.add_argument("--resume", default=True, action=argparse.BooleanOptionalAction, help="go on after a cut-off run")
    p.add_argument("--overwrite", action="store_true", help="train again although the result lies there already")
    p.add_argument("--out", help="where to save (default: ckpt/{dataset}_{network}_{attack}_dbd.pt)")
    p.add_argument("--results", default=str(cli.ROOT / "results"), help="folder of the JSON record")
    return p


if __name__ == "__main__":
    parser().parse_args()  # answers --help and a wrong flag before the seconds that torch takes

import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

import models
import resuming
import utils
from backdoors import poison_training_set
from defenses import dbd
from evaluate import evaluate, victim_backdoor
from records import save_record

# two runs are the same run when these agree
SETTINGS = ("dataset", "network", "attack", "seed", "target", "width", "poison_rate", "precision")


@torch.no_grad()
def poisoned_set(images, labels, poison, backdoor, batch_size=1000):
    """Return the training set as the attacker leaves it on disk: (uint8 images, int64 labels), new tensors.

    images: uint8 (N, 3, H, W); labels: int64 (N,), on any device.
    """
    images, labels = images.clone(), labels.clone()
    if backdoor is None:
        return images, labels
    for index in poison.indices.to(images.device).split(batch_size):
        images[index] = (backdoor(utils.to_float(images[index])) * 255).round().clamp(0, 255).to(torch.uint8)
        if poison.relabel:
            labels[index] = poison.target
    return images, labels


def describe(now, poison):
    """Return the figures of an epoch as plain values: what share of the poisoned samples is trusted, not which are."""
    now = dict(now)
    if "trusted" in now:
        trusted = now.pop("trusted")
        if len(poison.indices):
            now["poisoned_trusted"] = torch.isin(poison.indices, trusted).float().mean().item()
    return now


@utils.repeatable()
def main(argv=None):
    """The command."""
    args = parser().parse_args(argv)
    device = utils.get_device(args.device)
    dtype = utils.get_dtype(args.precision, device)
    config = dbd.Config()
    if args.epochs:
        simclr, linear, semi = args.epochs
        config = replace(config, simclr_epochs=simclr, linear_epochs=linear, mixmatch_epochs=semi)
    tag = utils.network_tag(args.network, args.width)
    out = Path(args.out or utils.CKPT / f"{args.dataset}_{tag}_{args.attack}_dbd.pt")
    partial_path = resuming.partial_path(out)
    unfinished = args.resume and partial_path.exists()  # with it, only the record is missing
    if out.exists() and not args.overwrite and not unfinished:
        raise InputError(f"{out} exists; --overwrite trains it again, --out writes elsewhere")
    for place in (out, Path(args.results) / "record.json"):
        utils.check_place(place)
    utils.reset_peak_memory(device)
    images, labels = (t.to(device) for t in utils.load_dataset(args.dataset, args.datadir, train=True))
    test = tuple(t.to(device) for t in utils.load_dataset(args.dataset, args.datadir, train=False))
    try:
        poison = poison_training_set(labels, args.attack, args.target, args.poison_rate, args.seed, "fixed")
    except ValueError as error:
        raise InputError(str(error)) from None
    backdoor = victim_backdoor(args.attack, {"trigger": None}, device)
    images, labels = poisoned_set(images, labels, poison, backdoor)
    print(f"{args.dataset}, {tag}, {args.attack} -> {args.target}, {len(poison.indices):,} of {len(images):,} poisoned")

    torch.manual_seed(args.seed)
    network = models.get_model(args.network, 10, args.width)
    dbd.initialize(network)
    network.to(device)
    network.to(memory_format=utils.training_layout(network))
    n_views = 2 * len(images) * config.simclr_epochs
    fast = torch.compile(network, dynamic=False) if utils.compiling_pays(device, n_views, args.width) else None
    settings = {k: getattr(args, k) for k in SETTINGS} | {"precision": str(dtype)} | asdict(config)
    partial = (resuming.load_partial(partial_path, settings) if args.resume else None) or {"stage": 0, "epoch": 0}
    history, seconds, peak = partial.get("history", {}), partial.get("seconds", 0.0), partial.get("peak")
    stage = None
    for i, stage_of in enumerate(dbd.STAGES):
        stage = stage_of(network, config, args.seed, fast, stage)
        if i < partial["stage"]:
            stage.finish()
            continue
        first = 0
        if "state" in partial and i == partial["stage"]:
            stage.load_state_dict(partial["state"])
            first = partial["epoch"]
            print(f"going on after epoch {first} of {stage.epochs} of stage {stage.number} ({partial_path})")
        for epoch in range(first, stage.epochs):
            start = time.perf_counter()
            unit = "step" if stage_of is dbd.Semi else "img"
            total = config.mixmatch_steps if stage_of is dbd.Semi else len(images)
            with tqdm(total=total, unit=unit, desc=f"stage {stage.number}, epoch {epoch + 1}", leave=False) as bar:
                now = describe(stage.train_epoch(images, labels, epoch, dtype, bar.update), poison)
            seconds += time.perf_counter() - start
            figures = "  ".join(f"{k} {v:.4f}" for k, v in now.items())
            print(f"stage {stage.number} epoch {epoch + 1:3d}  {figures}  {seconds:.0f} s", flush=True)
            history.setdefault(f"stage_{stage.number}", []).append(now)
            peak = resuming.peak_so_far(peak, device)
            state = {"config": settings, "stage": i, "epoch": epoch + 1, "state": stage.state_dict()}
            utils.save_checkpoint(state | {"history": history, "seconds": seconds, "peak": peak}, partial_path)
        stage.finish()
        if stage_of is not dbd.Contrast:
            now = evaluate(network, *test, backdoor, args.target, args.batch_size, dtype)
            print(f"after stage {stage.number}  {now}", flush=True)
            history[f"after_stage_{stage.number}"] = now._asdict()

    state = utils.half_weights(network.state_dict())
    network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    network.to(memory_format=torch.channels_last)
    after = evaluate(network, *test, backdoor, args.target, args.batch_size, dtype)
    about = {k: getattr(args, k) for k in ("dataset", "network", "width", "attack", "target", "seed")}
    about |= {"num_classes": 10, "poison_rate": poison.rate, "poison_indices": poison.indices.to(torch.int32)}
    trigger = None if backdoor is None else {k: v.cpu() for k, v in backdoor.state_dict().items()}
    defence = {"name": "dbd", **asdict(config)}
    utils.save_checkpoint(
        {**about, **after._asdict(), "trigger": trigger, "bounds": None, "state_dict": state, "defence": defence}, out
    )
    args.poison_rate = poison.rate
    figures = {"after": after._asdict(), "seconds": seconds, "peak_GiB": peak, "history": history}
    figures |= {"data": 0, "training_images": len(images), "poisoned": len(poison.indices), "labels": True}
    figures["precision"] = str(dtype).removeprefix("torch.")
    # there is no victim: the file named is the result
    record = save_record("dbd", args, config, {"file": out.name, "sha256": utils.sha256(out)}, device, tag, **figures)
    partial_path.unlink(missing_ok=True)
    print(f"{after}\nwrote {out} and {record} after {seconds:.0f} s of training")


if __name__ == "__main__":
    cli.run(main)
