"""The trade-off of UNIT on one victim: BA and ASR against the accuracy it may cost and the clean images it has.

    python sweep.py --attack badnet

Runs unit.py's search once for each value of acc_degrade and of data_rate, all else at its default; what has a record in
results/ for these very weights is not run again. Writes a table to results/README.md and a picture beside it.
"""

import cli
from cli import InputError, bounded

ACC_DEGRADE = (0.005, 0.01, 0.02, 0.03, 0.05, 0.10)
DATA_RATE = (0.01, 0.02, 0.05, 0.10)


def parser():
    """Return the command's parser."""
    p = cli.parser("sweep.py", "trade BA against ASR", attacks=("none", *cli.ATTACKS))
    p.add_argument("--acc_degrade", nargs="*", default=ACC_DEGRADE, type=bounded(float, 0, 1, True), help="values")
    p.add_argument("--data_rate", nargs="*", default=DATA_RATE, type=bounded(float, 0, 1, True), help="values to run")
    p.add_argument("--seeds", nargs="+", type=bounded(int, 0, 2**32 - 1), help="a run each (default: --seed alone)")
    p.add_argument("--draw", default="first", choices=("first", "random"), help="which images of each class; by seed")
    p.add_argument("--ckpt", help="victim (default: the one of --network and --attack)")
    p.add_argument("--results", default=str(cli.ROOT / "results"), help="folder of the records, table and picture")
    return p


if __name__ == "__main__":
    parser().parse_args()  # answers --help and a wrong flag before the seconds that torch takes

import tempfile
from dataclasses import asdict
from pathlib import Path

import pictures
import report
import unit
import utils
from records import FREE, find, load_records

DEFAULTS = {"acc_degrade": unit.UnitConfig().acc_degrade, "data_rate": 0.05}


def cell(args, victim, flag, value, seed, out, folder):
    """Return the record of one run, found or made.

    out: where the defended model lies until it is measured, and beside it what a run that was cut off goes on from;
    folder: takes what else the run writes.
    """
    flags = ["--attack", args.attack, "--dataset", args.dataset, "--network", args.network]
    flags += ["--target", str(args.target), "--draw", args.draw]
    # left out where it is the default, so that the plain run is one of the cells
    if value != DEFAULTS[flag] or (flag == "data_rate" and args.dataset != "cifar10"):
        flags += [f"--{flag}", str(value)]
    usual = vars(unit.parser().parse_args(flags))
    # the record has what the flags left open as the constants have it
    settings = {k: v for k, v in (asdict(unit.UnitConfig()) | usual).items() if k not in FREE}
    victim_sum = utils.sha256(victim)

    def look():
        return find(load_records(args.results, "unit").values(), "unit", victim_sum, settings).get(seed)

    if look() is None:
        print(f"--- {flag} {value}, seed {seed}", flush=True)
        places = {"ckpt": victim, "out": out, "outdir": folder, "results": args.results}
        given = places | {k: getattr(args, k) for k in ("datadir", "batch_size", "device")} | {"seed": seed}
        unit.main(flags + [text for k, v in given.items() for text in (f"--{k}", str(v))])
        out.unlink()
    return look()


def main(argv=None):
    """The command."""
    args = parser().parse_args(argv)
    args.seeds = args.seeds or [args.seed]
    if args.dataset != "cifar10" and args.data_rate == DATA_RATE:
        args.data_rate = ()  # shares of the full set, of which the sample is one hundredth
    if not args.acc_degrade and not args.data_rate:
        raise InputError("there is nothing to run; give --acc_degrade or --data_rate a value")
    victim = utils.victim_path(args)
    # what gives other figures has a table and a picture of its own
    tag, name = f"{victim.stem} on {args.dataset}", f"sweep_{args.dataset}_{victim.stem}"
    if args.draw != parser().get_default("draw"):
        tag, name = f"{tag}, drawn at {args.draw}", f"{name}_{args.draw}"
    if args.target != parser().get_default("target"):
        tag, name = f"{tag}, target {args.target}", f"{name}_target{args.target}"
    out = utils.CKPT / f"{name}.pt"
    rows, before = [], None
    with tempfile.TemporaryDirectory() as folder:
        for flag in DEFAULTS:
            for value in getattr(args, flag):
                runs = [cell(args, victim, flag, value, seed, out, folder) for seed in args.seeds]
                if None in runs:
                    raise InputError(f"{args.results} has no record of the run just made; is it the right folder?")
                before = before or runs[0]["before"]
                mean = {k: sum(r["after"][k] or 0 for r in runs) / len(runs) for k in ("BA", "ASR")}
                mean["ASR"] = None if runs[0]["after"]["ASR"] is None else mean["ASR"]
                regs = [r["history"]["reg"][r["best_step"]] for r in runs]
                images = runs[0]["n_train"] + runs[0]["n_valid"]
                rows.append(
                    {"flag": flag, "value": value, "images": images, "R": sum(regs) / len(regs), "n": len(runs)}
                    | {"met": all(r["found_good"] for r in runs)} | mean
                )  # fmt: skip
    page = Path(args.results) / "README.md"
    lines = [
        [
            r["flag"],
            r["value"] if r["met"] else f"{r['value']} (no step within acc_degrade; the last one taken)",
            f"{r['images']:,}",
            report.percent(r["BA"]),
            report.percent(r["ASR"]),
            f"{r['R']:.2f}",
            r["n"],
        ]
        for r in rows
    ]
    table = report.markdown(["flag", "value", "defence images", "BA %", "ASR %", "R", "n"], lines)
    caption = (
        f"Before: BA {report.percent(before['BA'])} %, ASR {report.percent(before['ASR'])} %. ![{tag}]({name}.png)"
    )
    pictures.draw_sweep(rows, before, tag, Path(args.results) / f"{name}.png")
    report.put_section(page, f"Trade-offs of {tag}", f"{caption}\n\n{table}", f"sweep.py, {tag}")
    print(table)


if __name__ == "__main__":
    cli.run(main)
