"""The commands as a user runs them, on the embedded sample and small networks; exit statuses."""

import json
import os
import platform
import re
import subprocess
import sys

import pytest
import torch

import train
import unit
import utils
from cli import ROOT, InputError
from tests.running import SMALL, TORCHRUN, TRAIN, command, run_unit

SCRIPTS = ["train.py", "evaluate.py", "unit.py", "defend.py", "dbd.py", "compare.py", "sweep.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_flags_end_in_one_line_and_status_2(script):
    needed = ["--defense", "ft"] if script == "defend.py" else []
    for flags in (["--attack", "badnets"], ["--seed", "x"], ["--batch_size", "0"], ["--nonsense"], ["--target", "10"]):
        process = command(script, *needed, *flags)
        out, err = process.communicate()
        assert process.returncode == 2
        assert out == ""
        assert err.count("\n") == 1
        assert flags[0] in err


@pytest.mark.parametrize(
    ("script", "flags", "reason"),
    [
        ("unit.py", ["--lr", "-1"], "above 0"),
        ("unit.py", ["--lr", "nan"], "finite"),
        ("unit.py", ["--data_rate", "1.5"], "at most 1"),
        ("unit.py", ["--n_steps", "2.5"], "whole number"),
        ("train.py", ["--width", "0"], "at least"),
        ("train.py", ["--seed", "1" + 400 * "0"], "too large"),
        ("evaluate.py", ["--batch_size", "10000000000000000000000"], "too large"),
    ],
)
def test_numbers_out_of_range(script, flags, reason):
    process = command(script, *flags)
    assert reason in process.communicate()[1]
    assert process.returncode == 2


def test_report_takes_no_flag_and_its_help_writes_nothing():
    pages = [ROOT / "README.md", ROOT / "ckpt" / "README.md"]
    before = [page.stat().st_mtime_ns for page in pages]
    for flag, status in (("--help", 0), ("--nonsense", 2)):
        process = command("report.py", flag)
        _, err = process.communicate()
        assert process.returncode == status
        assert err.count("\n") == status // 2
    assert [page.stat().st_mtime_ns for page in pages] == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_of_the_paper(script):
    process = command(script, "--help")
    out, _ = process.communicate()
    assert process.returncode == 0
    for flag in ("datadir", "dataset", "network", "attack", "seed", "batch_size", "target", "device"):
        assert f"--{flag}" in out


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_freed_memory_is_kept_for_the_next_tensor():
    code = """import cli, resource
{}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
big = bytes(2**26)
bytearray(big)
before = faults()
for _ in range(4):
    bytearray(big)
print(faults() - before)"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    given_back, kept = (
        int(subprocess.check_output((sys.executable, "-c", code.format(first)), cwd=ROOT, env=env))
        for first in ("", "cli.keep_freed_memory()")
    )
    assert given_back >= 4 * 2**26 / 2**21  # pages of 2 MiB at the largest
    assert kept < given_back / 10


def test_a_missing_checkpoint_is_one_line_and_status_2():
    process = command("evaluate.py", *SMALL, "--network", "resnet50", "--attack", "wanet")
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert "python train.py --network resnet50 --attack wanet" in err


def test_unit_saves_what_it_measured(victim_file, tmp_path, capsys):
    run_unit(victim_file, tmp_path, "--n_steps", "11", "--lr", "0.01")
    out = capsys.readouterr().out
    assert re.search(r"before  Benign accuracy: \d+\.\d\d%, ASR: \d+\.\d\d% \(2,000 / 1,800 images\)", out)
    assert "a part of CIFAR-10's 10,000" in out
    steps = [line for line in out.splitlines() if line.startswith("step ") and "CE" in line]
    assert len(steps) == 2  # the tenth, and the last
    assert all(word in steps[0] for word in ("CE", "R", "alpha", "validation accuracy"))

    (record,) = (tmp_path / "results").iterdir()
    record = json.loads(record.read_text())
    assert [len(v) for v in record["history"].values()] == [11] * 4
    assert record["settings"]["acc_degrade"] == 0.03
    assert record["settings"]["n_sigma"] == 4.0
    assert (record["n_train"], record["n_valid"]) == (400, 100)
    assert record["settings"]["micro_batch"] == 100
    assert record["victim"]["sha256"] == utils.sha256(victim_file)
    assert 0.1 < record["peak_GiB"] < 24
    assert (tmp_path / "unit_badnet.png").exists()

    after = out[out.index("after ") :].split("after   ")[1].splitlines()[0]
    run_unit(victim_file, tmp_path, "--phase", "test")
    assert after in capsys.readouterr().out  # the saved model gives the same figures again

    defended = utils.load_checkpoint(tmp_path / "d.pt")
    assert defended["BA"] == record["after"]["BA"]
    assert defended["defence"]["best_step"] == record["best_step"]
    with pytest.raises(InputError, match="bounds already"):
        run_unit(tmp_path / "d.pt", tmp_path)


def test_a_victim_from_elsewhere_is_saved_to_the_last_bit(tiny, tmp_path, capsys):
    """Its weights are no half-precision numbers, and its attack is known to the user alone."""
    foreign = tmp_path / "foreign.pt"
    torch.save({k: v * (1 + 1e-5) if v.dim() > 1 else v for k, v in tiny.state_dict().items()}, foreign)
    run_unit(foreign, tmp_path, "--n_steps", "1", "--attack", "badnet", "--target", "0")
    before, after = (utils.load_checkpoint(p) for p in (foreign, tmp_path / "d.pt"))
    weights = before["state_dict"]
    assert all(torch.equal(after["state_dict"][k].to(v.dtype), v) for k, v in weights.items())
    assert (after["attack"], after["target"]) == ("badnet", 0)
    printed = capsys.readouterr().out.split("after   ")[1].splitlines()[0]
    run_unit(foreign, tmp_path, "--phase", "test")
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--out", "--outdir", "--results"])
def test_a_place_that_cannot_be_written_is_said_before_the_search(victim_file, tmp_path, flag, monkeypatch):
    monkeypatch.setattr(unit, "tighten", lambda *_args: pytest.fail("the search began"))
    (tmp_path / "file").write_text("")
    bad = {"--out": tmp_path, "--outdir": tmp_path / "file" / "x", "--results": tmp_path / "file"}[flag]
    with pytest.raises(InputError, match="cannot write"):
        run_unit(victim_file, tmp_path, flag, str(bad))
    before = victim_file.read_bytes()
    with pytest.raises(InputError, match="the victim"):
        run_unit(victim_file, tmp_path, "--out", str(victim_file))
    assert victim_file.read_bytes() == before


def test_two_processes_find_the_same(victim_file, tmp_path, one_thread):
    """torchrun shares the images among its processes; alphas agree exactly, bounds to rounding."""
    # with the default seed, on AVX-512, an activation meets its bound to the last bit: clipped in one, not in the other
    short = [*SMALL, "--ckpt", str(victim_file), "--n_steps", "4", "--lr", "0.01", "--seed", "1"]
    folders = [tmp_path / "1", tmp_path / "2"]
    alone, shared = ([*short, "--out", str(f / "d.pt"), "--results", str(f), "--outdir", str(f)] for f in folders)
    process = command("unit.py", *shared, launcher=TORCHRUN, cwd=tmp_path)
    unit.main(alone)  # meanwhile
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("after ") == 1  # one process speaks
    one, two = (json.loads(path.read_text()) for folder in folders for path in folder.glob("*.json"))
    bounds_one, bounds_two = (utils.load_checkpoint(folder / "d.pt")["bounds"] for folder in folders)
    assert (one["machine"]["processes"], two["machine"]["processes"]) == (1, 2)
    assert one["history"]["alpha"] == two["history"]["alpha"]
    assert one["best_step"] == two["best_step"]
    assert one["history"]["valid_acc"] == two["history"]["valid_acc"]
    for name in bounds_one:
        difference = (bounds_two[name] - bounds_one[name]).abs()
        # an activation that meets its bound to the last bit may be clipped in one and not in the other
        assert (difference > 1e-5).float().mean() < 1e-3
        assert difference.max() < 0.01


def test_two_processes_train_one_victim(tmp_path):
    out = tmp_path / "v.pt"
    process = command("train.py", *TRAIN, "--attack", "badnet", "--ckpt", str(out), launcher=TORCHRUN, cwd=tmp_path)
    said, err = process.communicate()
    assert process.returncode == 0, err
    assert said.count("epoch   3") == 1
    history = utils.load_checkpoint(out)["history"]
    assert len(history) == 3
    assert history[2]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("attack", ["none", "wanet", "reflection", "blended"])
def test_every_attack_trains_and_is_saved_with_what_judges_it(tmp_path, attack, capsys):
    out = tmp_path / "v.pt"
    flags = ["--poison_rate", "0.04"] if attack == "reflection" else []
    train.main([*TRAIN, "--epochs", "1", "--attack", attack, "--ckpt", str(out), *flags])
    v = utils.load_checkpoint(out)
    assert (v["attack"], v["target"], v["dataset"], v["width"], v["seed"]) == (
        attack,
        0,
        "cifar10_sample",
        0.0625,
        1024,
    )
    assert v["poison_rate"] == {"none": 0.0, "wanet": 0.1, "reflection": 0.04, "blended": 0.05}[attack]
    assert len(v["poison_indices"]) == {"none": 0, "wanet": 0, "reflection": 20, "blended": 25}[attack]
    assert (v["trigger"] is None) == (attack == "none")
    assert (v["n_clean"], v["n_triggered"]) == (2000, 0 if attack == "none" else 1800)
    assert v["versions"]["torch"] == str(torch.__version__)
    assert "Benign accuracy" in capsys.readouterr().out
