"""What the flags of a command mean: the victim, its trigger, the images that a defense sees."""

from flags import InputError

from pathlib import Path

import torch

import backdoors
import data
import utils
from fast import ranks


def victim_path(args):
    """Return the victim that the flags mean: --ckpt, else the one named after network and attack.

    The embedded sample has no victims of its own: it is for those of the full set.
    """
    return Path(args.ckpt) if args.ckpt else utils.checkpoint_path("cifar10", args.network, args.attack)


def load_victim(args, device):
    """Return (path, model, checkpoint, backdoor) that the flags mean; say where file and flags differ."""
    path = victim_path(args)
    model, checkpoint = utils.load_model(path, device)
    if checkpoint["num_classes"] != 10:
        raise InputError(f"{path} has {checkpoint['num_classes']} classes, {args.dataset} has 10; give another model")
    backdoor = load_trigger(args.attack, checkpoint, device)
    foreign = checkpoint["trigger"] is None or checkpoint["attack"] != args.attack
    if foreign and backdoor is not None and backdoor.width is not None:
        raise InputError(f"the trigger of {args.attack} is learned for its victim, and {path} holds none; give another")
    for flag in ("attack", "target"):
        trained = checkpoint[flag]
        differs = trained is not None and trained != getattr(args, flag) and args.attack != "none"
        if differs and ranks.ranks()[0] == 0:
            print(f"note: {path} was trained with {flag} {trained}, measured with {getattr(args, flag)}")
    return path, model, checkpoint, backdoor


def load_trigger(attack, checkpoint, device, width=None):
    """Return the trigger a checkpoint was trained with, else a fresh one of `width`; None for the attack `none`."""
    if attack == "none":
        if width is not None:
            raise InputError("without an attack there is no trigger; leave --trigger_width out")
        return None
    try:
        own = checkpoint["trigger"] is not None and checkpoint["attack"] == attack
        backdoor = backdoors.get_backdoor(attack, width=checkpoint.get("trigger_width") if own else width)
        if own:
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
