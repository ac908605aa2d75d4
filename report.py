"""Writes tables of figures: victims in ckpt/README.md, runs of unit.py in results/README.md, bf16 by fp32 in README.md.

    python report.py

No figure in them is typed by hand: they come from the checkpoints and from results/*.json, and stand between two marks.
"""

import cli


def parser():
    """Return the command's parser."""
    return cli.bare_parser("report.py", "write the tables of victims and runs into the pages")


if __name__ == "__main__":
    parser().parse_args()  # answers --help and a wrong flag before the seconds that torch takes

import json
import sys
from pathlib import Path

import utils
from records import FREE, load_records

BEGIN, END = "<!-- begin: written by {} -->", "<!-- end -->"


def percent(share):
    """Return a share in [0, 1] as the tables have it."""
    return "–" if share is None else f"{100 * share:.2f}"


def machine(versions):
    """Return where something was computed: the processor or GPU, and its threads."""
    device, threads = versions["device"].replace("(R)", ""), versions.get("threads")
    if threads is None or versions.get("kind") == "cuda":
        return device
    return f"{device}, {threads} thread{'s' * (threads > 1)}"


def markdown(header, rows):
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def rounds(checkpoint):
    """Return the runs of train.py that made a victim, the first one first: each {"epochs", "seconds", ...}."""
    before = checkpoint.get("init_from")
    return [*(rounds(before) if before else []), checkpoint]


def victims(folder):
    """Return the table of the victims in `folder`: what they are, their figures, what made them."""
    rows = []
    for path in sorted(folder.glob("*.pt")):
        if path.stem.endswith(".partial"):
            continue
        c = utils.load_checkpoint(path)
        if c.get("defence") or "poison_rate" not in c:  # no victim, or one from elsewhere, of which nothing is known
            continue
        kind = "clean" if c["attack"] == "none" else "clean-label" if c["clean_label"] else "dirty-label"
        rows.append([
            f"`{path.name}`", f"{c['width']:g}", f"{kind}, {100 * c['poison_rate']:g} %",
            percent(c["BA"]), percent(c["ASR"]),
            " + ".join(str(r["epochs"]) for r in rounds(c)), f"{sum(r['seconds'] for r in rounds(c)):.0f}",
            machine(c["versions"]),
            f"`{utils.sha256(path)}`",
        ])  # fmt: skip
    header = ["file", "width", "poison", "BA %", "ASR %", "epochs", "seconds", "machine", "sha256"]
    return markdown(header, rows)


def steps(record):
    """Return how long a run of unit.py searched: its steps, and whether until the budget was used."""
    s = record["settings"]
    return s["n_steps"] if s["until"] == "steps" else f"{len(record['history']['reg'])}, until budget"


def runs(folder):
    """Return the table of the records of unit.py in `folder`: whole runs at the authors' constants, of any length.

    Those until the budget is used are among them.
    """
    rows = []
    usual = {"lr": 1e-3, "acc_degrade": 0.03, "data_rate": None, "draw": "first"}
    for path, r in load_records(folder, "unit").items():
        if r["interrupted"] or any(r["settings"].get(k) != v for k, v in usual.items()):
            continue
        s = r["settings"]
        rows.append([
            Path(r["victim"]["file"]).stem, s["dataset"], f"{r['n_train'] + r['n_valid']:,}", steps(r),
            f"{percent(r['before']['BA'])} / {percent(r['before']['ASR'])}",
            f"**{percent(r['after']['BA'])} / {percent(r['after']['ASR'])}**",
            f"{r['history']['reg'][0]:.2f} → {r['history']['reg'][r['best_step']]:.2f}", r["best_step"] + 1,
            f"{r['seconds']:.0f}", f"{r['peak_GiB']:.2f}" if r.get("peak_GiB") else "–",
            f"{machine(r['machine'])}, {s['precision']}", f"[json]({path.name})",
        ])  # fmt: skip
    header = ["victim", "measured on", "defence images", "steps", "BA/ASR before", "after", "R", "step chosen"]
    return markdown([*header, "seconds", "peak GiB", "machine", "record"], rows)


def precisions(folder):
    """Return the table of the runs of unit.py that differ in no setting but bf16 or fp32; code and machine may."""
    alike = {}
    for r in load_records(folder, "unit").values():
        what = {k: v for k, v in r["settings"].items() if k not in FREE}
        key = r["victim"]["sha256"], r["settings"]["seed"], json.dumps(what, sort_keys=True)
        if not r["interrupted"]:
            alike.setdefault(key, {})[r["settings"]["precision"]] = r
    rows = []
    for (_, _, what), pair in alike.items():
        if len(pair) < 2:
            continue
        s, both = json.loads(what), (pair["bf16"], pair["fp32"])
        a, b = (r["after"] for r in both)
        apart = ["–" if a[k] is None else f"{100 * (a[k] - b[k]):+.2f}" for k in ("BA", "ASR")]
        rows.append([
            Path(pair["bf16"]["victim"]["file"]).stem, s["dataset"], steps(pair["bf16"]),
            *(f"{percent(m['BA'])} / {percent(m['ASR'])}" for m in (a, b)),
            " / ".join(apart), *(r["best_step"] + 1 for r in both),
            *(f"{r['seconds']:.0f} ({machine(r['machine'])})" for r in both),
        ])  # fmt: skip
    header = ["victim", "measured on", "steps", "BA/ASR after, bf16", "fp32", "difference", "step chosen, bf16", "fp32"]
    return markdown([*header, "seconds, bf16", "fp32"], rows)


def check_mark(path, script):
    """Return (text, first mark) of the file `path`. Raises InputError unless it has the marks of `script`, once."""
    begin = BEGIN.format(script)
    try:
        text = path.read_text()
    except OSError as error:
        raise cli.InputError(f"cannot read {path}: {error.strerror}; name the page that holds the table") from None
    if text.count(begin) != 1 or END not in text.partition(begin)[2]:
        raise cli.InputError(f"{path} has no place for the table; put the lines {begin} and {END} into it")
    return text, begin


def put(path, table, script="report.py"):
    """Replace what stands between the marks of `script` in the file `path`. Raises InputError when it has none."""
    text, begin = check_mark(path, script)
    before, _, rest = text.partition(begin)
    new = f"{before}{begin}\n{table}\n{END}{rest.partition(END)[2]}"
    utils.write_whole(path, lambda p: p.write_text(new))


def put_section(path, title, table, script):
    """Like put(), but where the page has no place for the table, or is not there, add a section of that title to it."""
    begin = BEGIN.format(script)
    if not path.exists() or begin not in path.read_text():
        text = path.read_text() if path.exists() else "# Figures\n"
        utils.write_whole(path, lambda p: p.write_text(f"{text}\n## {title}\n\n{begin}\n{END}\n"))
    put(path, table, script)


def main(argv=None):
    """The command."""
    parser().parse_args(argv)
    root = Path(cli.ROOT)
    put(root / "ckpt" / "README.md", victims(root / "ckpt"))
    put(root / "results" / "README.md", runs(root / "results"))
    put(root / "README.md", precisions(root / "results"), "report.py, bf16 and fp32")
    print("wrote ckpt/README.md, results/README.md and README.md", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
