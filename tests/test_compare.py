"""compare.py: victims and their seeds, the tables of their records, and which cells are run."""

import flags
from flags import InputError

import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import compare
import defend
import utils
from backdoors import get_backdoor
from evaluate import Measured
from support import inputs, plots, records, tables, victims
from tests.running import command

CPU = torch.device("cpu")


def parsed(defense, *given):
    script, words = ("unit.py", []) if defense == "unit" else ("defend.py", ["--defense", defense])
    return flags.parser(script).parse_args([*words, *given])


# --- compare.py: a house of victims and records -----------------------------------------------------------------------


def figures(ba, asr=None, ra=None):
    return Measured(ba, asr, ra, 0.75, 10000, 0 if asr is None else 9000, 1000)._asdict()


class House:
    """A folder with small victims in ckpt/, and results/ for their records."""

    def __init__(self, folder, state):
        self.folder, self.results, self.state = folder, folder / "results", state

    def victim(self, name, attack="badnet", width=1.0, seed=1024, **changes):
        path = self.folder / "ckpt" / f"cifar10_{name}.pt"
        about = {"network": "resnet18", "width": width, "num_classes": 10, "attack": attack, "target": 0, "seed": seed}
        about |= {"bounds": None, "trigger": None if attack == "none" else get_backdoor(attack).state_dict()}
        about |= {"clean_label": attack == "reflection", "poison_rate": 0.1, "sampling": "resampled", "epochs": 30}
        about |= figures(0.93, *((None, None) if attack == "none" else (1.0, 0.0))) | changes
        # what its width is stands in the file; these weights are of the same for all
        utils.save_checkpoint({**about, "state_dict": self.state, "seconds": 99.4, "commit": "abc"}, path)
        return path

    def record(self, path, cell, measured, seconds=12.3, alone=False, **changes):
        """Write a record of a victim; alone: with what lets it count without the victim's file."""
        victim = {"file": path.name, "sha256": utils.sha256(path), "attack": "badnet"}
        if alone:
            victim = records.victim_of(path, utils.load_checkpoint(path))
        record = {"defense": cell.split(",")[0], "victim": victim, "settings": {}, "after": measured}
        record |= {"machine": {"threads": 2}, "commit": "0123456789", "seconds": seconds, **changes}
        utils.save_json(record, self.results / path.stem / f"{cell}.json")

    def args(self, *given):
        return flags.parser("compare.py").parse_args(["--results", str(self.results), "--device", "cpu", *given])

    def compare(self, *given):
        compare.main(["--results", str(self.results), "--device", "cpu", *given])

    def victims(self):
        return victims.all_victims(self.results)

    def groups(self):
        return victims.grouped(self.victims())

    def table(self, text, title):
        """The table of a title in a text: {first cell: [the other cells]}."""
        lines = next(t for t in text.split("\n\n") if t.lstrip("| ").startswith(title)).splitlines()
        cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
        return {c[0]: c[1:] for c in [cells[0], *cells[2:]]}


@pytest.fixture
def house(tmp_path, untouched, monkeypatch):
    (tmp_path / "ckpt").mkdir()
    monkeypatch.setattr(utils, "CKPT", tmp_path / "ckpt")
    monkeypatch.setattr(compare, "draw", lambda *_: None)  # the pictures' time
    monkeypatch.setattr(compare, "POLL", 0.01)
    return House(tmp_path, utils.half_weights(untouched.state_dict()))


# --- victims and their seeds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        ([], "–"),
        ([0.98765], "98.8"),
        ([0.5, 0.6, 0.7], "60.0 ± 10.0"),
        ([0.88, 0.90], "89.0 ± 1.4"),  # the root of 2 · 1² / (2 - 1)
        ([0.25, 0.25, 0.25], "25.0 ± 0.0"),
    ],
)
def test_mean_and_standard_deviation(shares, text):
    assert tables.spread(shares) == text


def test_victims_in_ckpt_are_the_files_named_after_a_data_set(house):
    """Others there, and what was made of a victim, are not opened."""
    path = house.victim("a", dataset="fashion_mnist")
    path.rename(path.with_name("fashion_mnist_a.pt"))
    for name in ("mine", "fashionable_a", "cifar10_a_unit", "fashion_mnist_a_ft", "fashion_mnist_a.partial"):
        (path.parent / f"{name}.pt").write_bytes(b"no checkpoint")
    assert [v.stem for v in house.victims()] == ["fashion_mnist_a"]


def test_victims_that_differ_in_seed_alone_are_one_group(house):
    for name, seed in (("b", 7), ("a", 1024), ("c", 1)):  # whatever their files are called
        house.victim(name, seed=seed)
    (group,) = house.groups()
    assert [v.seed for v in group.victims] == [1, 7, 1024]
    assert (group.panel, group.name) == ("resnet18", "badnet")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"sampling": "fixed"}, {"badnet", "badnet, sampling=fixed"}),
        ({"epochs": 24}, {"badnet", "badnet, epochs=24"}),
        ({"poison_rate": 0.05}, {"badnet, poison_rate=0.1", "badnet, poison_rate=0.05"}),
        ({"target": 2}, {"badnet", "badnet, target=2"}),
        ({"attack": "wanet"}, {"badnet", "wanet"}),
        ({"width": 0.25}, {"badnet"}),
        ({"dataset": "svhn"}, {"badnet"}),
        ({"size": 64}, {"badnet"}),
    ],
)
def test_victims_of_other_recipes_are_groups_of_their_own(house, change, names):
    house.victim("a", seed=1)
    house.victim("b", seed=2, **change)
    groups = house.groups()
    assert len(groups) == 2
    assert {g.name for g in groups} == names
    assert len({(g.panel, g.name) for g in groups}) == 2


def test_a_mean_over_attacks_takes_one_recipe_of_each(house):
    house.victim("b", sampling="fixed"), house.victim("a"), house.victim("c", attack="wanet")
    for name, ba in (("a", 0.9), ("b", 0.5), ("c", 0.8)):
        house.record(house.folder / f"ckpt/cifar10_{name}.pt", "ft", figures(ba, 0.5, 0.25))
    groups = house.groups()
    assert {g.name: g.leads for g in groups} == {"badnet": True, "badnet, sampling=fixed": False, "wanet": True}
    # BA: (90 + 80) / 2
    assert house.table(tables.averages(groups), "resnet18")["FT"] == ["85.0", "50.0", "25.0", "badnet, wanet"]
    assert house.table(tables.grids(groups), "resnet18: BA %")["FT"][-1] == "85.0"
    assert "sampling" not in tables.overview(groups)


def test_the_table_of_victims_has_those_named_as_train_py_names_them(house):
    usual = "resnet18_badnet"
    for seed, name in enumerate((usual, f"{usual}-fixed", f"{usual}_seed1", "mine")):
        house.victim(name, seed=seed)
    files = house.table(tables.victim_table(house.victims()), "file")
    assert set(files) - {"file"} == {f"`cifar10_{usual}.pt`", f"`cifar10_{usual}-fixed.pt`"}


def test_a_file_of_an_earlier_version_is_of_the_recipe_that_it_was_made_by(house):
    house.victim("a", seed=1)
    house.victim("b", seed=2, size=32, flip=True, dataset="cifar10")  # what is said by now, and was so before
    assert [len(g.victims) for g in house.groups()] == [2]


def test_of_one_recipe_and_seed_one_victim_counts(house):
    first, again = house.victim("a"), house.victim("b", history=["other bytes"])
    house.record(first, "ft", figures(0.9, 0.5, 0.25), alone=True)
    house.record(again, "ft", figures(0.8, 0.5, 0.25))
    first.unlink()
    (group,) = house.groups()
    assert group.values("ft", "BA") == [0.8]  # the one whose file is here


def test_a_record_counts_without_its_victims_file_if_it_says_enough(house):
    paths = [house.victim(f"s{seed}", seed=seed) for seed in (1, 2, 3)]
    for i, path in enumerate(paths):
        house.record(path, "ft", figures(0.9 - i / 100, 0.5, 0.25), alone=i < 2)
        if i:
            path.unlink()
    (group,) = house.groups()
    assert group.values("ft", "BA") == [0.9, 0.89]
    assert [(v.seed, v.path is None) for v in group.victims] == [(1, False), (2, True)]
    utils.save_checkpoint({**utils.load_checkpoint(paths[0]), "lr": 0.2}, paths[0])  # a file of other weights is here
    assert [g.values("ft", "BA") for g in house.groups()] == [[], [0.89]]


def test_records_of_other_weights_in_one_folder_are_told_apart(house):
    path = house.victim("a")
    for cell in ("ft", "none"):
        house.record(path, cell, figures(0.9, 0.5, 0.25), alone=True)
    utils.save_checkpoint({**utils.load_checkpoint(path), "seed": 5}, path)
    house.record(path, "bcu", figures(0.8, 0.5, 0.25), alone=True)
    path.unlink()
    (group,) = house.groups()
    assert [v.seed for v in group.victims] == [1024]
    assert (group.values("ft", "BA"), group.values("bcu", "BA")) == ([0.9], [])


def test_only_victims_are_taken(house, monkeypatch):
    path = house.victim("resnet18_badnet")
    saved = utils.load_checkpoint(path) | {"defense": {"name": "ft"}}
    utils.save_checkpoint(saved, path.with_name("cifar10_mine.pt"))
    for name in ("resnet18_badnet_ft", "resnet18_badnet_unit_step_images=250", "resnet18_wanet.partial"):
        path.with_name(f"cifar10_{name}.pt").write_bytes(b"not to be opened")
    torch.save(house.state, path.with_name("cifar10_foreign.pt"))
    assert [v.path.name for v in house.victims()] == ["cifar10_resnet18_badnet.pt"]


@pytest.mark.parametrize(
    "damage", [{"width": "a"}, {"width": None}, {"target": ...}, {"target": "b"}, {"size": "c"}, {"network": None}]
)
def test_a_record_whose_recipe_is_damaged_is_named(house, damage):
    """It would have to place the victim in the tables, whose file is not here."""
    path = house.victim("a")
    house.record(path, "none", figures(0.9, 0.5, 0.25), alone=True)
    path.unlink()
    place = house.results / "cifar10_a" / "none.json"
    record = json.loads(place.read_text())
    recipe = record["victim"]["recipe"] | damage
    record["victim"]["recipe"] = {k: v for k, v in recipe.items() if v is not ...}
    place.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"none\.json is no record of a run"):
        house.compare("--no-run")


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r["after"].update(BA=float("nan")),
        lambda r: r["after"].update(BA=None),
        lambda r: r["after"].update(BA=[]),
        lambda r: r["after"].update(RA=float("inf")),
        lambda r: r["after"].update(ASR=93.5),  # in %
        lambda r: r.update(seconds=float("nan")),
        lambda r: r["victim"].update(sha256=[]),
        lambda r: r["victim"].update(seed="1"),
        lambda r: r["victim"].update(seed=[]),
        lambda r: r["victim"].pop("attack"),
        lambda r: r.update(steps=300),  # and no best_step
    ],
)
def test_a_record_whose_figures_cannot_be_is_named(house, damage):
    path = house.victim("a")
    house.record(path, "none", figures(0.9, 0.5, 0.25), alone=True)
    place = house.results / "cifar10_a" / "none.json"
    record = records.read(place)
    damage(record)
    place.write_text(json.dumps(record))
    path.unlink()
    with pytest.raises(InputError, match=r"none\.json is no record of a run; move it elsewhere"):
        house.compare("--no-run")


def test_a_copy_of_a_folder_of_records_does_not_count_twice(house):
    path = house.victim("a")
    house.record(path, "none", figures(0.9, 0.5, 0.25), alone=True)
    path.unlink()
    (folder,) = house.results.iterdir()
    shutil.copytree(folder, folder.with_name("backup"))
    assert [v.stem for v in house.victims()] == ["cifar10_a"]
    assert tables.details(house.victims()).count("\n") == 2


# --- the tables -------------------------------------------------------------------------------------------------------


def two_seeds(house):
    """BadNets with two seeds, WaNet and a clean network, all small."""
    a, b = house.victim("a", width=0.25), house.victim("b", width=0.25, seed=2)
    wanet, clean = house.victim("w", "wanet", 0.25), house.victim("n", "none", 0.25)
    house.record(a, "none", figures(0.9, 1.0, 0.0))
    house.record(b, "none", figures(0.92, 0.98, 0.02))
    house.record(wanet, "none", figures(0.87, 0.9, 0.1))
    house.record(a, "unit", figures(0.88, 0.02, 0.84))
    house.record(b, "unit", figures(0.9, 0.06, 0.8))
    house.record(wanet, "unit", figures(0.85, 0.1, 0.7))
    house.record(a, "i_bau", figures(0.7, 0.5, 0.25))
    house.record(clean, "none", figures(0.93))
    house.record(clean, "none,attack=badnet", figures(0.93, 0.01, 0.9))
    house.record(a, "unit,acc_degrade=0.05", figures(0.1, 0.1, 0.1))  # no line of the tables
    return a, b, wanet, clean


def test_the_tables_have_means_over_seeds_and_attacks(house, capsys):
    two_seeds(house)
    house.compare("--no-run")
    averages, grids = (
        (house.results / page).read_text().partition(tables.BEGIN.format(mark))[2].partition(tables.END)[0].strip()
        for page, mark in (("README.md", "averages"), ("attacks.md", "grids"))
    )
    assert house.table(averages, "resnet18-w0.25") == {
        "resnet18-w0.25": ["BA %", "ASR %", "RA %", "attacks"],
        "no defense": ["89.0", "94.5", "5.5", "badnet, wanet"],  # BadNets' own mean first: (91 + 87) / 2
        "I-BAU": ["70.0", "50.0", "25.0", "badnet"],
        "UNIT": ["87.0", "7.0", "76.0", "badnet, wanet"],
    }
    assert house.table(grids, "resnet18-w0.25: RA %") == {
        "resnet18-w0.25: RA %": ["badnet (n = 2)", "wanet", "mean"],
        "no defense": ["1.0 ± 1.4", "10.0", "5.5"],
        "I-BAU": ["25.0 (1)", "–", "25.0 (1)"],
        "UNIT": ["82.0 ± 2.8", "70.0", "76.0"],
        "ceiling of RA": ["90.0", "–", ""],
    }
    assert house.table(grids, "resnet18-w0.25: ASR %")["UNIT"] == ["4.0 ± 2.8", "10.0", "7.0"]
    assert house.table(grids, "resnet18-w0.25: BA %") == {
        "resnet18-w0.25: BA %": ["badnet (n = 2)", "wanet", "none", "mean"],  # a clean network is no attack
        "no defense": ["91.0 ± 1.4", "87.0", "93.0", "89.0"],
        "I-BAU": ["70.0 (1)", "–", "–", "70.0 (1)"],
        "UNIT": ["89.0 ± 1.4", "85.0", "–", "87.0"],
    }
    assert "| UNIT | 87.0 | 7.0 | 76.0 | badnet, wanet |" in capsys.readouterr().out


def test_budgets_stand_beside_each_other_where_two_have_records(house):
    a, b, wanet = house.victim("a"), house.victim("b", seed=2), house.victim("w", "wanet")
    for path, cell, measured in (
        (a, "none", figures(0.9, 1.0, 0.0)),
        (a, "unit,step_images=250", figures(0.88, 0.5, 0.25)),
        (a, "unit,acc_degrade=0.05,step_images=250", figures(0.86, 0.2, 0.5)),
        (b, "unit,acc_degrade=0.05,step_images=250", figures(0.84, 0.1, 0.75)),
        (wanet, "unit,step_images=250", figures(0.8, 0.5, 0.25)),
    ):
        house.record(path, cell, measured)
    assert house.table(tables.budgets(house.groups()), "BA / ASR / RA") == {
        "BA / ASR / RA in %": ["no defense", "3 %", "5 %", "10 %"],
        "resnet18, badnet (n = 2)": [
            "90.00 / 100.00 / 0.00", "88.00 / 50.00 / 25.00", "85.00 ± 1.41 / 15.00 ± 7.07 / 62.50 ± 17.68", "–"
        ],
    }  # fmt: skip
    house.record(a, "unit,acc_degrade=0.1,step_images=250", figures(0.8, 0.1, 0.5))
    assert house.table(tables.budgets(house.groups()), "BA / ASR / RA")["resnet18, badnet (n = 2)"][3] == (
        "80.00 / 10.00 / 50.00"
    )


def test_many_attacks_are_several_tables_and_the_mean_stands_in_the_last(house, monkeypatch):
    monkeypatch.setattr(tables, "BAND", 2)
    for i, attack in enumerate(("badnet", "wanet", "reflection")):
        house.record(house.victim(attack, attack), "none", figures(0.9, 1.0, i / 10))
    first, second, *_ = tables.grids(house.groups()).split("\n\n")
    assert first.splitlines()[::2] == ["| resnet18: RA % | badnet | wanet |", "| no defense | 0.0 | 10.0 |"]
    assert second.splitlines()[::2] == ["| resnet18: RA % | reflection | mean |", "| no defense | 20.0 | 10.0 |"]


def test_the_front_page_has_what_was_defended_of_the_first_three_attacks(house):
    badnet, clean = house.victim("badnet"), house.victim("none", "none")
    wanet, narrow = house.victim("wanet", "wanet"), house.victim("small", "badnet", 0.25)
    house.record(badnet, "none", figures(0.9356, 1.0, 0.0))
    house.record(badnet, "unit", figures(0.9073, 0.01291, 0.8992))
    house.record(badnet, "nad", figures(0.8, 0.7, 0.1))  # no column of the front page
    house.record(wanet, "none", figures(0.91, 0.5, 0.25))
    house.record(wanet, "nad", figures(0.8, 0.7, 0.1))
    house.record(narrow, "ft", figures(0.8, 0.1, 0.1))
    house.record(house.victim("sig", "sig"), "bcu", figures(0.8, 0.1, 0.1))
    house.record(house.victim("vgg", network="vgg11"), "bcu", figures(0.8, 0.1, 0.1))
    house.record(clean, "none", figures(0.9459))
    house.record(clean, "ft", figures(0.9459))
    house.record(clean, "none,attack=badnet", figures(0.9459, 0.0056, 0.9447))
    assert house.table(tables.overview(house.groups()), "BA / ASR / RA") == {
        "BA / ASR / RA in %": ["no defense", "FT", "UNIT", "ceiling of RA"],
        "resnet18_badnet": ["93.56 / 100.00 / 0.00", "–", "90.73 / 1.29 / 89.92", "94.47"],
        "resnet18-w0.25_badnet": ["–", "80.00 / 10.00 / 10.00", "–", "–"],
    }


def test_the_ceiling_is_of_the_same_network_and_images(house):
    wide, narrow = house.victim("w"), house.victim("s", width=0.25)
    large = house.victim("l", size=64)
    for seed, ra in ((1, 0.8), (2, 0.9)):
        clean = house.victim(f"n{seed}", "none", seed=seed)
        house.record(clean, "none,attack=badnet", figures(0.9, 0.01, ra))
    best = {g.victims[0].path: victims.ceiling(g, house.groups()) for g in house.groups() if g.attack != "none"}
    assert best == {wide: [0.8, 0.9], narrow: [], large: []}


def test_what_does_not_count_is_left_out(house):
    path = house.victim("resnet18_badnet")
    house.record(path, "none", figures(0.5, 0.5, 0.5))
    house.record(path, "ft", figures(0.6, 0.6, 0.4), victim={"sha256": "0" * 64})  # of other weights
    house.record(path, "unit", figures(0.7, 0.7, 0.3), interrupted="out of time")
    (group,) = house.groups()
    assert [group.values(cell, "BA") for cell in ("none", "ft", "unit")] == [[0.5], [], []]
    assert tables.details(house.victims()).count("\n") == 2


def test_every_record_is_a_line_of_the_runs(house):
    path = house.victim("resnet18_badnet")
    house.record(path, "none", figures(0.5, 0.5, 0.5), seconds=0.0)
    house.record(path, "ulrl", figures(0.6, 0.6, 0.4), findings={"outcome": "suspicious: rows 0"})
    house.record(path, "unit,lr=0.05", figures(0.7, 0.7, 0.3), best_step=4, steps=300)
    house.compare("--no-run")
    lines = (house.results / "runs.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| resnet18")] == [
        "| resnet18_badnet | none | 50.00 / 50.00 / 50.00 | 75.00 |  | – | 2 | 0123456789 |",
        "| resnet18_badnet | ulrl | 60.00 / 60.00 / 40.00 | 75.00 | suspicious: rows 0 | 12 | 2 | 0123456789 |",
        "| resnet18_badnet | unit,lr=0.05 | 70.00 / 70.00 / 30.00 | 75.00 | step 5 of 300 | 12 | 2 | 0123456789 |",
    ]


def test_another_network_or_data_set_is_a_line_of_its_own_page(house):
    for attack in ("badnet", "wanet"):
        path = house.victim(attack, attack)
        house.record(path, "none", figures(0.9, 1.0, 0.0))
        house.record(path, "unit", figures(0.89, 0.5, 0.25))
    wide, clothes, alone = (
        house.victim("vgg", network="vgg11", width=0.5, epochs=24),
        house.victim("clothes", "wanet", 0.25, dataset="fashion_mnist"),
        house.victim("wrn", network="wideresnet16"),
    )
    for path in (wide, clothes, alone):
        extra = ",dataset=fashion_mnist" if path == clothes else ""
        house.record(path, f"none{extra}", figures(0.86, 1.0, 0.0))
    house.record(wide, "unit,step_images=250", figures(0.83, 0.03, 0.81))
    house.record(clothes, "unit,dataset=fashion_mnist,step_images=250", figures(0.7, 0.3, 0.1))
    house.record(clothes, "unit,dataset=fashion_mnist", figures(0.8, 0.2, 0.1))
    house.compare("--no-run")
    table = (house.results / "networks.md").read_text().partition(tables.BEGIN.format("networks") + "\n")[2]
    assert house.table(table.partition(tables.END)[0].strip(), "network, attack") == {
        "network, attack": ["made by", "BA / ASR / RA in %", "after UNIT", "run"],
        "vgg11-w0.5, badnet": [
            "`train.py --attack badnet --network vgg11 --width 0.5 --epochs 24`",
            "86.00 / 100.00 / 0.00", "83.00 / 3.00 / 81.00", "UNIT 250",
        ],
        "fashion_mnist_resnet18-w0.25, wanet": [
            "`train.py --attack wanet --dataset fashion_mnist --width 0.25`",
            "86.00 / 100.00 / 0.00", "80.00 / 20.00 / 10.00", "UNIT",
        ],
    }  # fmt: skip
    assert list(tables.panels(house.groups())) == ["resnet18"]  # of several attacks


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attack": "wanet", "sampling": "in_batch"}, "--attack wanet"),  # its own, which the flag does not take
        ({"attack": "badnet", "sampling": "fixed"}, "--attack badnet --sampling fixed"),
        ({"attack": "badnet", "poison_rate": 0.05}, "--attack badnet --poison_rate 0.05"),
        ({"attack": "composite", "poison_rate": 1 / 11, "batch_size": 64}, "--attack composite --batch_size 64"),
        ({"attack": "none", "poison_rate": 0.0, "weight_decay": 0.0}, "--attack none --weight_decay 0.0"),
        ({"attack": "badnet", "target": "all", "dataset": "svhn"}, "--attack badnet --dataset svhn --target all"),
    ],
)
def test_the_command_that_makes_a_victim_is_one_that_train_py_takes(changes, words):
    usual = vars(flags.parser("train.py").parse_args([]))
    recipe = {k: usual.get(k) for k in records.RECIPE} | {"poison_rate": 0.1} | changes
    assert tables.making(recipe) == f"train.py {words}"
    flags.parser("train.py").parse_args(words.split())


def test_how_often_the_detector_is_right(house):
    """Right is the target alone; another class, another one beside it or none at all are wrong."""
    index = [0.5, 0.25, 3.0, 2.5, 1.0]

    def found(name, suspicious, smallest, attack="badnet", **changes):
        norms = [9.0 if c != smallest else 1.0 for c in range(5)]
        findings = {"suspicious": suspicious, "norms": norms, "anomaly_index": index, "outcome": ""}
        path = house.victim(name, attack, **changes)
        cell = "nc,target=2" if changes.get("target") else "nc"
        house.record(path, cell, figures(0.9, 0.5, 0.5), findings=findings)

    assert tables.detections(house.victims()) == ""
    found("right", [2], 2, target=2)
    found("two", [2, 3], 2, seed=1, target=2)
    found("missed", [], 1, "wanet")
    found("clean", [], 0, "none")
    found("blamed", [3], 3, "none", seed=1)
    house.victim("unmeasured", seed=3)
    said, table = tables.detections(house.victims()).split("\n\n")
    assert said == "Right on 1 of 3 backdoored networks and 1 of 2 clean networks."
    assert house.table(table, "network") == {
        "network": ["target", "suspected class (index)", "class of the smallest patch (index)", "right"],
        "right": ["2", "2 (3.00)", "2 (3.00)", "yes"],
        "two": ["2", "2 (3.00), 3 (2.50)", "2 (3.00)", "no"],
        "missed": ["0", "none", "1 (0.25)", "no"],
        "clean": ["none", "none", "0 (0.50)", "yes"],
        "blamed": ["none", "3 (2.50)", "3 (2.50)", "no"],
    }
    house.compare("--no-run")
    assert said in (house.results / "attacks.md").read_text()


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r.pop("findings"),
        lambda r: r["findings"].pop("anomaly_index"),
        lambda r: r["findings"].update(norms=[], anomaly_index=[], suspicious=[]),
        lambda r: r["findings"].update(norms=[1.0]),
        lambda r: r["findings"].update(norms=["a", "b"]),
        lambda r: r["findings"].update(norms=[1.0, float("nan")]),
        lambda r: r.update(defense="ft", findings={}),  # by its name the detector's, by its content not
        lambda r: r["findings"].update(suspicious=[7]),
        lambda r: r["findings"].update(suspicious=None),
    ],
)
def test_a_record_of_nc_whose_findings_are_damaged_is_named(house, damage):
    path = house.victim("a")
    findings = {"suspicious": [0], "norms": [1.0, 2.0], "anomaly_index": [3.0, 0.5], "outcome": ""}
    house.record(path, "nc", figures(0.9, 0.5, 0.5), findings=findings)
    file = house.results / path.stem / "nc.json"
    assert records.read(file)["findings"] == findings
    record = json.loads(file.read_text())
    damage(record)
    file.write_text(json.dumps(record))
    with pytest.raises(InputError, match="nc.json is no record of a run; move it elsewhere"):
        house.compare("--no-run")


def test_the_run_on_the_usual_folder_also_writes_the_front_page_and_that_of_the_victims(house, monkeypatch):
    wide, narrow = house.victim("resnet18_badnet"), house.victim("resnet18-w0.25_none", "none", 0.25)
    house.victim("resnet18_badnet_seed2", seed=2)  # remade by a command, and not listed
    monkeypatch.setattr(flags, "RESULTS", house.results)
    monkeypatch.setattr(flags, "ROOT", house.folder)
    pages = [house.folder / "README.md", house.folder / "ckpt" / "README.md"]
    for page, name in zip(pages, ("overview", "victims"), strict=True):
        page.write_text(f"{tables.BEGIN.format(name)}\n{tables.END}\n")
    house.record(wide, "none", figures(0.5, 0.5, 0.25))
    house.record(wide, "unit", figures(0.6, 0.1, 0.4))
    compare.main(["--no-run", "--results", str(house.folder / "elsewhere")])
    assert "|" not in pages[0].read_text() + pages[1].read_text()
    house.compare("--no-run")
    front, listed = (page.read_text() for page in pages)
    assert "| resnet18_badnet (n = 2) | 50.00 / 50.00 / 25.00 | 60.00 / 10.00 / 40.00 |" in front
    sums = [utils.sha256(path)[:16] for path in (wide, narrow)]
    assert [line for line in listed.splitlines() if line.startswith("| `")] == [
        "| `cifar10_resnet18_badnet.pt` | 1 | dirty-label, 10 %, resampled | 30 | 93.00 / 100.00 / 0.00 | 75.00 | 99 |"
        f" abc | `{sums[0]}` |",
        f"| `cifar10_resnet18-w0.25_none.pt` | 0.25 | clean | 30 | 93.00 | 75.00 | 99 | abc | `{sums[1]}` |",
    ]


def test_what_is_drawn_is_what_was_measured(house, monkeypatch):
    monkeypatch.undo()  # the pictures are what this is about
    monkeypatch.setattr(utils, "CKPT", house.folder / "ckpt")
    given = {}
    monkeypatch.setattr(plots, "draw_heatmap", lambda *a: given.update(heatmap=a))
    monkeypatch.setattr(plots, "draw_tradeoff", lambda *a: given.update(tradeoff=a))
    two_seeds(house)
    house.record(house.victim("wide"), "none", figures(0.9, 1.0, 0.0))  # of no defense there is nothing to see
    house.compare("--no-run")
    columns, maps, _ = given["heatmap"]
    assert columns == ["no defense", "I-BAU", "UNIT", "clean network"]
    (title, rows, ra, low), (second, _, asr, high) = maps
    assert (title, second, low, high) == ("resnet18-w0.25: RA %", "resnet18-w0.25: ASR %", False, True)
    assert rows == ["badnet", "wanet"]
    assert ra == [[pytest.approx(0.01), 0.25, pytest.approx(0.82), 0.9], [0.1, None, 0.7, None]]
    assert asr == [[pytest.approx(0.99), 0.5, pytest.approx(0.04), 0.01], [0.9, None, 0.1, None]]
    ((panel, points),) = given["tradeoff"][0].items()
    assert panel == "resnet18-w0.25: mean over badnet"  # that both defenses have
    assert {k: pytest.approx(v) for k, v in points.items()} == {"I-BAU": (0.2, 0.25), "UNIT": (0.02, 0.81)}
    house.record(house.folder / "ckpt/cifar10_w.pt", "i_bau", figures(0.8, 0.2, 0.5))
    house.compare("--no-run")
    ((panel, points),) = given["tradeoff"][0].items()
    assert panel == "resnet18-w0.25: mean over badnet, wanet"
    assert {k: pytest.approx(v) for k, v in points.items()} == {
        "I-BAU": ((0.2 + 0.07) / 2, (0.25 + 0.4) / 2),
        "UNIT": (0.02, (0.81 + 0.6) / 2),  # BadNets' own mean first
    }


def test_attacks_are_named_as_briefly_as_it_is_clear():
    whole = list("abcdefg")
    assert tables.named("gb", whole) == "b, g"
    assert tables.named("abcd", whole) == "all but e, f, g"
    assert tables.named("abc", "abc") == "a, b, c"
    assert tables.named("abcd", list("abcd")) == "all 4"
    assert tables.named("abcd", list("abcdefghi")) == "a, b, c, d"


def test_defenses_are_compared_over_the_attacks_that_most_of_them_have():
    some = {"ft": "ab", "nad": "ab", "clp": "abc", "unit": "abcd"}
    assert compare.in_common({k: dict.fromkeys(v) for k, v in some.items()}) == ["a", "b"]  # 4 x 2, not 2 x 3
    some |= {"rnp": "abc", "fst": "bc", "anp": "abcd"}
    assert compare.in_common({k: dict.fromkeys(v) for k, v in some.items()}) == ["b", "a", "c"]  # 4 x 3, not 6 x 2


def test_an_attack_without_ra_is_counted_apart(house, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(utils, "CKPT", house.folder / "ckpt")
    given = {}
    monkeypatch.setattr(plots, "draw_heatmap", lambda *a: given.update(heatmap=a))
    monkeypatch.setattr(plots, "draw_tradeoff", lambda *_: None)
    for attack, ra in (("badnet", 0.8), ("wanet", 0.6), ("composite", None)):
        path = house.victim(attack, attack, width=0.25)
        for cell in ("none", "ft", "unit"):
            house.record(path, cell, figures(0.9, 0.3, ra))
    house.compare("--no-run")
    (_, rows, ra, _), (_, others, asr, _) = given["heatmap"][1]
    assert (rows, others) == (["badnet", "wanet"], ["badnet", "wanet", "composite"])
    assert (ra, asr) == ([[0.8] * 3, [0.6] * 3], [[0.3] * 3] * 3)
    averages = house.table(tables.averages(house.groups()), "resnet18-w0.25")
    assert averages["UNIT"] == ["90.0", "30.0", "70.0 (2)", "badnet, wanet, composite"]


# --- what is run ------------------------------------------------------------------------------------------------------

COPY = "import shutil, sys; print('made'); shutil.copy(*sys.argv[1:])"


def running(house, monkeypatch, failing=(), code=COPY):
    """Let each cell be a small process that leaves its record; return the list of those that were started."""
    ran = []

    def command(victim, cell, args, outdir):
        ran.append((victim.stem.removeprefix("cifar10_"), cell))
        if cell in failing:
            return [sys.executable, "-S", "-c", "import sys; print('why'); sys.exit(2)"]
        house.record(victim.path, cell, figures(0.5, 0.25, 0.125))
        made, place = victim.folder / f"{cell}.json", victim.record_path(cell)
        kept = house.folder / f"{victim.stem}_{cell}.json"
        made.replace(kept)
        return [sys.executable, "-S", "-c", code, str(kept), str(place)]

    monkeypatch.setattr(compare, "command", command)
    return ran


def test_what_has_no_record_is_run_once_cheapest_defense_first(house, monkeypatch):
    for name, attack, width, seed in (
        ("wide", "badnet", 1.0, 1), ("wanet", "wanet", 0.25, 1), ("b2", "badnet", 0.25, 2), ("b1", "badnet", 0.25, 1),
        ("clean", "none", 0.25, 1),
    ):  # fmt: skip
        house.victim(name, attack, width, seed)
    ran = []

    def fill(jobs, _args):
        for victim, cell in jobs:
            ran.append((victim.stem.removeprefix("cifar10_"), cell))
            house.record(victim.path, victim.record_path(cell).stem, figures(0.5, 0.25, 0.125))
        return []

    monkeypatch.setattr(compare, "fill", fill)
    cells = ["unit", "bcu", "none", "unit,step_images=250"]
    house.compare("--defenses", *cells)
    order = ["b1", "wanet", "clean", "b2", "wide"]  # small first, then the first seed
    assert list(dict.fromkeys(cell for _, cell in ran)) == [
        "none", "none,attack=badnet", "none,attack=wanet", "unit,step_images=250", "bcu", "unit"
    ]  # fmt: skip
    assert [name for name, cell in ran if cell == "bcu"] == order
    assert [name for name, cell in ran if "attack" in cell] == ["clean", "clean"]  # the ceilings
    ran.clear()
    house.compare("--defenses", *cells, "unit,acc_degrade=0.03", "unit,n_steps=9", "unit,n_steps=09")
    assert [cell for _, cell in ran] == 5 * ["unit,n_steps=9"]  # the default is no run of its own


def test_a_defense_that_is_in_no_list_yet_comes_last(house, monkeypatch):
    house.victim("badnet")
    monkeypatch.setattr(compare, "CHEAPEST", ("none", "unit"))
    assert [cell for _, cell in compare.missing(house.victims(), ["clp", "unit", "none"])] == ["none", "unit", "clp"]


def test_only_the_victims_that_are_named_are_run(house, monkeypatch):
    named, other = house.victim("a"), house.victim("b", "wanet")
    house.record(other, "none", figures(0.75, 0.5, 0.25))
    ran = running(house, monkeypatch)
    house.compare("--defenses", "ft", "--victims", str(named))
    assert ran == [("a", "ft")]
    assert "75.0" in (house.results / "README.md").read_text()


def test_a_cell_is_looked_for_where_its_command_writes(house):
    """A victim of the sample answers for the data set, whose name is then in the record's."""
    house.victim("a", dataset="cifar10_sample")
    (victim,) = house.victims()
    args = flags.parser("defend.py").parse_args(victim.words("none")[1:] + ["--results", str(house.results)])
    inputs.answer(args, utils.load_checkpoint(victim.path))
    said = records.victim_of(victim.path, utils.load_checkpoint(victim.path))
    assert records.path_of("none", args, said) == victim.record_path("none")
    assert victim.record_path("none").name == "none,dataset=cifar10_sample.json"


def test_victims_without_a_file_are_not_run_and_said(house, monkeypatch, capsys):
    path = house.victim("a", seed=7)
    house.record(path, "none", figures(0.75, 0.5, 0.25), alone=True)
    path.unlink()
    ran = running(house, monkeypatch)
    house.compare("--defenses", "none", "ft", "clp")
    assert not ran
    assert "2 cells cannot be run for want of the victims' files in ckpt/: cifar10_a" in capsys.readouterr().out


def test_the_ceilings_are_measured_with_the_victims_own_target(house):
    for attack, target in (("composite", 2), ("badnet", 0), ("dynamic", 0)):
        house.victim(attack, attack, target=target)
    house.victim("n", "none")
    cells = [cell for v, cell in compare.missing(house.victims(), ["none"]) if v.attack == "none"]
    learned = "none,attack=dynamic,trigger_of=cifar10_dynamic"  # the trigger of this victim
    assert cells == ["none", "none,attack=badnet", "none,attack=composite,target=2", learned]
    clean = house.victims()[-1]
    assert [clean.record_path(cell).name for cell in cells[2:]] == [f"{cell}.json" for cell in cells[2:]]
    assert clean.words(learned)[-2:] == ["--attack=dynamic", f"--trigger_of={utils.CKPT}/cifar10_dynamic.pt"]
    holder = utils.CKPT / "cifar10_dynamic.pt"
    for trigger, known in (
        ({}, []),
        ({"trigger_sha256": "of another file"}, []),
        ({"trigger_sha256": utils.sha256(holder)}, [0.7]),
    ):
        house.record(clean.path, learned, figures(0.9, 0.01, 0.7), **trigger)
        (dynamic,) = (g for g in house.groups() if g.attack == "dynamic")
        assert victims.ceiling(dynamic, house.groups()) == known
    dynamic.victims[0].path.unlink()  # which has no record, either
    cells = [cell for v, cell in compare.missing([*dynamic.victims, clean], ["none"]) if v.attack == "none"]
    assert cells == ["none"]


def test_the_ceiling_takes_the_trigger_of_a_file_whose_name_reads_like_settings(house):
    path = house.victim("dynamic,seed=2", "dynamic")
    house.victim("n", "none")
    (cell,) = (cell for _, cell in compare.missing(house.victims(), ["none"]) if "attack" in cell)
    words = house.victims()[-1].words(cell)
    args = flags.parser(words[0]).parse_args(words[1:])
    assert (args.trigger_of, args.seed) == (str(path), 1024)


def test_the_estimate_is_by_the_records_of_the_same_cell_and_network(house):
    paths = [house.victim(name, width=0.25, seed=i) for i, name in enumerate("abcd")]
    wide = house.victim("wide")
    for path, seconds in zip(paths[:2], (100.0, 200.0), strict=True):
        house.record(path, "ft", figures(0.9, 0.5, 0.5), seconds=seconds)
    house.record(paths[0], "bcu", figures(0.9, 0.5, 0.5), seconds=900.0)
    house.record(wide, "bcu", figures(0.9, 0.5, 0.5), seconds=7200.0)
    everyone = house.victims()
    jobs = compare.missing(everyone, ["ft", "bcu", "anp"])
    assert len(jobs) == 3 + 3 + 5
    # two small ft, 150 s each, and three small bcu; of the wide ft and of all anp nothing is known
    assert compare.estimate(jobs, everyone) == (2 * 150 + 3 * 900, 6)
    assert compare.estimate(jobs, everyone, 4) == ((2 * 150 + 3 * 900) / 4, 6)
    assert compare.plan(jobs, everyone, 4) == (
        "11 cells have no record and are run, 4 at a time; about 12 min by the records of the same defense on such a"
        " network, without the measuring; for 6 of them no record says how long they take"
    )
    # the measuring alone takes no time that a record says; nothing is said of what is not known
    assert "about" not in compare.plan(compare.missing(everyone, ["anp"]), everyone, 1)


BUSY = """
import os, shutil, sys, time
from pathlib import Path
busy = Path(sys.argv[1]).parent / "busy"
busy.mkdir(exist_ok=True)
own = busy / str(os.getpid())
own.touch()
end = time.time() + 0.3
most = 0
while time.time() < end:
    most = max(most, len(list(busy.iterdir())))
    time.sleep(0.01)
own.unlink()
with open(busy.parent / "most", "a") as file:
    file.write(f"{most} {os.environ['OMP_NUM_THREADS']}\\n")
shutil.copy(*sys.argv[1:])
"""


def test_jobs_run_side_by_side_each_on_its_share_of_the_cores(house, monkeypatch):
    for i in range(4):
        house.victim(f"v{i}", seed=i)
    running(house, monkeypatch, code=BUSY)
    monkeypatch.setattr(compare, "cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    house.compare("--defenses", "ft", "--jobs", "2")
    said = [line.split() for line in (house.folder / "most").read_text().splitlines()]
    assert len(said) == 4
    assert not list((house.folder / "ckpt").glob("*.log"))  # what went well leaves no output behind
    assert max(int(most) for most, _ in said) == 2
    assert {threads for _, threads in said} == {"3"}
    assert [g.values("ft", "BA") for g in house.groups()] == [[0.5] * 4]


def test_a_cell_that_fails_does_not_take_the_rest_with_it(house, monkeypatch, capsys):
    house.victim("badnet")
    ran = running(house, monkeypatch, failing=["ulrl"])
    for _ in range(2):  # what failed is tried again
        ran.clear()
        with pytest.raises(SystemExit) as end:
            house.compare("--defenses", "ulrl", "ft")
        assert end.value.code == 1
        log = house.folder / "ckpt" / "cifar10_badnet_ulrl.log"
        said = f"failed:\ncifar10_badnet, ulrl: exit status 2, it said: why ({log})\n"
        assert capsys.readouterr().err == said
        assert log.read_text() == "why\n"
    assert [cell for _, cell in ran] == ["ulrl"]
    assert "| FT | 50.0 |" in (house.results / "README.md").read_text()


def test_a_cell_that_leaves_no_record_is_said(house, monkeypatch, capsys):
    house.victim("badnet")
    running(house, monkeypatch, code="print('nothing')")
    with pytest.raises(SystemExit):
        house.compare("--defenses", "ft")
    assert "cifar10_badnet, ft: it left no record that belongs here" in capsys.readouterr().err


def test_ctrl_c_ends_the_runs_and_leaves_what_is_done(house, monkeypatch):
    for name, attack in (("a", "badnet"), ("b", "wanet"), ("c", "reflection")):
        house.victim(name, attack)
    running(house, monkeypatch, code=f"import sys, time; 'cifar10_a' in sys.argv[1] or time.sleep(60); {COPY}")
    started, popen = [], compare.subprocess.Popen
    monkeypatch.setattr(compare.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])

    def sleep(seconds):
        if len(started) == 3:
            raise KeyboardInterrupt
        time_sleep(seconds)

    time_sleep = time.sleep
    monkeypatch.setattr(compare.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        house.compare("--defenses", "ft", "--jobs", "2")
    assert [p.returncode for p in started] == [0, -15, -15]
    found = sorted(p.relative_to(house.results).as_posix() for p in house.results.rglob("*.json"))
    assert found == ["cifar10_a/ft.json"]
    assert "| FT | 50.0 |" in (house.results / "README.md").read_text()  # the tables have it


# --- a cell as a command ----------------------------------------------------------------------------------------------

CELLS = [
    ("none", "none", {"defense": "none"}),
    ("ft,epochs=5", "ft,epochs=5", {"defense": "ft", "epochs": [5]}),
    ("bcu", "bcu", {"defense": "bcu"}),
    ("ulrl,draw=random", "ulrl,draw=random", {"defense": "ulrl", "draw": "random"}),
    ("unit", "unit", {"acc_degrade": 0.03}),
    ("unit,acc_degrade=0.05", "unit,acc_degrade=0.05", {"acc_degrade": 0.05}),
    # one run, however its settings are written
    ("unit,step_images=250,acc_degrade=0.050", "unit,acc_degrade=0.05,step_images=250", {"step_images": 250}),
    ("unit,acc_degrade=0.03", "unit", {"acc_degrade": 0.03}),
    ("none,attack=wanet", "none,attack=wanet", {"defense": "none", "attack": "wanet"}),
]


@pytest.mark.parametrize(("cell", "name", "settings"), CELLS)
def test_a_cell_is_a_command_whose_record_it_finds_again(house, cell, name, settings):
    path = house.victim("resnet18_badnet")
    (victim,) = house.victims()
    words = compare.command(victim, cell, house.args("--datadir", "D"), "pictures")
    script, *given = words[1:]
    assert script == str(flags.ROOT / ("unit.py" if cell.startswith("unit") else "defend.py"))
    args = flags.parser(Path(script).name).parse_args(given)
    asked = vars(args)
    assert {k: asked[k] for k in settings} == settings
    assert (asked["ckpt"], asked["datadir"], asked["device"]) == (str(path), "D", "cpu")
    assert (asked["attack"], asked["target"]) == (settings.get("attack", "badnet"), 0)
    place = records.path_of(cell.split(",")[0], args, {"file": path.name, "attack": "badnet"})
    assert place == house.results / path.stem / f"{name}.json" == victim.record_path(cell)
    assert victim.record(cell) is None
    house.record(path, name, figures(0.5, 0.25, 0.125))
    assert victim.record(cell)["after"]["BA"] == 0.5
    # what it saves stands beside the victims, a file for each cell, and is no victim
    out = asked["out"] and Path(asked["out"])
    assert (out is None) == (asked.get("defense") == "none")
    if out:
        assert out.parent == path.parent
        out.write_bytes(b"not to be opened")
        assert len(house.victims()) == 1


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"target": 2}, "target=2"),
        ({"target": "all"}, "target=all"),
        ({"dataset": "svhn", "size": 48, "target": 9}, "dataset=svhn,size=48,target=9"),
        ({"dataset": "cifar10", "size": 32, "target": 0}, ""),
    ],
)
@pytest.mark.parametrize("defense", ["unit", "anp"])
def test_what_a_victim_is_for_is_passed_on(house, changes, name, defense):
    house.victim("v", **changes)
    (victim,) = house.victims()
    script, *given = compare.command(victim, defense, house.args(), "pictures")[1:]
    asked = vars(flags.parser(Path(script).name).parse_args(given))
    assert {k: asked[k] for k in changes} == changes
    assert victim.record_path(defense).name == ",".join(filter(None, (defense, name))) + ".json"


@pytest.mark.parametrize("cell", ["units", "dbd", "", "unit,acc_degrade", "ft,", "sweep,seed=1"])
def test_an_unknown_column_is_refused(house, cell):
    house.victim("resnet18_badnet")
    with pytest.raises(InputError, match="no column"):
        house.compare("--defenses", "none", cell)
    assert not house.results.exists()


@pytest.mark.parametrize("cell", ["unit,no_such=1", "ft,step_images=3", "unit,acc_degrade=2"])
def test_an_unknown_setting_of_a_column_is_refused(house, cell, capsys):
    house.victim("resnet18_badnet")
    with pytest.raises(SystemExit) as end:
        house.compare("--defenses", "none", cell)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert cell.split(",")[1].split("=")[0] in err
    assert not house.results.exists()


def test_an_unknown_column_ends_in_one_line_and_status_2(tmp_path):
    process = command("compare.py", "--no-run", "--results", str(tmp_path / "results"), "--defenses", "units")
    out, err = process.communicate()
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert "no column 'units'" in err
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_named_and_no_victim_is_refused(house, monkeypatch):
    path = house.victim("a")
    foreign, defended = house.folder / "mine.pt", house.folder / "ckpt" / "cifar10_a_ft.pt"
    torch.save(house.state, foreign)
    utils.save_checkpoint(utils.load_checkpoint(path) | {"defense": {"name": "ft"}}, defended)
    ran = running(house, monkeypatch)
    for other in (foreign, defended):
        with pytest.raises(InputError, match=rf"{other.name} is defended or from elsewhere"):
            house.compare("--defenses", "ft", "--victims", str(path), str(other))
    assert not ran
    assert not house.results.exists()


def test_a_cell_of_ones_own_folder_of_images_keeps_its_output_in_ckpt(house, monkeypatch):
    house.victim("a")
    running(house, monkeypatch, failing=["ft,dataset=folder:/some/signs"])
    with pytest.raises(SystemExit):
        house.compare("--defenses", "ft,dataset=folder:/some/signs")
    assert (house.folder / "ckpt" / "cifar10_a_ft_dataset=folder-signs.log").read_text() == "why\n"


def test_a_place_that_takes_no_output_is_said_and_nothing_runs(house, monkeypatch):
    path = house.victim("a")
    ran = running(house, monkeypatch)
    monkeypatch.setattr(utils, "CKPT", path)  # a file, in which nothing can be written
    with pytest.raises(InputError, match="cannot write"):
        house.compare("--defenses", "ft", "--victims", str(path))
    assert not ran


def test_a_trajectory_that_is_cut_off_is_named(house):
    path = house.victim("a")
    figs = {"settings": {"acc_degrade": 0.03}, "initial_acc": 0.9, "best_step": 1, "steps": 3}
    house.record(path, "unit", figures(0.5, 0.5, 0.5), **figs)
    trajectory = house.results / path.stem / "unit.npz"
    np.savez_compressed(trajectory, reg=np.arange(300.0))
    whole = trajectory.read_bytes()
    for content in (b"", whole[:200], b"no zip"):
        trajectory.write_bytes(content)
        with pytest.raises(InputError, match=r"unit\.npz is no trajectory"):
            house.compare("--no-run")
    for names in (("reg",), ("alpha", "ce", "reg", "valid_acc")):  # of other figures, of another number of steps
        np.savez_compressed(trajectory, **dict.fromkeys(names, np.arange(4.0)))
        with pytest.raises(InputError, match=r"unit\.npz is no trajectory"):
            house.compare("--no-run")


def test_without_victims_there_is_nothing_to_compare(house):
    with pytest.raises(InputError, match="nothing to compare"):
        house.compare()
    with pytest.raises(InputError, match=r"no checkpoint .*x\.pt"):
        house.compare("--victims", str(house.folder / "x.pt"))


def test_a_page_without_a_place_is_known_before_anything_is_run(house, monkeypatch):
    house.victim("resnet18_badnet")
    house.results.mkdir()
    (house.results / "README.md").write_text("nothing here")
    ran = running(house, monkeypatch)
    with pytest.raises(InputError, match="no place"):
        house.compare()
    assert not ran
    assert [p.name for p in house.results.iterdir()] == ["README.md"]


def test_two_cells_are_run_and_compared(tmp_path, victim_file, monkeypatch, few_test_images):
    """As a user does it, but for the process: on a real victim and the embedded sample."""

    class InThisProcess(SimpleNamespace):
        def __init__(self, words, **_):
            defend.main([*words[2:], "--precision", "fp32"])
            super().__init__(returncode=0, poll=lambda: 0)

        __hash__ = object.__hash__

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(Popen=InThisProcess, STDOUT=None))
    monkeypatch.setattr(utils, "CKPT", tmp_path)
    cells = ["none,dataset=cifar10_sample", "clp,dataset=cifar10_sample"]
    given = ["--victims", str(victim_file), "--results", str(tmp_path / "results"), "--device", "cpu", "--defenses"]
    compare.main([*given, *cells])
    monkeypatch.setattr(compare, "subprocess", None)  # and runs nothing again
    compare.main([*given, *cells])
    found = [json.loads((tmp_path / "results" / "victim" / f"{cell}.json").read_text()) for cell in cells]
    page = (tmp_path / "results" / "runs.md").read_text()
    for cell, record in zip(cells, found, strict=True):
        shares = [record["after"][k] for k in ("BA", "ASR", "RA")]
        assert all(0 < s < 1 for s in shares)
        assert f"| victim | {cell} | {' / '.join(f'{100 * s:.2f}' for s in shares)} |" in page
        assert record["victim"] == records.victim_of(victim_file, utils.load_checkpoint(victim_file))
    assert (tmp_path / "victim_clp_dataset=cifar10_sample.pt").exists()
