"""compare.py and sweep.py: what has a record is not run again, what fails is said, tables hold what was measured."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import torch

import compare
import defend
import pictures
import records
import report
import sweep
import unit
import utils
from cli import ROOT, InputError
from defenses import finetune
from records import find, load_records

SAMPLE = ["--dataset", "cifar10_sample", "--device", "cpu"]

pytestmark = pytest.mark.usefixtures("few_test_images")


@pytest.fixture
def house(tmp_path, victim_file, monkeypatch):
    """A folder with one small victim, no records, a page with a place for BA and ASR; cells run in this process."""
    ckpt = tmp_path / "ckpt"
    ckpt.mkdir()
    victim_file.rename(ckpt / "cifar10_resnet18_badnet.pt")
    monkeypatch.setattr(utils, "CKPT", ckpt)
    (tmp_path / "page.md").write_text(f"{report.BEGIN.format('compare.py')}\n{report.END}\n")
    init = finetune.Config.__init__
    monkeypatch.setattr(finetune.Config, "__init__", lambda self, **k: init(self, **{"epochs": 1, **k}))
    ran = []

    def here(args, defense, attack, victim, seed):
        ran.append((defense, attack, seed))
        flags = [*SAMPLE, "--attack", attack, "--seed", str(seed), "--results", args.results, "--draw", args.draw]
        flags += ["--ckpt", str(victim)]
        if defense == "ulrl":
            return "exit status 1: no luck"
        defend.main([*flags, "--defense", defense])
        return None

    monkeypatch.setattr(compare, "run_cell", here)
    return tmp_path, ran


def run_compare(folder, *flags):
    compare.main([*SAMPLE, "--results", str(folder / "results"), "--page", str(folder / "page.md"), *flags])


def every_figure(folder):
    return (folder / "results" / "README.md").read_text()


def test_a_cell_is_run_once_and_its_figures_stand_in_the_table(house, capsys):
    folder, ran = house
    run_compare(folder, "--defenses", "none", "ft", "--seeds", "1", "2")
    assert ran == [("none", "badnet", 1), ("none", "badnet", 2), ("ft", "badnet", 1), ("ft", "badnet", 2)]
    run_compare(folder, "--defenses", "ft", "--seeds", "1", "2")
    assert len(ran) == 4
    rows = json.loads((folder / "results" / "compare.json").read_text())
    assert [(r["attack"], r["defense"], r["n"]) for r in rows] == [("badnet", "none", 2), ("badnet", "ft", 2)]
    records = [json.loads(p.read_text()) for p in (folder / "results").glob("ft_*.json")]
    mean, asr = (sum(r["after"][k] for r in records) / 2 for k in ("BA", "ASR"))
    assert rows[1]["BA"] == pytest.approx(mean)
    assert f"| cifar10_resnet18_badnet | ft | {100 * mean:.2f} |" in every_figure(folder)
    line = next(line for line in (folder / "page.md").read_text().splitlines() if "badnet" in line)
    assert line.split(" | ")[2] == f"{100 * mean:.2f} / {100 * asr:.2f} (n = 2)"  # after the victim and `none`
    assert line.endswith("| – | – | – | – |")  # what was not run
    assert (folder / "results" / "compare.png").exists()


def test_a_cell_that_fails_does_not_take_the_rest_with_it(house, capsys):
    folder, ran = house
    with pytest.raises(SystemExit) as end:
        run_compare(folder, "--defenses", "ulrl", "ft")
    assert end.value.code == 1
    assert "badnet, ulrl, seed 1024: exit status 1: no luck" in capsys.readouterr().err
    assert "| cifar10_resnet18_badnet | ft |" in every_figure(folder)


def test_of_several_seeds_each_cell_has_a_place_of_its_own_until_it_is_measured(tmp_path, monkeypatch):
    """Always the same, so that a cell that was cut off goes on."""
    places, popen = [], subprocess.Popen
    monkeypatch.setattr(utils, "CKPT", tmp_path)

    def fake(command, **kwargs):
        places.append(Path(command[command.index("--out") + 1]))
        return popen(["touch", places[-1]], **kwargs)

    monkeypatch.setattr(compare.subprocess, "Popen", fake)
    args = compare.parser().parse_args([*SAMPLE, "--results", str(tmp_path), "--seeds", "7", "8"])
    cells = [(defense, seed) for defense in compare.COLUMNS for seed in args.seeds]
    for defense, seed in cells * 2:
        assert compare.run_cell(args, defense, "wanet", tmp_path / "cifar10_resnet18_wanet.pt", seed) is None
        assert not list(tmp_path.iterdir())
    assert len(set(places)) == len(cells)
    assert places[: len(cells)] == places[len(cells) :]
    assert {place.parent for place in places} == {tmp_path}


@pytest.mark.parametrize(
    ("status", "said"), [(0, None), (2, "exit status 2: the last line"), (-9, "killed by signal 9")]
)
def test_a_cell_is_a_command_of_its_own(tmp_path, monkeypatch, capfd, status, said):
    """The command line is one that the script's own parser takes; what it says on standard error is passed on."""
    commands, popen = [], subprocess.Popen

    def fake(command, **kwargs):
        commands.append(command)
        end = "kill -9 $$" if status < 0 else f"exit {status}"
        return popen(["sh", "-c", f"echo some bar >&2; echo the last line >&2; {end}"], **kwargs)

    monkeypatch.setattr(compare.subprocess, "Popen", fake)
    for defense in compare.COLUMNS:
        args = compare.parser().parse_args([*SAMPLE, "--results", str(tmp_path), "--draw", "random"])
        args.seeds = [7]
        assert compare.run_cell(args, defense, "wanet", Path("v.pt"), 7) == said
        assert "some bar" in capfd.readouterr().err
        script, flags = commands[-1][1], commands[-1][2:]
        known = (unit if script.endswith("unit.py") else defend).parser().parse_args(flags)
        assert (known.attack, known.ckpt, known.seed, known.draw) == ("wanet", "v.pt", 7, "random")
        assert known.dataset == "cifar10_sample"
        search = {"steps": "unit", "budget": "unit_budget"}.get(getattr(known, "until", None))
        assert (search or known.defense) == defense


def test_the_committed_default_run_is_found():
    """The record of the default run in results/ is that of the committed victim, and the table takes it."""
    args = compare.parser().parse_args([])
    sums = {path.stem: victim_sum for _, path, victim_sum in compare.victims(args)}
    records = load_records(ROOT / "results").values()
    assert 1024 in find(
        records, "unit", sums["cifar10_resnet18_badnet"], compare.usual_settings(args, "unit", "badnet")
    )


def test_victims_of_every_width_are_cells(house):
    folder, ran = house
    full = utils.CKPT / "cifar10_resnet18_badnet.pt"
    narrow = utils.load_checkpoint(full) | {"target": None}  # another file
    utils.save_checkpoint(narrow, utils.CKPT / "cifar10_resnet18-w0.125_badnet.pt")
    run_compare(folder, "--defenses", "none")
    assert len(ran) == 2
    page = every_figure(folder)
    assert page.index("| cifar10_resnet18_badnet | none |") < page.index("| cifar10_resnet18-w0.125_badnet | none |")
    page = (folder / "page.md").read_text()
    assert page.index("| cifar10_resnet18_badnet |") < page.index("| cifar10_resnet18-w0.125_badnet |")


def test_a_search_until_the_budget_is_a_cell_of_its_own():
    args = compare.parser().parse_args([])
    usual = {d: compare.usual_settings(args, d, "badnet") for d in ("unit", "unit_budget")}
    for defense, settings in usual.items():
        record = {"defense": "unit", "victim": {"sha256": "0"}, "settings": settings | {"seed": 1}}
        assert [d for d in usual if compare.found({"a": record}, d, "0", usual[d])] == [defense]


def test_the_picture_takes_more_victims_than_there_are_markers(tmp_path):
    rows = [{"victim": f"v{i}", "defense": "ft", "BA": 0.9, "ASR": 0.1} for i in range(12)]
    pictures.draw_compared(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"


def test_of_two_precisions_bf16_is_the_cell():
    """Whether the flag says so, or auto, and the record what that came to."""
    victim = {"victim": {"sha256": "0"}}
    flags = [{"defense": "unit", **victim, "settings": {"seed": 1, "precision": p}} for p in ("bf16", "fp32")]
    auto = {"defense": "ft", **victim, "settings": {"seed": 1, "precision": "auto"}}
    chosen = [{**auto, "precision": p} for p in ("bfloat16", "float32")]
    for bf16, fp32 in (flags, chosen):
        for pair in ([bf16, fp32], [fp32, bf16]):
            assert find(pair, bf16["defense"], "0", {})[1] is bf16


def test_the_table_of_the_readme_is_that_of_the_defaults(house):
    with pytest.raises(InputError, match="--page"):
        compare.main([*SAMPLE, "--results", str(house[0] / "results")])
    with pytest.raises(InputError, match="--results"):
        compare.main([*SAMPLE, "--page", str(house[0] / "page.md")])
    assert not house[1]


def test_images_of_another_set_are_a_row_apart(house):
    folder, _ = house
    about = {"dataset": "cifar10_sample", "network": "resnet18", "attack": "badnet", "target": 0}
    usual = compare.usual_settings(compare.parser().parse_args(SAMPLE), "bcu", "badnet")
    victim = {"sha256": utils.sha256(utils.CKPT / "cifar10_resnet18_badnet.pt")}
    figures = {"seconds": 5.0, "data": 500, "labels": False, "machine": {"device": "x"}}
    for ood, ba in ((None, 0.8), ("clothes.gz", 0.7)):
        settings = usual | about | {"ood": ood, "seed": 1024}
        record = {"defense": "bcu", "victim": victim, "settings": settings, "after": {"BA": ba, "ASR": 0.1}, **figures}
        utils.save_json(record, folder / "results" / f"bcu_{ba}.json")
    run_compare(folder, "--no-run")
    page = every_figure(folder)
    assert "| cifar10_resnet18_badnet | bcu | 80.00 | 10.00 | 5 |" in page
    assert "| cifar10_resnet18_badnet | bcu (on images of clothes.gz) | 70.00 | 10.00 | 5 |" in page
    page = (folder / "page.md").read_text()
    assert "80.00 / 10.00" in page
    assert "70.00" not in page


def test_another_victim_is_another_cell(house):
    folder, ran = house
    run_compare(folder, "--defenses", "none")
    path = utils.CKPT / "cifar10_resnet18_badnet.pt"
    checkpoint = utils.load_checkpoint(path)
    checkpoint["state_dict"]["linear.bias"] += 1
    utils.save_checkpoint(checkpoint, path)
    run_compare(folder, "--defenses", "none")
    assert len(ran) == 2


def test_a_page_without_a_place_is_known_before_anything_is_run(house):
    folder, ran = house
    (folder / "page.md").write_text("nothing here")
    with pytest.raises(InputError, match="no place"):
        run_compare(folder)
    (folder / "page.md").unlink()
    with pytest.raises(InputError, match="cannot read"):
        run_compare(folder)
    assert not ran


def test_runs_of_dbd_stand_apart_by_their_settings(house):
    folder, _ = house
    about = {"dataset": "cifar10_sample", "network": "resnet18", "attack": "blended", "target": 0, "poison_rate": 0.05}
    figures = {"after": {"BA": 0.8, "ASR": 0.1}, "seconds": 5.0, "data": 0, "machine": {"device": "x"}}
    for name, seed, epochs in (("a", 1, 2), ("b", 2, 2), ("c", 1, 9)):
        settings = about | {
            "seed": seed,
            "width": 0.25,
            "simclr_epochs": epochs,
            "linear_epochs": 1,
            "mixmatch_epochs": 1,
        }
        record = {"defense": "dbd", "victim": {"sha256": "0"}, "settings": settings, **figures}
        utils.save_json(record, folder / "results" / f"dbd_{name}.json")
    run_compare(folder, "--no-run")
    page = every_figure(folder)
    assert "| blended | dbd (width 0.25, 2+1+1 epochs, poison rate 5 %, target 0) | 80.00 | 10.00 |" in page
    rows = json.loads((folder / "results" / "compare.json").read_text())
    assert sorted(r["n"] for r in rows) == [1, 2]


def test_every_column_finds_its_own_flags_again():
    """The settings a table looks for are those a run writes: flags as given, and the constants of the method."""
    args = compare.parser().parse_args([])
    for defense in compare.COLUMNS:
        settings = compare.usual_settings(args, defense, "badnet")
        assert settings["attack"] == "badnet"
        assert not {"seed", "results", "out", "device"} & set(settings)
    assert compare.usual_settings(args, "ulrl", "badnet")["data_rate"] == 0.01
    assert compare.usual_settings(args, "unit", "badnet")["n_sigma"] == 4.0


def test_a_sweep_runs_each_value_once(house, monkeypatch, capsys):
    folder, _ = house
    search, seen = unit.tighten, []

    def short(model, *data_and_config, **kwargs):
        *data, config, on_step = data_and_config
        seen.append((config.acc_degrade, len(data[0]) + len(data[2])))
        return search(model, *data, dataclasses.replace(config, n_steps=1), on_step, **kwargs)

    monkeypatch.setattr(unit, "tighten", short)
    flags = [*SAMPLE, "--attack", "badnet", "--results", str(folder / "results")]
    for _ in range(2):
        sweep.main([*flags, "--acc_degrade", "0.01", "0.03", "--data_rate", "0.5"])
    assert seen == [(0.01, 500), (0.03, 500), (0.03, 250)]
    assert [path.name for path in utils.CKPT.iterdir()] == ["cifar10_resnet18_badnet.pt"]
    page = (folder / "results" / "README.md").read_text()
    assert page.count("| acc_degrade |") == 2
    assert "| data_rate | 0.5 | 250 |" in page
    assert (folder / "results" / "sweep_cifar10_sample_cifar10_resnet18_badnet.png").exists()
    sweep.main([*flags, "--draw", "random", "--acc_degrade", "--data_rate", "0.5"])
    assert (folder / "results" / "README.md").read_text().startswith(page)  # a table apart
    for good, said in ((True, "| 0.01 |"), (False, "| 0.01 (no step within acc_degrade; the last one taken) |")):
        for path in (folder / "results").glob("unit_*.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"found_good": good}))
        sweep.main([*flags, "--acc_degrade", "0.01", "--data_rate"])
        assert f"| acc_degrade {said}" in (folder / "results" / "README.md").read_text()
    with pytest.raises(InputError, match="nothing to run"):
        sweep.main([*flags, "--acc_degrade"])


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
