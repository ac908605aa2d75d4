"""One table in which UNIT stands beside the defences it is compared with, on every victim that lies in ckpt/.

    python compare.py            # runs what has no record yet, then writes the table

A cell is a run of unit.py or defend.py at its published constants, and its record in results/. What has a record for
these very weights is not run again; a cell that fails is reported and left out. --attack, --defenses and --seeds choose
what is run; the table holds all that has a record, of the data set, network, target and way of drawing given. Writes
results/compare.json, results/compare.png, the table in results/README.md, and BA and ASR alone in README.md.
"""

import argparse

import cli
from cli import InputError, bounded

COLUMNS = ("none", *cli.DEFENSES, "unit", "unit_budget")  # the last: unit.py --until budget


def parser():
    """Return the command's parser."""
    p = cli.parser("compare.py", "fill the table of defences", attacks=("none", *cli.ATTACKS))
    p.set_defaults(attack=None)
    p.add_argument("--defenses", nargs="+", default=COLUMNS, choices=COLUMNS, help="which to run")
    p.add_argument("--seeds", nargs="+", type=bounded(int, 0, 2**32 - 1), help="a run each (default: --seed alone)")
    p.add_argument("--draw", default="first", choices=("first", "random"), help="which images of each class; by seed")
    p.add_argument("--run", default=True, action=argparse.BooleanOptionalAction, help="run what has no record yet")
    p.add_argument("--results", default=str(cli.ROOT / "results"), help="folder of the records")
    p.add_argument("--page", default=str(cli.ROOT / "README.md"), help="file that holds BA and ASR in short")
    return p


if __name__ == "__main__":
    parser().parse_args()  # answers --help and a wrong flag before the seconds that torch takes

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import defend
import pictures
import report
import unit
import utils
from records import FREE, find, load_records

# what a method's own paper reports, on its own weights: BA / ASR in %
REPORTED = {
    ("badnet", "dbd"): "92.50 / 0.88 (before: 95.13 / 100; poison 5 %, target 3)",
    ("blended", "dbd"): "92.60 / 0.31 (before: 94.26 / 98.15; poison 5 %, target 3)",
}


def usual_settings(args, defense, attack):
    """Return {setting: value} of a run at the published constants, without what says how or where it computes.

    args: the flags of this command.
    """
    flags = ["--attack", attack, "--dataset", args.dataset, "--network", args.network, "--target", str(args.target)]
    flags += ["--draw", args.draw]
    if defense.startswith("unit"):
        until = "steps" if defense == "unit" else "budget"
        usual, config = unit.parser().parse_args(flags), unit.UnitConfig(until=until)
    else:
        usual = defend.parser().parse_args([*flags, "--defense", defense])
        config = defend.configure(usual)
    return {k: v for k, v in (vars(usual) | asdict(config)).items() if k not in FREE}


def found(records, column, victim_sum, settings):
    """Return {seed: record} of the runs that belong into a column; `records`: {path: record}."""
    return find(records.values(), "unit" if column.startswith("unit") else column, victim_sum, settings)


def run_cell(args, defense, attack, victim, seed):
    """Run one cell in a process of its own; return what went wrong in a line, or None."""
    script = {"unit": ["unit.py"], "unit_budget": ["unit.py", "--until", "budget"]}.get(defense)
    script = script or ["defend.py", "--defense", defense]
    flags = {"attack": attack, "ckpt": victim, "seed": seed}
    same = ("datadir", "dataset", "network", "batch_size", "target", "device", "draw", "results")
    flags |= {k: getattr(args, k) for k in same}
    command = [sys.executable, str(cli.ROOT / script[0]), *script[1:]]
    command += [text for k, v in flags.items() for text in (f"--{k}", str(v))]
    with tempfile.TemporaryDirectory() as folder:
        if script[0] == "unit.py":
            command += ["--outdir", folder]
        # of several seeds none stays in ckpt/; what a cell that was cut off goes on from lies beside it
        out = utils.CKPT / f"{victim.stem}_{defense}_seed{seed}.pt" if len(args.seeds) > 1 else None
        if out:
            command += ["--out", str(out)]
        said = b""
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            try:
                while chunk := process.stderr.read1():
                    sys.stderr.buffer.write(chunk)
                    sys.stderr.flush()
                    said = (said + chunk)[-2000:]
            except KeyboardInterrupt:  # the cell got it too, and saves what it has
                process.wait()
                raise
    if out:
        out.unlink(missing_ok=True)
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        return f"killed by signal {-process.returncode}"
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    return f"exit status {process.returncode}: {lines[-1] if lines else 'no word'}"


def victims(args):
    """Yield (attack, file, its sum) of the victims that are there, first those of full width."""
    for attack in ("none", *cli.ATTACKS):
        full = utils.checkpoint_path("cifar10", args.network, attack)
        others = sorted(full.parent.glob(full.name.replace(f"_{attack}", f"-w*_{attack}")))
        for victim in (full, *others):
            if victim.exists():
                yield attack, victim, utils.sha256(victim)


def fill(args):
    """Run the cells that the flags choose and that have no record; return what went wrong, a line each."""
    failed = []
    for attack, victim, victim_sum in victims(args):
        if args.attack not in (None, attack):
            continue
        for defense in args.defenses:
            settings = usual_settings(args, defense, attack)
            for seed in args.seeds:
                if seed in found(load_records(args.results), defense, victim_sum, settings):
                    continue
                cell = f"{victim.stem}, {defense}, seed {seed}"
                print(f"--- {cell}", flush=True)
                error = run_cell(args, defense, attack, victim, seed)
                if not error and seed not in found(load_records(args.results), defense, victim_sum, settings):
                    error = "it left no record that belongs here"
                if error:
                    failed.append(f"{cell}: {error}")
                    print(failed[-1], file=sys.stderr)
    return failed


def summarise(victim, attack, defense, runs, **about):
    """Return one row of the table as plain values: means over the runs."""

    def mean(of):
        values = [of(r) for r in runs]
        return None if None in values else sum(values) / len(values)

    one, machines = runs[0], sorted({report.machine(r["machine"]) for r in runs})
    outcomes = [r["findings"]["outcome"] for r in runs if "outcome" in r.get("findings", {})]
    s = one["settings"]
    return {
        **{k: s.get(k) for k in ("dataset", "network", "target", "draw")},
        "victim": victim,
        "attack": attack,
        "defense": defense,
        "BA": mean(lambda r: r["after"]["BA"]),
        "ASR": mean(lambda r: r["after"]["ASR"]),
        "seconds": mean(lambda r: r["seconds"]) if len(machines) == 1 else None,
        "peak_GiB": mean(lambda r: r.get("peak_GiB")) if len(machines) == 1 else None,
        "clean_images": one["data"] if "data" in one else one["n_train"] + one["n_valid"],
        "labels": one.get("labels", True),
        "n": len(runs),
        "machine": ", ".join(machines),
        "findings": [r["findings"] for r in runs if r.get("findings")],
        "note": "; ".join(dict.fromkeys(outcomes)) or None,
        "reported": REPORTED.get((attack, defense)),
        **about,
    }


def rows_of(args):
    """Return the rows of the table: every victim and defence that has a record, then the runs of DBD."""
    records, rows = load_records(args.results), []
    for attack, victim, victim_sum in victims(args):
        for defense in COLUMNS:
            usual = usual_settings(args, defense, attack)
            # on the clean images, then on those of other sets
            for ood in dict.fromkeys([None, *(r["settings"].get("ood") for r in records.values())]):
                if ood is not None and "ood" not in usual:
                    continue
                runs = found(records, defense, victim_sum, usual | ({"ood": ood} if "ood" in usual else {}))
                if runs:
                    about = {"ood": ood} | ({"note": f"on images of {ood}"} if ood else {})
                    rows.append(summarise(victim.stem, attack, defense, list(runs.values()), **about))
    # DBD has no victim: it trains on the poisoned images itself; runs that differ in their settings are rows apart
    alike = {}
    for r in records.values():
        s = r["settings"]
        if r["defense"] == "dbd" and s["dataset"] == args.dataset and s["network"] == args.network:
            what = json.dumps({k: v for k, v in s.items() if k not in {*FREE, "resume", "overwrite"}}, sort_keys=True)
            alike.setdefault((s["attack"], what), {})[s["seed"]] = r
    for (attack, what), runs in alike.items():
        s = json.loads(what)
        epochs = "+".join(str(s[f"{stage}_epochs"]) for stage in ("simclr", "linear", "mixmatch"))
        rate = f"{100 * s['poison_rate']:g} %"
        note = f"width {s['width']:g}, {epochs} epochs, poison rate {rate}, target {s['target']}"
        rows.append(summarise(None, attack, "dbd", list(runs.values()), note=note))
    return rows


def table(rows):
    """Return the rows as a table in Markdown."""
    lines = []
    for r in rows:
        lines.append([
            r["victim"] or r["attack"], f"{r['defense']} ({r['note']})" if r["note"] else r["defense"],
            report.percent(r["BA"]),
            report.percent(r["ASR"]), "–" if r["seconds"] is None else f"{r['seconds']:.0f}",
            "–" if r["peak_GiB"] is None else f"{r['peak_GiB']:.2f}", f"{r['clean_images']:,}",
            "yes" if r["labels"] else "no", r["n"], r["machine"], r["reported"] or "–",
        ])  # fmt: skip
    header = ["victim", "defence", "BA %", "ASR %", "seconds", "peak GiB", "clean images", "labels", "n", "machine"]
    return report.markdown([*header, "its own paper, on its own weights"], lines)


def overview(rows):
    """Return BA / ASR alone, a line per victim, a column per defence; first the victims of full width."""
    lines = {}
    for r in rows:
        if r["victim"] and not r["ood"]:
            n = f" (n = {r['n']})" if r["n"] > 1 else ""
            lines.setdefault(r["victim"], {})[r["defense"]] = (
                f"{report.percent(r['BA'])} / {report.percent(r['ASR'])}{n}"
            )
    ordered = sorted(lines.items(), key=lambda line: "-w" in line[0])
    return report.markdown(
        ["BA / ASR in %", *COLUMNS], [[victim, *(line.get(c, "–") for c in COLUMNS)] for victim, line in ordered]
    )


def main(argv=None):
    """The command."""
    args = parser().parse_args(argv)
    args.seeds = args.seeds or [args.seed]
    usual = all(getattr(args, k) == parser().get_default(k) for k in ("dataset", "network", "target", "draw"))
    ours = Path(args.page).resolve() == cli.ROOT / "README.md" or Path(args.results).resolve() == cli.ROOT / "results"
    if not usual and ours:
        raise InputError("README.md holds the full set's table at the defaults; give your own --page and --results")
    report.check_mark(Path(args.page), "compare.py")
    failed = fill(args) if args.run else []
    rows = rows_of(args)
    if not rows:
        raise InputError("there is nothing to show; train a victim first: python train.py --attack badnet")
    print(table(rows))
    utils.save_json(rows, Path(args.results) / "compare.json")
    pictures.draw_compared(rows, Path(args.results) / "compare.png")
    report.put_section(Path(args.results) / "README.md", "All defences", table(rows), "compare.py")
    report.put(Path(args.page), overview(rows), "compare.py")
    if failed:
        print("\n".join(["failed:", *failed]), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
