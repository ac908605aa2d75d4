"""BCU: Backdoor Cleansing with Unlabeled Data (Pang et al., CVPR 2023).

The victim is distilled on clean images into a copy of itself, a random part of whose weights is re-initialized. Clean
images do not activate the backdoor, so it is not passed on. BCU needs no labels.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fast import training_copy

from .common import Repaired, Training, forward, train_epoch


@dataclass(frozen=True)
class Config:
    """The constants of BCU."""

    uses_labels: ClassVar[bool] = False
    data_rate: float = 0.05  # share of the training set that is clean data
    flip: bool = True  # whether augmentation mirrors the images
    # share of a layer's entries that are re-initialized, by the prefix of the layer's path
    p: tuple[tuple[str, float], ...] = (
        ("conv1", 0.01),
        ("layer1.", 0.01),
        ("layer2.", 0.03),
        ("layer3.", 0.09),
        ("layer4.", 0.27),
        ("linear", 0.10),
    )
    lr: float = 0.01  # cosine schedule
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 100
    batch_size: int = 256
    temperature_low: float = 1.0
    temperature_rise: float = 3.0  # over all epochs; the published 0.03 per epoch for 100 epochs


def redraw_layer(layer):
    """Re-initialize a layer in place, from torch's global generator.

    A convolution's weight is Kaiming normal: mean 0, variance 2 / fan_out, fan_out being output channels * kernel area.
    A linear layer's weight and bias, and a convolution's bias, are uniform in +-1 / sqrt(fan_in).
    """
    layer.reset_parameters()
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


@torch.no_grad()
def partly_fresh(model, p, seed):
    """Return a copy of `model` with a random part of its convolution and linear weights re-initialized.

    p: ((prefix of a layer's path, share of its weight and bias entries), ...). Each entry is replaced independently by
    that of a fresh layer, see redraw_layer(); batch norm is copied. The state of torch's global generator is restored.
    Raises ValueError for a layer that matches no prefix.
    """
    device = next(model.parameters()).device
    # on the CPU and in one memory layout, so that every device gets the same draws
    student = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed + 1)  # the CPU's alone
        for name, layer in student.named_modules():
            if not isinstance(layer, (nn.Conv2d, nn.Linear)):
                continue
            share = next((value for start, value in p if name.startswith(start)), None)
            if share is None:
                raise ValueError(f"BCU has a share for the layers of a ResNet here, and none for {name}")
            old = {k: v.clone() for k, v in layer.named_parameters()}
            redraw_layer(layer)
            for k, fresh in layer.named_parameters():
                replaced = torch.rand(fresh.shape, generator=generator) < share
                fresh.copy_(torch.where(replaced, fresh, old[k]))
    return student.to(device)


def temperature_of(epoch, config):
    """Return T of an epoch, counted from 0; for 100 epochs 1.03, 1.06, ..., 4.00. The last epoch always has 4."""
    return config.temperature_low + config.temperature_rise * (epoch + 1) / config.epochs


def distillation_loss(student, teacher, temperature):
    """Return KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch, without a factor T^2.

    student, teacher: logits (B, classes); temperature: T.
    """
    s, t = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return F.kl_div(s, t, log_target=True, reduction="batchmean")


def repair(model, images, labels=None, config=Config(), seed=0, dtype=torch.float32, callback=None, state=None):
    """Distill the victim into a partly re-initialized copy of itself.

    images: uint8 (N, 3, H, W) on the model's device; labels: ignored; dtype: autocast's; callback, state: see
    defenses/__init__.py; an epoch's figures are "loss" and "agreement", the share of images that student and teacher
    classify alike. Returns a Repaired. Raises ValueError for a network other than the ResNets here.
    """
    del labels
    student = training_copy(partly_fresh(model, config.p, seed), dtype).train()
    teacher = training_copy(model, dtype).requires_grad_(False).eval()
    optimizer = torch.optim.SGD(
        student.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    training = Training(student, optimizer, torch.Generator().manual_seed(seed), rate, state)
    for epoch in range(training.done, config.epochs):
        temperature = temperature_of(epoch, config)

        def loss_of(x, _index, temperature=temperature):
            logits = forward(student, x, dtype)
            with torch.no_grad():
                wanted = forward(teacher, x, dtype)
            return distillation_loss(logits, wanted, temperature), logits.argmax(1) == wanted.argmax(1)

        loss, agreement = train_epoch(images, config, optimizer, training.generator, loss_of)
        training.end_epoch(callback, loss=loss, agreement=agreement)
    return Repaired(student.eval(), training.history)
