"""One table in which UNIT stands beside the defences it is compared with, on every victim that lies in ckpt/.

    python compare.py            # runs what has no record yet, then writes the table

A cell is a run of unit.py or defend.py at its published constants, and its record in results/. What has a record for
these very weights is not run again; a cell that fails is reported and left out. Writes results/compare.json,
results/compare.png and the table in README.md.
"""

import argparse

import cli
from cli import InputError, bounded

DEFENSES = ("none", "ft", "bcu", "ulrl", "unit")


def parser():
    """Return the command's parser."""
    p = cli.parser("compare.py", "fill the table of defences", attacks=("none", *cli.ATTACKS))
    p.set_defaults(attack=None)
    p.add_argument("--defenses", nargs="+", default=DEFENSES, choices=DEFENSES, help="the columns")
    p.add_argument("--seeds", nargs="+", default=[1024], type=bounded(int, 0, 2**32 - 1), help="a run each; their mean")
    p.add_argument("--run", default=True, action=argparse.BooleanOptionalAction, help="run what has no record yet")
    p.add_argument("--results", default=str(cli.ROOT / "results"), help="folder of the records")
    p.add_argument("--page", default=str(cli.ROOT / "README.md"), help="file that holds the table")
    return p


if __name__ == "__main__":
    parser().parse_args()  # answers --help and a wrong flag before the seconds that torch takes

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import defend
import pictures
import report
import unit
import utils
from records import FREE, find, load_records

# what each method's own paper reports, on its own weights: BA / ASR
REPORTED = {("badnet", "dbd"): "92.50 / 0.88 (before: 95.13 / 100; poison 5 %, target 3)"}


def usual_settings(args, defense, attack):
    """Return {setting: value} of a run at the published constants, without what says how or where it computes.

    args: the flags of this command.
    """
    flags = ["--attack", attack, "--dataset", args.dataset, "--network", args.network, "--target", str(args.target)]
    if defense == "unit":
        usual, config = unit.parser().parse_args(flags), unit.UnitConfig()
    else:
        usual = defend.parser().parse_args([*flags, "--defense", defense])
        config = defend.configure(usual)
    return {k: v for k, v in (vars(usual) | asdict(config)).items() if k not in FREE}


def run_cell(args, defense, attack, seed):
    """Run one cell in a process of its own; return what went wrong in a line, or None."""
    script = ["unit.py"] if defense == "unit" else ["defend.py", "--defense", defense]
    flags = {"attack": attack, "seed": seed}
    flags |= {
        k: getattr(args, k) for k in ("datadir", "dataset", "network", "batch_size", "target", "device", "results")
    }
    command = [sys.executable, str(cli.ROOT / script[0]), *script[1:]]
    command += [text for k, v in flags.items() for text in (f"--{k}", str(v))]
    if defense == "unit":
        command += ["--outdir", args.results]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode in (-2, 130):
        raise KeyboardInterrupt
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return f"exit status {done.returncode}: {lines[-1] if lines else 'no word'}"


def summarise(attack, defense, found):
    """Return one row of the table as plain values: means over the seeds found."""
    runs = list(found.values())

    def mean(of):
        values = [of(r) for r in runs]
        return None if None in values else sum(values) / len(values)

    one = runs[0]
    return {
        "attack": attack,
        "defense": defense,
        "BA": mean(lambda r: r["after"]["BA"]),
        "ASR": mean(lambda r: r["after"]["ASR"]),
        "seconds": mean(lambda r: r["seconds"]),
        "peak_GiB": mean(lambda r: r["peak_GiB"]),
        "data": one["data"] if "data" in one else one["n_train"] + one["n_valid"],
        "labels": one.get("labels", True),
        "n": len(runs),
        "machine": one["machine"]["device"],
        "reported": REPORTED.get((attack, defense)),
    }


def table(rows):
    """Return the rows as a table in Markdown."""
    lines = []
    for r in rows:
        lines.append([
            r["attack"], r["defense"], report.percent(r["BA"]), report.percent(r["ASR"]), f"{r['seconds']:.0f}",
            "–" if r["peak_GiB"] is None else f"{r['peak_GiB']:.2f}", f"{r['data']:,}", "yes" if r["labels"] else "no",
            r["n"], r["machine"], r["reported"] or "–",
        ])  # fmt: skip
    header = ["victim", "defence", "BA %", "ASR %", "seconds", "peak GiB", "clean images", "labels", "n", "machine"]
    return report.markdown([*header, "its own paper, on its own weights"], lines)


def main(argv=None):
    """The command."""
    args = parser().parse_args(argv)
    rows, failed = [], []
    for attack in [args.attack] if args.attack else ["none", *cli.ATTACKS]:
        victim = utils.checkpoint_path("cifar10", args.network, attack)
        if not victim.exists():
            print(f"no victim {victim.name}, so no row for {attack}")
            continue
        victim_sum = utils.sha256(victim)
        for defense in args.defenses:
            settings = usual_settings(args, defense, attack)
            for seed in args.seeds:
                found = find(load_records(args.results).values(), defense, victim_sum, settings)
                if seed in found or not args.run:
                    continue
                print(f"--- {attack}, {defense}, seed {seed}", flush=True)
                error = run_cell(args, defense, attack, seed)
                if error:
                    failed.append(f"{attack}, {defense}, seed {seed}: {error}")
                    print(failed[-1], file=sys.stderr)
            found = find(load_records(args.results).values(), defense, victim_sum, settings)
            found = {seed: found[seed] for seed in args.seeds if seed in found}
            if found:
                rows.append(summarise(attack, defense, found))
        # what was trained on the poisoned images themselves has no victim to start from
        for r in load_records(args.results, "dbd").values():
            wanted = {"attack": attack, "dataset": args.dataset, "network": args.network, "width": 1.0}
            if all(r["settings"][k] == v for k, v in wanted.items()):
                rows.append(summarise(attack, "dbd", {0: r}))
    if not rows:
        raise InputError("there is nothing to show; train a victim first: python train.py --attack badnet")
    utils.save_json(rows, Path(args.results) / "compare.json")
    pictures.draw_compared(rows, Path(args.results) / "compare.png")
    report.put(Path(args.page), table(rows), "compare.py")
    print(table(rows))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
