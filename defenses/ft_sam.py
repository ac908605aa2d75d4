"""FT-SAM: fine-tuning with sharpness-aware minimization (Zhu et al., ICCV 2023).

Plain fine-tuning hardly changes neurons of large norm, among them the backdoor's. Each step here uses the gradient at
the worst point of a neighborhood of the weights, which is wider for larger weights (adaptive SAM).
"""

import contextlib
import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from fast import training_copy

from .common import Repaired, Training, forward, train_epoch


@dataclass(frozen=True)
class Config:
    """The constants of FT-SAM."""

    uses_labels: ClassVar[bool] = True
    data_rate: float = 0.05  # share of the training set that is clean data
    rho: float = 2.0  # radius of the neighborhood
    smoothing: float = 0.1  # label smoothing: the probability shared by the other classes
    lr: float = 0.01  # cosine schedule
    lr_period: int = 200  # steps from the largest rate down to 0 and up again
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 100
    batch_size: int = 256
    flip: bool = True  # whether augmentation mirrors the images


class AdaptiveSAM(torch.optim.SGD):
    """SGD at w with the gradient at w + e. Call climb() after a backward pass, and step() after a second one.

    e = rho * w^2 * g / (norm of |w| * g + 1e-12), over all parameters together, g being the gradient at w.
    """

    def __init__(self, parameters, rho, **kwargs):
        super().__init__(parameters, **kwargs)
        self.rho, self.before = rho, []

    @torch.no_grad()
    def climb(self):
        """Move the weights from w to w + e."""
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([(p.abs() * p.grad).norm() for p in weights]))
        self.before = [(p, p.detach().clone()) for p in weights]
        for p in weights:
            p += self.rho / (norm + 1e-12) * p.square() * p.grad

    @torch.no_grad()
    def step(self, closure=None):
        """Restore the weights w exactly, then take an SGD step by the gradient in .grad."""
        for p, old in self.before:
            p.copy_(old)
        self.before = []
        return super().step(closure)


@contextlib.contextmanager
def still_averages(net):
    """Within this context, batch norm in train mode does not update its running averages."""
    kept = [(m, m.momentum) for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for m, _ in kept:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, momentum in kept:
            m.momentum = momentum


def smooth_loss(logits, labels, smoothing):
    """Return the cross-entropy with 1 - smoothing on the label and smoothing / (classes - 1) on each other class."""
    classes = logits.shape[1]
    return F.cross_entropy(logits, labels, label_smoothing=smoothing * classes / (classes - 1))


def rate_at(step, config):
    """Return the learning rate of a step, counted from 0 over all epochs."""
    return config.lr * (1 + math.cos(2 * math.pi * step / config.lr_period)) / 2


def repair(model, images, labels, config=Config(), seed=0, dtype=torch.float32, callback=None, state=None):
    """Fine-tune a copy of `model` on clean images by adaptive SAM.

    images: uint8 (N, 3, H, W); labels: int64 (N,), both on the model's device; dtype: autocast's;
    callback, state: see defenses/__init__.py; an epoch's figures are "loss", at w + e, and "accuracy", at w.
    Returns a Repaired.
    """
    net = training_copy(model, dtype).train()
    optimizer = AdaptiveSAM(
        net.parameters(), config.rho, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    training = Training(net, optimizer, torch.Generator().manual_seed(seed), state=state)
    steps = itertools.count(training.done * math.ceil(len(images) / config.batch_size))

    def loss_of(x, index):
        optimizer.param_groups[0]["lr"] = rate_at(next(steps), config)
        logits = forward(net, x, dtype)
        optimizer.zero_grad()
        smooth_loss(logits, labels[index], config.smoothing).backward()
        optimizer.climb()
        with still_averages(net):
            loss = smooth_loss(forward(net, x, dtype), labels[index], config.smoothing)
        return loss, logits.argmax(1) == labels[index]

    for _ in range(training.done, config.epochs):
        loss, accuracy = train_epoch(images, config, optimizer, training.generator, loss_of)
        training.end_epoch(callback, loss=loss, accuracy=accuracy)
    return Repaired(net.eval(), training.history)
