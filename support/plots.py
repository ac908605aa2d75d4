"""The pictures: what a trigger looks like, how a search for bounds went, how defenses compare."""

import numpy as np
import torch
from matplotlib.figure import Figure  # not pyplot: whoever imports this keeps their own backend
from matplotlib.transforms import Bbox

import data
import utils

COLUMNS = 16  # of the trigger's picture


def rows_of(clean, triggered, times=1):
    """Return the rows of a picture: {what: float (n, 3, H, W) in [0, 1]}, n COLUMNS at most.

    clean, triggered: floats (N, 3, H, W) in [0, 1], the same images; the difference is multiplied by `times`; clean:
    None where they are not known, for a row of the triggered ones alone.
    """
    triggered = triggered[:COLUMNS].cpu()
    if clean is None:
        return {"triggered": triggered}
    clean = clean[:COLUMNS].cpu()
    difference = ((triggered - clean).abs() * times).clamp(0, 1)
    return {"clean": clean, "triggered": triggered, "difference" if times == 1 else f"diff. × {times}": difference}


@torch.no_grad()
def trigger_rows(images, labels, target, backdoor, n=COLUMNS):
    """Return the rows of a trigger's picture, see rows_of(), on n of the test images that ASR is measured on.

    images: uint8 (N, 3, H, W), labels: int64 (N,), on the backdoor's device. A mix of several images has no clean
    counterpart, and no difference from it.
    """
    others, truth = backdoor.test_set(images, labels, target)
    some = data.to_float(others[:n] if truth is None else others[data.few(truth, n)])
    rows = rows_of(some, backdoor(some), backdoor.times)
    if truth is None:
        return {"clean": data.to_float(images[:n]).cpu(), "triggered": rows["triggered"]}
    return rows


def draw_demo(rows, path):
    """Write the picture of a trigger: {what: float (n, 3, H, W) in [0, 1]}, see rows_of()."""
    fig = Figure(figsize=(len(rows["triggered"]), 0.25 + 1.05 * len(rows)), layout="constrained")
    axes = fig.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (name, row) in zip(axes, rows.items(), strict=True):
        axis.imshow(torch.cat(list(row), dim=2).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_ylabel(name, fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
    utils.write_whole(path, lambda p: fig.savefig(p, format="png", dpi=100))


def draw_patches(patches, norms, index, path):
    """Write the picture of the smallest patch of each class: above its mask, below what it stamps on a black image.

    patches: float (classes, 1 + C, H, W) in [0, 1], mask first; norms, index: a number per class, for the titles.
    """
    columns = min(10, len(norms))
    lines = -(-len(norms) // columns)
    fig = Figure(figsize=(1.3 * columns, 3.1 * lines), layout="constrained")
    axes = fig.subplots(2 * lines, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for c, patch in enumerate(patches.cpu()):
        mask, stamped = patch[0], (patch[:1] * patch[1:]).permute(1, 2, 0)
        above, below = axes[2 * (c // columns) : 2 * (c // columns) + 2, c % columns]
        above.imshow(mask.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        above.set_title(f"class {c}\nnorm {norms[c]:.1f}\nindex {index[c]:.1f}", fontsize=9)
        below.imshow(stamped.numpy(), vmin=0, vmax=1, interpolation="nearest")
    utils.write_whole(path, lambda p: fig.savefig(p, format="png", dpi=100))


def draw_triggers(triggers, path):
    """Write the sheet of all triggers, a line each: {name: what trigger_rows() returns, or why there is nothing}."""
    wide, side = next(
        row.shape[0::3] for rows in triggers.values() if not isinstance(rows, str) for row in rows.values()
    )
    line, strip, left = side + 4, wide * side + 8, 4 * side
    canvas = torch.ones(3, len(triggers) * line + side // 2, left + 3 * strip)
    fig = Figure(figsize=(canvas.shape[2] / 50, canvas.shape[1] / 50))
    axis = fig.add_axes((0, 0, 1, 1))
    for column, name in enumerate(("clean", "triggered", "difference, times the factor")):
        axis.text(left + column * strip, side // 4, name, va="center")
    for top, (name, rows) in zip(range(side // 2, canvas.shape[1], line), triggers.items(), strict=False):
        missing = isinstance(rows, str)
        factor = next((what.removeprefix("diff.") for what in ([] if missing else rows) if "×" in what), "")
        axis.text(left - 6, top + side // 2, name + factor, ha="right", va="center")
        if missing:
            axis.text(left, top + side // 2, rows, va="center", color="gray")
            continue
        for column, row in enumerate(rows.values()):
            start = left + column * strip
            canvas[:, top : top + side, start : start + wide * side] = torch.cat(list(row), dim=2)
    axis.imshow(canvas.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.axis("off")
    utils.write_whole(path, lambda p: fig.savefig(p, format="png", dpi=100))


def draw_history(history, best_step, limit, path):
    """Write the picture of how CE, R, alpha and validation accuracy went; limit: the accuracy that counts as good."""
    names = {
        "ce": "cross-entropy",
        "reg": "R, sum of mean bounds",
        "alpha": "alpha",
        "valid_acc": "validation accuracy",
    }
    fig = Figure(figsize=(9, 6), layout="constrained")
    axes = fig.subplots(2, 2, sharex=True)
    for axis, (key, name) in zip(axes.flat, names.items(), strict=True):
        axis.plot(range(1, len(history[key]) + 1), history[key], lw=1.2)
        axis.axvline(best_step + 1, color="tab:green", ls=":", label=f"step chosen: {best_step + 1}")
        axis.set_title(name)
    axes[1, 0].set_yscale("log")
    axes[1, 1].axhline(limit, color="tab:red", ls="--", label="good at or above")
    axes[1, 1].legend()
    for axis in axes[1]:
        axis.set_xlabel("step")
    utils.write_whole(path, lambda p: fig.savefig(p, format="png", dpi=110))


def draw_moved(neurons, path):
    """Write the picture of the neurons that a trigger moves most: two distributions each, and the learned bound.

    neurons: the first of what activations.trigger_effect returns.
    """
    fig = Figure(figsize=(11, 5.6), layout="constrained")
    axes = fig.subplots(2, -(-len(neurons) // 2), squeeze=False)
    for axis, neuron in zip(axes.flat, neurons, strict=False):
        high = max(neuron.clean.max(), neuron.triggered.max()).item()
        for name, values, color in (("clean", neuron.clean, "tab:blue"), ("triggered", neuron.triggered, "tab:red")):
            axis.hist(
                values.numpy(), bins=50, range=(0, high), histtype="stepfilled", alpha=0.6, color=color, label=name
            )
        if neuron.bound is not None:
            axis.axvline(neuron.bound, color="black", ls="--", label=f"bound {neuron.bound:.2f}")
        axis.set_title(f"{neuron.site} {neuron.place}", fontsize=10)
        axis.set_yscale("log")
        axis.legend(fontsize=8)
    fig.supxlabel("activation without bounds")
    fig.supylabel("images")
    utils.write_whole(path, lambda p: fig.savefig(p, format="png", dpi=110))


def draw_heatmap(columns, maps, path):
    """Write the picture of attacks against defenses, a panel for each of `maps`, one below the other.

    columns: names of the defenses; maps: [(title, names of the rows, rows of a share in [0, 1] or None per column, low
    is good)]; without any no picture is written.
    """
    if not maps:
        return
    inches = [1.1 + 0.28 * len(rows) for _, rows, *_ in maps]
    fig = Figure(figsize=(min(9, 2 + 0.5 * len(columns)), sum(inches)), layout="constrained")
    axes = fig.subplots(len(maps), 1, squeeze=False, height_ratios=inches)[:, 0]
    for axis, (title, rows, values, low) in zip(axes, maps, strict=True):
        shares = np.array([[np.nan if v is None else v for v in row] for row in values], float)
        axis.imshow(shares, vmin=0, vmax=1, cmap="viridis_r" if low else "viridis", aspect="auto")
        axis.set_title(title, fontsize=10, loc="left", fontweight="bold")
        axis.set_xticks(range(len(columns)), columns, rotation=40, ha="left", rotation_mode="anchor", fontsize=9)
        axis.xaxis.tick_top()
        axis.set_yticks(range(len(rows)), rows, fontsize=9)
        axis.tick_params(length=0)
        for (y, x), share in np.ndenumerate(shares):
            dark = (1 - share if low else share) < 0.6  # of nothing it is not: black on white
            text = "–" if np.isnan(share) else f"{100 * share:.0f}"
            axis.text(x, y, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    utils.write_whole(path, lambda p: fig.savefig(p, format="png", dpi=200))


def draw_tradeoff(panels, path):
    """Write the scatter of what defenses cost and gain, a panel beside the other; without any, no picture is written.

    panels: {title: {defense: (BA lost, RA gained)}}, shares in [-1, 1].
    """
    if not panels:
        return
    fig = Figure(figsize=(max(6, 4.5 * len(panels)), 5), layout="constrained")
    axes = fig.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        axis.plot(*([100 * p[i] for p in points.values()] for i in (0, 1)), "o", ms=6)
        axis.set_title(title, fontsize=10)
        axis.margins(0.18, 0.1)
        axis.grid(alpha=0.3)
    fig.supxlabel("BA lost, percentage points", fontsize=10)
    fig.supylabel("RA gained, percentage points", fontsize=10)
    fig.draw_without_rendering()  # places are known from here on
    fig.set_layout_engine("none")
    for axis, points in zip(axes, panels.values(), strict=True):
        _label(axis, [(100 * lost, 100 * gained) for lost, gained in points.values()], list(points))
    utils.write_whole(path, lambda p: fig.savefig(p, format="png", dpi=200))


def _label(axis, places, labels):
    """Write each label near its place, as near as it comes without covering another label or place."""
    scale = axis.figure.dpi / 72  # pixels per point
    near, points, frame = 4 * scale, axis.transData.transform(places), axis.get_window_extent()
    taken = [Bbox.from_bounds(x - near, y - near, 2 * near, 2 * near) for x, y in points]
    around = [(r * np.cos(t), r * np.sin(t)) for r in range(8, 300, 4) for t in np.arange(0, 2 * np.pi, np.pi / 12)]
    for place, (x, y), label in zip(places, points, labels, strict=True):
        style = {"va": "center", "fontsize": 8}
        measured = axis.text(*place, label, **style)
        size = measured.get_window_extent()
        measured.remove()
        for dx, dy in around:
            ha, side = ("left", 0) if dx > 1 else ("right", 1) if dx < -1 else ("center", 0.5)
            left, low = x + dx * scale - side * size.width, y + dy * scale - size.height / 2
            box = Bbox.from_bounds(left, low, size.width, size.height)
            inside = all(frame.contains(*corner) for corner in (box.min, box.max))
            if inside and not any(box.overlaps(other) for other in taken):
                if np.hypot(dx, dy) > 12:  # too far to be taken for its own without a line
                    style["arrowprops"] = {"arrowstyle": "-", "lw": 0.5, "color": "gray", "relpos": (side, 0.5)}
                axis.annotate(label, place, (dx, dy), textcoords="offset points", ha=ha, **style)
                taken.append(box)
                break
