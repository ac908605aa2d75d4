"""Records, tables and compare.py: what has a record is not run again; tables hold what was measured, and no more."""

import flags
from flags import InputError

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import compare
import defend
import unit
import utils
from backdoors import get_backdoor
from defenses import finetune
from evaluate import Measured
from support import plots, records, tables
from tests.running import command

CPU = torch.device("cpu")


def parsed(defense, *given):
    script, words = ("unit.py", []) if defense == "unit" else ("defend.py", ["--defense", defense])
    return flags.parser(script).parse_args([*words, *given])


# --- records ----------------------------------------------------------------------------------------------------------

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


def test_a_record_is_found_by_the_weights_of_its_victim(tmp_path):
    path, _, figures, victim = unit_run(tmp_path)
    assert records.load(path, victim["sha256"])["after"] == figures["after"]
    assert records.load(path, "f" * 64) is None
    assert records.load(path.with_name("ft.json"), victim["sha256"]) is None
    for why in ("interrupted", "out of time"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"interrupted": why}))
        assert records.load(path, victim["sha256"]) is None


@pytest.mark.parametrize("content", ["{}", "[]", "", "no json", '{"victim": "x.pt"}', '{"victim": null}'])
def test_what_is_no_record_is_named(tmp_path, content):
    (tmp_path / "unit.json").write_text(content)
    with pytest.raises(InputError, match=r"unit\.json is no record of a run"):
        records.load(tmp_path / "unit.json", "0")


# --- tables in pages --------------------------------------------------------------------------------------------------


def test_a_share_that_was_not_measured_is_a_dash():
    assert [tables.percent(s) for s in (None, 0.0, 0.98765, 1)] == ["–", "0.00", "98.77", "100.00"]


def test_a_table_in_markdown():
    assert tables.markdown(["a", "b"], [["x", 1], ["y", None]]).splitlines() == [
        "| a | b |", "| --- | --- |", "| x | 1 |", "| y | None |"
    ]  # fmt: skip


def test_a_table_goes_between_its_marks_alone(tmp_path):
    page = tmp_path / "page.md"
    a, b = (tables.BEGIN.format(name) for name in ("a", "b"))
    text = f"before\n{a}\nold\n{tables.END}\nbetween\n{b}\nkept\n{tables.END}\nafter\n"
    page.write_text(text)
    for _ in range(2):
        tables.put(page, "a", "| new |")
        assert page.read_text() == text.replace("old", "| new |")


@pytest.mark.parametrize("text", ["no marks", tables.BEGIN.format("a"), f"{tables.END}\n{tables.BEGIN.format('a')}\n"])
def test_a_page_without_a_place_is_left_as_it_is(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(InputError, match="no place"):
        tables.put(page, "a", "| new |")
    assert page.read_text() == text
    with pytest.raises(InputError, match="cannot read"):
        tables.put(tmp_path / "none.md", "a", "| new |")


# --- the picture ------------------------------------------------------------------------------------------------------


def test_the_picture_has_a_panel_for_each_victim_and_leaves_out_what_has_no_ra(tmp_path, monkeypatch):
    drawn, savefig = [], plots.Figure.savefig
    monkeypatch.setattr(plots.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k)))
    rows = [{"victim": f"v{i}", "defense": d, "BA": 0.9, "RA": i / 20} for i in range(12) for d in ("ft", "unit")]
    plots.draw_compared([*rows, {"victim": "clean", "defense": "ft", "BA": 0.9, "RA": None}], tmp_path / "x.png")
    panels = {axis.get_title(): axis for axis in drawn[0].axes if axis.get_title()}
    assert list(panels) == [f"v{i}" for i in range(12)]
    for i, axis in enumerate(panels.values()):
        points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if len(line.get_xdata())]
        assert points == [(pytest.approx(5 * i), 90)] * 2
    assert (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"


def test_without_anything_to_show_there_is_no_picture(tmp_path):
    plots.draw_compared([], tmp_path / "x.png")
    plots.draw_compared([{"victim": "clean", "defense": "ft", "BA": 0.9, "RA": None}], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


# --- compare.py -------------------------------------------------------------------------------------------------------


def figures(ba, asr, ra):
    return Measured(ba, asr, ra, 0.75, 10000, 0 if asr is None else 9000, 1000)._asdict()


class House:
    """A folder with small victims in ckpt/, and results/ for their records."""

    def __init__(self, folder, state):
        self.folder, self.results, self.state, self.run = folder, folder / "results", state, compare.Victim.run

    def victim(self, name, attack, width=0.125):
        path = self.folder / "ckpt" / f"cifar10_{name}.pt"
        about = {"network": "resnet18", "width": width, "num_classes": 10, "attack": attack, "target": 0}
        about |= {"bounds": None, "trigger": None if attack == "none" else get_backdoor(attack).state_dict()}
        about |= {"clean_label": attack == "reflection", "poison_rate": 0.1, "sampling": "resampled", "epochs": 30}
        about |= figures(0.93, *((None, None) if attack == "none" else (1.0, 0.0)))
        # what its width is stands in the file; these weights are of the same for all
        utils.save_checkpoint({**about, "state_dict": self.state, "seconds": 99.4, "commit": "abc"}, path)
        return path

    def record(self, path, cell, measured, **changes):
        victim = {"file": path.name, "sha256": utils.sha256(path), "attack": "x"}
        record = {"defense": cell.split(",")[0], "victim": victim, "settings": {}, "after": measured, "seconds": 12.3}
        record |= {"machine": {"threads": 2}, "commit": "0123456789", **changes}
        utils.save_json(record, self.results / path.stem / f"{cell}.json")

    def compare(self, *given):
        compare.main(["--results", str(self.results), "--device", "cpu", *given])

    def rows(self, table="overview"):
        """The lines of a table in results/README.md: {(cells to the left): [the other cells]}."""
        page = (self.results / "README.md").read_text()
        lines = page.partition(tables.BEGIN.format(table))[2].partition(tables.END)[0].strip().splitlines()
        cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
        left = 1 if table == "overview" else 2
        return {tuple(c[:left]) if left > 1 else c[0]: c[left:] for c in [cells[0], *cells[2:]]}


@pytest.fixture
def house(tmp_path, untouched, monkeypatch):
    (tmp_path / "ckpt").mkdir()
    monkeypatch.setattr(utils, "CKPT", tmp_path / "ckpt")
    house = House(tmp_path, utils.half_weights(untouched.state_dict()))
    monkeypatch.setattr(compare.Victim, "run", lambda *_args: pytest.fail("a cell was run"))
    return house


def running(house, monkeypatch, failing=()):
    """Let cells be records at once; return the list of those that were run."""
    ran = []

    def run(victim, cell, args):
        ran.append((victim.path.stem, cell))
        if cell in failing:
            return "exit status 1, see above"
        house.record(victim.path, cell, figures(0.5, 0.25, 0.125))
        return None

    monkeypatch.setattr(compare.Victim, "run", run)
    return ran


def test_the_overview_has_the_records_and_the_ceiling_of_ra(house, capsys):
    badnet, clean = house.victim("resnet18_badnet", "badnet"), house.victim("resnet18_none", "none")
    wanet = house.victim("resnet18_wanet", "wanet")
    house.record(badnet, "none", figures(0.9356, 1.0, 0.0))
    house.record(badnet, "unit", figures(0.9073, 0.01291, 0.8991))
    house.record(badnet, "unit,acc_degrade=0.05", figures(0.8, 0.7, 0.1))  # another column
    house.record(wanet, "ulrl", figures(0.91, 0.5, 0.25))
    house.record(clean, "none", figures(0.9459, None, None))
    house.record(clean, "none,attack=badnet", figures(0.9459, 0.0056, 0.9447))
    house.compare("--no-run")
    assert house.rows() == {
        "BA / ASR / RA in %": ["no defense", "FT", "BCU", "ULRL", "UNIT", "UNIT, 250 images a step", "ceiling of RA"],
        "resnet18_badnet": ["93.56 / 100.00 / 0.00", "–", "–", "–", "90.73 / 1.29 / 89.91", "–", "94.47"],
        "resnet18_wanet": ["–", "–", "–", "91.00 / 50.00 / 25.00", "–", "–", "–"],
        "resnet18_none": ["94.59", "–", "–", "–", "–", "–", "–"],
    }
    assert list(house.rows())[1:] == ["resnet18_badnet", "resnet18_wanet", "resnet18_none"]
    assert "90.73 / 1.29 / 89.91" in capsys.readouterr().out
    assert (house.results / "pictures" / "compare.png").read_bytes()[1:4] == b"PNG"


def test_the_ceiling_is_of_the_same_width(house):
    wide, narrow = house.victim("resnet18_badnet", "badnet", 1.0), house.victim("resnet18-w0.25_badnet", "badnet", 0.25)
    clean = house.victim("resnet18_none", "none", 1.0)
    for path in (narrow, wide):
        house.record(path, "none", figures(0.9, 1.0, 0.0))
    house.record(clean, "none,attack=badnet", figures(0.9, 0.01, 0.8))
    house.compare("--no-run")
    assert [(name, cells[-1]) for name, cells in list(house.rows().items())[1:]] == [
        ("resnet18_badnet", "80.00"), ("resnet18-w0.25_badnet", "–")  # full width first
    ]  # fmt: skip


def test_what_does_not_count_is_a_dash(house):
    path = house.victim("resnet18_badnet", "badnet")
    house.record(path, "none", figures(0.5, 0.5, 0.5))
    house.record(path, "ft", figures(0.6, 0.6, 0.4), victim={"sha256": "0" * 64})  # of other weights
    house.record(path, "unit", figures(0.7, 0.7, 0.3), interrupted="out of time")
    house.compare("--no-run")
    assert house.rows()["resnet18_badnet"] == ["50.00 / 50.00 / 50.00", *6 * ["–"]]
    assert set(house.rows("details")) == {("victim", "run"), ("resnet18_badnet", "none")}
    utils.save_checkpoint(utils.load_checkpoint(path) | {"target": 1}, path)  # other bytes
    house.compare("--no-run")
    assert list(house.rows()) == ["BA / ASR / RA in %"]


def test_every_record_is_a_line_of_the_details(house):
    path = house.victim("resnet18_badnet", "badnet")
    house.record(path, "none", figures(0.5, 0.5, 0.5), seconds=0.0)
    house.record(path, "ulrl", figures(0.6, 0.6, 0.4), findings={"outcome": "suspicious: rows 0"})
    house.record(path, "unit,acc_degrade=0.05", figures(0.7, 0.7, 0.3), best_step=4, steps=300)
    house.compare("--no-run")
    assert list(house.rows("details").values())[1:] == [
        ["50.00 / 50.00 / 50.00", "75.00", "", "–", "2", "0123456789"],
        ["60.00 / 60.00 / 40.00", "75.00", "suspicious: rows 0", "12", "2", "0123456789"],
        ["70.00 / 70.00 / 30.00", "75.00", "step 5 of 300", "12", "2", "0123456789"],
    ]
    assert ("resnet18_badnet", "unit,acc_degrade=0.05") in house.rows("details")


def test_only_victims_are_rows(house):
    house.victim("resnet18_badnet", "badnet")
    other = house.folder / "ckpt" / "cifar10_resnet18_badnet_ft.pt"
    content = utils.load_checkpoint(house.folder / "ckpt" / "cifar10_resnet18_badnet.pt")
    utils.save_checkpoint(content | {"defense": {"name": "ft"}}, other)
    (house.folder / "ckpt" / "cifar10_resnet18_wanet.partial.pt").write_bytes(b"half a victim")
    torch.save(house.state, house.folder / "ckpt" / "cifar10_foreign.pt")
    args = flags.parser("compare.py").parse_args([])
    assert [v.path.name for v in compare.all_victims(args)] == ["cifar10_resnet18_badnet.pt"]


def test_what_has_no_record_is_run_once(house, monkeypatch):
    house.victim("resnet18_wanet", "wanet")
    house.victim("resnet18_badnet", "badnet")
    house.victim("resnet18_none", "none")
    ran = running(house, monkeypatch)
    house.compare("--defenses", "none", "ft")
    assert ran == [
        ("cifar10_resnet18_badnet", "none"),
        ("cifar10_resnet18_badnet", "ft"),
        ("cifar10_resnet18_wanet", "none"),
        ("cifar10_resnet18_wanet", "ft"),
        ("cifar10_resnet18_none", "none"),
        ("cifar10_resnet18_none", "ft"),
        ("cifar10_resnet18_none", "none,attack=badnet"),  # the ceilings
        ("cifar10_resnet18_none", "none,attack=wanet"),
    ]
    assert house.rows()["resnet18_wanet"] == [*2 * ["50.00 / 25.00 / 12.50"], *4 * ["–"], "12.50"]
    ran.clear()
    house.compare("--defenses", "none", "ft", "unit,n_steps=9")
    assert [cell for _, cell in ran] == 3 * ["unit,n_steps=9"]


def test_a_cell_that_fails_does_not_take_the_rest_with_it(house, monkeypatch, capsys):
    house.victim("resnet18_badnet", "badnet")
    ran = running(house, monkeypatch, failing=["ulrl"])
    with pytest.raises(SystemExit) as end:
        house.compare("--defenses", "ulrl", "ft")
    assert end.value.code == 1
    assert [cell for _, cell in ran] == ["ulrl", "ft"]
    assert capsys.readouterr().err == "failed:\ncifar10_resnet18_badnet, ulrl: exit status 1, see above\n"
    assert house.rows()["resnet18_badnet"] == ["–", "50.00 / 25.00 / 12.50", *5 * ["–"]]
    ran.clear()
    with pytest.raises(SystemExit):
        house.compare("--defenses", "ulrl", "ft")
    assert [cell for _, cell in ran] == ["ulrl"]


COLUMNS = [
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


@pytest.mark.parametrize(("cell", "name", "settings"), COLUMNS)
@pytest.mark.parametrize("status", [0, 2])
def test_a_cell_is_a_command_whose_record_it_finds_again(house, monkeypatch, cell, name, settings, status):
    path = house.victim("resnet18_badnet", "badnet")
    monkeypatch.setattr(compare.Victim, "run", house.run)
    commands = []

    def run(words, **kwargs):
        commands.append(words)
        script, given = words[1], words[2:]
        args = flags.parser(Path(script).name).parse_args(given)
        if status == 0:
            place = records.path_of(cell.split(",")[0], args, {"file": path.name, "attack": "badnet"})
            house.record(path, place.stem, figures(0.5, 0.25, 0.125))
            assert place == house.results / path.stem / f"{name}.json"
        return subprocess.CompletedProcess(words, status)

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run))
    args = flags.parser("compare.py").parse_args(["--results", str(house.results), "--datadir", "D", "--device", "cpu"])
    victim = compare.Victim(path, args.results)
    assert victim.record(cell) is None
    error = victim.run(cell, args)
    assert (victim.record(cell) is None, error is None) == (status != 0, status == 0)
    assert error is None or "exit status 2" in error
    ((_, script, *given),) = commands
    assert script == str(flags.ROOT / ("unit.py" if cell.startswith("unit") else "defend.py"))
    asked = vars(flags.parser(Path(script).name).parse_args(given))
    assert {k: asked[k] for k in settings} == settings
    assert (asked["ckpt"], asked["datadir"], asked["device"]) == (str(path), "D", "cpu")
    assert asked["attack"] == settings.get("attack", "badnet")
    # what it saves stands beside the victims, a file for each cell, and is no victim
    out = asked["out"] and Path(asked["out"])
    assert (out is None) == (asked.get("defense") == "none")
    assert out is None or (out.parent == house.folder / "ckpt" and out.name.startswith(path.stem + "_"))


def test_a_cell_that_leaves_no_record_is_said(house, monkeypatch):
    path = house.victim("resnet18_badnet", "badnet")
    monkeypatch.setattr(compare.Victim, "run", house.run)
    done = SimpleNamespace(run=lambda words, **_: subprocess.CompletedProcess(words, 0))
    monkeypatch.setattr(compare, "subprocess", done)
    args = flags.parser("compare.py").parse_args(["--results", str(house.results)])
    assert "no record" in compare.Victim(path, args.results).run("none", args)


@pytest.mark.parametrize("cell", ["units", "dbd", "", "unit,acc_degrade", "ft,", "sweep,seed=1"])
def test_an_unknown_column_is_refused(house, cell):
    house.victim("resnet18_badnet", "badnet")
    with pytest.raises(InputError, match="no column"):
        house.compare("--defenses", "none", cell)
    assert not house.results.exists()


@pytest.mark.parametrize("cell", ["unit,no_such=1", "ft,step_images=3", "unit,acc_degrade=2"])
def test_an_unknown_setting_of_a_column_is_refused(house, cell, capsys):
    house.victim("resnet18_badnet", "badnet")
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


def test_without_victims_there_is_nothing_to_compare(house):
    with pytest.raises(InputError, match="nothing to compare"):
        house.compare()
    with pytest.raises(InputError, match=r"no checkpoint .*x\.pt"):
        house.compare("--victims", str(house.folder / "x.pt"))


def test_a_page_without_a_place_is_known_before_anything_is_run(house):
    house.victim("resnet18_badnet", "badnet")
    house.results.mkdir()
    (house.results / "README.md").write_text("nothing here")
    with pytest.raises(InputError, match="no place"):
        house.compare()
    assert [p.name for p in house.results.iterdir()] == ["README.md"]


def test_the_default_run_also_writes_the_front_page_and_that_of_the_victims(house, monkeypatch):
    wide, narrow = house.victim("resnet18_badnet", "badnet", 1.0), house.victim("resnet18-w0.25_none", "none", 0.25)
    monkeypatch.setattr(flags, "RESULTS", house.results)
    monkeypatch.setattr(flags, "ROOT", house.folder)
    pages = [house.folder / "README.md", house.folder / "ckpt" / "README.md"]
    for page, name in zip(pages, ("overview", "victims"), strict=True):
        page.write_text(f"{tables.BEGIN.format(name)}\n{tables.END}\n")
    house.record(wide, "none", figures(0.5, 0.5, 0.25))
    house.record(narrow, "none", figures(0.5, None, None))
    house.compare("--no-run", "--victims", str(wide))  # not the default
    assert "|" not in pages[0].read_text() + pages[1].read_text()
    house.compare("--no-run")
    front, victims = (page.read_text() for page in pages)
    assert "| resnet18_badnet | 50.00 / 50.00 / 25.00 |" in front
    assert "| resnet18-w0.25_none | 50.00 |" in front
    sums = [utils.sha256(path)[:16] for path in (wide, narrow)]
    assert (
        "| `cifar10_resnet18_badnet.pt` | 1 | dirty-label, 10 %, resampled | 30 | 93.00 / 100.00 / 0.00 | 75.00 | 99 |"
        f" abc | `{sums[0]}` |" in victims
    )
    assert (
        f"| `cifar10_resnet18-w0.25_none.pt` | 0.25 | clean | 30 | 93.00 | 75.00 | 99 | abc | `{sums[1]}` |" in victims
    )


def test_two_cells_are_run_and_compared(tmp_path, victim_file, monkeypatch, few_test_images):
    """As a user does it, but for the process: on a real victim, the embedded sample and one epoch."""

    def run(words, **_):
        defend.main([*words[2:], "--precision", "fp32"])
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(utils, "CKPT", tmp_path)
    init = finetune.Config.__init__
    monkeypatch.setattr(finetune.Config, "__init__", lambda self, **k: init(self, **{"epochs": 1, **k}))
    cells = ["none,dataset=cifar10_sample", "ft,dataset=cifar10_sample"]
    given = ["--victims", str(victim_file), "--results", str(tmp_path / "results"), "--device", "cpu", "--defenses"]
    compare.main([*given, *cells])
    monkeypatch.setattr(compare, "subprocess", None)  # and runs nothing again
    compare.main([*given, *cells])
    found = [json.loads((tmp_path / "results" / "victim" / f"{cell}.json").read_text()) for cell in cells]
    page = (tmp_path / "results" / "README.md").read_text()
    for cell, record in zip(cells, found, strict=True):
        shares = [record["after"][k] for k in ("BA", "ASR", "RA")]
        assert all(0 < s < 1 for s in shares)
        assert f"| victim | {cell} | {' / '.join(f'{100 * s:.2f}' for s in shares)} |" in page
    assert (tmp_path / "victim_ft_dataset=cifar10_sample.pt").exists()
