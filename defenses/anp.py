"""ANP: adversarial neuron pruning (Wu and Wang, NeurIPS 2021).

Backdoor neurons are the most sensitive to adversarial perturbations of the weights. One mask per channel of batch norm
is learned under such perturbations on clean images; channels whose mask ends near 0 are pruned.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

import data
from fast import training_copy

from .common import Repaired, Training
from .pruning import Channels, Masks, forward_with, held_out


@dataclass(frozen=True)
class Config:
    """The constants of ANP."""

    uses_labels: ClassVar[bool] = True
    data_rate: float = 0.05  # share of the training set that is clean data
    lr: float = 0.2  # of the masks
    momentum: float = 0.9
    epsilon: float = 0.4  # bound of the initial noise, and size of the ascent step from it
    alpha: float = 0.2  # weight of the unperturbed loss; the perturbed one has 1 - alpha
    epochs: int = 5  # 20 are published; the perturbed loss has converged by then
    epoch_steps: int = 100  # batches per epoch, drawn with replacement
    batch_size: int = 128
    flip: bool = True  # whether augmentation mirrors the images
    # pruning: the largest threshold that keeps the accuracy on the held-out images
    thresholds: tuple[float, ...] = tuple(k / 20 for k in range(19))  # 0, 0.05, ..., 0.9
    valid_share: float = 0.2  # of the clean images, held out
    max_drop: float = 0.10  # relative loss of the victim's accuracy on them


def loss_under(noise, masks, net, channels, x, y):
    """Return the cross-entropy of the network with scales (mask + delta) gamma and shifts (1 + xi) beta.

    noise: (2, n), delta and xi; masks: (n,); channels: of `net`, a Channels; x: float (B, 3, H, W); y: int64 (B,).
    """
    parameters = channels.parameters((masks + noise[0]) * channels.gamma, (1 + noise[1]) * channels.beta)
    return F.cross_entropy(forward_with(net, parameters, x, torch.float32), y)


def adversarial_noise(loss_of, n, epsilon, generator, device):
    """Return the noise (2, n), delta on the scales and xi on the shifts: uniform in +-epsilon, then one ascent step.

    loss_of: noise to the loss to maximize. The step is epsilon times the sign of the gradient. There is no projection,
    so an entry may reach 2 epsilon.
    """
    noise = (torch.rand(2, n, generator=generator) * 2 - 1).mul(epsilon).to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(noise), noise)
    return noise.detach() + epsilon * gradient.sign()


def repair(model, images, labels, config=Config(), seed=0, dtype=torch.float32, callback=None, state=None):
    """Learn a mask per channel of batch norm, and set gamma = 0 in a copy of `model` where the mask ends low.

    images: uint8 (N, 3, H, W); labels: int64 (N,), both on the model's device; a fifth of them is held out to choose
    the threshold, which BackdoorBench chooses on test images. dtype: autocast's on the held-out images; masks are
    learned in float32, because the perturbations are small. callback, state: see defenses/__init__.py; an epoch's
    figures are "loss" and "perturbed", the loss under noise. Returns a Repaired whose findings are the threshold and
    the held-out accuracies. Raises ValueError for a network without batch norm, and for too few images.
    """
    learn, valid = held_out(labels, config.valid_share)
    net = training_copy(model, torch.float32).requires_grad_(False).train()
    channels = Channels(net)
    masks, device, n = Masks(channels), images.device, len(channels.gamma)
    x_learn, y_learn = images[learn], labels[learn]
    optimizer, generator = masks.optimizer(config.lr, config.momentum), torch.Generator().manual_seed(seed)
    training = Training(masks, optimizer, generator, state=state)

    def step(x, y):
        """Take one SGD step on alpha * loss + (1 - alpha) * loss under noise; return both losses, detached (2,)."""
        fixed, no_noise = masks.values.detach(), torch.zeros(2, n, device=device)
        noise = adversarial_noise(
            lambda noise: loss_under(noise, fixed, net, channels, x, y), n, config.epsilon, generator, device
        )
        losses = torch.stack([loss_under(e, masks.values, net, channels, x, y) for e in (no_noise, noise)])
        optimizer.zero_grad()
        (config.alpha * losses[0] + (1 - config.alpha) * losses[1]).backward()
        optimizer.step()
        return losses.detach()

    for _ in range(training.done, config.epochs):
        total = torch.zeros(2, device=device)
        for _ in range(config.epoch_steps):
            index = torch.randint(len(learn), (config.batch_size,), generator=generator).to(device)
            total += step(data.augment(data.to_float(x_learn[index]), generator, flip=config.flip), y_learn[index])
        loss, perturbed = (total / config.epoch_steps).tolist()
        training.end_epoch(callback, loss=loss, perturbed=perturbed)
    how = config.thresholds, config.max_drop, images[valid], labels[valid], dtype
    net, findings = channels.most_aggressive(model, masks.values.detach(), *how)
    return Repaired(net, training.history, findings)
