"""The commands as a user runs them, on the embedded sample and small networks; exit statuses."""

from flags import ROOT, InputError, parser

import json
import os
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import evaluate
import train
import unit
import utils
from support import records
from tests.running import SMALL, TORCHRUN, TRAIN, command, run_defend, run_unit

pytestmark = pytest.mark.usefixtures("few_test_images")


@pytest.mark.parametrize(
    ("script", "words", "reason"),
    [
        ("unit.py", ["--lr", "-1"], "above 0"),
        ("unit.py", ["--lr", "nan"], "finite"),
        ("unit.py", ["--data_rate", "1.5"], "at most 1"),
        ("unit.py", ["--n_steps", "2.5"], "whole number"),
        ("unit.py", ["--target", "-1"], "at least 0"),
        ("unit.py", ["--target", "every"], "not a whole number"),
        ("unit.py", ["--size", "4"], "at least 8"),
        ("unit.py", ["--dataset", "folder:"], "invalid choice"),
        ("train.py", ["--width", "0"], "at least"),
        ("train.py", ["--seed", "1" + 400 * "0"], "too large"),
        ("train.py", ["--sampling", "once"], "invalid choice"),
        ("evaluate.py", ["--batch_size", "10000000000000000000000"], "too large"),
        ("evaluate.py", ["--attack", "badnets"], "invalid choice"),
        ("defend.py", ["--defense", "bcu", "--epochs", "0"], "at least 1"),
    ],
)
def test_a_value_that_cannot_be_is_one_line_and_status_2(script, words, reason, capsys):
    with pytest.raises(SystemExit) as left:
        parser(script).parse_args(words)
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert reason in err
    assert words[-2] in err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_freed_memory_is_kept_for_the_next_tensor():
    code = """import flags, resource
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
        for first in ("", "flags.keep_freed_memory()")
    )
    assert given_back >= 4 * 2**26 / 2**21  # pages of 2 MiB at the largest
    assert kept < given_back / 10


def test_what_unit_has_not_made_is_not_measured(victim_file, tmp_path):
    with pytest.raises(InputError, match="no defended model .*d.pt; make it by the same command without --phase test"):
        run_unit(victim_file, tmp_path, "--phase", "test")


def test_a_missing_checkpoint_is_one_line_and_status_2():
    process = command("evaluate.py", *SMALL, "--network", "resnet50", "--attack", "wanet")
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert "python train.py --network resnet50 --attack wanet" in err


def test_unit_saves_what_it_measured(victim_file, tmp_path, capsys):
    run_unit(victim_file, tmp_path, "--n_steps", "11", "--lr", "0.01", "--data_rate", "0.2")
    out = capsys.readouterr().out
    shares = r"BA \d+\.\d\d %  ASR \d+\.\d\d %  RA \d+\.\d\d %  target class \d+\.\d\d %"
    n_target = int((data.load_dataset("cifar10_sample", None, train=False)[1] == 0).sum())
    counts = rf"\(100 clean, {100 - n_target} triggered, {n_target} of the target class\)"
    assert re.search(rf"before  {shares}  {counts}", out)
    assert re.search(rf"after   {shares}  {counts}", out)
    steps = [line for line in out.splitlines() if line.startswith("step ") and "CE" in line]
    assert len(steps) == 2  # the tenth, and the last
    assert all(word in steps[0] for word in ("CE", "R", "alpha", "validation accuracy"))

    path = tmp_path / "results" / "victim" / "unit,data_rate=0.2,dataset=cifar10_sample,lr=0.01,n_steps=11.json"
    assert path.stat().st_size < 5000
    record = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz")) as history:
        assert [len(history[k]) for k in ("alpha", "ce", "reg", "valid_acc")] == [11] * 4
        assert record["R"] == pytest.approx([history["reg"][i] for i in (0, record["best_step"])])
    assert record["settings"]["acc_degrade"] == 0.03
    assert record["settings"]["n_sigma"] == 4.0
    assert (record["n_train"], record["n_valid"], record["steps"]) == (80, 20, 11)
    assert record["settings"]["micro_batch"] == 100
    assert record["victim"] == records.victim_of(victim_file, utils.load_checkpoint(victim_file))
    assert (record["victim"]["file"], record["victim"]["sha256"]) == ("victim.pt", utils.sha256(victim_file))
    assert 0.1 < record["peak_GiB"] < 24
    assert not record["interrupted"]
    assert (tmp_path / "unit_badnet.png").exists()
    assert not (tmp_path / "d.partial.pt").exists()

    after = out[out.index("after ") :].split("after   ")[1].splitlines()[0]
    run_unit(victim_file, tmp_path, "--phase", "test")
    assert after in capsys.readouterr().out  # the saved model gives the same figures again

    defended = utils.load_checkpoint(tmp_path / "d.pt")
    assert {k: defended[k] for k in record["after"]} == record["after"]
    assert defended["defense"]["best_step"] == record["best_step"]
    with pytest.raises(InputError, match="bounds already"):
        run_unit(tmp_path / "d.pt", tmp_path)
    utils.save_checkpoint(defended | {"bounds": None}, tmp_path / "tuned.pt")  # as of another defense
    with pytest.raises(InputError, match="is a defended model; give --ckpt the victim"):
        run_unit(tmp_path / "tuned.pt", tmp_path)
    with pytest.raises(InputError, match="defended model"):
        run_defend(tmp_path / "d.pt", tmp_path, "--defense", "none")


@pytest.mark.usefixtures("few_tries", "undrawn")
def test_a_victim_from_elsewhere_is_saved_to_the_last_bit(tiny, tmp_path, capsys):
    """Its weights are not representable in half precision, and the file does not name its attack."""
    foreign = tmp_path / "foreign.pt"
    torch.save({k: v * (1 + 1e-5) if v.dim() > 1 else v for k, v in tiny.state_dict().items()}, foreign)
    run_unit(foreign, tmp_path, "--n_steps", "1", "--data_rate", "0.2", "--attack", "badnet", "--target", "0")
    before, after = (utils.load_checkpoint(p) for p in (foreign, tmp_path / "d.pt"))
    weights = before["state_dict"]
    assert all(torch.equal(after["state_dict"][k].to(v.dtype), v) for k, v in weights.items())
    assert (after["attack"], after["target"], after["dataset"]) == ("badnet", 0, "cifar10_sample")
    printed = capsys.readouterr().out.split("after   ")[1].splitlines()[0]
    run_unit(foreign, tmp_path, "--phase", "test")
    assert printed in capsys.readouterr().out


ALONE = """
import sys
import torch
program = torch.export.load(sys.argv[1]).module()
images = torch.load(sys.argv[2])
torch.save([program(images), program(images[:1])], sys.argv[3])
assert "models" not in sys.modules
"""


@pytest.mark.usefixtures("undrawn")
def test_an_exported_model_needs_torch_alone(victim_file, tmp_path, capsys, monkeypatch):
    """Loaded in another folder by an interpreter that sees nothing of this project."""
    images = torch.rand(5, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    export = ["--export", str(tmp_path / "a.pt2")]
    run_unit(victim_file, tmp_path, "--n_steps", "1", "--data_rate", "0.2", *export)
    assert f"wrote {tmp_path / 'a.pt2'}" in capsys.readouterr().out
    command = [sys.executable, "-I", "-c", ALONE, "a.pt2", "images.pt", "logits.pt"]
    subprocess.run(command, cwd=tmp_path, check=True)
    whole, one = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        want = utils.load_model(tmp_path / "d.pt")[0](images)
    torch.testing.assert_close(whole, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one, want[:1], rtol=1e-4, atol=1e-4)

    written = []
    monkeypatch.setattr(unit, "write_export", lambda *what: written.append(what[1:]))
    run_unit(victim_file, tmp_path, "--phase", "test", *export)
    assert written == [(str(tmp_path / "a.pt2"), 32)]


@pytest.mark.parametrize("flag", ["--out", "--outdir", "--results", "--export"])
def test_a_place_that_cannot_be_written_is_said_before_the_search(victim_file, tmp_path, flag, monkeypatch):
    monkeypatch.setattr(unit, "tighten", lambda *_args: pytest.fail("the search began"))
    (tmp_path / "file").write_text("")
    bad = {"--out": tmp_path, "--outdir": tmp_path / "file" / "x", "--results": tmp_path / "file"}.get(flag, tmp_path)
    with pytest.raises(InputError, match="cannot write"):
        run_unit(victim_file, tmp_path, flag, str(bad))
    before = victim_file.read_bytes()
    with pytest.raises(InputError, match="the victim"):
        run_unit(victim_file, tmp_path, "--out", str(victim_file))
    for phase in ("unit", "test"):
        with pytest.raises(InputError, match="--export is the victim"):
            run_unit(victim_file, tmp_path, "--export", str(victim_file), "--phase", phase)
        with pytest.raises(InputError, match="--export is the defended model"):
            run_unit(victim_file, tmp_path, "--export", str(tmp_path / "d.pt"), "--phase", phase)
    assert victim_file.read_bytes() == before


BOTH = f"""import json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed, train, unit
unit.main(json.loads(sys.argv[1]))
torch.distributed.init_process_group = lambda *_: None  # they have joined it
train.main(json.loads(sys.argv[2]))
"""


@pytest.mark.usefixtures("one_thread")
def test_two_processes_find_the_same_and_train_one_victim(victim_file, few_images, tmp_path):
    """torchrun shares each step's images among its processes; alphas agree exactly, CE, R and bounds to rounding.

    Both commands run after one another in the same two processes, to save time.
    """
    # with the default seed, on AVX-512, an activation meets its bound to the last bit: clipped in one, not in the other
    short = [*SMALL, *few_images, "--ckpt", str(victim_file), "--n_steps", "4", "--lr", "0.01", "--seed", "1"]
    short += ["--data_rate", "1", "--step_images", "151"]  # of 200
    folders = [tmp_path / "1", tmp_path / "2"]
    alone, shared = ([*short, "--out", str(f / "d.pt"), "--results", str(f), "--outdir", str(f)] for f in folders)
    training = [*TRAIN, *few_images, "--epochs", "2", "--attack", "badnet", "--ckpt", str(tmp_path / "v.pt")]
    (tmp_path / "both.py").write_text(BOTH)
    process = command(tmp_path / "both.py", *map(json.dumps, (shared, training)), launcher=TORCHRUN, cwd=tmp_path)
    unit.main(alone)  # meanwhile
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert (out.count("after   BA"), out.count("epoch   2")) == (1, 1)  # one process speaks
    paths = [next(folder.rglob("*.json")) for folder in folders]
    one, two = (json.loads(path.read_text()) for path in paths)
    paths = [path.with_suffix(".npz") for path in paths]
    alphas, accuracies, ce, reg = ([np.load(p)[k].tolist() for p in paths] for k in ("alpha", "valid_acc", "ce", "reg"))
    bounds_one, bounds_two = (utils.load_checkpoint(folder / "d.pt")["bounds"] for folder in folders)
    assert (one["machine"]["processes"], two["machine"]["processes"]) == (1, 2)
    assert alphas[0] == alphas[1]
    assert one["best_step"] == two["best_step"]
    assert accuracies[0] == accuracies[1]
    np.testing.assert_allclose(*ce, rtol=1e-4)
    np.testing.assert_allclose(*reg, rtol=1e-6)
    for name in bounds_one:
        difference = (bounds_two[name] - bounds_one[name]).abs()
        # an activation that meets its bound to the last bit may be clipped in one and not in the other
        assert (difference > 1e-5).float().mean() < 1e-3
        assert difference.max() < 0.01

    history = utils.load_checkpoint(tmp_path / "v.pt")["history"]
    assert len(history) == 2
    assert history[1]["loss"] < history[0]["loss"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("attack", ["none", "wanet", "blended", "input_aware"])
def test_every_kind_of_attack_trains_a_victim_that_measures_as_it_said(tmp_path, attack, capsys, monkeypatch):
    """By the file alone, with its trigger, and by the flags that name it; also after a defense."""
    monkeypatch.setattr("backdoors.networks.WARM_UP", 2)
    out, width = tmp_path / "v.pt", ["--trigger_width", "2"] if attack == "input_aware" else []
    train.main([*TRAIN, "--epochs", "1", "--attack", attack, *width, "--ckpt", str(out)])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BA ")]
    evaluate.main([*SMALL, "--attack", attack, "--ckpt", str(out), "--outdir", str(tmp_path)])
    assert said == [line for line in capsys.readouterr().out.splitlines() if line.startswith("BA ")]
    assert len(said) == 1
    assert ("ASR" in said[0]) == (attack != "none")
    assert (tmp_path / f"demo_{attack}.png").exists() == (attack != "none")
    assert utils.load_checkpoint(out)["trigger_width"] == (2 if width else None)
    if width:
        words = ["--attack", attack, "--ckpt", str(out), "--results", str(tmp_path)]
        unit.main([*SMALL, *words, "--n_steps", "1", "--out", str(tmp_path / "d.pt"), "--outdir", str(tmp_path)])
        after = [line for line in capsys.readouterr().out.splitlines() if line.startswith("after ")]
        evaluate.main([*SMALL, "--attack", attack, "--ckpt", str(tmp_path / "d.pt"), "--outdir", str(tmp_path)])
        lines = capsys.readouterr().out.splitlines()
        assert f"after   {next(line for line in lines if line.startswith('BA '))}" in after
        assert any(line.startswith("cross accuracy") for line in lines)
