"""compare.py: which cells are run, and by which commands."""

import flags
from flags import InputError

import fcntl
import json
import subprocess
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
from support import inputs, records, victims
from tests.house import figures
from tests.running import command

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


def test_a_cell_that_another_process_runs_is_left_to_it(house, monkeypatch, capsys):
    """As one does whose compare.py was killed."""
    house.victim("badnet")
    ran = running(house, monkeypatch)
    log = house.folder / "ckpt" / "cifar10_badnet_ft.log"
    with open(log, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("epoch 1")
        file.flush()
        wait = [sys.executable, "-S", "-c", "input()"]
        other = subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=file)
    with pytest.raises(SystemExit):
        house.compare("--defenses", "ft", "clp")
    assert ran == [("badnet", "clp")]
    assert f"cifar10_badnet, ft: another process is running it ({log})" in capsys.readouterr().err
    assert log.read_text() == "epoch 1"
    other.communicate(b"\n")
    house.compare("--defenses", "ft", "clp")
    assert ran == [("badnet", "clp"), ("badnet", "ft")]
    assert not log.exists()


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


@pytest.mark.parametrize("setting", ["out=x", "outd=x", "ckpt=x", "results=x", "defense=nad", "max_minutes=1"])
def test_what_is_no_setting_of_a_defense_is_refused(house, setting):
    house.victim("resnet18_badnet")
    with pytest.raises(InputError, match=f"{setting.partition('=')[0]} is no setting of a defense; leave it out"):
        house.compare("--defenses", f"ft,{setting}")
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
