"""The tables of compare.py and their pages, and the pictures of many runs."""

import flags
from flags import InputError

import json

import numpy as np
import pytest
import torch
from matplotlib.text import Text

import compare
import utils
from support import plots, records, tables, victims
from tests.house import figures

# --- the tables -------------------------------------------------------------------------------------------------------


def two_seeds(house):
    """BadNets with two seeds, WaNet and a clean network, all small."""
    a, b = house.victim("a", width=0.25), house.victim("b", width=0.25, seed=2)
    wanet, clean = house.victim("w", "wanet", 0.25), house.victim("n", "none", 0.25)
    house.record(a, "none", figures(0.9, 1.0, 0.0))
    house.record(b, "none", figures(0.92, 0.98, 0.02))
    house.record(wanet, "none", figures(0.87, 0.9, 0.1))
    house.record(a, "unit", figures(0.88, 0.02, 0.84))
    house.record(b, "unit", figures(0.9, 0.06, 0.8))
    house.record(wanet, "unit", figures(0.85, 0.1, 0.7))
    house.record(a, "i_bau", figures(0.7, 0.5, 0.25))
    house.record(clean, "none", figures(0.93))
    house.record(clean, "none,attack=badnet", figures(0.93, 0.01, 0.9))
    house.record(a, "unit,acc_degrade=0.05", figures(0.1, 0.1, 0.1))  # no line of the tables
    return a, b, wanet, clean


def test_the_tables_have_means_over_seeds_and_attacks(house, capsys):
    two_seeds(house)
    house.compare("--no-run")
    averages, grids = (
        (house.results / page).read_text().partition(tables.BEGIN.format(mark))[2].partition(tables.END)[0].strip()
        for page, mark in (("README.md", "averages"), ("attacks.md", "grids"))
    )
    assert house.table(averages, "resnet18-w0.25") == {
        "resnet18-w0.25": ["BA %", "ASR %", "RA %", "attacks"],
        "no defense": ["89.0", "94.5", "5.5", "badnet, wanet"],  # BadNets' own mean first: (91 + 87) / 2
        "I-BAU": ["70.0", "50.0", "25.0", "badnet"],
        "UNIT": ["87.0", "7.0", "76.0", "badnet, wanet"],
    }
    assert house.table(grids, "resnet18-w0.25: RA %") == {
        "resnet18-w0.25: RA %": ["badnet (n = 2)", "wanet", "mean"],
        "no defense": ["1.0 ± 1.4", "10.0", "5.5"],
        "I-BAU": ["25.0 (1)", "–", "25.0 (1)"],
        "UNIT": ["82.0 ± 2.8", "70.0", "76.0"],
        "ceiling of RA": ["90.0", "–", ""],
    }
    assert house.table(grids, "resnet18-w0.25: ASR %")["UNIT"] == ["4.0 ± 2.8", "10.0", "7.0"]
    assert house.table(grids, "resnet18-w0.25: BA %") == {
        "resnet18-w0.25: BA %": ["badnet (n = 2)", "wanet", "none", "mean"],  # a clean network is no attack
        "no defense": ["91.0 ± 1.4", "87.0", "93.0", "89.0"],
        "I-BAU": ["70.0 (1)", "–", "–", "70.0 (1)"],
        "UNIT": ["89.0 ± 1.4", "85.0", "–", "87.0"],
    }
    assert "| UNIT | 87.0 | 7.0 | 76.0 | badnet, wanet |" in capsys.readouterr().out


def test_budgets_stand_beside_each_other_where_two_have_records(house):
    a, b, wanet = house.victim("a"), house.victim("b", seed=2), house.victim("w", "wanet")
    for path, cell, measured in (
        (a, "none", figures(0.9, 1.0, 0.0)),
        (a, "unit,step_images=250", figures(0.88, 0.5, 0.25)),
        (a, "unit,acc_degrade=0.05,step_images=250", figures(0.86, 0.2, 0.5)),
        (b, "unit,acc_degrade=0.05,step_images=250", figures(0.84, 0.1, 0.75)),
        (wanet, "unit,step_images=250", figures(0.8, 0.5, 0.25)),
    ):
        house.record(path, cell, measured)
    assert house.table(tables.budgets(house.groups()), "BA / ASR / RA") == {
        "BA / ASR / RA in %": ["no defense", "3 %", "5 %", "10 %"],
        "resnet18, badnet (n = 2)": [
            "90.00 / 100.00 / 0.00", "88.00 / 50.00 / 25.00", "85.00 ± 1.41 / 15.00 ± 7.07 / 62.50 ± 17.68", "–"
        ],
    }  # fmt: skip
    house.record(a, "unit,acc_degrade=0.1,step_images=250", figures(0.8, 0.1, 0.5))
    assert house.table(tables.budgets(house.groups()), "BA / ASR / RA")["resnet18, badnet (n = 2)"][3] == (
        "80.00 / 10.00 / 50.00"
    )


def test_many_attacks_are_several_tables_and_the_mean_stands_in_the_last(house, monkeypatch):
    monkeypatch.setattr(tables, "BAND", 2)
    for i, attack in enumerate(("badnet", "wanet", "reflection")):
        house.record(house.victim(attack, attack), "none", figures(0.9, 1.0, i / 10))
    first, second, *_ = tables.grids(house.groups()).split("\n\n")
    assert first.splitlines()[::2] == ["| resnet18: RA % | badnet | wanet |", "| no defense | 0.0 | 10.0 |"]
    assert second.splitlines()[::2] == ["| resnet18: RA % | reflection | mean |", "| no defense | 20.0 | 10.0 |"]


def test_the_front_page_has_what_was_defended_of_the_first_three_attacks(house):
    badnet, clean = house.victim("badnet"), house.victim("none", "none")
    wanet, narrow = house.victim("wanet", "wanet"), house.victim("small", "badnet", 0.25)
    house.record(badnet, "none", figures(0.9356, 1.0, 0.0))
    house.record(badnet, "unit", figures(0.9073, 0.01291, 0.8992))
    house.record(badnet, "nad", figures(0.8, 0.7, 0.1))  # no column of the front page
    house.record(wanet, "none", figures(0.91, 0.5, 0.25))
    house.record(wanet, "nad", figures(0.8, 0.7, 0.1))
    house.record(narrow, "ft", figures(0.8, 0.1, 0.1))
    house.record(house.victim("sig", "sig"), "bcu", figures(0.8, 0.1, 0.1))
    house.record(house.victim("vgg", network="vgg11"), "bcu", figures(0.8, 0.1, 0.1))
    house.record(clean, "none", figures(0.9459))
    house.record(clean, "ft", figures(0.9459))
    house.record(clean, "none,attack=badnet", figures(0.9459, 0.0056, 0.9447))
    assert house.table(tables.overview(house.groups()), "BA / ASR / RA") == {
        "BA / ASR / RA in %": ["no defense", "FT", "UNIT", "ceiling of RA"],
        "resnet18_badnet": ["93.56 / 100.00 / 0.00", "–", "90.73 / 1.29 / 89.92", "94.47"],
        "resnet18-w0.25_badnet": ["–", "80.00 / 10.00 / 10.00", "–", "–"],
    }


def test_the_ceiling_is_of_the_same_network_and_images(house):
    wide, narrow = house.victim("w"), house.victim("s", width=0.25)
    large = house.victim("l", size=64)
    for seed, ra in ((1, 0.8), (2, 0.9)):
        clean = house.victim(f"n{seed}", "none", seed=seed)
        house.record(clean, "none,attack=badnet", figures(0.9, 0.01, ra))
    best = {g.victims[0].path: victims.ceiling(g, house.groups()) for g in house.groups() if g.attack != "none"}
    assert best == {wide: [0.8, 0.9], narrow: [], large: []}


def test_what_does_not_count_is_left_out(house):
    path = house.victim("resnet18_badnet")
    house.record(path, "none", figures(0.5, 0.5, 0.5))
    house.record(path, "ft", figures(0.6, 0.6, 0.4), victim={"sha256": "0" * 64})  # of other weights
    house.record(path, "unit", figures(0.7, 0.7, 0.3), interrupted="out of time")
    (group,) = house.groups()
    assert [group.values(cell, "BA") for cell in ("none", "ft", "unit")] == [[0.5], [], []]
    assert tables.details(house.victims()).count("\n") == 2


def test_every_record_is_a_line_of_the_runs(house):
    path = house.victim("resnet18_badnet")
    house.record(path, "none", figures(0.5, 0.5, 0.5), seconds=0.0)
    house.record(path, "ulrl", figures(0.6, 0.6, 0.4), findings={"outcome": "suspicious: rows 0"})
    house.record(path, "unit,lr=0.05", figures(0.7, 0.7, 0.3), best_step=4, steps=300)
    house.compare("--no-run")
    lines = (house.results / "runs.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| resnet18")] == [
        "| resnet18_badnet | none | 50.00 / 50.00 / 50.00 | 75.00 |  | – | 2 | 0123456789 |",
        "| resnet18_badnet | ulrl | 60.00 / 60.00 / 40.00 | 75.00 | suspicious: rows 0 | 12 | 2 | 0123456789 |",
        "| resnet18_badnet | unit,lr=0.05 | 70.00 / 70.00 / 30.00 | 75.00 | step 5 of 300 | 12 | 2 | 0123456789 |",
    ]


def test_another_network_or_data_set_is_a_line_of_its_own_page(house):
    for attack in ("badnet", "wanet"):
        path = house.victim(attack, attack)
        house.record(path, "none", figures(0.9, 1.0, 0.0))
        house.record(path, "unit", figures(0.89, 0.5, 0.25))
    wide, clothes, alone = (
        house.victim("vgg", network="vgg11", width=0.5, epochs=24),
        house.victim("clothes", "wanet", 0.25, dataset="fashion_mnist"),
        house.victim("wrn", network="wideresnet16"),
    )
    for path in (wide, clothes, alone):
        extra = ",dataset=fashion_mnist" if path == clothes else ""
        house.record(path, f"none{extra}", figures(0.86, 1.0, 0.0))
    house.record(wide, "unit,step_images=250", figures(0.83, 0.03, 0.81))
    house.record(clothes, "unit,dataset=fashion_mnist,step_images=250", figures(0.7, 0.3, 0.1))
    house.record(clothes, "unit,dataset=fashion_mnist", figures(0.8, 0.2, 0.1))
    house.compare("--no-run")
    table = (house.results / "networks.md").read_text().partition(tables.BEGIN.format("networks") + "\n")[2]
    assert house.table(table.partition(tables.END)[0].strip(), "network, attack") == {
        "network, attack": ["made by", "BA / ASR / RA in %", "after UNIT", "run"],
        "vgg11-w0.5, badnet": [
            "`train.py --attack badnet --network vgg11 --width 0.5 --epochs 24`",
            "86.00 / 100.00 / 0.00", "83.00 / 3.00 / 81.00", "UNIT 250",
        ],
        "fashion_mnist_resnet18-w0.25, wanet": [
            "`train.py --attack wanet --dataset fashion_mnist --width 0.25`",
            "86.00 / 100.00 / 0.00", "80.00 / 20.00 / 10.00", "UNIT",
        ],
    }  # fmt: skip
    assert list(tables.panels(house.groups())) == ["resnet18"]  # of several attacks


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attack": "wanet", "sampling": "in_batch"}, "--attack wanet"),  # its own, which the flag does not take
        ({"attack": "badnet", "sampling": "fixed"}, "--attack badnet --sampling fixed"),
        ({"attack": "badnet", "poison_rate": 0.05}, "--attack badnet --poison_rate 0.05"),
        ({"attack": "composite", "poison_rate": 1 / 11, "batch_size": 64}, "--attack composite --batch_size 64"),
        ({"attack": "none", "poison_rate": 0.0, "weight_decay": 0.0}, "--attack none --weight_decay 0.0"),
        ({"attack": "badnet", "target": "all", "dataset": "svhn"}, "--attack badnet --dataset svhn --target all"),
    ],
)
def test_the_command_that_makes_a_victim_is_one_that_train_py_takes(changes, words):
    usual = vars(flags.parser("train.py").parse_args([]))
    recipe = {k: usual.get(k) for k in records.RECIPE} | {"poison_rate": 0.1} | changes
    assert tables.making(recipe) == f"train.py {words}"
    flags.parser("train.py").parse_args(words.split())


def test_how_often_the_detector_is_right(house):
    """Right is the target alone; another class, another one beside it or none at all are wrong."""
    index = [0.5, 0.25, 3.0, 2.5, 1.0]

    def found(name, suspicious, smallest, attack="badnet", **changes):
        norms = [9.0 if c != smallest else 1.0 for c in range(5)]
        findings = {"suspicious": suspicious, "norms": norms, "anomaly_index": index, "outcome": ""}
        path = house.victim(name, attack, **changes)
        cell = "nc,target=2" if changes.get("target") else "nc"
        house.record(path, cell, figures(0.9, 0.5, 0.5), findings=findings)

    assert tables.detections(house.victims()) == ""
    found("right", [2], 2, target=2)
    found("two", [2, 3], 2, seed=1, target=2)
    found("missed", [], 1, "wanet")
    found("clean", [], 0, "none")
    found("blamed", [3], 3, "none", seed=1)
    house.victim("unmeasured", seed=3)
    said, table = tables.detections(house.victims()).split("\n\n")
    assert said == "Right on 1 of 3 backdoored networks and 1 of 2 clean networks."
    assert house.table(table, "network") == {
        "network": ["target", "suspected class (index)", "class of the smallest patch (index)", "right"],
        "right": ["2", "2 (3.00)", "2 (3.00)", "yes"],
        "two": ["2", "2 (3.00), 3 (2.50)", "2 (3.00)", "no"],
        "missed": ["0", "none", "1 (0.25)", "no"],
        "clean": ["none", "none", "0 (0.50)", "yes"],
        "blamed": ["none", "3 (2.50)", "3 (2.50)", "no"],
    }
    house.compare("--no-run")
    assert said in (house.results / "attacks.md").read_text()


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r.pop("findings"),
        lambda r: r["findings"].pop("anomaly_index"),
        lambda r: r["findings"].update(norms=[], anomaly_index=[], suspicious=[]),
        lambda r: r["findings"].update(norms=[1.0]),
        lambda r: r["findings"].update(norms=["a", "b"]),
        lambda r: r["findings"].update(norms=[1.0, float("nan")]),
        lambda r: r.update(defense="ft", findings={}),  # by its name the detector's, by its content not
        lambda r: r["findings"].update(suspicious=[7]),
        lambda r: r["findings"].update(suspicious=None),
    ],
)
def test_a_record_of_nc_whose_findings_are_damaged_is_named(house, damage):
    path = house.victim("a")
    findings = {"suspicious": [0], "norms": [1.0, 2.0], "anomaly_index": [3.0, 0.5], "outcome": ""}
    house.record(path, "nc", figures(0.9, 0.5, 0.5), findings=findings)
    file = house.results / path.stem / "nc.json"
    assert records.read(file)["findings"] == findings
    record = json.loads(file.read_text())
    damage(record)
    file.write_text(json.dumps(record))
    with pytest.raises(InputError, match="nc.json is no record of a run; move it elsewhere"):
        house.compare("--no-run")


def test_the_run_on_the_usual_folder_also_writes_the_front_page_and_that_of_the_victims(house, monkeypatch):
    wide, narrow = house.victim("resnet18_badnet"), house.victim("resnet18-w0.25_none", "none", 0.25)
    house.victim("resnet18_badnet_seed2", seed=2)  # remade by a command, and not listed
    monkeypatch.setattr(flags, "RESULTS", house.results)
    monkeypatch.setattr(flags, "ROOT", house.folder)
    pages = [house.folder / "README.md", house.folder / "ckpt" / "README.md"]
    for page, name in zip(pages, ("overview", "victims"), strict=True):
        page.write_text(f"{tables.BEGIN.format(name)}\n{tables.END}\n")
    house.record(wide, "none", figures(0.5, 0.5, 0.25))
    house.record(wide, "unit", figures(0.6, 0.1, 0.4))
    compare.main(["--no-run", "--results", str(house.folder / "elsewhere")])
    assert "|" not in pages[0].read_text() + pages[1].read_text()
    house.compare("--no-run")
    front, listed = (page.read_text() for page in pages)
    assert "| resnet18_badnet (n = 2) | 50.00 / 50.00 / 25.00 | 60.00 / 10.00 / 40.00 |" in front
    sums = [utils.sha256(path)[:16] for path in (wide, narrow)]
    assert [line for line in listed.splitlines() if line.startswith("| `")] == [
        "| `cifar10_resnet18_badnet.pt` | 1 | dirty-label, 10 %, resampled | 30 | 93.00 / 100.00 / 0.00 | 75.00 | 99 |"
        f" abc | `{sums[0]}` |",
        f"| `cifar10_resnet18-w0.25_none.pt` | 0.25 | clean | 30 | 93.00 | 75.00 | 99 | abc | `{sums[1]}` |",
    ]


def test_what_is_drawn_is_what_was_measured(house, monkeypatch):
    monkeypatch.undo()  # the pictures are what this is about
    monkeypatch.setattr(utils, "CKPT", house.folder / "ckpt")
    given = {}
    monkeypatch.setattr(plots, "draw_heatmap", lambda *a: given.update(heatmap=a))
    monkeypatch.setattr(plots, "draw_tradeoff", lambda *a: given.update(tradeoff=a))
    two_seeds(house)
    house.record(house.victim("wide"), "none", figures(0.9, 1.0, 0.0))  # of no defense there is nothing to see
    house.compare("--no-run")
    columns, maps, _ = given["heatmap"]
    assert columns == ["no defense", "I-BAU", "UNIT", "clean network"]
    (title, rows, ra, low), (second, _, asr, high) = maps
    assert (title, second, low, high) == ("resnet18-w0.25: RA %", "resnet18-w0.25: ASR %", False, True)
    assert rows == ["badnet", "wanet"]
    assert ra == [[pytest.approx(0.01), 0.25, pytest.approx(0.82), 0.9], [0.1, None, 0.7, None]]
    assert asr == [[pytest.approx(0.99), 0.5, pytest.approx(0.04), 0.01], [0.9, None, 0.1, None]]
    ((panel, points),) = given["tradeoff"][0].items()
    assert panel == "resnet18-w0.25: mean over badnet"  # that both defenses have
    assert {k: pytest.approx(v) for k, v in points.items()} == {"I-BAU": (0.2, 0.25), "UNIT": (0.02, 0.81)}
    house.record(house.folder / "ckpt/cifar10_w.pt", "i_bau", figures(0.8, 0.2, 0.5))
    house.compare("--no-run")
    ((panel, points),) = given["tradeoff"][0].items()
    assert panel == "resnet18-w0.25: mean over badnet, wanet"
    assert {k: pytest.approx(v) for k, v in points.items()} == {
        "I-BAU": ((0.2 + 0.07) / 2, (0.25 + 0.4) / 2),
        "UNIT": (0.02, (0.81 + 0.6) / 2),  # BadNets' own mean first
    }


def test_attacks_are_named_as_briefly_as_it_is_clear():
    whole = list("abcdefg")
    assert tables.named("gb", whole) == "b, g"
    assert tables.named("abcd", whole) == "all but e, f, g"
    assert tables.named("abc", "abc") == "a, b, c"
    assert tables.named("abcd", list("abcd")) == "all 4"
    assert tables.named("abcd", list("abcdefghi")) == "a, b, c, d"


def test_defenses_are_compared_over_the_attacks_that_most_of_them_have():
    some = {"ft": "ab", "nad": "ab", "clp": "abc", "unit": "abcd"}
    assert compare.in_common({k: dict.fromkeys(v) for k, v in some.items()}) == ["a", "b"]  # 4 x 2, not 2 x 3
    some |= {"rnp": "abc", "fst": "bc", "anp": "abcd"}
    assert compare.in_common({k: dict.fromkeys(v) for k, v in some.items()}) == ["b", "a", "c"]  # 4 x 3, not 6 x 2


def test_an_attack_without_ra_is_counted_apart(house, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(utils, "CKPT", house.folder / "ckpt")
    given = {}
    monkeypatch.setattr(plots, "draw_heatmap", lambda *a: given.update(heatmap=a))
    monkeypatch.setattr(plots, "draw_tradeoff", lambda *_: None)
    for attack, ra in (("badnet", 0.8), ("wanet", 0.6), ("composite", None)):
        path = house.victim(attack, attack, width=0.25)
        for cell in ("none", "ft", "unit"):
            house.record(path, cell, figures(0.9, 0.3, ra))
    house.compare("--no-run")
    (_, rows, ra, _), (_, others, asr, _) = given["heatmap"][1]
    assert (rows, others) == (["badnet", "wanet"], ["badnet", "wanet", "composite"])
    assert (ra, asr) == ([[0.8] * 3, [0.6] * 3], [[0.3] * 3] * 3)
    averages = house.table(tables.averages(house.groups()), "resnet18-w0.25")
    assert averages["UNIT"] == ["90.0", "30.0", "70.0 (2)", "badnet, wanet, composite"]


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


# --- the pictures -----------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figs, savefig = [], plots.Figure.savefig
    monkeypatch.setattr(plots.Figure, "savefig", lambda self, *a, **k: (figs.append(self), savefig(self, *a, **k)))
    return figs


def test_the_heatmap_prints_each_share_in_its_cell(tmp_path, drawn):
    maps = [("RA %", ["badnet", "wanet"], [[0.0, 0.876], [None, 1.0]], False), ("ASR %", ["badnet"], [[1, 0.5]], True)]
    plots.draw_heatmap(["FT", "UNIT"], maps, tmp_path / "x.png")
    first, second = drawn[0].axes
    assert {t.get_position(): t.get_text() for t in first.texts} == {
        (0, 0): "0",
        (1, 0): "88",
        (0, 1): "–",
        (1, 1): "100",
    }
    assert [t.get_text() for t in second.texts] == ["100", "50"]
    assert [t.get_text() for t in first.get_xticklabels()] == ["FT", "UNIT"]
    assert [t.get_text() for t in first.get_yticklabels()] == ["badnet", "wanet"]
    # the dark end is 0 of RA and 100 of ASR, and what is printed there is white
    assert [t.get_color() for t in first.texts] == ["white", "black", "black", "black"]
    assert second.texts[0].get_color() == "white"
    assert (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"


def test_no_label_of_the_tradeoff_covers_another_or_a_point(tmp_path, drawn):
    g = torch.Generator().manual_seed(0)
    close = (0.02 * torch.rand(15, 2, generator=g)).tolist()
    points = {f"DEFENSE-{i}": (x, 5 * y) for i, (x, y) in enumerate(close)}
    plots.draw_tradeoff({"a": points, "b": {"UNIT": (0.01, 0.5)}}, tmp_path / "x.png")
    axis, other = drawn[0].axes
    np.testing.assert_allclose(axis.lines[0].get_xydata(), [(100 * x, 500 * y) for x, y in close])
    assert [t.get_text() for t in axis.texts] == [f"DEFENSE-{i}" for i in range(15)]
    assert [t.get_text() for t in other.texts] == ["UNIT"]
    drawn[0].draw_without_rendering()
    boxes = [Text.get_window_extent(t) for t in axis.texts]  # without the line to the point
    dots = axis.transData.transform(axis.lines[0].get_xydata())
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(b) for b in boxes[:i])
        assert not any(box.contains(x, y) for x, y in dots)


def test_without_anything_to_show_there_is_no_picture(tmp_path):
    plots.draw_heatmap([], [], tmp_path / "x.png")
    plots.draw_tradeoff({}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
