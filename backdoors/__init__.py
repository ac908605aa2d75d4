"""Triggers by name, and how a training set is poisoned with them.

A new trigger: a module here with an nn.Module that takes (folder, size), keeps what it needs as buffers and maps
(N, 3, H, W) in [0, 1] to the same; a line in TRIGGERS, a rate in poison.POISON_RATE, and its name in flags.ATTACKS. Its
buffers lie in the victim's checkpoint, so that whoever has the file has the trigger.
"""

from pathlib import Path

from .badnet import BadNet
from .blended import Blended
from .poison import SAMPLINGS, Poison, epoch_order, poison_training_set
from .reflection import Reflection
from .wanet import WaNet

__all__ = ["SAMPLINGS", "TRIGGERS", "Poison", "epoch_order", "get_backdoor", "poison_training_set"]

TRIGGERS = {"badnet": BadNet, "wanet": WaNet, "reflection": Reflection, "blended": Blended}
FOLDER = Path(__file__).resolve().parent.parent / "data" / "trigger"


def get_backdoor(name, size=32, folder=FOLDER):
    """Return the trigger as an nn.Module with buffers: (N, 3, size, size) in [0, 1] to the same.

    folder: where the trigger files lie; put the authors' there to get the authors' triggers.
    Raises ValueError for an unknown name, FileNotFoundError for a missing file.
    """
    if name not in TRIGGERS:
        raise ValueError(f"unknown attack {name!r}; there are {', '.join(TRIGGERS)}")
    return TRIGGERS[name](Path(folder), size).eval()
