"""The defenses that UNIT is compared with: one of them on one victim, saved so that evaluate.py takes it.

    python defend.py --defense bcu --attack badnet
    python defend.py --defense dbd --attack badnet    # trains a network on the poisoned images themselves

ft: fine-tuning; bcu: Backdoor Cleansing with Unlabeled Data (CVPR 2023); ulrl: UnLearn and ReLearn (2024); nad: Neural
Attention Distillation (ICLR 2021); seam: selective amnesia (S&P 2023); i_bau: adversarial unlearning by implicit
gradients (ICLR 2022); ft_sam: fine-tuning with sharpness-aware minimization (ICCV 2023); fst: Feature Shift Tuning
(NeurIPS 2023); clp: channel Lipschitz pruning (ECCV 2022), of the weights alone; fp: fine-pruning (RAID 2018); anp:
adversarial neuron pruning (NeurIPS 2021); rnp: reconstructive neuron pruning (ICML 2023); nc: Neural Cleanse (S&P
2019); dbd: Decoupling the Training Process (ICLR 2022); none: nothing is changed, the victim is measured. Each runs at
its published constants, but for those in docs/deviations.md. The same command resumes an interrupted run.
"""

import flags  # first: it answers --help and a wrong flag before torch is imported
from flags import InputError, place_of

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm

import data
import models
import utils
from backdoors import TRIGGERS, poison_training_set
from defenses import DEFENSES, dbd
from evaluate import evaluate
from fast import training_layout
from fast.training import compiled
from support import inputs, machine, records
from support.resume import IMAGES, Partial


@dataclass(frozen=True)
class NoDefense:
    """The constants of doing nothing."""

    uses_labels: ClassVar[bool] = False
    data_rate: float = 0.0


def configure(args):
    """Return the method's constants by the flags. Raises InputError for a flag that the method does not have."""
    if args.defense == "dbd":
        config, stages = dbd.Config(), ("simclr_epochs", "linear_epochs", "mixmatch_epochs")
        if args.data_rate:
            raise InputError("dbd sees the whole training set; leave --data_rate out")
        if args.trigger_of:
            raise InputError("dbd plants a fresh trigger; leave --trigger_of out")
        if args.epochs and len(args.epochs) != len(stages):
            raise InputError("dbd has three stages; give --epochs three numbers, as in 100 10 190")
        return replace(config, flip=inputs.flips(args), **dict(zip(stages, args.epochs or (), strict=False)))
    if args.width != 1.0 or args.poison_rate is not None or args.overwrite:
        raise InputError(f"--width, --poison_rate and --overwrite are dbd's; leave them out for {args.defense}")
    if args.defense == "none":
        if args.epochs or args.data_rate or args.flip is not None:
            raise InputError("without a defense --epochs, --data_rate and --flip are of no use; leave them out")
        return NoDefense()
    config = DEFENSES[args.defense].Config()
    if not config.data_rate and args.data_rate:
        raise InputError(f"{args.defense} sees no images; leave --data_rate out")
    usual = 1.0 if args.dataset == "cifar10_sample" and config.data_rate else config.data_rate
    config = replace(config, data_rate=args.data_rate or usual)
    if hasattr(config, "flip"):
        config = replace(config, flip=inputs.flips(args))
    if args.epochs is None:
        return config
    if not hasattr(config, "epochs") or len(args.epochs) != 1:
        raise InputError(f"{args.defense} takes {'one' if hasattr(config, 'epochs') else 'no'} number for --epochs")
    return replace(config, epochs=args.epochs[0])


def clean_images(args, config):
    """Return the images that the method sees, uint8 (N, 3, H, W), and their labels, int64 (N,)."""
    if config.data_rate:
        x_train, y_train, x_valid, y_valid = inputs.defense_data(args, config.data_rate)
        return torch.cat((x_train, x_valid)), torch.cat((y_train, y_valid))
    return torch.zeros(0, 3, args.size, args.size, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)


def repair(args, config, model, images, labels, partial, dtype):
    """Run the method on `model`, with these images; return what it returns, a Repaired."""
    print(
        f"{args.defense}: {len(images):,} clean images, labels{'' if config.uses_labels else ' not'} used", flush=True
    )
    partial.begin()
    done = partial.step
    stages = [v for k, v in vars(config).items() if k.endswith("epochs")]
    total = stages[0] if len(stages) == 1 else None  # one of several stages may end early
    with tqdm(total=total, unit="epoch", initial=partial.step) as progress:

        def callback(now, state_of):
            nonlocal done
            done += 1
            progress.update()
            progress.write(f"epoch {done:3d}  " + "  ".join(f"{k} {v:.4f}" for k, v in now.items()))
            partial.keep(done, state_of)

        try:
            repaired = DEFENSES[args.defense].repair(
                model, images, labels if config.uses_labels else None, config, args.seed, dtype, callback, partial.state
            )
        except ValueError as error:  # resuming would raise it again
            partial.remove()
            raise InputError(f"{args.defense} cannot repair this victim: {error}") from None
    for name, value in repaired.findings.items():
        print(f"{name}: {value}")
    return repaired


def defend(args, device, dtype):
    """Repair a victim, or measure it."""
    path, model, checkpoint, backdoor = inputs.load_victim(args, device)
    config = configure(args)
    if checkpoint["bounds"] is not None or checkpoint["defense"]:
        raise InputError(f"{path} is a defended model; give --ckpt the victim")
    out = inputs.defended_path(args, checkpoint, args.defense)
    inputs.check_apart("--out", out, {"the victim": path, "the trigger's file": args.trigger_of})
    victim = records.victim_of(path, checkpoint)
    record_at = records.path_of(args.defense, args, victim)
    for place in (record_at,) if args.defense == "none" else (out, record_at):
        utils.check_place(place)
    *test_set, triggered = inputs.test_data(args, checkpoint, device)

    def measure(model):
        return evaluate(model, *test_set, backdoor, args.target, args.batch_size, dtype, triggered)

    before = after = measure(model)
    figures = {"data": 0, "labels": False, "seconds": 0.0}
    if args.defense == "none":
        print(f"{path}\n{before}")
    else:
        keys = ("defense", "dataset", "size", "data_rate", "draw", "seed")
        settings = {k: getattr(args, k) for k in keys} | asdict(config)
        images, labels = clean_images(args, config)
        settings |= inputs.origin(path, checkpoint, images, labels) | {"precision": str(dtype)}
        partial = Partial(out, settings, device, args.resume)
        print(f"{path}\nbefore  {before}{partial.said()}", flush=True)
        repaired = repair(args, config, model, images.to(device), labels.to(device), partial, dtype)
        seconds, state = partial.seconds_so_far(), utils.round_weights(repaired.model)
        after = measure(repaired.model)
        print(f"after   {after}\n{seconds:.1f} s")
        made = {"name": args.defense, **asdict(config), "findings": repaired.findings}
        about = inputs.about_defended(args, checkpoint, backdoor)
        saved = {**checkpoint, **after._asdict(), **about, "state_dict": state, "defense": made}
        utils.save_checkpoint(saved, out)
        figures = {"data": len(images), "labels": config.uses_labels, "seconds": seconds}
        figures |= {"peak_GiB": partial.peak_so_far(), "findings": repaired.findings}
        print(f"wrote {out}")
    figures |= {"before": before._asdict(), "after": after._asdict(), "precision": str(dtype).removeprefix("torch.")}
    records.save(record_at, args.defense, args, config, victim, device, figures)
    print(f"wrote {record_at}")
    if args.defense != "none":
        partial.remove()


@torch.no_grad()
def poisoned_set(images, labels, poison, backdoor, batch_size=1000):
    """Return the training set as the attacker leaves it on disk: (uint8 images, int64 labels), new tensors.

    images: uint8 (N, 3, H, W); labels: int64 (N,), on any device.
    """
    images, labels = images.clone(), labels.clone()
    if backdoor is None:
        return images, labels
    for index in poison.indices.to(images.device).split(batch_size):
        images[index] = (backdoor(data.to_float(images[index])) * 255).round().clamp(0, 255).to(torch.uint8)
        if poison.relabel:
            labels[index] = poison.wanted(labels[index])
    return images, labels


def train_by_dbd(args, device, dtype):
    """Train a network with DBD on a `fixed` poisoned set, whose images carry the trigger before training."""
    inputs.answer(args, dict.fromkeys(utils.UNKNOWN))
    config = configure(args)
    if place_of(args.attack):
        raise InputError("dbd trains on poisoned images: give --attack a trigger that makes them")
    if args.ckpt:
        raise InputError("dbd repairs no victim, it trains a network of its own; leave --ckpt out")
    args.network, said = str(args.network), inputs.new_network(args)
    classes, tag = inputs.class_names(args), utils.network_tag(args.network, args.width)
    own = utils.checkpoint_path(args.dataset, args.network, args.attack, args.width)
    out = Path(args.out or own.with_name(f"{own.stem}_dbd.pt"))
    trigger = TRIGGERS.get(args.attack)
    if trigger is not None and trigger.sampling == "in_batch":
        raise InputError(f"{args.attack} poisons batches in training: there is no poisoned set that DBD could be given")
    if trigger is not None and (trigger.width or trigger.surrogate or trigger.cover_rate):
        raise InputError(f"{args.attack} asks for more than its trigger on images; give dbd another --attack")
    if out.is_file() and not args.overwrite:
        raise InputError(f"{out} exists; --overwrite trains it again, --out writes elsewhere")
    victim = {"file": own.name, "sha256": None, "attack": args.attack}
    record_at = records.path_of("dbd", args, victim)
    for place in (out, record_at):
        utils.check_place(place)
    (images, labels), test_set = (
        tuple(t.to(device) for t in data.load_dataset(args.dataset, args.datadir, train, args.size))
        for train in (True, False)
    )
    try:
        poison = poison_training_set(labels, args.attack, args.target, args.poison_rate, args.seed, "fixed")
    except ValueError as error:
        raise InputError(str(error)) from None
    backdoor = inputs.load_trigger(args.attack, {"trigger": None}, device, args.size)
    images, labels = poisoned_set(images, labels, poison, backdoor)
    print(f"{args.dataset}, {tag}, {args.attack} -> {args.target}, {len(poison.indices):,} of {len(images):,} poisoned")

    torch.manual_seed(args.seed)
    network = models.get_model(args.network, len(classes), args.width, mean=said["mean"], std=said["std"]).to(device)
    if not isinstance(getattr(network, "linear", None), torch.nn.Linear):
        raise InputError(f"dbd takes a network whose last layer is named `linear`; {args.network}'s is not")
    dbd.initialize(network)
    network.to(memory_format=training_layout(network))
    keys = ("dataset", "size", "network", "attack", "seed", "target", "width", "poison_rate")
    settings = {k: getattr(args, k) for k in keys} | said | {"precision": str(dtype)} | asdict(config)
    settings |= {IMAGES: utils.tensor_sum(images, labels)}  # the poisoned ones
    partial = Partial(out, settings, device, args.resume)
    print(partial.said().strip() or "stage 1 of 3", flush=True)
    history = partial.state["history"] if partial.state else {}

    def measure():
        return evaluate(network, *test_set, backdoor, args.target, args.batch_size, dtype)

    def callback(stage, epoch, now, state_of):
        if "trusted" in now:  # kept is the share of the poisoned samples that are trusted, not the indices
            trusted = now.pop("trusted")
            if len(poison.indices):
                now["poisoned_trusted"] = torch.isin(poison.indices, trusted).float().mean().item()
        line = "  ".join(f"{k} {v:.4f}" for k, v in now.items())
        print(f"stage {stage.number} epoch {epoch + 1:3d}  {line}  {partial.seconds_so_far():.0f} s", flush=True)
        history.setdefault(f"stage_{stage.number}", []).append(now)
        if stage.number > 1 and epoch + 1 == stage.epochs:
            print(f"after stage {stage.number}  {measure()}", flush=True)
        done = sum(len(epochs) for epochs in history.values())
        partial.keep(done, lambda: {"training": state_of(), "history": history}, now=True)

    whole = compiled(network, 2 * len(images) * config.simclr_epochs, args.width)
    state = partial.state["training"] if partial.state else None
    dbd.train(network, images, labels, config, args.seed, dtype, whole, callback, state)
    seconds, state = partial.seconds_so_far(), utils.round_weights(network)
    after = measure()
    about = {k: getattr(args, k) for k in ("dataset", "size", "network", "width", "attack", "target", "seed")}
    about |= said | {"num_classes": len(classes), "poison_rate": poison.rate}
    about |= {"poison_indices": poison.indices.to(torch.int32)}
    about |= {"trigger": inputs.trigger_state(backdoor)}
    made = {"bounds": None, "state_dict": state, "defense": {"name": "dbd", **asdict(config)}}
    utils.save_checkpoint({**about, **made, **after._asdict()}, out)
    figures = {"after": after._asdict(), "seconds": seconds, "peak_GiB": partial.peak_so_far()}
    figures |= {"data": len(images), "poisoned": len(poison.indices), "labels": True}
    figures |= {"last": {stage: epochs[-1] for stage, epochs in history.items()}}
    records.save(record_at, "dbd", args, config, victim, device, figures)
    partial.remove()
    print(f"{after}\nwrote {out} and {record_at} after {seconds:.0f} s")


@utils.repeatable()
def main(argv=None):
    """The command."""
    args = flags.parser("defend.py").parse_args(argv)
    device = utils.get_device(args.device)
    dtype = utils.get_dtype(args.precision, device)
    machine.reset_peak_memory(device)
    (train_by_dbd if args.defense == "dbd" else defend)(args, device, dtype)


if __name__ == "__main__":
    flags.run(main)
