"""ULRL: UnLearn and ReLearn (Min et al., 2024).

Unlearning the clean task changes the output neuron of the backdoor's target most. Its row of the linear layer is then
re-initialized and relearned, pushed away from the original.
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
    """The constants of ULRL."""

    uses_labels: ClassVar[bool] = True
    data_rate: float = 0.01  # share of the training set that is clean data
    flip: bool = True  # whether augmentation mirrors the images
    batch_size: int = 128
    momentum: float = 0.9
    # unlearning
    unlearn_lr: float = 0.01
    unlearn_weight_decay: float = 5e-4
    unlearn_epochs: int = 20  # at most
    unlearn_lr_drop: int = 10  # epochs between multiplications of the rate by unlearn_lr_factor
    unlearn_lr_factor: float = 0.1
    clip_norm: float = 20.0  # of the gradient
    stop_accuracy: float = 0.20  # unlearning ends at or below this accuracy on the clean images
    # suspicious rows
    z_threshold: float = 3.5
    mad_scale: float = 1.4826  # factor from the MAD of a normal distribution to its standard deviation
    max_suspicious: int = 2  # those of the lowest class index
    # relearning
    redraw_gain: float = 2.0  # a re-initialized row is uniform in +-sqrt(gain / fan_in)
    relearn_lr: float = 0.005  # cosine schedule
    relearn_epochs: int = 20
    dissimilarity: float = 0.7  # weight of the cosine term


def unlearn(model, images, labels, config, generator, dtype=torch.float32, callback=None, state=None):
    """Maximize the cross-entropy of a copy of `model` on the clean images; return (that network, history)."""
    net = training_copy(model, dtype).train()
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.unlearn_lr, momentum=config.momentum, weight_decay=config.unlearn_weight_decay
    )
    rate = torch.optim.lr_scheduler.StepLR(optimizer, config.unlearn_lr_drop, config.unlearn_lr_factor)
    training = Training(net, optimizer, generator, rate, state)

    def loss_of(x, index):
        logits = forward(net, x, dtype)
        return -F.cross_entropy(logits, labels[index]), logits.argmax(1) == labels[index]

    accuracy = training.history.get("unlearn_accuracy", [1.0])[-1]
    while training.done < config.unlearn_epochs and accuracy > config.stop_accuracy:
        loss, accuracy = train_epoch(images, config, optimizer, generator, loss_of, config.clip_norm)
        training.end_epoch(callback, unlearn_loss=-loss, unlearn_accuracy=accuracy)
    return net, training.history


def suspicious_rows(change, config=Config()):
    """Return (suspicious rows, robust z-scores): list of int, at most two; list of float.

    change: (classes,), c, the sum of |weight change| over each row. z = |c - median| / (1.4826 MAD), MAD = median of
    |c - median|; the median of an even number of values is the lower of the middle two.
    A row is suspicious if z > 3.5 and c > median. Of more than two, those of the lowest class index are kept, not those
    of the largest z. If MAD is 0, all z are 0 and no row is suspicious. Raises ValueError for NaN or infinity.
    """
    change = change.cpu().double()
    if not change.isfinite().all():
        raise ValueError("unlearning has made weights NaN or infinite")
    middle = change.median()  # torch takes the lower of the two in the middle
    distance = (change - middle).abs()
    spread = config.mad_scale * distance.median()
    z = distance / spread if spread > 0 else torch.zeros_like(distance)
    out = (z > config.z_threshold) & (change > middle)
    return out.nonzero()[: config.max_suspicious, 0].tolist(), z.tolist()


@torch.no_grad()
def redraw_rows(linear, rows, generator, gain=2.0):
    """Re-initialize rows of a linear layer in place: uniform in +-sqrt(gain / fan_in), bias 0."""
    limit = math.sqrt(gain / linear.in_features)
    for row in rows:
        fresh = torch.rand(linear.in_features, generator=generator) * 2 * limit - limit
        linear.weight[row] = fresh.to(linear.weight)
        if linear.bias is not None:
            linear.bias[row] = 0


def relearn(model, rows, images, labels, config, generator, dtype=torch.float32, callback=None, state=None):
    """Fine-tune a copy of the victim whose suspicious rows are re-initialized and pushed away from the originals.

    Loss: cross-entropy + 0.7 * sum over suspicious rows of cos(row, original row). Returns (network, history).
    """
    net = training_copy(model, dtype).train()
    linear = linear_layer(net)
    original = linear.weight.detach()[rows].clone()
    redraw_rows(linear, rows, generator, config.redraw_gain)
    optimizer = torch.optim.SGD(net.parameters(), lr=config.relearn_lr, momentum=config.momentum)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.relearn_epochs)
    training = Training(net, optimizer, generator, rate, state)

    def loss_of(x, index):
        logits = forward(net, x, dtype)
        likeness = F.cosine_similarity(linear.weight[rows], original, dim=1).sum()
        loss = F.cross_entropy(logits, labels[index]) + config.dissimilarity * likeness
        return loss, logits.argmax(1) == labels[index]

    for _ in range(training.done, config.relearn_epochs):
        loss, accuracy = train_epoch(images, config, optimizer, generator, loss_of)
        training.end_epoch(callback, loss=loss, accuracy=accuracy)
    return net, training.history


def repair(model, images, labels, config=Config(), seed=0, dtype=torch.float32, callback=None, state=None):
    """Find the backdoor's output neuron by unlearning, then relearn it in a copy of `model`.

    images: uint8 (N, 3, H, W); labels: int64 (N,), both on the model's device; dtype: autocast's; callback, state: see
    defenses/__init__.py, over the epochs of unlearning and then of relearning. Returns a Repaired whose findings are
    the suspicious rows (if there is none, relearning is plain fine-tuning), the robust z-score of each row, and whether
    unlearning reached stop_accuracy. Raises ValueError if unlearning gives NaN or infinite weights.
    """
    state = {} if state is None else state
    how = images, labels, config, torch.Generator().manual_seed(seed), dtype

    def callback_of(name, found):
        """Return the callback of one of the two trainings; found: further entries of the state."""
        if callback is None:
            return None
        return lambda now, state_of: callback(now, lambda: {**found, name: state_of()})

    found = {k: state[k] for k in ("rows", "z", "before") if k in state}
    if not found:
        net, before = unlearn(model, *how, callback_of("unlearn", {}), state.get("unlearn"))
        change = (linear_layer(net).weight - linear_layer(model).weight).detach().abs().sum(1)
        rows, z = suspicious_rows(change, config)
        found = {"rows": rows, "z": z, "before": before}
    rows, z, before = found.values()
    net, after = relearn(model, rows, *how, callback_of("relearn", found), state.get("relearn"))
    unlearned = before["unlearn_accuracy"][-1] <= config.stop_accuracy
    if rows:
        outcome = f"suspicious: rows {', '.join(map(str, rows))}"
    elif any(z):
        outcome = f"no row is suspicious (largest z {max(z):.2f}); relearning was fine-tuning"
    else:
        outcome = "no row is suspicious (MAD 0); relearning was fine-tuning"
    if not unlearned:
        outcome += f"; unlearning did not reach {config.stop_accuracy:.0%} accuracy"
    findings = {"outcome": outcome}
    findings |= {"suspicious_rows": rows, "z": z, "unlearned": unlearned}
    return Repaired(net.eval(), before | after, findings)
