"""I-BAU: Implicit Backdoor Adversarial Unlearning (Zeng et al., ICLR 2022).

A minimax problem: the inner one finds the universal perturbation that changes most predictions on clean images; the
outer one updates the weights against it by the implicit hypergradient, which counts that the perturbation depends on
the weights.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

import data
from fast import training_copy

from .common import Repaired, Training, forward


@dataclass(frozen=True)
class Config:
    """The constants of I-BAU."""

    uses_labels: ClassVar[bool] = True
    data_rate: float = 0.05  # share of the training set that is clean data; published: 5,000 images
    batch_size: int = 100
    epochs: int = 5  # the paper's rounds
    # the perturbation delta
    delta_lr: float = 10.0  # of plain SGD, one pass over the batches
    penalty: float = 0.001  # weight of its squared norm
    share: float = 0.01  # of a batch that gets delta in the outer loss, at least one image
    # the weights
    lr: float = 1e-3  # of Adam
    inner_lr: float = 0.1  # of the inner step Phi, see hypergradient()
    terms: int = 5  # K, terms of the Neumann series


def inner_loss(net, delta, x, y, penalty):
    """Return the inner loss -CE(net(x + delta), y) + penalty * |delta|^2, which delta minimizes."""
    return penalty * delta.square().sum() - F.cross_entropy(forward(net, x + delta, torch.float32), y)


def perturbation(net, batches, config):
    """Return delta (1, 3, H, W): from 0, one SGD step per batch away from the network's own predictions.

    batches: [(float images (B, 3, H, W), labels)]. delta is not clamped.
    """
    delta = torch.zeros_like(batches[0][0][:1])
    for x, _ in batches:
        delta = delta.requires_grad_()
        with torch.no_grad():
            own = forward(net, x, torch.float32).argmax(1)
        (slope,) = torch.autograd.grad(inner_loss(net, delta, x, own, config.penalty), delta)
        delta = delta.detach() - config.delta_lr * slope
    return delta


def hypergradient(outer, inner, delta, weights, inner_lr, terms):
    """Return (outer loss, its hypergradients by `weights`, which count that delta depends on the weights).

    outer, inner: delta to a scalar loss that also depends on `weights`. Phi = delta - inner_lr * d inner / d delta, and
    delta is taken to be its fixed point. The hypergradient is d outer / d weights + v dPhi / d weights, where v is the
    sum over j < terms of d outer / d delta * (dPhi / d delta)^j.
    """
    delta = delta.detach().requires_grad_()
    loss = outer(delta)
    by_delta, *direct = torch.autograd.grad(loss, [delta, *weights], materialize_grads=True)
    (slope,) = torch.autograd.grad(inner(delta), delta, create_graph=True)
    phi, v = delta - inner_lr * slope, by_delta
    for _ in range(terms - 1):
        (v,) = torch.autograd.grad(phi, delta, v, retain_graph=True)
        v = v + by_delta
    implicit = torch.autograd.grad(phi, weights, v, materialize_grads=True)
    return loss.detach(), [d + i for d, i in zip(direct, implicit, strict=True)]


def repair(model, images, labels, config=Config(), seed=0, dtype=torch.float32, callback=None, state=None):
    """Find and unlearn a universal perturbation of a copy of `model`, in 5 rounds.

    Batch norm is in eval mode: its statistics are fixed, its weights are trained. Batches are drawn once, without
    augmentation; Phi is taken on the first of them.
    images: uint8 (N, 3, H, W); labels: int64 (N,), both on the model's device; dtype: ignored, second derivatives need
    fp32; callback, state: see defenses/__init__.py; an epoch is a round, its figures are "loss" and "delta", the norm
    of the perturbation. Returns a Repaired.
    """
    del dtype
    net = training_copy(model, torch.float32).eval()
    weights = list(net.parameters())
    optimizer = torch.optim.Adam(weights, lr=config.lr)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator).to(images.device).split(config.batch_size)
    batches = [(data.to_float(images[index]), labels[index]) for index in order]
    training = Training(net, optimizer, generator, state=state)

    def inner(delta):
        return inner_loss(net, delta, *batches[0], config.penalty)

    for _ in range(training.done, config.epochs):
        delta, total = perturbation(net, batches, config), 0.0
        for x, y in batches:
            carries = torch.zeros(len(x), 1, 1, 1)
            carries[torch.randperm(len(x), generator=generator)[: max(1, int(config.share * len(x)))]] = 1

            def outer(delta, x=x, y=y, carries=carries.to(x.device)):
                return F.cross_entropy(forward(net, x + carries * delta, torch.float32), y)

            loss, gradients = hypergradient(outer, inner, delta, weights, config.inner_lr, config.terms)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            optimizer.step()
            total += loss.item() * len(x)
        training.end_epoch(callback, loss=total / len(images), delta=delta.norm().item())
    return Repaired(net.eval(), training.history)
