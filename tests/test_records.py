"""Records of runs: their names, what they hold, and how they are found again."""

from flags import InputError

import json

import numpy as np
import pytest
import torch

import unit
from evaluate import Measured
from support import records
from tests.house import parsed

CPU = torch.device("cpu")

BADNET = {"file": "cifar10_resnet18_badnet.pt", "sha256": "0", "attack": "badnet"}


@pytest.mark.parametrize(
    ("defense", "given", "name"),
    [
        ("unit", [], "unit"),
        ("unit", ["--n_steps", "300", "--acc_degrade", "0.030", "--seed", "1024"], "unit"),  # the defaults, given
        ("unit", ["--step_images", "250", "--acc_degrade", "0.05"], "unit,acc_degrade=0.05,step_images=250"),
        ("unit", ["--acc_degrade", "0.05", "--step_images", "250"], "unit,acc_degrade=0.05,step_images=250"),
        ("unit", ["--seed", "7", "--draw", "random"], "unit,draw=random,seed=7"),
        ("ft", ["--data_rate", "0.01", "--epochs", "3"], "ft,data_rate=0.01,epochs=3"),
        ("dbd", ["--epochs", "2", "1", "3", "--poison_rate", "0.2"], "dbd,epochs=2+1+3,poison_rate=0.2"),
        ("bcu", ["--dataset", "cifar10_sample", "--target", "1"], "bcu,dataset=cifar10_sample,target=1"),
        # where and how it is computed, and under which name, is none of it
        ("unit", ["--device", "cpu", "--precision", "fp32", "--micro_batch", "9", "--batch_size", "9"], "unit"),
        ("unit", ["--max_minutes", "9", "--no-resume", "--out", "x", "--outdir", "y", "--ckpt", "z"], "unit"),
        ("unit", ["--export", "/x/y.pt2"], "unit"),
        ("ulrl", ["--datadir", "x", "--network", "resnet50", "--device", "cpu"], "ulrl"),
    ],
)
def test_the_name_of_a_record_has_what_differs_from_the_defaults(tmp_path, defense, given, name):
    args = parsed(defense, *given, "--results", str(tmp_path))
    assert records.path_of(defense, args, BADNET) == tmp_path / "cifar10_resnet18_badnet" / f"{name}.json"


@pytest.mark.parametrize(
    ("own", "given", "name"),
    [
        ("badnet", "badnet", "none"),
        ("wanet", "wanet", "none"),
        ("badnet", "wanet", "none,attack=wanet"),
        ("none", "badnet", "none,attack=badnet"),  # though it is the flag's default
        ("badnet", "none", "none,attack=none"),
        (None, "wanet", "none"),  # of unknown origin
    ],
)
def test_the_name_of_a_record_has_an_attack_that_is_not_the_victims(tmp_path, own, given, name):
    args = parsed("none", "--attack", given, "--results", str(tmp_path))
    victim = {"file": tmp_path / "elsewhere" / "v.pt", "attack": own}
    assert records.path_of("none", args, victim) == tmp_path / "v" / f"{name}.json"


def unit_run(tmp_path, n_steps=300):
    """A run of UNIT as large as the default one: its record's path and trajectory, saved."""
    args = parsed("unit", "--results", str(tmp_path))
    measured = Measured(0.9072999999999999, 0.012888888888888889, 0.8991111111111111, 0.91, 10000, 9000, 1000)
    g = torch.Generator().manual_seed(0)
    history = {k: torch.rand(n_steps, generator=g).tolist() for k in ("alpha", "ce", "reg", "valid_acc")}
    figures = {"before": measured._asdict(), "after": measured._asdict(), "seconds": 1257.123456789, "peak_GiB": 1 / 3}
    figures |= {"n_train": 2000, "n_valid": 500, "steps": n_steps, "interrupted": None, "best_step": 285}
    figures |= {"found_good": True, "initial_acc": 0.9340000152587891, "R": [10.560123456789, 8.290123456789]}
    victim = {"file": "cifar10_resnet18_badnet.pt", "sha256": "0123456789abcdef" * 4, "attack": "badnet"}
    path = records.path_of("unit", args, victim)
    records.save(path, "unit", args, unit.UnitConfig(precision="bf16"), victim, CPU, figures, history)
    return path, history, figures, victim


def test_a_record_is_small_and_its_trajectory_lies_beside_it(tmp_path):
    path, history, figures, victim = unit_run(tmp_path)
    assert path.stat().st_size < 5000
    record = json.loads(path.read_text())
    assert {k: record[k] for k in figures} == figures
    assert (record["defense"], record["victim"]) == ("unit", victim)
    assert {k: record["settings"][k] for k in ("acc_degrade", "n_sigma", "betas", "precision", "n_steps")} == {
        "acc_degrade": 0.03, "n_sigma": 4.0, "betas": [0.5, 0.9], "precision": "bf16", "n_steps": 300
    }  # fmt: skip
    assert not {"datadir", "ckpt", "out", "outdir", "results"} & set(record["settings"])  # of this machine alone
    assert {"python", "torch", "device", "kind", "threads", "date", "processes"} == set(record["machine"])
    with np.load(path.with_suffix(".npz")) as file:
        assert set(file) == set(history)
        for name, values in history.items():
            np.testing.assert_array_equal(file[name], np.float32(values))
    assert sorted(p.name for p in path.parent.iterdir()) == ["unit.json", "unit.npz"]


def test_a_record_says_whose_trigger_was_planted(tmp_path):
    holder = tmp_path / "holder.pt"
    holder.write_bytes(b"abc")
    args = parsed("none", "--trigger_of", str(holder), "--results", str(tmp_path))
    victim = {"file": "v.pt", "sha256": "0" * 64, "attack": "none"}
    path = records.path_of("none", args, victim)
    records.save(path, "none", args, unit.UnitConfig(), victim, CPU, {})
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", by FIPS 180-2
    assert json.loads(path.read_text())["trigger_sha256"] == sha256


def test_a_record_is_found_by_the_weights_of_its_victim(tmp_path):
    path, _, figures, victim = unit_run(tmp_path)
    assert records.load(path, victim["sha256"])["after"] == figures["after"]
    assert records.load(path, "f" * 64) is None
    assert records.load(path.with_name("ft.json"), victim["sha256"]) is None
    for why in ("interrupted", "out of time"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"interrupted": why}))
        assert records.load(path, victim["sha256"]) is None


def test_a_run_that_was_cut_off_does_not_replace_a_whole_one(tmp_path):
    path, history, figures, victim = unit_run(tmp_path, 3)
    whole, trajectory = path.read_bytes(), path.with_suffix(".npz").read_bytes()

    def save(**changes):
        given = parsed("unit", "--results", str(tmp_path)), unit.UnitConfig(precision="bf16")
        return records.save(path, "unit", *given, victim | changes, CPU, figures | {"interrupted": "interrupted"}, {})

    assert not save()
    assert (path.read_bytes(), path.with_suffix(".npz").read_bytes()) == (whole, trajectory)
    for content in (whole.replace(b": null", b': "out of time"'), b"no record"):
        path.write_bytes(content)
        assert save()
        assert json.loads(path.read_text())["interrupted"] == "interrupted"
    path.write_bytes(whole)
    assert not save(sha256="f" * 64)  # of other weights
    assert path.read_bytes() == whole


def test_a_record_of_another_file_of_the_same_name_is_kept_beside(tmp_path):
    path, _, figures, victim = unit_run(tmp_path, 3)
    whole = path.read_bytes()
    given = parsed("unit", "--results", str(tmp_path)), unit.UnitConfig(precision="bf16")
    assert records.save(path, "unit", *given, victim, CPU, figures)
    assert [p.name for p in path.parent.glob("*.json*")] == [path.name]
    path.write_bytes(whole)
    with pytest.warns(match=rf"was of another file named {victim['file']}; it is now .*{path.name}.old"):
        assert records.save(path, "unit", *given, victim | {"sha256": "f" * 64}, CPU, figures)
    assert path.with_name(f"{path.name}.old").read_bytes() == whole
    assert json.loads(path.read_text())["victim"]["sha256"] == "f" * 64


def test_settings_are_those_of_the_command(tmp_path):
    """--width and --poison_rate are of DBD's own network; a victim's stand in its recipe."""
    for defense, own in (("ft", set()), ("dbd", {"width", "poison_rate", "overwrite"})):
        path = tmp_path / f"{defense}.json"
        records.save(path, defense, parsed(defense), unit.UnitConfig(), BADNET, CPU, {})
        assert {"width", "poison_rate", "overwrite"} & set(json.loads(path.read_text())["settings"]) == own


@pytest.mark.parametrize("content", ["{}", "[]", "", "no json", '{"victim": "x.pt"}', '{"victim": null}'])
def test_what_is_no_record_is_named(tmp_path, content):
    (tmp_path / "unit.json").write_text(content)
    with pytest.raises(InputError, match=r"unit\.json is no record of a run"):
        records.load(tmp_path / "unit.json", "0")
