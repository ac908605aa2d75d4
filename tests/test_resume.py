"""Runs interrupted by Ctrl-C, a time limit or a kill, and resumed: they give the bits of an uninterrupted run."""

from flags import ROOT, InputError

import json
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch

import defend
import fast.ranks
import train
import unit
import utils
from data import cifar10
from defenses import finetune
from evaluate import Measured
from support import machine, resume
from support.resume import Partial
from support.watch import Watch
from tests.running import SMALL, TRAIN, command, run_defend, run_unit

pytestmark = pytest.mark.usefixtures("few_test_images", "few_tries", "undrawn")
CPU = torch.device("cpu")


def make_old(partial):
    """Make a part of a run report a million seconds and a thousand GiB."""
    kept = torch.load(partial, weights_only=True)
    utils.save_checkpoint({**kept, "seconds": 1e6, "peak": 1e3}, partial)


def record_in(folder):
    """The one record of a folder, and its trajectory."""
    (path,) = folder.rglob("*.json")
    with np.load(path.with_suffix(".npz")) as trajectory:
        return json.loads(path.read_text()), {k: v.tolist() for k, v in trajectory.items()}


def kill(process):
    """End a process without asking it."""
    process.kill()
    process.communicate()


def wait_for(path, process):
    """Return when the file is there, the process still running."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


# --- what lies on disk ----------------------------------------------------------------------------------------------


def test_a_part_of_a_run_comes_back_whole_and_lies_beside_the_result(tmp_path):
    partial = Partial(tmp_path / "d.pt", {"lr": 0.1}, CPU)
    assert (partial.state, partial.step, partial.said()) == (None, 0, "")
    partial.keep(3, lambda: {"bounds": torch.arange(3), "history": {"ce": [1.0]}}, now=True)
    assert [path.name for path in tmp_path.iterdir()] == ["d.partial.pt"]
    again = Partial(tmp_path / "d.pt", {"lr": 0.1}, CPU)
    assert again.step == 3
    assert torch.equal(again.state["bounds"], torch.arange(3))
    assert again.state["history"] == {"ce": [1.0]}
    assert "going on after 3 " in again.said()
    assert Partial(tmp_path / "d.pt", {"lr": 0.1}, CPU, resume=False).state is None
    for name in ("d", "e"):  # a write that was killed, of this run and of another
        (tmp_path / f".{name}.partial.pt.123.tmp").write_bytes(b"half")
    again.remove()
    again.remove()
    assert [path.name for path in tmp_path.iterdir()] == [".e.partial.pt.123.tmp"]


def test_it_is_kept_once_a_minute_and_counts_the_time_and_memory_of_all_its_parts(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(resume.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(machine, "peak_memory", lambda _: 2.0)
    partial = Partial(tmp_path / "d.pt", {}, CPU)
    for now[0], step in ((130.0, 1), (161.0, 2), (200.0, 3)):
        partial.keep(step, dict)
        assert partial.path.exists() == (step > 1)
    make_old(partial.path)
    partial = Partial(tmp_path / "d.pt", {}, CPU)
    assert partial.step == 2
    now[0] = 250.0
    partial.begin()
    now[0] = 260.0
    assert partial.seconds_so_far() == 1e6 + 10
    assert partial.peak_so_far() == 1e3


def test_with_other_settings_or_damaged_it_is_refused_and_on_another_machine_taken(tmp_path, capsys, monkeypatch):
    partial = Partial(tmp_path / "d.pt", {"lr": 0.1, "seed": 1}, CPU)
    partial.keep(3, dict, now=True)
    for settings, named in (({"lr": 0.2, "seed": 1}, "lr"), ({"lr": 0.1, "seed": 1, "draw": "first"}, "draw")):
        with pytest.raises(InputError, match=f"another {named};.*--no-resume"):
            Partial(tmp_path / "d.pt", settings, CPU)
    assert capsys.readouterr().err == ""
    here = machine.machine(CPU)
    monkeypatch.setattr(machine, "machine", lambda _: here | {"device": "another"})
    assert Partial(tmp_path / "d.pt", partial.settings, CPU).step == 3
    assert f"begun on {here['device']}" in capsys.readouterr().err
    for content in (b"damaged", b""):
        partial.path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read.*--no-resume"):
            Partial(tmp_path / "d.pt", partial.settings, CPU)
    utils.save_checkpoint({"config": {"lr": 0.1}}, partial.path)  # of an older version
    with pytest.raises(InputError, match="cannot be read.*--no-resume"):
        Partial(tmp_path / "d.pt", partial.settings, CPU)
    assert Partial(tmp_path / "d.pt", partial.settings, CPU, resume=False).step == 0


# --- a search -------------------------------------------------------------------------------------------------------


@pytest.fixture
def search(tiny, defense, tmp_path):
    """Run a search of some steps on few images under a Watch; return (its result, the watch)."""

    def run(n_steps, max_minutes=None):
        partial = Partial(tmp_path / "d.pt", {}, CPU)
        config = unit.UnitConfig(n_steps=n_steps)
        with Watch(n_steps, partial, max_minutes, True) as watch:
            return unit.tighten(tiny, *(t[::20] for t in defense), config, watch, partial.state), watch

    return run


def interrupt_in(monkeypatch, step, times=1):
    """Send Ctrl-C the given number of times in the validation pass of a step."""
    calls, accuracy = [], unit.accuracy

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1 + step:  # one at the start, one a step
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return accuracy(*args)

    monkeypatch.setattr(unit, "accuracy", interrupted)


def test_ctrl_c_ends_a_search_after_the_step_under_way(search, tmp_path, monkeypatch):
    whole, watch = search(2)
    assert watch.why is None
    interrupt_in(monkeypatch, step=2)
    result, watch = search(5)
    assert watch.why == "interrupted"
    assert result.history == whole.history
    assert all(torch.equal(result.bounds[k], whole.bounds[k]) for k in whole.bounds)
    assert Partial(tmp_path / "d.pt", {}, CPU).step == 2
    with pytest.raises(KeyboardInterrupt):  # out of the search it is Python's own again
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_in_the_last_step_leaves_the_run_whole(search, monkeypatch):
    interrupt_in(monkeypatch, step=2)
    result, watch = search(2)
    assert (watch.why, len(result.history["ce"])) == (None, 2)


def test_a_second_ctrl_c_ends_it_at_once(search, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    interrupt_in(monkeypatch, step=2, times=2)
    with pytest.raises(KeyboardInterrupt):
        search(5)
    assert signal.getsignal(signal.SIGINT) == before


def test_where_one_process_is_out_of_time_all_end_after_the_same_step(search, tmp_path, monkeypatch):
    said = []

    def from_another(tensors):
        if len(tensors) == 1 and tensors[0].is_floating_point():
            said.append(tensors[0].item())
            tensors[0] += len(said) == 2

    monkeypatch.setattr(fast.ranks, "sum_over_ranks", from_another)
    result, watch = search(9, max_minutes=1e6)
    assert (watch.why, len(result.history["ce"]), said) == ("out of time", 2, [0, 0])
    assert Partial(tmp_path / "d.pt", {}, CPU).step == 2


def test_ctrl_c_saves_the_best_bounds_and_ends_in_130(victim_file, few_images, tmp_path):
    flags = ["--out", str(tmp_path / "d.pt"), "--results", str(tmp_path / "r"), "--outdir", str(tmp_path)]
    flags += ["--data_rate", "0.1", "--n_steps", "100000"]
    process = command("unit.py", *SMALL, *few_images, "--ckpt", str(victim_file), *flags)
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert "keeping the best bounds so far" in out
    assert "Traceback" not in err
    saved = utils.load_checkpoint(tmp_path / "d.pt")
    assert saved["bounds"] is not None
    record, trajectory = record_in(tmp_path / "r")
    assert record["interrupted"] == "interrupted"
    assert record["steps"] == len(trajectory["ce"])
    assert record["best_step"] == saved["defense"]["best_step"] < record["steps"]
    assert torch.load(tmp_path / "d.partial.pt", weights_only=True)["step"] == record["steps"]


def test_the_bounds_are_on_disk_before_they_are_measured(victim_file, tmp_path, monkeypatch):
    """A kill or Ctrl-C during the last measurement does not cost the search."""
    measure, calls = unit.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(unit, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_unit(victim_file, tmp_path, "--n_steps", "1", "--data_rate", "0.2")
    model, checkpoint = utils.load_model(tmp_path / "d.pt")
    assert [checkpoint[k] for k in Measured._fields] == [None] * 7
    assert checkpoint["bounds"] is not None


def test_unit_resumes_after_a_kill_to_the_same_bits(victim_file, few_images, tmp_path, one_thread, capsys):
    often = tmp_path / "often.py"  # keeps a search after every step, not once a minute
    often.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import unit; from support import resume\n"
        "resume.KEEP_EVERY = 0; unit.main(sys.argv[1:])"
    )
    flags = [*few_images, "--data_rate", "0.2", "--n_steps", "12", "--ckpt", str(victim_file)]
    whole, cut = folders = [tmp_path / name for name in ("whole", "cut")]
    argv = {f: [*SMALL, *flags, "--out", str(f / "d.pt"), "--results", str(f), "--outdir", str(f)] for f in folders}
    process = command(often, *argv[cut])
    wait_for(cut / "d.partial.pt", process)
    kill(process)
    unit.main(argv[whole])
    assert not (cut / "d.pt").exists()
    make_old(cut / "d.partial.pt")
    capsys.readouterr()
    unit.main(argv[cut])
    assert 0 < int(re.search(r"going on after (\d+) ", capsys.readouterr().out)[1]) < 12
    assert not list(tmp_path.rglob("*.partial.pt"))
    a, b = (utils.load_checkpoint(f / "d.pt") for f in folders)
    assert all(torch.equal(a["bounds"][k], b["bounds"][k]) for k in a["bounds"])
    assert [a[k] for k in Measured._fields] == [b[k] for k in Measured._fields]
    assert a["defense"] == b["defense"]
    (a, trajectory), (b, its) = map(record_in, folders)
    assert trajectory == its
    assert a["seconds"] < 1e6 < b["seconds"]
    assert a["peak_GiB"] < b["peak_GiB"] == 1e3


def test_a_run_out_of_time_saves_the_best_bounds_and_goes_on_to_the_same_bits(victim_file, tmp_path, capsys):
    flags = ["--data_rate", "0.2", "--n_steps", "3", "--step_images", "50"]
    run_unit(victim_file, tmp_path, *flags)
    whole, recorded = utils.load_checkpoint(tmp_path / "d.pt")["bounds"], record_in(tmp_path / "results")
    trajectory = recorded[1]
    defended = (tmp_path / "d.pt").read_bytes()
    run_unit(victim_file, tmp_path, *flags, "--max_minutes", "1e-9")
    assert "stays that of a whole search" in capsys.readouterr().out
    assert record_in(tmp_path / "results") == recorded
    assert (tmp_path / "d.pt").read_bytes() == defended
    assert utils.load_checkpoint(tmp_path / "d_cut_off.pt")["BA"] is not None
    assert (tmp_path / "unit_badnet_cut_off.png").exists()
    shutil.rmtree(tmp_path / "results")
    (tmp_path / "d.partial.pt").unlink()
    for done in (1, 2, 3):  # whatever the time, a step is done
        capsys.readouterr()
        run_unit(victim_file, tmp_path, *flags, "--max_minutes", "1e-9")
        out = capsys.readouterr().out
        assert (f"out of time after {done} of 3 steps" in out) == (done < 3)
        assert ("the same command goes on" in out) == (done < 3)
        assert (f"going on after {done - 1} " in out) == (done > 1)
        kept = utils.load_checkpoint(tmp_path / "d.pt")
        assert kept["BA"] is not None
        assert (tmp_path / "d.partial.pt").exists() == (done < 3)
        record, so_far = record_in(tmp_path / "results")
        assert record["interrupted"] == ("out of time" if done < 3 else None)
        assert so_far == {k: v[:done] for k, v in trajectory.items()}
    assert all(torch.equal(kept["bounds"][k], whole[k]) for k in whole)


def test_a_search_goes_on_with_its_own_settings_alone(victim_file, tiny, tmp_path):
    """All settings that its bits depend on; a command with another one names it, and changes nothing."""
    flags = ["--data_rate", "0.2", "--n_steps", "3"]
    run_unit(victim_file, tmp_path, *flags, "--max_minutes", "1e-9")
    partial = tmp_path / "d.partial.pt"
    before = partial.read_bytes()
    changes = {"seed": "1", "data_rate": "0.1", "draw": "random", "lr": "0.1", "n_steps": "2"}
    changes |= {"acc_degrade": "0.1", "step_images": "20", "precision": "bf16"}
    for name, value in changes.items():
        with pytest.raises(InputError, match=f"another {name};"):
            run_unit(victim_file, tmp_path, *flags, f"--{name}", value)
    with pytest.raises(InputError, match="another mean, std;"):
        run_unit(victim_file, tmp_path, *flags, "--mean", "none")
    other = tmp_path / "other.pt"
    torch.save(tiny.state_dict(), other)
    with pytest.raises(InputError, match="another victim;"):
        run_unit(other, tmp_path, *flags)
    assert partial.read_bytes() == before


def test_a_full_disk_is_no_end_of_a_search(victim_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resume, "KEEP_EVERY", 0)
    save = utils.save_checkpoint

    def full(checkpoint, path):
        if "partial" in path.name:
            raise InputError("cannot write")
        save(checkpoint, path)

    monkeypatch.setattr(utils, "save_checkpoint", full)
    run_unit(victim_file, tmp_path, "--n_steps", "2", "--data_rate", "0.2")
    said = capsys.readouterr()
    assert "of 2 chosen" in said.out
    assert said.err.count("warning: cannot write") == 2
    assert (tmp_path / "d.pt").exists()


# --- training -------------------------------------------------------------------------------------------------------


def test_train_resumes_after_a_kill_to_the_same_bits(few_images, tmp_path, one_thread, capsys):
    flags = [*TRAIN, *few_images, "--attack", "badnet"]
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    process = command("train.py", *flags, "--ckpt", str(cut), cwd=str(tmp_path))
    partial = tmp_path / "cut.partial.pt"
    wait_for(partial, process)
    kill(process)
    train.main([*flags, "--ckpt", str(whole)])
    assert not cut.exists()
    capsys.readouterr()
    train.main([*flags, "--ckpt", str(cut)])
    assert re.search(r"going on after [123] ", capsys.readouterr().out)
    assert not partial.exists()
    a, b = utils.load_checkpoint(whole), utils.load_checkpoint(cut)
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
    assert [h["loss"] for h in a["history"]] == [h["loss"] for h in b["history"]]
    assert [a[k] for k in Measured._fields] == [b[k] for k in Measured._fields]


# --- other defenses -------------------------------------------------------------------------------------------------


def cut_off_after(monkeypatch, epochs):
    """Make a fine-tuning raise IndexError after a number of epochs; return the list of epochs left."""
    epoch, left = finetune.train_epoch, [1] * epochs

    def cut_off(*args):
        left.pop()
        return epoch(*args)

    monkeypatch.setattr(finetune, "train_epoch", cut_off)
    return left


def test_a_repair_goes_on_after_it_was_cut_off_to_the_same_bits(victim_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resume, "KEEP_EVERY", 0)
    flags = ["--defense", "ft", "--epochs", "3", "--data_rate", "0.2"]
    run_defend(victim_file, tmp_path, *flags)
    whole = torch.load(tmp_path / "d.pt", weights_only=True)
    (record_at,) = tmp_path.rglob("*.json")
    record = json.loads(record_at.read_text())
    (tmp_path / "d.pt").unlink()
    left, partial = cut_off_after(monkeypatch, 2), tmp_path / "d.partial.pt"
    with pytest.raises(IndexError):
        run_defend(victim_file, tmp_path, *flags)
    assert not (tmp_path / "d.pt").exists()
    make_old(partial)
    left[:] = [1]  # epoch
    capsys.readouterr()
    run_defend(victim_file, tmp_path, *flags)
    assert "going on after 2 " in capsys.readouterr().out
    assert not partial.exists()
    again = torch.load(tmp_path / "d.pt", weights_only=True)
    assert all(torch.equal(v, again["state_dict"][k]) for k, v in whole["state_dict"].items())
    assert [again[k] for k in ("defense", *Measured._fields)] == [whole[k] for k in ("defense", *Measured._fields)]
    later = json.loads(record_at.read_text())
    assert [later[k] for k in ("before", "after", "findings")] == [record[k] for k in ("before", "after", "findings")]
    assert record["seconds"] < 1e6 < later["seconds"]
    assert record["peak_GiB"] < later["peak_GiB"] == 1e3


def test_without_resuming_a_repair_passes_over_what_it_could_go_on_from(victim_file, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "KEEP_EVERY", 0)
    flags = ["--defense", "ft", "--epochs", "2", "--data_rate", "0.2"]
    partial = tmp_path / "d.partial.pt"
    partial.write_bytes(b"damaged")
    with pytest.raises(InputError, match="--no-resume"):
        run_defend(victim_file, tmp_path, *flags)
    left = cut_off_after(monkeypatch, 1)
    with pytest.raises(IndexError):
        run_defend(victim_file, tmp_path, *flags, "--no-resume")
    assert torch.load(partial, weights_only=True)["step"] == 1
    left[:] = [1, 1]
    run_defend(victim_file, tmp_path, *flags, "--no-resume")
    assert not left
    assert not partial.exists()


def test_a_repair_goes_on_with_its_own_settings_alone(victim_file, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "KEEP_EVERY", 0)
    monkeypatch.setattr(defend, "evaluate", lambda *_: Measured(1.0, 0.0, 1.0, 1.0, 1, 1, 1))
    flags, sample = ["--defense", "ft", "--epochs", "3", "--data_rate", "0.2"], cifar10.load_sample
    cut_off_after(monkeypatch, 1)
    with pytest.raises(IndexError):
        run_defend(victim_file, tmp_path, *flags)
    partial = tmp_path / "d.partial.pt"
    before = partial.read_bytes()
    changes = {"seed": "1", "data_rate": "0.1", "draw": "random", "epochs": "2", "precision": "bf16"}
    for name, value in changes.items():
        with pytest.raises(InputError, match=f"another {name};"):
            run_defend(victim_file, tmp_path, *flags, f"--{name}", value)
    with pytest.raises(InputError, match="another mean, std;"):
        run_defend(victim_file, tmp_path, *flags, "--mean", "none")
    x, y = sample(True)
    with monkeypatch.context() as patch:  # as of a folder of pictures that has changed since
        patch.setattr(cifar10, "load_sample", lambda train: (x.flip(-1), y))
        with pytest.raises(InputError, match="another set of images;"):
            run_defend(victim_file, tmp_path, *flags)
    with pytest.raises(InputError, match="another defense,"):
        run_defend(victim_file, tmp_path, *flags, "--defense", "bcu")
    other = tmp_path / "other.pt"
    torch.save(tiny.state_dict(), other)
    with pytest.raises(InputError, match="another victim;"):
        run_defend(other, tmp_path, *flags)
    assert partial.read_bytes() == before


def test_what_cannot_be_repaired_leaves_nothing_to_go_on_from(victim_file, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "KEEP_EVERY", 0)

    def astray(*args):
        callback = args[6]
        callback({"loss": 1.0}, dict)
        assert (tmp_path / "d.partial.pt").exists()
        raise ValueError("no numbers")

    monkeypatch.setattr(finetune, "repair", astray)
    with pytest.raises(InputError, match="no numbers"):
        run_defend(victim_file, tmp_path, "--defense", "ft")
    assert not (tmp_path / "d.partial.pt").exists()
