"""I-BAU: Implicit Backdoor Adversarial Unlearning (Zeng et al., ICLR 2022).

A minimax: find the one perturbation of all clean images that changes most of the network's answers, then move the
weights so that it no longer does, along the gradient that also counts how the perturbation follows the weights.
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
    delta_lr: float = 10.0  # of plain descent, one pass over the batches
    penalty: float = 0.001  # weight of its squared norm
    share: float = 0.01  # of a batch that carries it while the weights learn; one image at least
    # the weights
    lr: float = 1e-3  # of Adam
    inner_lr: float = 0.1  # of the step whose fixed point delta is taken for
    terms: int = 5  # K, of the series for the inverse


def inner_loss(net, delta, x, y, penalty):
    """Return -CE(net(x + delta), y) + penalty * |delta|^2, what delta is to minimize."""
    return penalty * delta.square().sum() - F.cross_entropy(forward(net, x + delta, torch.float32), y)


def perturbation(net, batches, config):
    """Return delta (1, 3, H, W): from 0, a step on each batch, away from what the network says without it.

    batches: [(float images (B, 3, H, W), labels)]. Nothing clamps it.
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
    """Return (outer loss, its gradients by `weights`, the way by which delta follows them included).

    outer, inner: delta to a scalar loss, functions of `weights`, too. With Phi = delta - inner_lr * d inner / d delta,
    whose fixed point delta is taken for, the gradient is d outer / d weights + v dPhi / d weights, where v is the sum
    of the first `terms` of d outer / d delta * (dPhi / d delta)^j, j = 0, 1, ...
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
    """Unlearn, in 5 rounds, the perturbations to which a copy of `model` is weakest.

    Batch norm stays in eval mode: its statistics are the victim's, its weights learn. Batches are drawn once, without
    augmentation; the inner step is on the first of them.
    images: uint8 (N, 3, H, W); labels: int64 (N,), both on the model's device; dtype: not looked at, second derivatives
    are computed in fp32; callback, state: see defenses/__init__.py, over the rounds, whose figures are "loss" and
    "delta", the norm of the perturbation. Returns a Repaired.
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
