"""Runs that are cut off, by Ctrl-C or a kill, and go on: the bits are those of a whole run."""

import json
import re
import signal
import time

import pytest
import torch

import defend
import resuming
import train
import unit
import utils
from cli import ROOT, InputError
from defenses import finetune
from tests.running import SMALL, TRAIN, command, run_defend, run_unit

pytestmark = pytest.mark.usefixtures("few_test_images")


def make_old(partial):
    """Have a part of a run say that it took a million seconds, and a thousand GiB."""
    kept = torch.load(partial, weights_only=True)
    utils.save_checkpoint({**kept, "seconds": 1e6, "peak": 1e3}, partial)


def test_ctrl_c_saves_the_best_bounds_and_ends_in_130(victim_file, tmp_path):
    flags = ["--out", str(tmp_path / "d.pt"), "--results", str(tmp_path / "r"), "--outdir", str(tmp_path)]
    flags += ["--data_rate", "0.2", "--n_steps", "100000"]
    # a shell that starts the tests in the background has them ignore Ctrl-C, and what they start inherits that
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = command("unit.py", *SMALL, "--ckpt", str(victim_file), *flags, **heed)
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert "keeping the best bounds so far" in out
    assert "Traceback" not in err
    assert utils.load_checkpoint(tmp_path / "d.pt")["bounds"] is not None


def test_the_bounds_are_on_disk_before_they_are_measured(victim_file, tmp_path, monkeypatch):
    """A kill or a second Ctrl-C during the last measurement does not cost the search."""
    measure, calls = unit.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(unit, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_unit(victim_file, tmp_path, "--n_steps", "1")
    model, checkpoint = utils.load_model(tmp_path / "d.pt")
    assert checkpoint["BA"] is None
    assert checkpoint["bounds"] is not None


def test_unit_resumes_after_a_kill_to_the_same_bits(victim_file, tmp_path, one_thread, capsys):
    often = tmp_path / "often.py"  # keeps a search after every step, not once a minute
    often.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import resuming, unit\n"
        "resuming.KEEP_EVERY = 0; unit.main(sys.argv[1:])"
    )
    flags = ["--data_rate", "0.2", "--n_steps", "12", "--ckpt", str(victim_file)]
    folders = {name: tmp_path / name for name in ("whole", "cut")}
    argv = {
        name: [*SMALL, *flags, "--out", str(f / "d.pt"), "--results", str(f / "r"), "--outdir", str(f)]
        for name, f in folders.items()
    }
    unit.main(argv["whole"])
    process = command(often, *argv["cut"])
    while not list(folders["cut"].glob("*.partial.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (folders["cut"] / "d.pt").exists()
    make_old(next(folders["cut"].glob("*.partial.pt")))
    capsys.readouterr()
    unit.main(argv["cut"])
    assert re.search(r"going on after step \d+ of 12", capsys.readouterr().out)
    assert not list(folders["cut"].glob("*.partial.pt"))
    a, b = (utils.load_checkpoint(f / "d.pt") for f in folders.values())
    assert all(torch.equal(a["bounds"][k], b["bounds"][k]) for k in a["bounds"])
    assert (a["BA"], a["ASR"], a["defence"]) == (b["BA"], b["ASR"], b["defence"])
    a, b = (json.loads(next((f / "r").iterdir()).read_text()) for f in folders.values())
    assert a["history"] == b["history"]
    assert a["resumed_after"] == 0 < b["resumed_after"] < 12
    assert a["seconds"] < 1e6 < b["seconds"]
    assert a["peak_GiB"] < b["peak_GiB"] == 1e3


def test_a_run_out_of_time_saves_the_best_bounds_and_goes_on_to_the_same_bits(victim_file, tmp_path, capsys):
    flags = ["--data_rate", "0.2", "--n_steps", "3"]
    run_unit(victim_file, tmp_path, *flags)
    whole = utils.load_checkpoint(tmp_path / "d.pt")["bounds"]
    for done in (1, 2, 3):  # whatever the time, a step is done
        capsys.readouterr()
        run_unit(victim_file, tmp_path, *flags, "--max_minutes", "1e-9")
        out = capsys.readouterr().out
        assert (f"out of time after {done} of 3 steps" in out) == (done < 3)
        assert (f"going on after step {done - 1} of 3" in out) == (done > 1)
        kept = utils.load_checkpoint(tmp_path / "d.pt")
        assert kept["BA"] is not None
        assert len(list(tmp_path.glob("d.*.partial.pt"))) == (done < 3)
    assert all(torch.equal(kept["bounds"][k], whole[k]) for k in whole)
    records = [json.loads(p.read_text()) for p in sorted((tmp_path / "results").iterdir())]
    assert [r["interrupted"] for r in records] == ["", "time", "time", ""]
    assert [len(r["history"]["ce"]) for r in records] == [3, 1, 2, 3]


def test_train_resumes_after_a_kill_to_the_same_bits(tmp_path, one_thread, capsys):
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    train.main([*TRAIN, "--attack", "badnet", "--ckpt", str(whole)])
    process = command("train.py", *TRAIN, "--attack", "badnet", "--ckpt", str(cut), cwd=str(tmp_path))
    partial = tmp_path / "cut.partial.pt"
    while not partial.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not cut.exists()
    train.main([*TRAIN, "--attack", "badnet", "--ckpt", str(cut)])
    assert re.search(r"going on after epoch [123] of 3", capsys.readouterr().out)
    assert not partial.exists()
    a, b = utils.load_checkpoint(whole), utils.load_checkpoint(cut)
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
    assert [h["loss"] for h in a["history"]] == [h["loss"] for h in b["history"]]
    assert (a["BA"], a["ASR"]) == (b["BA"], b["ASR"])


def test_a_search_is_known_by_all_that_its_bits_follow_from(monkeypatch):
    def place(victim="0", device="cpu", **changes):
        args = unit.parser().parse_args([f"--{k}={v}" for k, v in changes.items()])
        config = unit.UnitConfig(lr=args.lr, n_steps=args.n_steps, until=args.until, acc_degrade=args.acc_degrade)
        settings = resuming.settings_of(args, config, victim, torch.device(device))
        return resuming.partial_path(ROOT / "d.pt", settings)

    changes = {"seed": 1, "data_rate": 0.1, "draw": "random", "dataset": "cifar10_sample", "lr": 0.1, "n_steps": 2}
    changes |= {"until": "budget", "acc_degrade": 0.1}
    places = [place(), place(victim="1"), place(device="mps"), *(place(**{k: v}) for k, v in changes.items())]
    monkeypatch.setattr(utils, "ranks", lambda: (0, 2))
    places.append(place())
    assert len(set(places)) == 12
    assert {p.parent for p in places} == {ROOT}


def test_a_damaged_part_of_a_search_is_refused_and_a_full_disk_no_end(victim_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resuming, "KEEP_EVERY", 0)
    flags = ["--n_steps", "2", "--data_rate", "0.2"]
    report, save = unit.report, utils.save_checkpoint

    def stop_at_2(step, *args):
        if step == 1:
            raise KeyboardInterrupt
        report(step, *args)

    monkeypatch.setattr(unit, "report", stop_at_2)
    with pytest.raises(KeyboardInterrupt):
        run_unit(victim_file, tmp_path, *flags)
    (partial,) = tmp_path.glob("d.*.partial.pt")
    assert torch.load(partial, weights_only=True)["step"] == 1
    partial.write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be read.*--no-resume"):
        run_unit(victim_file, tmp_path, *flags)

    def full(checkpoint, path):
        if "partial" in path.name:
            raise InputError("cannot write")
        save(checkpoint, path)

    monkeypatch.setattr(unit, "report", report)
    monkeypatch.setattr(utils, "save_checkpoint", full)
    run_unit(victim_file, tmp_path, *flags, "--no-resume")
    said = capsys.readouterr()
    assert "2 steps" in said.out
    assert said.err.count("warning: cannot write") == 2
    assert not partial.exists()


def test_a_partial_run_with_other_settings_is_not_taken(tmp_path):
    out = tmp_path / "v.pt"
    partial = out.with_suffix(".partial.pt")
    utils.save_checkpoint({"config": {"attack": "wanet"}}, partial)
    with pytest.raises(InputError, match="--no-resume"):
        train.main([*TRAIN, "--ckpt", str(out)])
    partial.write_bytes(b"damaged")
    with pytest.raises(InputError, match="--no-resume"):
        train.main([*TRAIN, "--ckpt", str(out)])
    assert not out.exists()


def test_a_repair_goes_on_after_it_was_cut_off_to_the_same_bits(victim_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resuming, "KEEP_EVERY", 0)
    flags = ["--defense", "ft", "--epochs", "3", "--data_rate", "0.2"]
    run_defend(victim_file, tmp_path, *flags)
    whole = torch.load(tmp_path / "d.pt", weights_only=True)
    (tmp_path / "d.pt").unlink()
    epoch, left = finetune.train_epoch, [1, 1]

    def cut_off(*args):
        left.pop()
        return epoch(*args)

    monkeypatch.setattr(finetune, "train_epoch", cut_off)
    with pytest.raises(IndexError):
        run_defend(victim_file, tmp_path, *flags)
    (partial,) = tmp_path.glob("d.*.partial.pt")
    make_old(partial)
    left[:] = [1]  # epoch
    capsys.readouterr()
    run_defend(victim_file, tmp_path, *flags)
    assert "going on after 2 epochs" in capsys.readouterr().out
    assert not partial.exists()
    again = torch.load(tmp_path / "d.pt", weights_only=True)
    assert all(torch.equal(v, again["state_dict"][k]) for k, v in whole["state_dict"].items())
    assert (again["BA"], again["ASR"], again["defence"]) == (whole["BA"], whole["ASR"], whole["defence"])
    records = [json.loads(p.read_text()) for p in sorted((tmp_path / "results").iterdir())]
    assert [r["resumed_after"] for r in records] == [0, 2]
    assert records[0]["history"] == records[1]["history"]
    assert records[0]["seconds"] < 1e6 < records[1]["seconds"]
    assert records[0]["peak_GiB"] < records[1]["peak_GiB"] == 1e3
    partial.write_bytes(b"damaged")
    with pytest.raises(InputError, match="--no-resume"):
        run_defend(victim_file, tmp_path, *flags)
    left[:] = [1, 1]
    with pytest.raises(IndexError):
        run_defend(victim_file, tmp_path, *flags, "--no-resume")
    assert torch.load(partial, weights_only=True)["step"] == 2
    left[:] = [1, 1, 1]
    run_defend(victim_file, tmp_path, *flags, "--no-resume")  # and passes over what it could go on from
    assert not left
    assert not partial.exists()


def test_a_repair_is_known_by_all_that_its_bits_follow_from(tmp_path):
    def place(victim="0", dtype=torch.bfloat16, **flags):
        args = defend.parser().parse_args([f"--{k}={v}" for k, v in ({"defense": "bcu"} | flags).items()])
        settings = defend.repair_settings(args, defend.configure(args), victim, dtype, torch.device("cpu"))
        return resuming.partial_path(tmp_path / "d.pt", settings)

    for name in "ab":
        (tmp_path / name).write_text(name)
    flags = {"seed": 1, "data_rate": 0.1, "draw": "random", "dataset": "cifar10_sample", "epochs": 2, "defense": "ft"}
    places = [place(), place(victim="1"), place(dtype=torch.float32), *(place(**{k: v}) for k, v in flags.items())]
    places += [place(ood=tmp_path / name) for name in "ab"]
    assert len(set(places)) == len(places) == 11


def test_what_cannot_be_repaired_leaves_nothing_to_go_on_from(victim_file, tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "KEEP_EVERY", 0)

    def astray(*args):
        args[7](dict)
        assert list(tmp_path.glob("d.*.partial.pt"))
        raise ValueError("no numbers")

    monkeypatch.setattr(finetune, "repair", astray)
    with pytest.raises(InputError, match="no numbers"):
        run_defend(victim_file, tmp_path, "--defense", "ft")
    assert not list(tmp_path.glob("d.*.partial.pt"))
