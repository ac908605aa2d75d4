"""Draws all triggers on one sheet: python data/trigger/sheet.py OUT.png [VICTIM.pt ...]

Learned triggers are those of the victims named, else of the first one in ckpt/; where there is none, the sheet says so.
The images are of the embedded sample.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import flags

import torch

import backdoors
import data
import utils
from support import inputs, plots

IMAGES = 6


def main(out, *victims):
    """Write the sheet."""
    images, labels = data.load_dataset("cifar10_sample", None, train=False)
    found = [utils.load_checkpoint(path) for path in (*victims, *sorted(utils.CKPT.glob("cifar10_*.pt")))]
    triggers = {}
    for name in flags.ATTACKS:
        theirs = [c for c in found if c["attack"] == name and c["trigger"] is not None]
        if backdoors.TRIGGERS[name].width is not None and not theirs:
            triggers[name] = f"learned for a victim; there is none: train.py --attack {name}"
            continue
        backdoor = inputs.load_trigger(name, theirs[0] if theirs else {"trigger": None}, torch.device("cpu")).eval()
        triggers[name] = plots.trigger_rows(images, labels, 2 if name == "composite" else 0, backdoor, IMAGES)
    plots.draw_triggers(triggers, Path(out))


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except flags.InputError as error:
        sys.exit(f"error: {error}")
