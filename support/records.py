"""The record of a run: settings, figures, machine and commit as small JSON; the tables are made of these alone.

A record lies at results/<victim>/<defense>[,setting=value...].json; only settings other than the defaults stand in its
name. Beside a record of UNIT lies the search's trajectory (.npz), from which compare.py draws its picture.
"""

import flags

import json
import math
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np

import utils
from fast import ranks

from . import machine

# flags that name places of this machine, of no use elsewhere
PLACES = {
    "datadir",
    "ckpt",
    "out",
    "export",
    "outdir",
    "results",
}
# flags that have no place in a record's name
FREE = PLACES | {"network", "attack", "width", "device", "batch_size", "micro_batch", "phase", "resume", "overwrite"}
FREE |= {"defense", "precision", "max_minutes"}
# what a victim's training was, but for its seed; the first four say what is defended, and on which images
RECIPE = ("dataset", "size", "network", "width", "attack", "target", "epochs", "lr", "weight_decay", "batch_size")
RECIPE += ("poison_rate", "sampling", "trigger_width", "flip", "mean", "std")


def victim_of(path, checkpoint):
    """Return what a record says of its victim: {"file", "sha256", "attack", "seed", "recipe"}.

    With seed and recipe the record counts in the tables even if the victim's file is deleted. Victims of one recipe
    differ in nothing but their seed; recipe: None for a file that does not say its attack. checkpoint: see
    utils.load_checkpoint().
    """
    victim = {"file": path.name, "sha256": utils.sha256(path), "attack": checkpoint["attack"]}
    recipe = None
    if checkpoint["attack"] is not None:
        recipe = {k: checkpoint.get(k) for k in RECIPE}
        recipe |= {k: utils.file_tag(recipe[k] or "cifar10") for k in ("dataset", "attack")}
        usual = {"size": 32, "flip": True}  # of files without these settings
        recipe |= {k: v for k, v in usual.items() if recipe[k] is None}
        recipe |= {k: list(recipe[k]) for k in ("mean", "std") if recipe[k] is not None}
    return victim | {"seed": checkpoint.get("seed"), "recipe": recipe}


def path_of(defense, args, victim):
    """Return where the record of a run lies. args: its flags; victim: {"file", "attack"} of what is defended.

    The attack stands in the name where it is not the victim's own.
    """
    usual = flags.parser("unit.py" if defense == "unit" else "defend.py")
    settings = {k: v for k, v in _settings(args).items() if k not in FREE and v != usual.get_default(k)}
    if victim["attack"] not in (None, args.attack):
        settings["attack"] = utils.file_tag(args.attack)
    settings = {k: "+".join(map(str, v)) if isinstance(v, list) else v for k, v in settings.items()}
    name = ",".join([defense, *(f"{k}={v}" for k, v in sorted(settings.items()))])
    return Path(args.results) / Path(victim["file"]).stem / f"{name}.json"


def _settings(args):
    """Return the flags of a command but for places of this machine; of a user's own folder or file the last name."""
    of_dbd = set() if vars(args).get("defense") == "dbd" else {"width", "poison_rate", "overwrite"}
    settings = {k: v for k, v in vars(args).items() if k not in PLACES | of_dbd}
    if settings.get("trigger_of"):
        settings["trigger_of"] = Path(settings["trigger_of"]).stem
    return settings | {k: utils.file_tag(settings[k]) for k in ("dataset", "attack") if k in settings}


def save(path, defense, args, config, victim, device, figures, trajectory=None):
    """Write the record of a run to `path`, and its trajectory beside it; return whether it is written.

    A run that was cut off does not replace the record of a whole one. A record of another victim's file of the same
    name is kept as `path`.old, with a warning. args: the command's flags; config: the method's constants, a dataclass;
    victim: see victim_of(); figures: plain values; trajectory: {figure: [one value per step]}.
    """
    before = whole(path)
    if before and figures.get("interrupted"):
        return False
    if before and before["victim"]["sha256"] != victim["sha256"]:
        old = path.with_name(f"{path.name}.old")
        path.replace(old)
        warnings.warn(f"{path} was of another file named {before['victim']['file']}; it is now {old}", stacklevel=2)
    record = {
        "defense": defense,
        "victim": victim,
        "settings": _settings(args) | asdict(config),
        "machine": machine.machine(device) | {"processes": ranks.ranks()[1]},
        "commit": machine.commit(),
        **figures,
    }
    if holder := vars(args).get("trigger_of"):
        record["trigger_sha256"] = utils.sha256(holder)
    utils.save_json(record, path)
    if trajectory is not None:
        values = {k: np.asarray(v, np.float32) for k, v in trajectory.items()}
        utils.write_whole(path.with_suffix(".npz"), lambda p: _savez(p, values))
    return True


def _savez(path, values):
    with open(path, "wb") as file:  # given a name, numpy would put another ending behind it
        np.savez_compressed(file, **values)


def whole(path):
    """Return the record at `path` if it is of a run that was not cut off, of whatever victim; else None."""
    try:
        record = read(path) if path.exists() else None
    except flags.InputError:  # no record
        return None
    return None if record is None or record.get("interrupted") else record


def read(path):
    """Return the record at `path`, of whatever victim. Raises InputError for a file that is no record."""
    try:
        record = json.loads(path.read_text())
        _check(record, path.stem.partition(",")[0])
    except OSError as error:
        raise flags.InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise flags.InputError(f"{path} is no record of a run; move it elsewhere") from None
    return record


def _check(record, defense):
    """Raise one of the errors that read() names where `record` lacks what the tables take from it."""
    victim, after = record["victim"], record["after"]
    shares = [after["BA"], *(after[k] for k in ("ASR", "RA", "target_accuracy") if after[k] is not None)]
    if not (all(0 <= share <= 1 for share in shares) and 0 <= record["seconds"] < math.inf):  # nor is any of them NaN
        raise ValueError
    record["machine"]["threads"], record["commit"], record.get("interrupted"), hash(victim["sha256"])
    record.get("findings", {}).get("outcome")
    if "steps" in record:
        record["best_step"] + record["steps"]
    if recipe := victim.get("recipe"):
        [recipe[k] for k in RECIPE], Path(victim["file"]), victim["attack"]
        if not isinstance(victim["seed"], int | None):
            raise ValueError
        utils.network_tag(recipe["network"], recipe["width"]), -recipe["width"]
        [n in (None, "all") or n + 0 for n in (recipe["size"], recipe["target"])]
    if defense == "nc":  # what the table of the detector takes from it
        found = record["findings"]
        pairs = list(zip(found["norms"], found["anomaly_index"], strict=True))
        [pairs[c] for c in found["suspicious"]], pairs[0]
        if not all(0 <= n < math.inf for pair in pairs for n in pair):
            raise ValueError


def load(path, victim_sum):
    """Return the record at `path`; None where there is none, or it is of other weights or of a run that was cut off.

    victim_sum: SHA-256 of the victim's file. Raises InputError for a file that is no record.
    """
    path = Path(path)
    record = read(path) if path.exists() else None
    if record is None or record.get("interrupted"):
        return None
    return record if record["victim"]["sha256"] in (victim_sum, None) else None  # None: DBD has no victim
