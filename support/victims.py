"""Victims and their records, for the tables: the victims of one recipe, one for each seed, share a line or column.

A victim is known by its file, or, where that is not here, by what its records say of it.
"""

import flags

import argparse
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import utils
from backdoors import TRIGGERS

from . import records


class Victim:
    """A network that train.py made, and its records in <results>/<its file's name>/."""

    def __init__(self, said, results, path=None, checkpoint=None):
        """said: see records.victim_of(); path, checkpoint: its file and what that says, None where it is not here."""
        self.path, self.about = path, checkpoint or said["recipe"]
        self.attack, self.sum, self.seed, self.recipe = (said[k] for k in ("attack", "sha256", "seed", "recipe"))
        self.stem = Path(said["file"]).stem
        self.folder = Path(results) / self.stem

    def words(self, cell):
        """Return the command that a cell, `defense[,setting=value...][,trigger_of=VICTIM]`, stands for: script, flags.

        VICTIM is the name of a file in ckpt/ without its ending, commas and all.
        """
        cell, _, holder = cell.partition(",trigger_of=")
        defense, *settings = cell.split(",")
        script = ["unit.py"] if defense == "unit" else ["defend.py", "--defense", defense]
        # what a victim is for, where that is not what the commands take it to be
        usual = {"dataset": (None, "cifar10"), "size": (None, 32), "target": (None, 0)}
        own = [w for k, v in usual.items() if self.about.get(k) not in v for w in (f"--{k}", str(self.about[k]))]
        settings += [f"trigger_of={utils.CKPT / holder}.pt"] if holder else []
        return [*script, "--attack", self.attack, *own, *(f"--{setting}" for setting in settings)]

    def record_path(self, cell):
        """Return where the record of a cell lies. A setting that is no flag of the command ends in exit status 2."""
        return self.folder / _record_name(tuple(self.words(cell)), self.attack)

    def record(self, cell):
        """Return the record of a cell; None where there is none, or it is of another file than is here."""
        record = records.load(self.record_path(cell), self.sum)
        _, named, holder = cell.partition(",trigger_of=")
        path = utils.CKPT / f"{holder}.pt"
        if record and named and path.is_file() and record.get("trigger_sha256") != utils.sha256(path):
            return None
        return record


@cache
def _record_name(words, attack):
    args = flags.parser(words[0]).parse_args(words[1:])
    defense = "unit" if words[0] == "unit.py" else args.defense
    return records.path_of(defense, args, {"file": "", "attack": attack}).name


def from_file(path, results):
    """Return the Victim in a file, None where that holds none. Raises InputError where it says what cannot be."""
    path = Path(path)
    checkpoint = {k: v for k, v in utils.load_checkpoint(path).items() if k != "state_dict"}
    if checkpoint["attack"] is None or checkpoint["defense"]:
        return None
    if checkpoint["attack"] not in ("none", *flags.ATTACKS):
        raise flags.InputError(f"{path} is of an unknown attack, {checkpoint['attack']!r}; move it elsewhere")
    for key, kind in flags.ANSWERS.items():
        try:
            checkpoint[key] is None or kind(str(checkpoint[key]))
        except argparse.ArgumentTypeError:
            raise flags.InputError(f"the {key} of {path} is {checkpoint[key]!r}; move it elsewhere") from None
    return Victim(records.victim_of(path, checkpoint), results, path, checkpoint)


def from_records(folder):
    """Return the Victim that the records in a folder are of, None where they do not name its recipe.

    Records of a file of another name, as in a copy of a folder, do not count. If they are of different weights, the
    Victim is the one with the most records.
    """
    found = [records.read(path)["victim"] for path in sorted(folder.glob("*.json"))]
    found = [v for v in found if v.get("recipe") and v["recipe"]["dataset"] in flags.DATASETS]
    found = [v for v in found if v["attack"] in ("none", *flags.ATTACKS) and Path(v["file"]).stem == folder.name]
    if not found:
        return None
    most = Counter(v["sha256"] for v in found).most_common(1)[0][0]
    return Victim(next(v for v in found if v["sha256"] == most), folder.parent)


def all_victims(results, named=()):
    """Return the victims in ckpt/, those `named` by their paths, and those that only their records in `results` show.

    Of ckpt/ only files are opened that are named after a data set, and not after a defense, as compare.py names what
    it saves.
    """
    defended = re.compile(rf"_({'|'.join((*flags.DEFENSES, 'unit', 'dbd'))})(_|$)")
    paths = [p for p in utils.CKPT.glob("*.pt") if p.name.startswith(tuple(f"{name}_" for name in flags.DATASETS))]
    paths = [p for p in paths if ".partial" not in p.name and not defended.search(p.stem)]
    by_path = {p.resolve(): p for p in (*map(Path, named), *paths)}
    victims = [v for p in by_path.values() if (v := from_file(p, results))]
    known = {}
    for v in victims:
        if known.setdefault(v.stem, v).sum != v.sum:
            raise flags.InputError(f"{known[v.stem].path} and {v.path} would share their records; rename one")
    folders = [f for f in Path(results).glob("*") if f.is_dir() and f.name not in known]
    return sorted((*victims, *filter(None, map(from_records, folders))), key=_order)


def _order(victim):
    """Full width first; the attacks as flags.py has them, clean networks last; by seed, those with a file first."""
    recipe = victim.recipe
    attack = len(flags.ATTACKS) if victim.attack == "none" else flags.ATTACKS.index(victim.attack)
    seed = -1 if victim.seed is None else victim.seed
    return -recipe["width"], panel_of(recipe), attack, seed, victim.path is None, victim.stem


def panel_of(recipe):
    """Return the name of what is defended, and on which images: victims that share it share a table."""
    parts = [] if recipe["dataset"] == "cifar10" else [recipe["dataset"]]
    parts += [utils.network_tag(recipe["network"], recipe["width"])]
    return "_".join(parts) + ("" if recipe["size"] == 32 else f"_{recipe['size']}px")


@dataclass
class Group:
    """The victims of one recipe, one for each seed; `name` is unique among those of the same panel.

    leads: whether means over attacks take this group: one of each attack, that of the most usual recipe. found: {cell:
    what records() returns}, filled as it is asked.
    """

    panel: str
    name: str
    attack: str
    recipe: dict
    victims: list
    leads: bool = False
    found: dict = field(default_factory=dict)

    def records(self, cell):
        """Return the record of the cell, or None, of each victim; each is read once."""
        if cell not in self.found:
            self.found[cell] = [v.record(cell) for v in self.victims]
        return self.found[cell]

    def values(self, cell, key):
        """Return a figure, "BA", "ASR" or "RA", of each victim that has a record of the cell and this figure in it."""
        return [r["after"][key] for r in self.records(cell) if r and r["after"][key] is not None]


def grouped(victims):
    """Return the Groups of victims, in their order. Of several of one recipe and seed the first one counts."""
    by_recipe = {}
    for victim in victims:
        by_recipe.setdefault(json.dumps(victim.recipe, sort_keys=True), {}).setdefault(victim.seed, victim)
    groups = []
    for by_seed in by_recipe.values():
        first, *_ = members = list(by_seed.values())
        groups.append(Group(panel_of(first.recipe), first.attack, first.attack, first.recipe, members))
    usual, leading = flags.parser("train.py"), {}
    for group in groups:
        alike = [g.recipe for g in groups if (g.panel, g.attack) == (group.panel, group.attack)]
        differ = [k for k in group.recipe if any(r[k] != group.recipe[k] for r in alike)]
        own = {k: group.recipe[k] for k in differ if group.recipe[k] != usual.get_default(k)}
        group.name = ", ".join([group.attack, *(f"{k}={v}" for k, v in own.items())])
        if group.attack != "none":
            leading.setdefault((group.panel, group.attack), []).append((len(own), group))
    for alike in leading.values():
        min(alike, key=lambda pair: pair[0])[1].leads = True
    return groups


def clean_cells(group):
    """Return the cells that measure a clean network on this group's triggered images, for the ceiling of RA.

    There is one; a trigger that is learned with its victim has one for each victim; a clean group has none.
    """
    if group.attack == "none":
        return []
    target = group.recipe["target"]
    cell = f"none,attack={group.attack}" + (f",target={target}" if target else "")
    if TRIGGERS[group.attack].width is None:
        return [cell]
    return [f"{cell},trigger_of={v.stem}" for v in group.victims]


def ceiling(group, groups, key="RA"):
    """Return the RA, or the ASR, of each clean network of the same panel on this group's triggered images."""
    clean = [g for g in groups if g.attack == "none" and g.panel == group.panel]
    return [share for g in clean for cell in clean_cells(group) for share in g.values(cell, key)]
