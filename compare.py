"""Every defense on every victim, in tables and two pictures.

    python compare.py                                    # run what has no record, then write the tables
    python compare.py --jobs 8                           # eight runs side by side, each on its share of the cores
    python compare.py --no-run                           # write the tables of the records there are
    python compare.py --defenses unit,acc_degrade=0.05   # other settings too, listed among all runs

A cell of the tables is a defense on the victims of one recipe, which differ in their seeds alone: mean and standard
deviation over these. The figures are those of the records in results/, also of victims whose files are not here. What
is missing is run cheapest defense first, each run a command of its own; Ctrl-C ends it, and the same command goes on.
The tables go into the pages of results/, README.md and ckpt/README.md.
"""

import flags  # first: it answers --help and a wrong flag before torch is imported

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import deque
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np

import utils
from support import plots, tables
from support.records import PLACES
from support.victims import all_victims, ceiling, clean_cells, grouped, panel_of

CHEAPEST = ("none", "clp", "ulrl", "seam", "fst", "rnp", "fp", "ft", "nad", "i_bau", "unit,step_images=250", "anp")
CHEAPEST += ("ft_sam", "bcu", "nc", "unit")
OWN = PLACES | {"defense", "phase", "max_minutes", "resume", "overwrite"}  # flags that a cell cannot have
POLL = 0.1  # seconds between two looks at the runs
PAGES = {
    "README.md": ("# Figures", ["averages"]),
    "attacks.md": ("# Attack by attack", ["grids", "budgets", "detections"]),
}
PAGES |= {"networks.md": ("# Other networks and data sets", ["networks"]), "runs.md": ("# Every run", ["details"])}


# --- what is to be run ------------------------------------------------------------------------------------------------


def missing(victims, defenses):
    """Return the [(victim, cell)] without a record, the cheapest defense first, then small networks, then by seed.

    A clean network is also measured on the triggers of the other victims of its panel.
    """
    cells, groups = {}, grouped(victims)
    for victim in victims:
        own = list(defenses)
        if victim.attack == "none" and "none" in defenses:
            beside = [g for g in groups if g.panel == panel_of(victim.recipe)]
            own += [cell for g in beside for cell in clean_cells(g) if can_measure(cell)]
        for cell in own:
            path = victim.record_path(cell)  # one run, however its settings are written
            if path not in cells and victim.record(cell) is None:
                cells[path] = victim, cell

    def cost(job):
        victim, cell = job
        places = [CHEAPEST.index(name) for name in (cell, cell.partition(",")[0]) if name in CHEAPEST]
        return (*places, len(CHEAPEST))[0], victim.recipe["width"], victim.seed or 0

    return sorted(cells.values(), key=cost)


def can_measure(cell):
    """Return whether the file is here that holds the trigger of a cell, where that is a victim's own."""
    _, own, stem = cell.partition("trigger_of=")
    return not own or (utils.CKPT / f"{stem}.pt").is_file()


def estimate(jobs, victims, side_by_side=1):
    """Return (seconds that the jobs take, by the records of the same cells and panels; for how many there are none)."""
    known = {}
    for victim in victims:
        for cell in {cell for _, cell in jobs}:
            if record := victim.record(cell):
                known.setdefault((panel_of(victim.recipe), cell), []).append(record["seconds"])
    keys = [(panel_of(victim.recipe), cell) for victim, cell in jobs]
    seconds = sum(statistics.mean(known[key]) for key in keys if key in known)
    return seconds / side_by_side, sum(key not in known for key in keys)


def plan(jobs, victims, side_by_side):
    """Return the lines that say what is going to be run, and for how long."""
    seconds, unknown = estimate(jobs, victims, side_by_side)
    lines = [f"{len(jobs)} cells have no record and are run, {side_by_side} at a time"]
    if len(jobs) > unknown:
        about = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
        lines += [f"about {about} by the records of the same defense on such a network, without the measuring"]
    if unknown:
        lines += [f"for {unknown} of them no record says how long they take"]
    return "; ".join(lines)


# --- running it -------------------------------------------------------------------------------------------------------


def command(victim, cell, args, outdir):
    """Return the words of the command that fills a cell; what it saves stands in ckpt/, under the cell's name."""
    script, *words = victim.words(cell)
    given = {"ckpt": victim.path, "datadir": args.datadir, "device": args.device, "results": args.results}
    if cell.partition(",")[0] != "none":
        given["out"] = place(victim, cell, ".pt")
    given |= {"outdir": outdir} if script == "unit.py" else {}
    words += [word for k, v in given.items() for word in (f"--{k}", str(v))]
    return [sys.executable, str(flags.ROOT / script), *words]


def place(victim, cell, ending):
    """Return where a run keeps its defended model, or its output: named as its record, which has no path in it."""
    return utils.CKPT / f"{victim.stem}_{victim.record_path(cell).stem.replace(',', '_')}{ending}"


def fill(jobs, args):
    """Run the jobs, args.jobs at a time; return what went wrong, a line each. The output of a failed run is kept."""
    env = dict(os.environ)
    if args.jobs > 1:  # torch would give each the whole machine
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // args.jobs)))
    waiting, running, failed = deque(enumerate(jobs, 1)), {}, []
    with tempfile.TemporaryDirectory() as outdir:
        try:
            while waiting or running:
                while waiting and len(running) < args.jobs:
                    i, (victim, cell) = waiting.popleft()
                    log = place(victim, cell, ".log")
                    print(f"{i} of {len(jobs)}: {victim.stem}, {cell}", flush=True)
                    utils.check_place(log)
                    with open(log, "a") as file:
                        if not claim(file):
                            why = f"another process is running it ({log}); run compare.py again after its end"
                            failed.append(f"{victim.stem}, {cell}: {why}")
                            print(failed[-1], flush=True)
                            continue
                        words = command(victim, cell, args, outdir)
                        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=env)
                    running[process] = victim, cell, log
                for process in [p for p in running if p.poll() is not None]:
                    victim, cell, log = running.pop(process)
                    if error := outcome(process.returncode, victim, cell, log):
                        failed.append(f"{victim.stem}, {cell}: {error}")
                        print(failed[-1], flush=True)
                time.sleep(POLL)
        finally:
            for process in running:  # after Ctrl-C: a record is whole or absent, and a long run goes on another time
                process.terminate()
            for process in running:
                process.wait()
    return failed


def claim(file):
    """Empty the open output of a run and lock it; return False, and do neither, where another process holds the lock.

    The process that inherits the file holds it until its end, also where compare.py itself was killed.
    """
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    file.truncate(0)
    return True


def outcome(status, victim, cell, log):
    """Return why a run that has ended failed, or None; then its output is removed."""
    if status == 0 and (record := victim.record(cell)) is not None:
        print(f"  {victim.stem}, {cell}: {tables.figures(record['after'])}, {record['seconds']:.0f} s", flush=True)
        log.unlink(missing_ok=True)
        return None
    said = log.read_text(errors="replace").split("\n")
    last = next((line.strip()[:300] for line in reversed(said) if line.strip()), "nothing")
    why = f"exit status {status}, it said: {last}" if status else "it left no record that belongs here"
    return f"{why} ({log})"


def cores():
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- pages and pictures -----------------------------------------------------------------------------------------------


def write_tables(victims, args):
    """Write the tables of the records that there are."""
    groups, results = grouped(victims), Path(args.results)
    made = {"averages": tables.averages(groups), "grids": tables.grids(groups)}
    made |= {
        "networks": tables.networks(groups),
        "budgets": tables.budgets(groups),
        "detections": tables.detections(victims),
        "details": tables.details(victims),
    }
    for name, (title, marks) in PAGES.items():
        page = results / name
        if not page.exists():
            text = "\n\n".join([title, *(f"{tables.BEGIN.format(mark)}\n{tables.END}" for mark in marks)]) + "\n"
            utils.write_whole(page, lambda p, text=text: p.write_text(text))
        for mark in marks:
            tables.put(page, mark, made[mark])
    if results.resolve() == flags.RESULTS:
        tables.put(flags.ROOT / "README.md", "overview", tables.overview(groups))
        tables.put(utils.CKPT / "README.md", "victims", tables.victim_table(victims))


def draw_searches(victims, folder):
    """Draw how the searches of UNIT went whose trajectories lie beside their records."""
    for v in victims:
        r, path = v.record("unit"), v.folder / "unit.npz"
        if r and path.exists():
            try:
                limit = r["initial_acc"] - r["settings"]["acc_degrade"]
                with open(path, "rb") as file:  # given a path, numpy leaves a damaged one open
                    history = dict(np.load(file))
                if any(history[k].shape != (r["steps"],) for k in ("alpha", "ce", "reg", "valid_acc")):
                    raise ValueError
            except (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile):
                raise flags.InputError(f"{path} is no trajectory of this record's search; delete it") from None
            plots.draw_history(history, r["best_step"], limit, folder / f"search_{v.stem}.png")


def draw(groups, folder):
    """Draw RA under every attack and defense, of a single panel ASR too, and what each defense costs and gains.

    The panels are those with several defenses; in the second picture all points of a panel are means over the same
    attacks.
    """
    shown, points = {}, {}
    for panel, of_panel in tables.panels(groups).items():
        attacked, gained = [g for g in of_panel if g.leads], {}
        for cell, name in tables.NAMES.items():
            found = {g.attack: pairs for g in attacked if (pairs := gains(g, cell))}
            if found and cell != "none":
                gained[name] = found
        if len(gained) > 1:  # one defense alone makes no picture
            shown[panel] = attacked
            attacks = in_common(gained)
            of = tables.named(attacks, [g.attack for g in attacked])
            points[f"{panel}: mean over {of}"] = {
                name: tuple(statistics.mean(statistics.mean(p[i] for p in found[a]) for a in attacks) for i in (0, 1))
                for name, found in gained.items()
                if set(attacks) <= set(found)
            }
    drawn = [g for attacked in shown.values() for g in attacked]
    columns = {c: name for c, name in tables.NAMES.items() if any(g.values(c, "RA") for g in drawn)}
    if any(ceiling(g, groups) for g in drawn):
        columns["ceiling"] = "clean network"

    def row(group, key):
        best = ceiling(group, groups, key)
        found = [best if cell == "ceiling" else group.values(cell, key) for cell in columns]
        return [statistics.mean(values) if values else None for values in found]

    maps = []
    for panel, attacked in shown.items():
        for key in ("RA", "ASR") if len(shown) == 1 else ("RA",):
            rows = {g.name: row(g, key) for g in attacked}
            rows = {name: shares for name, shares in rows.items() if any(s is not None for s in shares)}
            maps.append((f"{panel}: {key} %", list(rows), list(rows.values()), key == "ASR"))
    plots.draw_heatmap(list(columns.values()), maps, folder / "heatmap.png")
    plots.draw_tradeoff(points, folder / "tradeoff.png")


def in_common(gained):
    """Return the attacks over which the picture compares defenses: those that make the most pairs of a defense and an
    attack where each of two or more defenses has each attack. gained: {defense: {attack: ...}} of two or more.
    """
    attacks = list(dict.fromkeys(attack for found in gained.values() for attack in found))
    attacks.sort(key=lambda attack: -sum(attack in found for found in gained.values()))
    sizes = {}
    for k in range(1, len(attacks) + 1):
        having = sum(set(attacks[:k]) <= set(found) for found in gained.values())
        sizes[k] = (having > 1, k * having, k)
    return attacks[: max(sizes, key=sizes.get)]


def gains(group, cell):
    """Return (BA lost, RA gained) against no defense, of each victim of a group that has both records."""
    found = zip(group.records("none"), group.records(cell), strict=True)
    pairs = [(a["after"], b["after"]) for a, b in found if a and b]
    return [(a["BA"] - b["BA"], b["RA"] - a["RA"]) for a, b in pairs if a["RA"] is not None and b["RA"] is not None]


def main(argv=None):
    """The command."""
    args = flags.parser("compare.py").parse_args(argv)
    for cell in args.defenses:
        known = ("none", *flags.DEFENSES, "unit")
        if cell.partition(",")[0] not in known or not all("=" in s for s in cell.split(",")[1:]):
            raise flags.InputError(f"no column {cell!r}; write one of {', '.join(known)}, then ,setting=value")
        for setting in cell.partition(",trigger_of=")[0].split(",")[1:]:
            name = setting.partition("=")[0]
            if any(flag.startswith(name) for flag in OWN):  # argparse takes the beginning of a flag, too
                raise flags.InputError(f"no column {cell!r}: {name} is no setting of a defense; leave it out")
    for path in args.victims or ():
        if not Path(path).is_file():
            raise flags.InputError(f"no checkpoint {path}; name files that train.py made")
    victims = all_victims(args.results, args.victims or ())
    here = {v.path.resolve() for v in victims if v.path}
    for path in args.victims or ():
        if Path(path).resolve() not in here:
            raise flags.InputError(f"{path} is defended or from elsewhere, no victim; name files that train.py made")
    if not victims:
        raise flags.InputError("there is nothing to compare; train a victim first: python train.py --attack badnet")
    jobs = missing(victims, args.defenses)  # a setting that is no flag is known before anything runs,
    write_tables(victims, args)  # and so is a page without a place for a table
    if args.victims:
        named = {Path(p).resolve() for p in args.victims}
        jobs = [(v, cell) for v, cell in jobs if v.path and v.path.resolve() in named]
    failed, away = [], [v.stem for v, _ in jobs if v.path is None]
    jobs = [(v, cell) for v, cell in jobs if v.path]
    if args.run and away:
        names = ", ".join(dict.fromkeys(away))
        print(f"{len(away)} cells cannot be run for want of the victims' files in ckpt/: {names}")
    try:
        if args.run and jobs:
            print(plan(jobs, victims, args.jobs), flush=True)
            failed = fill(jobs, args)
    finally:
        write_tables(victims, args)
        draw(grouped(victims), Path(args.results) / "pictures")
        draw_searches(victims, Path(args.results) / "pictures")
    print(tables.averages(grouped(victims)))
    if failed:
        print("\n".join(["failed:", *failed]), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the runs end with this one
    flags.run(main)
