"""Every defense on every victim, in one table: BA / ASR / RA.

    python compare.py                                    # run what has no record, then write the tables
    python compare.py --no-run                           # write the tables of the records there are
    python compare.py --defenses unit,acc_degrade=0.05   # other settings too, listed among all runs

A cell is a record in results/. Beside each victim stands the ceiling of RA: what the clean network of the same width
gets on the same triggered images. The tables go into results/README.md, README.md and ckpt/README.md.
"""

import flags  # first: it answers --help and a wrong flag before torch is imported

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import utils
from support import plots, records
from support.tables import markdown, percent, put

# the columns of the first table, each a defense with its settings; other runs are listed below it
COLUMNS = {"none": "no defense", "ft": "FT", "bcu": "BCU", "ulrl": "ULRL", "unit": "UNIT"}
COLUMNS |= {"unit,step_images=250": "UNIT, 250 images a step"}


class Victim:
    """A checkpoint in ckpt/ that train.py made, and its records."""

    def __init__(self, path, results):
        self.path, self.sum = Path(path), utils.sha256(path)
        self.about = {k: v for k, v in utils.load_checkpoint(path).items() if k != "state_dict"}
        self.attack, self.folder = self.about["attack"], Path(results) / self.path.stem

    def words(self, cell):
        """Return the command that a cell, `defense[,setting=value...]`, stands for: a script and its flags."""
        defense, *settings = cell.split(",")
        script = ["unit.py"] if defense == "unit" else ["defend.py", "--defense", defense]
        # what a victim is for, where that is not what the commands take it to be
        usual = {"dataset": (None, "cifar10", "cifar10_sample"), "size": (None, 32)}
        own = [w for k, v in usual.items() if self.about.get(k) not in v for w in (f"--{k}", str(self.about[k]))]
        return [*script, "--attack", self.attack, *own, *(f"--{setting}" for setting in settings)]

    def record(self, cell):
        """Return the record of a cell, or None. A setting that is no flag of the command ends in exit status 2."""
        script, *words = self.words(cell)
        args = flags.parser(script).parse_args([*words, "--results", str(self.folder.parent)])
        victim = {"file": self.path, "attack": self.attack}
        return records.load(records.path_of(cell.partition(",")[0], args, victim), self.sum)

    def run(self, cell, args):
        """Run a cell as a command of its own; return None, or why it failed."""
        script, *words = self.words(cell)
        given = {"ckpt": self.path, "datadir": args.datadir, "device": args.device, "results": args.results}
        if cell.partition(",")[0] != "none":
            given["out"] = utils.CKPT / f"{self.path.stem}_{cell.replace(',', '_')}.pt"
        with tempfile.TemporaryDirectory() as folder:
            given |= {"outdir": folder} if script == "unit.py" else {}
            words += [word for k, v in given.items() for word in (f"--{k}", str(v))]
            status = subprocess.run([sys.executable, str(flags.ROOT / script), *words], check=False).returncode
        if status:
            return f"exit status {status}, see above"
        return "it left no record that belongs here" if self.record(cell) is None else None


def all_victims(args):
    """Return the victims that the flags mean: those of full width first, the clean networks last of each width."""
    paths = args.victims or sorted(p for p in utils.CKPT.glob("cifar10_*.pt") if ".partial" not in p.name)
    for path in paths:
        if not Path(path).is_file():
            raise flags.InputError(f"no checkpoint {path}; name files that train.py made")
    victims = [Victim(p, args.results) for p in paths]
    victims = [v for v in victims if v.attack is not None and not v.about["defense"]]
    for v in victims:
        if v.attack not in ("none", *flags.ATTACKS):
            raise flags.InputError(f"{v.path} is of an unknown attack, {v.attack!r}; leave it out, by --victims")
    return sorted(
        victims, key=lambda v: (-v.about["width"], flags.ATTACKS.index(v.attack) if v.attack != "none" else 99)
    )


def cells_of(victim, victims, defenses):
    """Return the cells of a victim; a clean network is also measured on the others' triggers."""
    cells = list(defenses)
    if victim.attack == "none" and "none" in cells:
        others = [v for v in victims if v.attack != "none" and v.about["width"] == victim.about["width"]]
        cells += [f"none,attack={a}" for a in dict.fromkeys(v.attack for v in others)]
    return cells


def fill(victims, args):
    """Run the cells that have no record; return what went wrong, a line each."""
    failed = []
    for victim in victims:
        for cell in cells_of(victim, victims, args.defenses):
            if victim.record(cell) is None:
                print(f"--- {victim.path.stem}, {cell}", flush=True)
                error = victim.run(cell, args)
                if error:
                    failed.append(f"{victim.path.stem}, {cell}: {error}")
    return failed


def figures(measured):
    """Return BA / ASR / RA of a record's "after" as the tables have it."""
    shares = [measured.get(k) for k in ("BA", "ASR", "RA")]
    return " / ".join(percent(s) for s in (shares if shares[1] is not None else shares[:1]))


def ceiling(victim, victims):
    """Return the RA of the clean network of the same width on the victim's triggered images, or None."""
    for v in victims:
        if v.attack == "none" and victim.attack != "none" and v.about["width"] == victim.about["width"]:
            record = v.record(f"none,attack={victim.attack}")
            return record and record["after"]["RA"]
    return None


def overview(victims):
    """Return the first table: a line per victim, BA / ASR / RA under each defense, and the ceiling of RA."""
    rows = []
    for victim in victims:
        found = [victim.record(cell) for cell in COLUMNS]
        if any(found):
            cells = [figures(r["after"]) if r else "–" for r in found]
            rows.append([victim.path.stem.removeprefix("cifar10_"), *cells, percent(ceiling(victim, victims))])
    return markdown(["BA / ASR / RA in %", *COLUMNS.values(), "ceiling of RA"], rows)


def details(victims):
    """Return the second table: a line per record, with the target class's accuracy, seconds and machine."""
    rows = []
    for victim in victims:
        for path in sorted(victim.folder.glob("*.json")):
            r = records.load(path, victim.sum)
            if r is None:
                continue
            after, note = r["after"], r.get("findings", {}).get("outcome", "")
            chosen = f"step {r['best_step'] + 1} of {r['steps']}" if "steps" in r else note
            seconds = f"{r['seconds']:.0f}" if r["seconds"] else "–"
            rows.append([
                victim.path.stem.removeprefix("cifar10_"), path.stem, figures(after), percent(after["target_accuracy"]),
                chosen, seconds, r["machine"]["threads"], r["commit"],
            ])  # fmt: skip
    header = ["victim", "run", "BA / ASR / RA in %", "target class %", "", "seconds", "threads", "commit"]
    return markdown(header, rows)


def victim_table(victims):
    """Return the table of the victims: what they are, their figures, what made them."""
    rows = []
    for v in victims:
        a = v.about
        label = "clean" if v.attack == "none" else "clean-label" if a["clean_label"] else "dirty-label"
        poison = label if v.attack == "none" else f"{label}, {100 * a['poison_rate']:g} %, {a.get('sampling') or '–'}"
        rows.append([
            f"`{v.path.name}`", f"{a['width']:g}", poison, a["epochs"], figures(a), percent(a.get("target_accuracy")),
            f"{a['seconds']:.0f}", a.get("commit") or "–", f"`{v.sum[:16]}`",
        ])  # fmt: skip
    header = ["file", "width", "poison", "epochs", "BA / ASR / RA in %", "target class %", "seconds", "commit"]
    return markdown([*header, "sha256"], rows)


def write_tables(victims, args):
    """Write the tables and the picture of the records that there are."""
    page = Path(args.results) / "README.md"
    if not page.exists():
        utils.write_whole(page, lambda p: p.write_text(EMPTY_PAGE))
    put(page, "overview", overview(victims))
    put(page, "details", details(victims))
    if Path(args.results).resolve() == flags.RESULTS and not args.victims:
        put(flags.ROOT / "README.md", "overview", overview(victims))
        put(utils.CKPT / "README.md", "victims", victim_table(victims))
    compared = [
        {"victim": v.path.stem, "defense": name, **r["after"]}
        for v in victims
        for c, name in COLUMNS.items()
        if (r := v.record(c))
    ]
    pictures = Path(args.results) / "pictures"
    plots.draw_compared(compared, pictures / "compare.png")
    for v in victims:
        r, path = v.record("unit"), v.folder / "unit.npz"
        if r and path.exists():
            limit = r["initial_acc"] - r["settings"]["acc_degrade"]
            try:
                history = dict(np.load(path))
            except (OSError, ValueError):
                raise flags.InputError(f"{path} is no trajectory of a search; delete it") from None
            plots.draw_history(history, r["best_step"], limit, pictures / f"search_{v.path.stem}.png")


def main(argv=None):
    """The command."""
    args = flags.parser("compare.py").parse_args(argv)
    for cell in args.defenses:
        known = ("none", *flags.DEFENSES, "unit")
        if cell.partition(",")[0] not in known or not all("=" in s for s in cell.split(",")[1:]):
            raise flags.InputError(f"no column {cell!r}; write one of {', '.join(known)}, then ,setting=value")
    victims = all_victims(args)
    if not victims:
        raise flags.InputError("there is nothing to compare; train a victim first: python train.py --attack badnet")
    for cell in args.defenses:
        victims[0].record(cell)  # a setting that is no flag is known before anything runs,
    write_tables(victims, args)  # and so is a page without a place for a table
    failed = fill(victims, args) if args.run else []
    write_tables(victims, args)
    print(overview(victims))
    if failed:
        print("\n".join(["failed:", *failed]), file=sys.stderr)
        sys.exit(1)


EMPTY_PAGE = "# Figures\n\n<!-- begin: overview -->\n<!-- end -->\n\n<!-- begin: details -->\n<!-- end -->\n"


if __name__ == "__main__":
    flags.run(main)
