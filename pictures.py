"""The pictures: what a trigger looks like, and how a search for bounds went."""

import itertools

import torch
from matplotlib.figure import Figure  # not pyplot: whoever imports this keeps their own backend

import utils


def draw_demo(images, backdoor, path, times=1, columns=16):
    """Write the trigger picture: rows clean, triggered, absolute difference (times `times`).

    images: uint8 (N, 3, H, W) on the backdoor's device; the first `columns` are drawn.
    """
    x = utils.to_float(images[:columns])
    x, triggered = x.cpu(), backdoor(x).cpu()
    difference = ((triggered - x).abs() * times).clamp(0, 1)
    rows = {"clean": x, "triggered": triggered, "difference" if times == 1 else f"diff. × {times}": difference}
    fig = Figure(figsize=(columns, 3.4), layout="constrained")
    axes = fig.subplots(3, 1)
    for axis, (name, row) in zip(axes, rows.items(), strict=True):
        axis.imshow(torch.cat(list(row), dim=2).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_ylabel(name, fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
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
        for name, values, colour in (("clean", neuron.clean, "tab:blue"), ("triggered", neuron.triggered, "tab:red")):
            axis.hist(values.numpy(), bins=50, range=(0, high), alpha=0.6, color=colour, label=name)
        if neuron.bound is not None:
            axis.axvline(neuron.bound, color="black", ls="--", label=f"bound {neuron.bound:.2f}")
        axis.set_title(f"{neuron.site} {neuron.place}", fontsize=10)
        axis.set_yscale("log")
        axis.legend(fontsize=8)
    fig.supxlabel("activation without bounds")
    fig.supylabel("images")
    utils.write_whole(path, lambda p: fig.savefig(p, format="png", dpi=110))


def draw_compared(rows, path):
    """Write the scatter of BA against ASR: a colour per defence, a marker per victim.

    rows: dictionaries with victim (or attack alone), defense, BA, ASR (None where there is no trigger: not drawn).
    """
    fig = Figure(figsize=(7, 4.6), layout="constrained")
    axis = fig.subplots()
    rows = [r for r in rows if r["ASR"] is not None]
    colours = {d: f"C{i}" for i, d in enumerate(dict.fromkeys(r["defense"] for r in rows))}
    names = dict.fromkeys(r["victim"] or r["attack"] for r in rows)
    markers = dict(zip(names, itertools.cycle("osD^vPX*<>"), strict=False))
    for r in rows:
        style = {"color": colours[r["defense"]], "marker": markers[r["victim"] or r["attack"]]}
        axis.plot(100 * r["ASR"], 100 * r["BA"], ls="", ms=8, alpha=0.8, **style)
    for name, colour in colours.items():
        axis.plot([], [], "o", color=colour, label=name)
    for name, marker in markers.items():
        axis.plot([], [], marker, color="grey", label=name)
    axis.set_xlabel("ASR % (better to the left)")
    axis.set_ylabel("BA % (better up)")
    axis.legend(fontsize=8, ncols=2)
    utils.write_whole(path, lambda p: fig.savefig(p, format="png", dpi=110))


def draw_sweep(rows, before, title, path):
    """Write the picture of a sweep: BA and ASR against each flag's values, the victim's own as dashed lines.

    rows: dictionaries with flag, value, BA, ASR (or None); before: BA and ASR of the victim.
    """
    flags = list(dict.fromkeys(r["flag"] for r in rows))
    fig = Figure(figsize=(4.6 * len(flags), 3.6), layout="constrained")
    axes = fig.subplots(1, len(flags), squeeze=False, sharey=True)[0]
    for axis, flag in zip(axes, flags, strict=True):
        mine = [r for r in rows if r["flag"] == flag]
        for name, colour in (("BA", "tab:blue"), ("ASR", "tab:red")):
            if before[name] is None:
                continue
            axis.plot([r["value"] for r in mine], [100 * r[name] for r in mine], "o-", color=colour, label=name)
            axis.axhline(100 * before[name], color=colour, ls="--", lw=0.8, label=f"{name} before")
        axis.set_xlabel(flag)
        axis.set_xscale("log")
        axis.set_xticks([r["value"] for r in mine], [f"{r['value']:g}" for r in mine])
        axis.minorticks_off()
        axis.set_ylim(-3, 103)
    axes[0].set_ylabel("%")
    axes[0].legend(fontsize=8)
    fig.suptitle(title, fontsize=10)
    utils.write_whole(path, lambda p: fig.savefig(p, format="png", dpi=110))
