"""Victims and their seeds, as compare.py finds them."""

from flags import InputError

import json
import shutil

import pytest
import torch

import utils
from support import records, tables, victims
from tests.house import figures


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


def test_two_files_of_one_name_are_refused(house):
    a, other = house.victim("a"), house.folder / "elsewhere" / "cifar10_a.pt"
    other.parent.mkdir()
    other.write_bytes(a.read_bytes())
    victims.all_victims(house.results, [other])  # the same file twice
    utils.save_checkpoint(utils.load_checkpoint(a) | {"seed": 2}, other)
    with pytest.raises(InputError, match=f"{other} and {a} would share their records; rename one"):
        victims.all_victims(house.results, [other])


@pytest.mark.parametrize("said", [{"target": "xyz"}, {"dataset": "imagenet"}, {"size": 4}])
def test_a_file_that_says_what_cannot_be_is_named(house, said):
    path = house.victim("a", **said)
    ((key, value),) = said.items()
    with pytest.raises(InputError, match=f"the {key} of {path} is {value!r}; move it elsewhere"):
        house.victims()


@pytest.mark.parametrize("key", ["network", "width", "num_classes"])
def test_what_a_file_leaves_open_is_taken_from_its_weights(house, key):
    path = house.victim("a", width=0.125)
    utils.save_checkpoint(utils.load_checkpoint(path) | {key: None}, path)
    (victim,) = house.victims()
    assert [victim.about[k] for k in ("network", "width", "num_classes")] == ["resnet18", 0.125, 10]
