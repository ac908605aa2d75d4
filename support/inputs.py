"""What the flags of a command mean: the data set, the victim, its trigger, the images that a defense sees."""

from flags import ANSWERS, ATTACKS, DATASETS, NETWORKS, NORMALIZATIONS, InputError, Unsaid, normalization, place_of

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

import backdoors
import data
import models
import utils
from fast import ranks

from . import foreign, resume


def class_names(args, path=None):
    """Return the classes of the data set that the flags mean. Raises InputError when the target is none of them.

    path: the file that answers for --target where the user did not, see answer().
    """
    names = data.class_names(args.dataset)
    target = vars(args).get("target", "all")  # detect.py has none
    if target != "all" and target >= len(names):
        whose = f"the target of {path}, {target}," if path else f"--target {target}"
        raise InputError(f"{whose} is no class of {args.dataset}: it has 0 to {len(names) - 1}; give another --target")
    return names


def flips(args):
    """Return whether augmentation mirrors the images: --flip, else what suits the data set."""
    return data.flips(args.dataset) if args.flip is None else args.flip


def victim_path(args):
    """Return the victim that the flags mean: --ckpt, else the one named after data set, network and attack.

    The embedded sample has no victims of its own: it is for those of the full set.
    """
    if args.ckpt is not None:
        return Path(args.ckpt)
    if args.attack == "file" or place_of(args.attack):
        raise InputError("triggered images do not say which network they are for; give it by --ckpt")
    dataset = "cifar10" if args.dataset == "cifar10_sample" else args.dataset
    path = utils.checkpoint_path(dataset, args.network, args.attack)
    if dataset != "cifar10" and not path.is_file():
        words = f"--dataset {dataset} {utils.training_flags(args.network, args.attack)}"
        raise InputError(f"no checkpoint {path}; make it with: python train.py {words}, or give --ckpt")
    return path


def answer(args, checkpoint, path=None):
    """Give `args` the attack, target, data set and image size that the file names, where the user gave none.

    An attack that is unknown here is no answer, a data set an error. Returns the flags that the file answered. Raises
    InputError for a value that the flag would not take, and for images of one's own that are no longer there.
    """
    answered = set()
    for flag, kind in ANSWERS.items():
        value, said = vars(args).get(flag), checkpoint[flag]
        if not isinstance(value, Unsaid):
            continue
        if flag == "dataset" and said is not None and said not in DATASETS and not place_of(str(said)):
            raise InputError(f"{path} is for the data set {said!r}, which is unknown here; give --dataset")
        if said is None or (flag == "attack" and said not in ("none", *ATTACKS)):
            setattr(args, flag, str(value) if isinstance(value, str) else int(value))
            continue
        try:
            setattr(args, flag, kind(str(said)))
        except argparse.ArgumentTypeError:
            raise InputError(f"the {flag} of {path} is {said!r}, which cannot be; give --{flag}") from None
        answered.add(flag)
        if flag == "dataset" and place_of(said) and not place_of(said)[1].exists():
            raise InputError(f"the data set of {path}, {said}, is not here; give --dataset")
    return answered


def load_network(args, device):
    """Return (path, model, checkpoint) that the flags mean.

    Raises InputError where there is no such file, it is refused, or the flags' data set or size does not fit it.
    """
    asked, path = normalization(args), victim_path(args)
    checkpoint = utils.load_checkpoint(path, None if isinstance(args.network, Unsaid) else args.network)
    args.network = checkpoint["network"]
    if isinstance(args.attack, Unsaid) and checkpoint["bd_test"]:
        args.attack = "file"
    guessed = {k for k in ("dataset", "target") if args.ckpt is not None and isinstance(vars(args).get(k), Unsaid)}
    answered = answer(args, checkpoint, path)
    classes = class_names(args, path if "target" in answered else None)
    if checkpoint["num_classes"] != len(classes):
        n = f"{path} has {checkpoint['num_classes']} classes, {args.dataset} has {len(classes)}"
        raise InputError(f"{n}; give the --dataset that it is for, or another model")
    size = checkpoint["size"] or (32 if checkpoint["trigger"] is not None else args.size)
    if size != args.size:
        raise InputError(f"{path} is for images of {size}x{size}; give --size {size}")
    model = utils.build_model(path, checkpoint, device)
    takes(model, path, size)
    guessed -= answered | ({"target"} if args.attack in ("none", "file") else set())
    for flag in sorted(guessed) if ranks.ranks()[0] == 0 else ():
        print(f"note: {path} does not say its {flag}; {getattr(args, flag)} is taken", flush=True)
    settle_normalization(args, path, model, checkpoint, asked)
    return path, model, checkpoint


def load_victim(args, device):
    """Return (path, model, checkpoint, backdoor) that the flags mean; say where file and flags differ.

    Raises InputError as load_network() does, and for a trigger that is missing or does not fit.
    """
    path, model, checkpoint = load_network(args, device)
    target = foreign.target_of(checkpoint) if args.attack == "file" else args.target
    source = trigger_source(args, checkpoint)
    backdoor = load_trigger(args.attack, source, device, args.size)
    not_its_own = source["trigger"] is None or source["attack"] != args.attack
    if not_its_own and backdoor is not None and backdoor.width is not None:
        learned = f"the trigger of {args.attack} is learned for its victim, and {path} holds none"
        other = ", or a victim that holds one by --trigger_of" if "trigger_of" in args else ""
        raise InputError(f"{learned}; give another{other}")
    if args.target == "all" and backdoor is not None and not (backdoor.relabel and backdoor.all_to_all):
        raise InputError(f"{args.attack} cannot send each class to the next; give --target a class")
    only = None if backdoor is None else backdoor.only_target
    if only not in (None, args.target):
        raise InputError(f"{args.attack} leads to class {only} alone; give --target {only}")
    notes = []
    if target != args.target:
        notes.append(f"the target of the triggered images of {path} is {target}, and taken for --target {args.target}")
        args.target = target
    for flag in ("attack", "target", "dataset"):
        trained, now = checkpoint[flag], getattr(args, flag)
        same = flag == "dataset" and {trained, now} == {"cifar10", "cifar10_sample"}
        if str(trained) not in ("None", str(now)) and not same and (args.attack != "none" or flag == "dataset"):
            notes.append(f"{path} was trained with {flag} {trained}, measured with {now}")
    if source is not checkpoint and source["target"] not in (None, args.target):
        notes.append(f"{args.trigger_of} was trained with target {source['target']}, measured with {args.target}")
    if backdoor is not None and checkpoint["attack"] in (None, args.attack) and source["trigger"] is None:
        notes.append(
            f"{path} brings no trigger: ASR is that of the {args.attack} here, which may be another than its own"
        )
    if ranks.ranks()[0] == 0:
        print("".join(f"note: {note}\n" for note in notes), end="")
    return path, model, checkpoint, backdoor


def trigger_source(args, checkpoint):
    """Return the checkpoint that holds the trigger: that of --trigger_of, else the given one, the model's own."""
    path = vars(args).get("trigger_of")
    if path is None:
        return checkpoint
    source = utils.load_checkpoint(path)
    if source["trigger"] is None or source["attack"] != args.attack:
        held, other = "none", "another file"
        if source["trigger"] is not None:
            held, other = f"one of {source['attack']}", f"--attack {source['attack']}, or another file"
        raise InputError(f"--trigger_of {path} holds no trigger of {args.attack}, but {held}; give {other}")
    size = source["size"] or 32
    if size != args.size:
        raise InputError(f"--trigger_of {path} is for images of {size}x{size}; give another, or --size {size}")
    return source


def defended_path(args, checkpoint, defense):
    """Return where the defended model goes: --out, else the place in ckpt/ that data set, victim and defense name."""
    names = (args.dataset, checkpoint["network"], args.attack, checkpoint["width"])
    return Path(args.out or utils.checkpoint_path(*names, f"_{defense}"))


def check_victim(path, checkpoint, out):
    """Raise InputError where the file is a defended model, or its own defended model cannot be written to `out`."""
    if checkpoint["bounds"] is not None:
        raise InputError(f"{path} has bounds already; give --ckpt the victim")
    if checkpoint["defense"]:
        raise InputError(f"{path} is a defended model; give --ckpt the victim")
    check_apart("--out", out, {"the victim": path})
    utils.check_place(out)


def check_apart(flag, place, taken):
    """Raise InputError where `place`, given by `flag`, is a file of `taken`, {what it is: path}; each may be None."""
    for what, path in taken.items():
        if place and path and Path(place).resolve() == Path(path).resolve():
            raise InputError(f"{flag} is {what} {path} itself; give another place")


def trigger_state(backdoor):
    """Return the trigger's state for a checkpoint, None without a trigger."""
    return None if backdoor is None else {k: v.cpu() for k, v in backdoor.state_dict().items()}


def about_defended(args, checkpoint, backdoor):
    """Return what the file of a repaired victim says of images and attack: as the victim's own, else as the flags."""
    about = {"dataset": checkpoint["dataset"] or args.dataset, "size": args.size}
    if checkpoint["attack"] is None and backdoor is not None:
        about |= {"attack": args.attack, "target": args.target, "trigger": trigger_state(backdoor)}
    elif checkpoint["attack"] is None and args.attack == "none":
        about["attack"] = "none"
    return about


def origin(path, checkpoint, *tensors):
    """Return what a run starts from, for support.resume.Partial: the victim's file and network, normalization, images.

    tensors: the images, and their labels where they are used.
    """
    about = {k: checkpoint[k] for k in ("network", "mean", "std")}
    return about | {"victim": utils.sha256(path), resume.IMAGES: utils.tensor_sum(*tensors)}


def check_search(path, model, config, images):
    """Raise InputError where UNIT cannot search bounds on this network or by `config`, a unit.UnitConfig.

    images: (x_train, ...), as augmented_defense_data() returns them.
    """
    try:
        config.check(len(images[0]))
        models.activation_sites(model, data.to_float(images[0][:2].to(models.weights_device(model))))
    except ValueError as error:
        raise InputError(f"{path} cannot be defended: {error}") from None


def new_network(args):
    """Return {"mean", "std"} of a network to train. Raises InputError for flags of networks from elsewhere."""
    asked = normalization(args)
    if asked == "auto":
        raise InputError("a network that is not trained yet has no normalization to find; leave --mean auto out")
    if args.network not in NETWORKS or args.attack == "file":
        raise InputError(f"what is trained here is one of {', '.join(NETWORKS)}, with an attack of ours; give those")
    return dict(zip(("mean", "std"), asked or NORMALIZATIONS["authors"], strict=True))


def takes(model, path, size):
    """Raise InputError unless `model` takes images of size x size."""
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size, device=device))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"the network of {path} does not take images of {size}x{size} ({reason})") from None


def settle_normalization(args, path, model, checkpoint, asked):
    """Let `model` normalize its images as asked, as its file says, or by trial, and say so; see support/foreign.py."""

    def clean():
        usual = argparse.Namespace(**{**vars(args), "data_rate": None, "draw": "first"})
        try:
            x_train, y_train, x_valid, y_valid = defense_data(usual)
        except InputError:  # a small set, of which 5 % is less than two images of each class
            usual.data_rate = 1.0
            x_train, y_train, x_valid, y_valid = defense_data(usual)
        images, labels = torch.cat((x_train, x_valid)), torch.cat((y_train, y_valid))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        return images[order], labels[order]

    dtype = utils.get_dtype(args.precision, next(model.parameters()).device)
    line = foreign.settle_normalization(path, model, checkpoint, asked, clean, dtype=dtype)
    if line is not None and ranks.ranks()[0] == 0:
        print(line, flush=True)


def load_trigger(attack, checkpoint, device, size=32, width=None):
    """Return the trigger that a checkpoint holds, if it is of `attack`, else a fresh one of `width`.

    size: side of the images. Returns None for the attack `none`, and for images that are triggered already.
    """
    if attack in ("none", "file") or place_of(attack):
        if width is not None:
            raise InputError("without an attack there is no trigger; leave --trigger_width out")
        return None
    own = checkpoint["trigger"] is not None and checkpoint["attack"] == attack
    try:
        backdoor = backdoors.get_backdoor(attack, size, width=checkpoint.get("trigger_width") if own else width)
        if own:
            backdoor.load_state_dict(checkpoint["trigger"])
            if not all(v.isfinite().all() for v in backdoor.state_dict().values()):
                raise ValueError("NaN or infinity in it")
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        if own:  # torch's words on what does not fit
            reason = f"that of the checkpoint does not fit ({reason}); give another --size, --attack or file"
        raise InputError(f"no trigger for {attack} on images of {size}x{size}: {reason}") from None
    return backdoor.to(device)


class Triggered(NamedTuple):
    """Images that carry a trigger already: uint8 (N, 3, H, W), their true labels int64 (N,), their files' names."""

    images: torch.Tensor
    labels: torch.Tensor
    stems: list


def test_data(args, checkpoint, device):
    """Return (test images uint8 (N, 3, H, W), labels int64 (N,), triggered images or None) by the flags, on `device`.

    Says how many triggered images there are, and how many of them, of the target class, do not count. Raises InputError
    where they or the data set are missing or damaged.
    """
    images, labels = data.load_dataset(args.dataset, args.datadir, False, args.size)
    triggered, place = None, place_of(args.attack)
    if args.attack == "file" or place:
        if place:
            found, where = data.load_triggered(place[1], data.class_names(args.dataset), args.size), f"in {place[1]}"
        else:
            found, where = foreign.triggered_images(checkpoint, args.size), "of the checkpoint's own"
        triggered = Triggered(found[0].to(device), found[1].to(device), found[2])
        left_out = int((triggered.labels == args.target).sum()) if args.target != "all" else 0
        if ranks.ranks()[0] == 0:
            n = f"{len(triggered.labels):,} triggered images {where}"
            print(f"{n}, of which {left_out:,} are of the target class and left out" if left_out else n)
    return images.to(device), labels.to(device), triggered


def beside_their_originals(images, labels, triggered, n=16):
    """Return (clean images, triggered ones), float in [0, 1], up to n of each, for a picture of both.

    BackdoorBench names each file by the index of its clean image in the test set. The clean images are None where a
    name is no such index or its image is of another class.
    """
    chosen = data.few(triggered.labels, n)
    some, clean = data.to_float(triggered.images[chosen]), None
    stems = [triggered.stems[i] for i in chosen.tolist()]
    if all(stem.isdecimal() and int(stem) < len(labels) for stem in stems):
        places = torch.tensor([int(stem) for stem in stems])
        if torch.equal(labels[places], triggered.labels[chosen]):
            clean = data.to_float(images[places])
    return clean, some


def defense_data(args, usual_rate=0.05):
    """Return (x_train, y_train, x_valid, y_valid) by the flags: uint8 (N, 3, H, W), int64 (N,), not augmented."""
    images, labels = data.load_dataset(args.dataset, args.datadir, True, args.size)
    n = len(data.class_names(args.dataset))
    train, valid = data.defense_indices(labels, args.dataset, args.data_rate, usual_rate, args.draw, args.seed, n)
    counts = torch.cat((labels[train], labels[valid])).bincount(minlength=n)
    if counts.min() < counts.max() and ranks.ranks()[0] == 0:
        few = f"{int((counts < counts.max()).sum())} of {n} classes have fewer than {counts.max()} training images"
        print(f"note: {few}, {counts.min()} at least; all of theirs are used")
    return images[train], labels[train], images[valid], labels[valid]


def augmented_defense_data(args):
    """Return defense_data(args) with each image passed once through crop and flip, as UNIT takes it."""
    x_train, y_train, x_valid, y_valid = defense_data(args)
    generator, flip = torch.Generator().manual_seed(args.seed), flips(args)
    return data.augment(x_train, generator, flip=flip), y_train, data.augment(x_valid, generator, flip=flip), y_valid
