"""FST: Feature Shift Tuning (Min et al., NeurIPS 2023).

The last linear layer is re-initialized and pushed away from the victim's, so that the features have to shift away from
those that the backdoor uses.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from fast import training_copy

from .common import Repaired, Training, forward, linear_layer, train_epoch


@dataclass(frozen=True)
class Config:
    """The constants of FST."""

    uses_labels: ClassVar[bool] = True
    data_rate: float = 0.05  # share of the training set that is clean data; published: 0.02
    alpha: float = 0.2  # weight of the inner product with the original weights
    lr: float = 0.01  # cosine schedule
    momentum: float = 0.9
    epochs: int = 10
    batch_size: int = 128
    flip: bool = True  # whether augmentation mirrors the images


@torch.no_grad()
def redraw_linear(linear, generator):
    """Re-initialize weight and bias of a linear layer in place: uniform in +-1 / sqrt(fan_in)."""
    limit = 1 / math.sqrt(linear.in_features)
    for p in linear.parameters():
        p.copy_(torch.rand(p.shape, generator=generator) * 2 * limit - limit)


@torch.no_grad()
def rescale(weight, norm):
    """Scale `weight` in place to the Frobenius norm `norm`."""
    weight *= norm / weight.norm()


def repair(model, images, labels, config=Config(), seed=0, dtype=torch.float32, callback=None, state=None):
    """Fine-tune a copy of `model` whose last linear layer is re-initialized and pushed away from the original.

    Loss: CE + alpha * sum of W * W_old, elementwise. After every step W is scaled to the Frobenius norm of W_old.
    images: uint8 (N, 3, H, W); labels: int64 (N,), both on the model's device; dtype: autocast's;
    callback, state: see defenses/__init__.py; an epoch's figures are "loss" and "accuracy". Returns a Repaired.
    Raises ValueError for a network without a linear layer.
    """
    net = training_copy(model, dtype).train()
    linear = linear_layer(net)
    old = linear.weight.detach().clone()
    generator = torch.Generator().manual_seed(seed)
    redraw_linear(linear, generator)
    optimizer = torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum)
    optimizer.register_step_post_hook(lambda *_: rescale(linear.weight, old.norm()))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    training = Training(net, optimizer, generator, rate, state)

    def loss_of(x, index):
        logits = forward(net, x, dtype)
        loss = F.cross_entropy(logits, labels[index]) + config.alpha * (linear.weight * old).sum()
        return loss, logits.argmax(1) == labels[index]

    for _ in range(training.done, config.epochs):
        loss, accuracy = train_epoch(images, config, optimizer, generator, loss_of)
        training.end_epoch(callback, loss=loss, accuracy=accuracy)
    return Repaired(net.eval(), training.history)
