"""RNP: reconstructive neuron pruning (Li et al., ICML 2023).

A network that has unlearned the clean task keeps its backdoor. Masks, one per channel of batch norm, are then trained
to recover the clean task: those of backdoor channels fall, and the victim is pruned there.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from fast import training_copy

from .common import Repaired, Training, train_epoch
from .pruning import Channels, Masks, forward_with, held_out
from .ulrl import unlearn


@dataclass(frozen=True)
class Config:
    """The constants of RNP."""

    uses_labels: ClassVar[bool] = True
    data_rate: float = 0.05  # share of the training set that is clean data
    batch_size: int = 128
    flip: bool = True  # whether augmentation mirrors the images
    momentum: float = 0.9
    # unlearning, see ulrl.unlearn()
    unlearn_images: int = 500  # of the clean images, at most; an epoch over more goes far below stop_accuracy
    unlearn_lr: float = 0.01
    unlearn_weight_decay: float = 5e-4
    unlearn_epochs: int = 20  # at most
    unlearn_lr_drop: int = 10  # epochs between multiplications of the rate by unlearn_lr_factor
    unlearn_lr_factor: float = 0.1
    clip_norm: float | None = None  # of the gradient; the authors clip before the backward pass, which has no effect
    stop_accuracy: float = 0.20  # unlearning ends at or below this accuracy on the clean images
    # recovering
    recover_lr: float = 0.2  # of the masks
    recover_epochs: int = 20
    loss_weight: float = 0.2
    # pruning: the largest threshold that keeps the accuracy on the held-out images
    thresholds: tuple[float, ...] = tuple(k / 20 for k in range(19))  # 0, 0.05, ..., 0.9
    valid_share: float = 0.2  # of the clean images, held out
    max_drop: float = 0.10  # relative loss of the victim's accuracy on them


def recover(net, images, labels, config, generator, dtype=torch.float32, callback=None, state=None):
    """Train masks on the channels of the unlearned `net` by its cross-entropy; return (values, history).

    values: (n,) in [0, 1], in the order of pruning.Channels.
    """
    net.requires_grad_(False).train()
    channels = Channels(net)
    masks = Masks(channels)
    optimizer = masks.optimizer(config.recover_lr, config.momentum)
    training = Training(masks, optimizer, generator, state=state)

    def loss_of(x, index):
        logits = forward_with(net, channels.parameters(masks.values * channels.gamma, channels.beta), x, dtype)
        return config.loss_weight * F.cross_entropy(logits, labels[index]), logits.argmax(1) == labels[index]

    for _ in range(training.done, config.recover_epochs):
        loss, accuracy = train_epoch(images, config, optimizer, generator, loss_of)
        training.end_epoch(callback, loss=loss, accuracy=accuracy)
    return masks.values.detach(), training.history


def repair(model, images, labels, config=Config(), seed=0, dtype=torch.float32, callback=None, state=None):
    """Unlearn the clean task, recover it by masks, and set gamma = 0 in a copy of the victim where a mask ends low.

    images: uint8 (N, 3, H, W); labels: int64 (N,), both on the model's device; a fifth of them is held out to choose
    the threshold, which the authors choose on test images. dtype: autocast's; callback, state: see
    defenses/__init__.py, over the epochs of unlearning and then of recovering. Returns a Repaired whose findings are
    the threshold and the held-out accuracies, and whether unlearning reached stop_accuracy.
    Raises ValueError for a network without batch norm, and for too few images.
    """
    state = {} if state is None else state
    channels = Channels(model)
    learn, valid = held_out(labels, config.valid_share)
    n = min(config.unlearn_images, len(learn))
    some = learn[torch.arange(n) * len(learn) // n]  # evenly spaced, in an order by class: equally many of each
    how = config, torch.Generator().manual_seed(seed), dtype

    def callback_of(name, found):
        """Return the callback of one of the two trainings; found: further entries of the state."""
        if callback is None:
            return None
        return lambda now, state_of: callback(now, lambda: {**found, name: state_of()})

    found = {k: state[k] for k in ("unlearned", "before") if k in state}
    if not found:
        net, before = unlearn(model, images[some], labels[some], *how, callback_of("unlearn", {}), state.get("unlearn"))
        found = {"unlearned": copy.deepcopy(net.state_dict()), "before": before}
    net = training_copy(model, dtype)
    net.load_state_dict(found["unlearned"])
    masks, after = recover(net, images[learn], labels[learn], *how, callback_of("recover", found), state.get("recover"))
    how = config.thresholds, config.max_drop, images[valid], labels[valid], dtype
    net, findings = channels.most_aggressive(model, masks, *how)
    findings["unlearned"] = found["before"]["unlearn_accuracy"][-1] <= config.stop_accuracy
    if not findings["unlearned"]:
        findings["outcome"] += f"; unlearning did not reach {config.stop_accuracy:.0%} accuracy"
    return Repaired(net, found["before"] | after, findings)
