"""Fine-tuning on the clean images: the plain baseline."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from fast import training_copy

from .common import Repaired, Training, forward, train_epoch


@dataclass(frozen=True)
class Config:
    """BackdoorBench's constants, for this baseline and for the fine-tuning in FP and NC."""

    uses_labels: ClassVar[bool] = True
    data_rate: float = 0.05  # share of the training set that is clean data
    lr: float = 0.01  # cosine schedule over the epochs
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 100
    batch_size: int = 256
    flip: bool = True  # whether augmentation mirrors the images


def tune(net, images, labels, config, seed=0, dtype=torch.float32, callback=None, state=None):
    """Fine-tune `net` in place on clean images and return the history; the other arguments are those of repair()."""
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    training = Training(net.train(), optimizer, torch.Generator().manual_seed(seed), rate, state)

    def loss_of(x, index):
        logits = forward(net, x, dtype)
        return F.cross_entropy(logits, labels[index]), logits.argmax(1) == labels[index]

    for _ in range(training.done, config.epochs):
        loss, accuracy = train_epoch(images, config, optimizer, training.generator, loss_of)
        training.end_epoch(callback, loss=loss, accuracy=accuracy)
    return training.history


def repair(model, images, labels, config=Config(), seed=0, dtype=torch.float32, callback=None, state=None):
    """Fine-tune a copy of `model` on clean images.

    images: uint8 (N, 3, H, W); labels: int64 (N,), both on the model's device; dtype: autocast's;
    callback, state: see defenses/__init__.py; an epoch's figures are "loss" and "accuracy". Returns a Repaired.
    """
    net = training_copy(model, dtype)
    history = tune(net, images, labels, config, seed, dtype, callback, state)
    return Repaired(net.eval(), history)
