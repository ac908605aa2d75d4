"""The commands as a user runs them, on the embedded sample and small networks; exit statuses; kills."""

import dataclasses
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import records
import report
import resuming
import train
import unit
import utils
from cli import ROOT, InputError

SMALL = ["--dataset", "cifar10_sample", "--device", "cpu", "--precision", "fp32"]
TRAIN = [*SMALL, "--width", "0.0625", "--epochs", "3", "--batch_size", "50"]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def command(script, *args, launcher=(), **kwargs):
    """Start a script in another folder than its own; by TORCHRUN, in two processes."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / script), *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=kwargs.pop("cwd", "/"), env=env, **kwargs,
    )  # fmt: skip


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


def run_unit(victim_file, tmp_path, *flags):
    """Run unit.py in this process on the small victim."""
    args = [*SMALL, "--ckpt", str(victim_file), "--out", str(tmp_path / "d.pt"), "--results", str(tmp_path / "results")]
    unit.main([*args, "--outdir", str(tmp_path), *flags])


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


@pytest.fixture
def one_thread():
    """The number of threads that command() gives: with another, sums are rounded differently."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


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


def test_two_processes_train_one_victim(tmp_path):
    out = tmp_path / "v.pt"
    process = command("train.py", *TRAIN, "--attack", "badnet", "--ckpt", str(out), launcher=TORCHRUN, cwd=tmp_path)
    said, err = process.communicate()
    assert process.returncode == 0, err
    assert said.count("epoch   3") == 1
    history = utils.load_checkpoint(out)["history"]
    assert len(history) == 3
    assert history[2]["loss"] < history[0]["loss"]


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


def test_a_search_is_known_by_all_that_its_bits_follow_from(monkeypatch):
    def place(victim="0", device="cpu", **changes):
        args = unit.parser().parse_args([f"--{k}={v}" for k, v in changes.items()])
        config = unit.UnitConfig(lr=args.lr, n_steps=args.n_steps, until=args.until, acc_degrade=args.acc_degrade)
        settings = unit.search_settings(args, config, victim, torch.device(device))
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
    report, save = unit.report, utils.save_checkpoint

    def stop_at_2(step, *args):
        if step == 1:
            raise KeyboardInterrupt
        report(step, *args)

    monkeypatch.setattr(unit, "report", stop_at_2)
    with pytest.raises(KeyboardInterrupt):
        run_unit(victim_file, tmp_path, "--n_steps", "2")
    (partial,) = tmp_path.glob("d.*.partial.pt")
    assert torch.load(partial, weights_only=True)["step"] == 1
    partial.write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be read.*--no-resume"):
        run_unit(victim_file, tmp_path, "--n_steps", "2")

    def full(checkpoint, path):
        if "partial" in path.name:
            raise InputError("cannot write")
        save(checkpoint, path)

    monkeypatch.setattr(unit, "report", report)
    monkeypatch.setattr(utils, "save_checkpoint", full)
    run_unit(victim_file, tmp_path, "--n_steps", "2", "--no-resume")
    said = capsys.readouterr()
    assert "2 steps" in said.out
    assert said.err.count("warning: cannot write") == 2
    assert not partial.exists()


def test_a_finished_victim_is_not_overwritten(victim_file):
    before = victim_file.read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        train.main([*TRAIN, "--ckpt", str(victim_file)])
    assert victim_file.read_bytes() == before


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


def test_clean_label_poison_beyond_the_target_class_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="lower it"):
        train.main([*TRAIN, "--attack", "reflection", "--poison_rate", "0.2", "--ckpt", str(tmp_path / "v.pt")])


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    path = tmp_path_factory.mktemp("first") / "first.pt"
    train.main([*TRAIN, "--epochs", "2", "--attack", "badnet", "--ckpt", str(path)])
    return path


@pytest.fixture
def first_round(tmp_path, trained_once):
    """A small victim after a first round of training."""
    return shutil.copy(trained_once, tmp_path)


def test_a_victim_is_trained_on_from_its_weights_on_the_same_poisoned_images(tmp_path, first_round):
    out = tmp_path / "second.pt"
    flags = ["--attack", "badnet", "--init", str(first_round), "--ckpt", str(out)]
    train.main([*TRAIN, *flags, "--epochs", "1", "--lr", "1e-12"])
    a, b = utils.load_checkpoint(first_round), utils.load_checkpoint(out)
    weights = [k for k, v in a["state_dict"].items() if v.dim() > 1]
    assert weights
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in weights)
    assert torch.equal(a["poison_indices"], b["poison_indices"])
    assert b["init"] == utils.sha256(first_round)
    assert (b["epochs"], b["epochs_before"]) == (1, 2)
    assert b["init_from"]["history"] == a["history"]
    table = report.victims(tmp_path).splitlines()
    assert len(table) == 4  # header, rule, two victims
    assert f"| {100 * b['BA']:.2f} | {100 * b['ASR']:.2f} | 2 + 1 |" in table[3]
    assert utils.sha256(out) in table[3]
    assert "| 2 |" in table[2]


def test_a_second_round_sees_other_crops_than_the_first(tmp_path, first_round):
    """At a rate of nothing, only order and augmentation can move the loss of an epoch."""
    losses = []
    for before in (0, 2):
        config = {"batch_size": 50, "seed": 1024, "epochs": 1, "lr": 1e-12, "small_epochs": 0, "average": 0}
        config["epochs_before"] = before
        model, _ = utils.load_model(first_round)
        data = utils.load_dataset("cifar10_sample", tmp_path, train=True)
        poison = train.poison_training_set(data[1], "none", 0)
        optimizer = torch.optim.SGD(model.eval().parameters(), lr=1e-12)
        how = torch.float32, torch.contiguous_format, lambda _size: None
        losses.append(train.train_epoch(model, optimizer, data, poison, None, config, 0, *how)[0])
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [(["--seed", "7"], "seed"), (["--poison_rate", "0.2"], "poison_rate"), (["--width", "0.125"], "width")],
)
def test_another_training_set_is_not_trained_on(tmp_path, first_round, flags, wrong):
    out = tmp_path / "second.pt"
    with pytest.raises(InputError, match=f"another {wrong}"):
        train.main([*TRAIN, "--attack", "badnet", "--init", str(first_round), "--ckpt", str(out), *flags])
    assert not out.exists()


def test_a_defended_model_or_a_foreign_one_is_not_trained_on(tmp_path, first_round):
    checkpoint = utils.load_checkpoint(first_round)
    defended, foreign = tmp_path / "defended.pt", tmp_path / "foreign.pt"
    model, _ = utils.load_model(first_round)
    bounds = unit.initial_bounds(model, [torch.rand(2, 3, 32, 32)], 4.0)
    utils.save_checkpoint({**checkpoint, "bounds": bounds}, defended)
    torch.save(checkpoint["state_dict"], foreign)
    for path, why in ((defended, "defended model"), (foreign, "another"), (tmp_path / "none.pt", "cannot read")):
        with pytest.raises(InputError, match=why):
            train.main([*TRAIN, "--attack", "badnet", "--init", str(path), "--ckpt", str(tmp_path / "v.pt")])


def test_a_table_goes_between_its_marks_alone(tmp_path):
    page = tmp_path / "page.md"
    a, b = (report.BEGIN.format(script) for script in ("a.py", "b.py"))
    text = f"before\n{a}\nold\n{report.END}\nbetween\n{b}\nkept\n{report.END}\nafter\n"
    page.write_text(text)
    report.put(page, "| new |", "a.py")
    assert page.read_text() == text.replace("old", "| new |")
    page.write_text("no marks")
    with pytest.raises(InputError, match="no place"):
        report.put(page, "| new |")
    assert page.read_text() == "no marks"


def run_record(**changes):
    """A record of unit.py on the default settings, with other settings."""
    usual = vars(unit.parser().parse_args([])) | dataclasses.asdict(unit.UnitConfig(precision="bf16"))
    figures = {"n_train": 2000, "n_valid": 500, "interrupted": False, "seconds": 12.0, "best_step": 1}
    figures |= {"before": {"BA": 0.9276, "ASR": 1.0}, "after": {"BA": 0.9028, "ASR": 0.0117}}
    figures |= {"history": {"reg": [9.5, 8.25]}, "victim": {"file": "cifar10_resnet18_badnet.pt", "sha256": "0"}}
    figures["machine"] = {"device": "a machine", "threads": 2}
    return {"defense": "unit", "settings": usual | changes, **figures}


def test_the_table_of_runs_has_what_the_records_say(tmp_path):
    utils.save_json(run_record(), tmp_path / "unit_a.json")
    utils.save_json(run_record(acc_degrade=0.1), tmp_path / "unit_b.json")  # not the authors' constants
    utils.save_json(run_record() | {"interrupted": True}, tmp_path / "unit_c.json")
    utils.save_json(run_record(until="budget"), tmp_path / "unit_d.json")
    rows = report.runs(tmp_path).splitlines()[2:]
    for row, steps in zip(rows, ("300", "2, until budget"), strict=True):
        start = (
            f"| cifar10_resnet18_badnet | cifar10 | 2,500 | {steps} | 92.76 / 100.00 | **90.28 / 1.17** | 9.50 → 8.25 |"
        )
        assert row.startswith(f"{start} 2 | 12 |")


def test_the_table_of_precisions_pairs_what_differs_in_nothing_else(tmp_path):
    utils.save_json(run_record(), tmp_path / "unit_a.json")
    fp32 = run_record(precision="fp32", micro_batch=1000) | {"after": {"BA": 0.9048, "ASR": 0.0107}}
    utils.save_json(fp32, tmp_path / "unit_b.json")
    for i, other in enumerate(({"seed": 1}, {"lr": 0.01}, {"attack": "wanet"})):
        utils.save_json(run_record(precision="fp32", **other), tmp_path / f"unit_c{i}.json")
    another_victim = run_record(precision="fp32") | {"victim": {"file": "x.pt", "sha256": "1"}}
    utils.save_json(another_victim, tmp_path / "unit_d.json")
    (row,) = report.precisions(tmp_path).splitlines()[2:]
    start = "| cifar10_resnet18_badnet | cifar10 | 300 | 90.28 / 1.17 | 90.48 / 1.07 | -0.20 / +0.10 | 2 | 2 |"
    assert row == f"{start} 12 (a machine, 2 threads) | 12 (a machine, 2 threads) |"


def test_records_of_one_second_stand_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(records.time, "strftime", lambda _format: "now")
    args = unit.parser().parse_args(["--results", str(tmp_path)])
    given = "unit", args, unit.UnitConfig(), {"file": "v.pt", "sha256": "0"}, torch.device("cpu"), "resnet18"
    paths = [records.save_record(*given, number=i) for i in range(3)]
    assert [r["number"] for r in records.load_records(tmp_path).values()] == [0, 1, 2]
    assert list(records.load_records(tmp_path)) == paths


def test_what_is_no_record_is_named(tmp_path):
    (tmp_path / "unit_x.json").write_text("{}")
    with pytest.raises(InputError, match="no record of a run"):
        report.runs(tmp_path)


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


def test_first_epochs_may_run_on_smaller_images(tmp_path, monkeypatch):
    sizes, forward = [], train.models.resnet.ResNet.forward

    def look(self, x):
        if self.training:
            sizes.append(tuple(x.shape[2:]))
        return forward(self, x)

    monkeypatch.setattr(train.models.resnet.ResNet, "forward", look)
    flags = ["--attack", "wanet", "--small_epochs", "1", "--epochs", "2", "--ckpt", str(tmp_path / "v.pt")]
    train.main([*TRAIN, *flags])
    assert sizes == [(24, 24)] * 10 + [(32, 32)] * 10
    assert utils.load_checkpoint(tmp_path / "v.pt")["small_epochs"] == 1
