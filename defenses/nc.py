"""NC: Neural Cleanse (Wang et al., IEEE S&P 2019).

The smallest patch that leads to each class is searched (inversion.py). An abnormally small one is taken for the trigger
and unlearned: the network is fine-tuned on clean images, some stamped with it, with their true labels.
"""

from dataclasses import dataclass

import torch

import data
from fast import training_copy

from . import finetune, inversion
from .common import Repaired


@dataclass(frozen=True)
class Config(inversion.Config, finetune.Config):
    """The constants of NC: those of the search, and those of unlearning by fine-tuning."""

    stamped_share: float = 0.2  # of the clean images, stamped once per suspicious class


def stamped_set(images, labels, patches, share, seed):
    """Return (images, labels) with a random share of the images replaced by P stamped copies, labels unchanged.

    images: uint8 (N, C, H, W); patches: (P, 1 + C, H, W). Returns (1 - share) N + P share N images.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)
    n = round(share * len(images))
    clean, some, truth = images[order[n:]], data.to_float(images[order[:n]]), labels[order[:n]]
    stamped = [inversion.stamp(some, patch[:1], patch[1:]) for patch in patches.to(images.device)]
    stamped = [(x * 255).round().to(torch.uint8) for x in stamped]
    return torch.cat((clean, *stamped)), torch.cat((labels[order[n:]], *[truth] * len(patches)))


def repair(model, images, labels, config=Config(), seed=0, dtype=torch.float32, callback=None, state=None):
    """Search the patch of each class, and unlearn those of suspicious classes; if none is, the network is unchanged.

    images: uint8 (N, 3, H, W); labels: int64 (N,), both on the model's device; dtype: autocast's; callback, state: see
    defenses/__init__.py, over the classes searched and then the epochs of unlearning. Returns a Repaired whose findings
    are the suspicious classes, and the norm and anomaly index of each class.
    """
    state = {} if state is None else state
    keep = callback and (lambda now, state_of: callback(now, lambda: {"search": state_of()}))
    found = state.get("found") or inversion.search(model, images, config, seed, dtype, keep, state.get("search"))
    suspicious, index = inversion.anomalies(found["norms"], config)
    net, history = training_copy(model, dtype), {}
    if suspicious:
        stamped = stamped_set(images, labels, found["patches"][suspicious], config.stamped_share, seed)
        keep = callback and (lambda now, state_of: callback(now, lambda: {"found": found, "tuning": state_of()}))
        history = finetune.tune(net, *stamped, config, seed, dtype, keep, state.get("tuning"))
    classes = ", ".join(map(str, suspicious))
    outcome = f"suspicious: class {classes}, unlearned" if suspicious else "no class is suspicious: nothing changed"
    findings = {"outcome": outcome, "suspicious": suspicious, "norms": found["norms"], "anomaly_index": index}
    return Repaired(net.eval(), {"norm": found["norms"]} | history, findings)
