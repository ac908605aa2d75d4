"""SEAM: selective amnesia by random labels (Zhu et al., IEEE S&P 2023).

Training on random labels makes a network forget both its task and its backdoor; clean labels then restore the task
alone.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from fast import training_copy

from .common import Repaired, Training, forward, train_epoch


@dataclass(frozen=True)
class Config:
    """The constants of SEAM."""

    uses_labels: ClassVar[bool] = True
    data_rate: float = 0.05  # share of the training set that is clean data; published: 0.10
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    # forgetting
    forget_per_class: int = 5  # images; those of all classes are one batch
    forget_epochs: int = 100  # at most; one step each
    stop_accuracy: float = 0.20  # forgetting ends below this accuracy on their true labels
    # recovering
    epochs: int = 10
    lr_drop: int = 2  # epochs between multiplications of the rate by lr_factor
    lr_factor: float = 0.1
    batch_size: int = 128
    flip: bool = True  # whether augmentation mirrors the images


def repair(model, images, labels, config=Config(), seed=0, dtype=torch.float32, callback=None, state=None):
    """Let a copy of `model` forget by random labels, then recover on the clean images.

    Forgetting: steps on the first 5 images of each class, augmented and randomly labeled afresh at each step, until the
    accuracy on the true labels in a step's forward pass (train mode) is below 20 %. Recovering: 10 epochs over all
    images by the same optimizer.
    images: uint8 (N, 3, H, W); labels: int64 (N,), both on the model's device; dtype: autocast's; callback, state: see
    defenses/__init__.py, over the steps of forgetting and then the epochs of recovering, whose figures are
    "forget_loss" and "forget_accuracy", then "loss" and "accuracy". Returns a Repaired whose finding `forgotten` tells
    whether forgetting reached that accuracy.
    """
    net = training_copy(model, dtype).train()
    optimizer = torch.optim.SGD(net.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    training = Training(net, optimizer, torch.Generator().manual_seed(seed), state=state)
    generator, history = training.generator, training.history
    few = torch.cat([(labels == c).nonzero()[: config.forget_per_class, 0] for c in labels.unique()])

    def random_loss(x, index):
        logits = forward(net, x, dtype)
        drawn = torch.randint(logits.shape[1], (len(x),), generator=generator).to(x.device)
        return F.cross_entropy(logits, drawn), logits.argmax(1) == labels[few[index]]

    def true_loss(x, index):
        logits = forward(net, x, dtype)
        return F.cross_entropy(logits, labels[index]), logits.argmax(1) == labels[index]

    def forgotten():
        return history.get("forget_accuracy", [1.0])[-1] < config.stop_accuracy

    one_batch = replace(config, batch_size=len(few))
    while len(history.get("forget_loss", ())) < config.forget_epochs and not forgotten():
        loss, accuracy = train_epoch(images[few], one_batch, optimizer, generator, random_loss)
        training.end_epoch(callback, forget_loss=loss, forget_accuracy=accuracy)
    for epoch in range(len(history.get("loss", ())), config.epochs):
        optimizer.param_groups[0]["lr"] = config.lr * config.lr_factor ** (epoch // config.lr_drop)
        loss, accuracy = train_epoch(images, config, optimizer, generator, true_loss)
        training.end_epoch(callback, loss=loss, accuracy=accuracy)
    steps = len(history["forget_loss"])
    outcome = f"forgotten in {steps} steps" if forgotten() else f"not forgotten in {steps} steps"
    return Repaired(net.eval(), history, {"outcome": outcome, "forgotten": forgotten()})
