"""The pictures: what a trigger looks like, and how a search for bounds went."""

import torch
from matplotlib.figure import Figure  # not pyplot: whoever imports this keeps their own backend

import utils


def draw_demo(images, backdoor, path, times=1, columns=16):
    """Write the trigger picture: rows clean, triggered, absolute difference (times `times`).

    images: uint8 (N, 3, H, W) on the backdoor's device; the first `columns` are drawn.
    """
    x = utils.to_float(images[:columns])
    x, triggered = x.cpu(), backdoor(x).cpu()
    rows = {"clean": x, "triggered": triggered, f"|difference| x {times}": ((triggered - x).abs() * times).clamp(0, 1)}
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
        axis.plot(range(len(history[key])), history[key], lw=1.2)
        axis.axvline(best_step, color="tab:green", ls=":", label=f"step chosen: {best_step}")
        axis.set_title(name)
    axes[1, 0].set_yscale("log")
    axes[1, 1].axhline(limit, color="tab:red", ls="--", label="good at or above")
    axes[1, 1].legend()
    for axis in axes[1]:
        axis.set_xlabel("step")
    utils.write_whole(path, lambda p: fig.savefig(p, format="png", dpi=110))
