"""The tables, in Markdown, and how they get into a page: between two marks, so that no figure is typed by hand."""

from flags import ATTACKS, DEFENSES, InputError, parser

import statistics

from backdoors import TRIGGERS
from backdoors.poison import SAMPLINGS
from utils import checkpoint_path, write_whole

from . import records
from .victims import ceiling

BEGIN, END = "<!-- begin: {} -->", "<!-- end -->"
# the lines of the tables, each a defense with its settings; other runs stand among all runs alone
NAMES = {"none": "no defense"} | {d: d.upper().replace("_", "-") for d in (*DEFENSES, "unit")}
NAMES |= {"unit,step_images=250": "UNIT 250"}
FRONT = ("none", "ft", "bcu", "ulrl", "unit", "unit,step_images=250")  # of the front page's table
# UNIT 250 by its --acc_degrade, in %
BUDGETS = {"3": "unit,step_images=250", "5": "unit,acc_degrade=0.05,step_images=250"}
BUDGETS |= {"10": "unit,acc_degrade=0.1,step_images=250"}
BAND = 9  # columns of attacks that fit beside each other


def percent(share):
    """Return a share in [0, 1] as the tables have it."""
    return "–" if share is None else f"{100 * share:.2f}"


def markdown(header, rows):
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def put(path, name, table):
    """Replace what stands between the marks of `name` in the page `path`.

    Raises InputError when the page cannot be read, or has not just one such place.
    """
    begin = BEGIN.format(name)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise InputError(f"cannot read {path}: {reason}; name a folder that holds the page") from None
    if text.count(begin) != 1 or END not in text.partition(begin)[2]:
        raise InputError(f"{path} has no place for the table; put the lines {begin} and {END} into it")
    before, _, rest = text.partition(begin)
    new = f"{before}{begin}\n{table}\n{END}{rest.partition(END)[2]}"
    write_whole(path, lambda p: p.write_text(new))


# --- what stands in the tables ----------------------------------------------------------------------------------------


def spread(shares, digits=1):
    """Return the mean of shares in [0, 1], in %, with the standard deviation (n - 1) where there are several."""
    if not shares:
        return "–"
    mean = f"{100 * statistics.mean(shares):.{digits}f}"
    return mean if len(shares) == 1 else f"{mean} ± {100 * statistics.stdev(shares):.{digits}f}"


def named(some, whole):
    """Say which names `some` are of those in `whole`: up to three are listed, of more perhaps the missing ones."""
    some, missing = ([name for name in whole if (name in some) == there] for there in (True, False))
    if len(some) <= max(3, len(missing)):
        return ", ".join(some)
    return f"all but {', '.join(missing)}" if missing else f"all {len(whole)}"


def mean_of_means(groups, cell, key):
    """Return (mean of a figure over the leading groups that have it, each group's own mean; how many these are)."""
    means = [statistics.mean(v) for g in groups if g.leads and (v := g.values(cell, key))]
    return (statistics.mean(means) if means else None), len(means)


def panels(groups):
    """Return {panel: its groups}, of the groups that have a record in the tables.

    Where there are networks under several attacks, those under a single one are left to networks() and details().
    """
    found = {}
    for group in groups:
        if any(group.values(cell, "BA") for cell in NAMES):
            found.setdefault(group.panel, []).append(group)
    several = {p: of for p, of in found.items() if sum(g.leads for g in of) > 1}
    return several or found


def overview(groups):
    """Return the front page's table: BA / ASR / RA of ResNet-18 on CIFAR-10 under the first three attacks.

    A line for the victims of an attack's usual recipe, a column for a defense; both only where a defense has a record.
    """
    rows, columns = [], ["none"]
    for group in groups:
        ours = (group.recipe["network"], group.recipe["dataset"]) == ("resnet18", "cifar10")
        found = {cell: [group.values(cell, key) for key in ("BA", "ASR", "RA")] for cell in FRONT}
        defended = [cell for cell in FRONT if cell != "none" and found[cell][0]]
        if ours and group.leads and group.attack in ATTACKS[:3] and defended:
            rows.append((group, found))
            columns += defended
    columns = [cell for cell in FRONT if cell in columns]
    lines = []
    for group, found in rows:
        cells = [" / ".join(spread(v, 2) for v in found[cell]) if found[cell][0] else "–" for cell in columns]
        n = f" (n = {len(group.victims)})" if len(group.victims) > 1 else ""
        lines.append([f"{group.panel}_{group.name}{n}", *cells, spread(ceiling(group, groups), 2)])
    return markdown(["BA / ASR / RA in %", *(NAMES[cell] for cell in columns), "ceiling of RA"], lines)


def averages(groups):
    """Return a table for each panel: a line per defense, the means over the attacks that it has a record for.

    A figure that fewer attacks have, as RA is undefined for Composite, has their number in parentheses.
    """
    parts = []
    for panel, of_panel in panels(groups).items():
        rows = []
        for cell, name in NAMES.items():
            means = [mean_of_means(of_panel, cell, key) for key in ("BA", "ASR", "RA")]
            n = means[0][1]
            leading = [g for g in of_panel if g.leads]
            if n:
                fewer = ["" if m in (0, n) else f" ({m})" for _, m in means]
                shares = ["–" if s is None else f"{100 * s:.1f}" for s, _ in means]
                attacks = named([g.attack for g in leading if g.values(cell, "BA")], [g.attack for g in leading])
                rows.append([name, *map("".join, zip(shares, fewer, strict=True)), attacks])
        if rows:
            parts.append(markdown([panel, "BA %", "ASR %", "RA %", "attacks"], rows))
    return "\n\n".join(parts)


def grids(groups):
    """Return, for each panel, tables of RA, ASR and BA: a line per defense, a column per attack, their mean last."""
    parts = []
    for panel, of_panel in panels(groups).items():
        for key in ("RA", "ASR", "BA"):
            columns = [g for g in of_panel if key == "BA" or g.attack != "none"]
            bands = [columns[i : i + BAND] for i in range(0, len(columns), BAND)]
            parts += [_grid(f"{panel}: {key} %", key, band, columns, band is bands[-1], groups) for band in bands]
    return "\n\n".join(parts)


def _grid(title, key, band, columns, last, groups):
    """Return one table of grids(): the groups in `band`; the mean is over all `columns`, and stands in the `last`."""
    counts = [len(g.victims) for g in band]
    heads = [f"{g.name} (n = {n})" if n > 1 else g.name for g, n in zip(band, counts, strict=True)]
    rows = []
    for cell, name in NAMES.items():
        mean, n = mean_of_means(columns, cell, key)
        found = [g.values(cell, key) for g in band]
        if n == 0 and not any(found):
            continue
        cells = [spread(v) + (f" ({len(v)})" if 0 < len(v) < m else "") for v, m in zip(found, counts, strict=True)]
        whole = sum(g.leads for g in columns)
        of = f" ({n})" if n < whole else ""
        rows.append([name, *cells, *([f"{100 * mean:.1f}{of}" if n else "–"] * last)])
    best = [ceiling(g, groups) if key == "RA" else [] for g in band]
    if any(best):
        rows.append(["ceiling of RA", *map(spread, best), *([""] * last)])
    return markdown([title, *heads, *(["mean"] * last)], rows)


def budgets(groups):
    """Return the table of UNIT 250 with several budgets: BA / ASR / RA, a line per group with two of them or more."""
    rows = []
    for group in groups:
        found = [[group.values(cell, key) for key in ("BA", "ASR", "RA")] for cell in ("none", *BUDGETS.values())]
        if sum(bool(of[0]) for of in found[1:]) > 1:
            n = f" (n = {len(group.victims)})" if len(group.victims) > 1 else ""
            cells = [" / ".join(spread(v, 2) for v in of) if of[0] else "–" for of in found]
            rows.append([f"{group.panel}, {group.name}{n}", *cells])
    header = ["BA / ASR / RA in %", "no defense", *(f"{points} %" for points in BUDGETS)]
    return markdown(header, rows) if rows else ""


def figures(measured):
    """Return BA / ASR / RA of a record's "after", or of a victim's file, in %."""
    shares = [measured.get(k) for k in ("BA", "ASR", "RA")]
    return " / ".join(percent(s) for s in (shares if shares[1] is not None else shares[:1]))


def details(victims):
    """Return the table of all runs: a line per record, with the target class's accuracy, seconds and threads."""
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
                victim.stem.removeprefix("cifar10_"), path.stem, figures(after), percent(after["target_accuracy"]),
                chosen, seconds, r["machine"]["threads"], r["commit"],
            ])  # fmt: skip
    header = ["victim", "run", "BA / ASR / RA in %", "target class %", "outcome", "seconds", "threads", "commit"]
    return markdown(header, rows)


def detections(victims):
    """Return what NC suspects in each network, by its records: how often it is right, then a line per network.

    It is right about a backdoor if the target is its only suspect, and about a clean network if it has none.
    """
    rows, right = [], {}
    for v in victims:
        record = v.record("nc")
        if record is None:
            continue
        found, target = record["findings"], None if v.attack == "none" else v.recipe["target"]
        index, norms = found["anomaly_index"], found["norms"]
        smallest = min(range(len(norms)), key=norms.__getitem__)
        is_right = found["suspicious"] == ([] if target is None else [target])
        right.setdefault("clean" if target is None else "backdoored", []).append(is_right)
        suspects = ", ".join(f"{c} ({index[c]:.2f})" for c in found["suspicious"]) or "none"
        rows.append([
            v.stem.removeprefix("cifar10_"), "none" if target is None else target, suspects,
            f"{smallest} ({index[smallest]:.2f})", "yes" if is_right else "no",
        ])  # fmt: skip
    if not rows:
        return ""
    said = [f"{sum(of)} of {len(of)} {kind} networks" for kind, of in sorted(right.items())]
    header = ["network", "target", "suspected class (index)", "class of the smallest patch (index)", "right"]
    return f"Right on {' and '.join(said)}.\n\n{markdown(header, rows)}"


def making(recipe):
    """Return the command that makes a victim of this recipe, without its seed."""
    shown = ("dataset", "network", "width", "epochs", "lr", "weight_decay", "batch_size", "size", "target")
    usual, trigger = parser("train.py"), TRIGGERS.get(recipe["attack"])
    given = {k: recipe[k] for k in shown if recipe[k] not in (None, usual.get_default(k))}
    if trigger and recipe["poison_rate"] not in (None, trigger.rate):
        given["poison_rate"] = recipe["poison_rate"]
    if recipe["sampling"] in SAMPLINGS and recipe["sampling"] != usual.get_default("sampling"):
        given["sampling"] = recipe["sampling"]  # any other is the attack's own, and no flag
    return " ".join(["train.py", f"--attack {recipe['attack']}", *(f"--{k} {v}" for k, v in given.items())])


def networks(groups):
    """Return the table of networks other than ResNet-18 and of other data sets: how they are made, what UNIT does.

    Empty where there is none. UNIT is the run over all images, or, where that has no record, UNIT 250.
    """
    rows = []
    for group in groups:
        recipe = group.recipe
        unit = next((c for c in ("unit", "unit,step_images=250") if group.values(c, "BA")), None)
        if (recipe["network"], recipe["dataset"]) == ("resnet18", "cifar10") or unit is None:
            continue
        n = f" (n = {len(group.victims)})" if len(group.victims) > 1 else ""
        measured = [[spread(group.values(c, key), 2) for key in ("BA", "ASR", "RA")] for c in ("none", unit)]
        name = f"{group.panel}, {group.name}{n}"
        rows.append([name, f"`{making(recipe)}`", *map(" / ".join, measured), NAMES[unit]])
    header = ["network, attack", "made by", "BA / ASR / RA in %", "after UNIT", "run"]
    return markdown(header, rows) if rows else ""


def victim_table(victims):
    """Return the table of the victims that have the name train.py gives, or one that adds `-word` to it.

    What they are, their figures, how they were made. Files of other names, as of other seeds, are left out.
    """
    rows = []
    for v in victims:
        a = v.about
        usual = v.path and checkpoint_path(v.recipe["dataset"], a["network"], v.attack, a["width"]).stem
        if v.path is None or not (v.path.stem == usual or v.path.stem.startswith(f"{usual}-")):
            continue
        label = "clean" if v.attack == "none" else "clean-label" if a["clean_label"] else "dirty-label"
        poison = label if v.attack == "none" else f"{label}, {100 * a['poison_rate']:g} %, {a.get('sampling') or '–'}"
        rows.append([
            f"`{v.path.name}`", f"{a['width']:g}", poison, a["epochs"], figures(a), percent(a.get("target_accuracy")),
            f"{a['seconds']:.0f}", a.get("commit") or "–", f"`{v.sum[:16]}`",
        ])  # fmt: skip
    header = ["file", "width", "poison", "epochs", "BA / ASR / RA in %", "target class %", "seconds", "commit"]
    return markdown([*header, "sha256"], rows)
