"""What the flags of a command mean: the victim, its trigger, the images that a defense sees."""

from flags import NETWORKS, NORMALIZATIONS, InputError, Unsaid, normalization

import argparse
from pathlib import Path

import torch

import backdoors
import data
import utils
from fast import ranks

from . import foreign


def victim_path(args):
    """Return the victim that the flags mean: --ckpt, else the one named after network and attack.

    The embedded sample has no victims of its own: it is for those of the full set.
    """
    return Path(args.ckpt) if args.ckpt else utils.checkpoint_path("cifar10", args.network, args.attack)


def load_victim(args, device):
    """Return (path, model, checkpoint, backdoor) that the flags mean; say where file and flags differ."""
    path, asked = victim_path(args), normalization(args)
    checkpoint = utils.load_checkpoint(path, None if isinstance(args.network, Unsaid) else args.network)
    args.network = checkpoint["network"]
    if isinstance(args.attack, Unsaid):
        args.attack = "file" if checkpoint["bd_test"] else str(args.attack)
    if checkpoint["num_classes"] != 10:
        raise InputError(f"{path} has {checkpoint['num_classes']} classes, {args.dataset} has 10; give another model")
    if args.attack == "file":
        args.target = foreign.target_of(checkpoint)
    model = utils.build_model(path, checkpoint, device)
    takes(model, path)
    settle_normalization(args, path, model, checkpoint, asked)
    backdoor = load_trigger(args.attack, checkpoint, device)
    not_its_own = checkpoint["trigger"] is None or checkpoint["attack"] != args.attack
    if not_its_own and backdoor is not None and backdoor.optimizer() is not None:
        raise InputError(
            f"the trigger of {args.attack} is trained with its victim, and {path} holds none; give another"
        )
    for flag in ("attack", "target"):
        trained = checkpoint[flag]
        differs = trained is not None and trained != getattr(args, flag) and args.attack != "none"
        if differs and ranks.ranks()[0] == 0:
            print(f"note: {path} was trained with {flag} {trained}, measured with {getattr(args, flag)}")
    return path, model, checkpoint, backdoor


def new_network(args):
    """Return {"mean", "std"} of a network that is to be trained. Raises InputError for flags that suit no such one."""
    asked = normalization(args)
    if asked == "auto":
        raise InputError("a network that is not trained yet has no normalization to find; leave --mean auto out")
    if args.network not in NETWORKS or args.attack == "file":
        raise InputError(f"what is trained here is one of {', '.join(NETWORKS)}, with an attack of ours; give those")
    return dict(zip(("mean", "std"), asked or NORMALIZATIONS["authors"], strict=True))


def takes(model, path, size=32):
    """Raise InputError unless `model` takes images of `size`, as those of the data set are."""
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
        x_train, y_train, x_valid, y_valid = defense_data(usual)
        images, labels = torch.cat((x_train, x_valid)), torch.cat((y_train, y_valid))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        return images[order], labels[order]

    dtype = utils.get_dtype(args.precision, next(model.parameters()).device)
    line = foreign.settle_normalization(path, model, checkpoint, asked, clean, args.batch_size, dtype)
    if line is not None and ranks.ranks()[0] == 0:
        print(line, flush=True)


def load_trigger(attack, checkpoint, device):
    """Return the trigger a checkpoint was trained with, else that of the trigger files; None for `none`, `file`."""
    if attack in ("none", "file"):
        return None
    try:
        backdoor = backdoors.get_backdoor(attack)
        if checkpoint["trigger"] is not None and checkpoint["attack"] == attack:
            backdoor.load_state_dict(checkpoint["trigger"])
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"no trigger for {attack}: {' '.join(str(error).split())[:200]}") from None
    return backdoor.to(device)


def defense_data(args, usual_rate=0.05):
    """Return (x_train, y_train, x_valid, y_valid) by the flags: uint8 (N, 3, H, W), int64 (N,), as they are."""
    images, labels = data.load_dataset(args.dataset, args.datadir, train=True)
    train, valid = data.defense_indices(labels, args.dataset, args.data_rate, usual_rate, args.draw, args.seed)
    return images[train], labels[train], images[valid], labels[valid]


def augmented_defense_data(args):
    """Return defense_data(args) with each image passed once through crop and flip, as UNIT takes it."""
    x_train, y_train, x_valid, y_valid = defense_data(args)
    generator = torch.Generator().manual_seed(args.seed)
    return data.augment(x_train, generator), y_train, data.augment(x_valid, generator), y_valid
