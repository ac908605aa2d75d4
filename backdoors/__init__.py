"""Triggers by name, and how a training set is poisoned with them.

badnet, patch, trojnn: a small picture replaces pixels; blend: noise, blended: a picture, sig: stripes, reflection: a
photograph, mixed into the whole image; adaptive_blend: a picture in parts; filter: the filter of a photo app; cl:
corners, on adversarial images; wanet: a warp; composite: parts of two images; dynamic, input_aware, lira: made by a
network that is trained along with the victim; invisible, dfst: by one that is trained before it.

A new trigger is a module here (copy badnet.py) with a subclass of trigger.Trigger, a line in TRIGGERS, and its name at
the end of flags.ATTACKS; every command then takes it. The class takes (folder, size) and maps (N, 3, H, W) in [0, 1]
to the same. Its state lies in buffers or parameters, which the victim's checkpoint stores. A trigger with networks
takes (folder, size, width) and has a class attribute `width`.
"""

from pathlib import Path

from . import poison
from .adaptive_blend import AdaptiveBlend
from .badnet import BadNet
from .blend import Blend
from .blended import Blended
from .cl import LabelConsistent
from .composite import Composite
from .dfst import Dfst
from .dynamic import Dynamic
from .filter import Filter
from .input_aware import InputAware
from .invisible import Invisible
from .lira import Lira
from .patch import Patch
from .poison import Poison, epoch_order
from .reflection import Reflection
from .sig import Sig
from .trigger import Trigger
from .trojnn import TrojNN
from .wanet import WaNet

__all__ = ["TRIGGERS", "Poison", "Trigger", "epoch_order", "get_backdoor", "poison_training_set"]

TRIGGERS = {
    "badnet": BadNet,
    "wanet": WaNet,
    "reflection": Reflection,
    "blended": Blended,
    "adaptive_blend": AdaptiveBlend,
    "blend": Blend,
    "cl": LabelConsistent,
    "composite": Composite,
    "dfst": Dfst,
    "dynamic": Dynamic,
    "filter": Filter,
    "input_aware": InputAware,
    "invisible": Invisible,
    "lira": Lira,
    "patch": Patch,
    "sig": Sig,
    "trojnn": TrojNN,
}
MAX_WIDTH = 256  # of a trigger's networks
FOLDER = Path(__file__).resolve().parent.parent / "data" / "trigger"


def get_backdoor(name, size=32, folder=FOLDER, width=None):
    """Return the trigger as an nn.Module with buffers: (N, 3, size, size) in [0, 1] to the same.

    folder: the folder of the trigger files, where the authors' files may replace ours. width: channels of a learned
    trigger's first layer, None for its default.
    Raises ValueError for an unknown name or an impossible width, FileNotFoundError for a missing file.
    """
    if name not in TRIGGERS:
        raise ValueError(f"unknown attack {name!r}; there are {', '.join(TRIGGERS)}")
    if width is None:
        return TRIGGERS[name](Path(folder), size).eval()
    if TRIGGERS[name].width is None:
        raise ValueError(f"the trigger of {name} has no networks; leave --trigger_width out")
    if not isinstance(width, int) or not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"trigger width {width!r} is no whole number from 1 to {MAX_WIDTH}")
    return TRIGGERS[name](Path(folder), size, width).eval()


def poison_training_set(labels, attack, target, rate=None, seed=0, sampling="fixed"):
    """Return the Poison of an attack by name, `none` for a clean set; see poison.choose()."""
    return poison.choose(labels, None if attack == "none" else TRIGGERS[attack], target, rate, seed, sampling)
