"""NAD: Neural Attention Distillation (Li et al., ICLR 2021).

Two copies of the victim are fine-tuned, first the teacher, then the student. The student's loss has a term that pulls
the attention maps of its last stages to the teacher's.

The published code keeps the student with the best test figures; here the last epoch is kept.
"""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

import data
import models
from fast import training_copy

from .common import Repaired, Training, forward, train_epoch


@dataclass(frozen=True)
class Config:
    """The constants of NAD."""

    uses_labels: ClassVar[bool] = True
    data_rate: float = 0.05  # share of the training set that is clean data
    beta: tuple[float, ...] = (500.0, 1000.0, 1000.0)  # weights of the last stages' attention terms, in forward order
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    teacher_epochs: int = 10
    epochs: int = 10  # of the student
    batch_size: int = 256
    flip: bool = True  # whether augmentation mirrors the images


def stage_ends(sites, count):
    """Return the activation sites at which the last `count` stages end, in forward order.

    A stage is the part of the network with maps of one size, above 1 x 1. It ends at the last activation of that size
    with the most channels; the narrower first activation of a bottleneck, which has the previous stage's size, does not
    count. sites: {site: shape}, see models.activation_sites(). Raises ValueError where there are fewer stages.
    """
    ends = {}
    for name, (channels, *size) in sites.items():
        if len(size) == 2 and math.prod(size) > 1 and channels >= ends.get(tuple(size), (0,))[0]:
            ends[tuple(size)] = channels, name
    if len(ends) < count:
        raise ValueError(f"NAD needs activations with maps of {count} sizes, this network has {len(ends)}")
    return [name for _, name in ends.values()][-count:]


def attention_map(a):
    """Return the sum over channels of a^2, divided by (its norm over all positions + 1e-6): float32 (N, H, W).

    a: activations (N, C, H, W).
    """
    energy = a.float().square().sum(1)
    return energy / (torch.linalg.vector_norm(energy, dim=(1, 2), keepdim=True) + 1e-6)


def with_maps(net, sites, ends, x, dtype):
    """Return (logits, the attention map of each site in `ends`) of one forward pass; sites: all of the network."""
    maps = {}

    def look(name, a):
        if name in ends:
            maps[name] = attention_map(a)

    with models.watching(sites, len(x), look):
        logits = forward(net, x, dtype)
    return logits, [maps[name] for name in ends]


def repair(model, images, labels, config=Config(), seed=0, dtype=torch.float32, callback=None, state=None):
    """Fine-tune a teacher, then a student, both from the victim.

    Loss of the student: CE + sum over stages of beta * mean squared difference of the two attention maps; the teacher
    is then frozen and in eval mode. images: uint8 (N, 3, H, W); labels: int64 (N,), both on the model's device; dtype:
    autocast's; callback, state: see defenses/__init__.py, over the epochs of the teacher and then of the student; an
    epoch's figures are "teacher_loss" and "teacher_accuracy", then "loss" and "accuracy". Returns a Repaired.
    Raises ValueError for a network with too few stages.
    """
    state, generator = {} if state is None else state, torch.Generator().manual_seed(seed)
    sites = models.activation_sites(copy.deepcopy(model).eval(), data.to_float(images[:2]))
    ends = stage_ends(sites, len(config.beta))

    def tune(name, epochs, loss_of, figures, found):
        """Fine-tune a copy of the victim by loss_of(net, images, labels) to (loss, logits); return (net, history).

        name: of its entry in the state; figures: names of loss and accuracy; found: further entries of the state.
        """
        net = training_copy(model, dtype).train()
        optimizer = torch.optim.SGD(net.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
        training = Training(net, optimizer, generator, state=state.get(name))

        def batch_loss(x, index):
            loss, logits = loss_of(net, x, labels[index])
            return loss, logits.argmax(1) == labels[index]

        def tell(now, state_of):
            callback(now, lambda: {**found, name: state_of()})

        for _ in range(training.done, epochs):
            now = train_epoch(images, config, optimizer, generator, batch_loss)
            training.end_epoch(callback and tell, **dict(zip(figures, now, strict=True)))
        return net, training.history

    def plain_loss(net, x, y):
        logits = forward(net, x, dtype)
        return F.cross_entropy(logits, y), logits

    def guided_loss(net, x, y):
        logits, maps = with_maps(net, sites, ends, x, dtype)
        with torch.no_grad():
            _, wanted = with_maps(teacher, sites, ends, x, dtype)
        distances = [b * F.mse_loss(own, its) for b, own, its in zip(config.beta, maps, wanted, strict=True)]
        return F.cross_entropy(logits, y) + sum(distances), logits

    if "taught" in state:
        teacher, before = training_copy(model, dtype), copy.deepcopy(state["before"])
        teacher.load_state_dict(state["taught"])
    else:
        figures = "teacher_loss", "teacher_accuracy"
        teacher, before = tune("teacher", config.teacher_epochs, plain_loss, figures, {})
    teacher.requires_grad_(False).eval()
    found = {"taught": teacher.state_dict(), "before": before}
    net, after = tune("student", config.epochs, guided_loss, ("loss", "accuracy"), found)
    return Repaired(net.eval(), before | after)
