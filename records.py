"""The JSON records of runs: settings, machine, history, figures. The tables of the READMEs are made of them."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import utils
from cli import InputError

PLACES = ("datadir", "ckpt", "out", "outdir", "results")  # flags that name places of this machine, of no use elsewhere

# what says how or where a run computes, and not what
FREE = {*PLACES, "seed", "device", "precision", "batch_size", "micro_batch", "phase", "compile", "resume"}


def save_record(defense, args, config, victim, device, tag, **figures):
    """Write the record of a run of `defense` into args.results and return its path.

    args: the command's flags; config: the method's constants, a dataclass; victim: {"file", "sha256"} of what was
    defended; tag: network and width; figures: plain values.
    """
    stem = f"{defense}_{args.dataset}_{tag}_{args.attack}_{time.strftime('%Y%m%d-%H%M%S')}"
    path, others = Path(args.results) / f"{stem}.json", 0
    while path.exists():  # of the same second
        others += 1
        path = path.with_name(f"{stem}_{others}.json")
    record = {
        "defense": defense,
        "victim": victim,
        "settings": {k: v for k, v in vars(args).items() if k not in PLACES} | asdict(config),
        "machine": utils.machine(device) | {"processes": utils.ranks()[1]},
        **figures,
    }
    utils.save_json(record, path)
    return path


def load_records(folder, defense=None):
    """Return {path: record} of the runs in `folder`, by name; of one defense, or of all.

    Raises InputError for a file that is no record.
    """
    records = {}
    for path in sorted(Path(folder).glob(f"{defense or '*'}_*.json")):
        try:
            records[path] = json.loads(path.read_text())
            records[path]["settings"], records[path]["victim"]["sha256"]
            if records[path]["defense"] == "unit":  # from before there was another search
                records[path]["settings"].setdefault("until", "steps")
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} is no record of a run; move it elsewhere") from None
    return records


def find(records, defense, victim_sum, settings):
    """Return {seed: record} of whole runs of `defense` on these weights at these settings: of each seed the newest.

    A run in bf16, which is the default where it is fast, goes before one in fp32.
    """
    found = {}
    for r in sorted(records, key=lambda r: _computed_in(r) not in ("fp32", "float32")):
        same = r["defense"] == defense and r["victim"]["sha256"] == victim_sum and not r.get("interrupted")
        # as JSON has it: tuples are lists
        if same and all(_plain(r["settings"].get(k)) == _plain(v) for k, v in settings.items()):
            found[r["settings"]["seed"]] = r
    return found


def _computed_in(record):
    return record.get("precision") or record["settings"].get("precision")  # the flag alone may say auto


def _plain(value):
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
