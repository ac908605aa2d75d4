"""Fine-tuning on the clean images: the plain baseline."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .common import Repaired, Training, copy_of, forward, train_epoch


@dataclass(frozen=True)
class Config:
    """The constants of the baseline."""

    uses_labels: ClassVar[bool] = True
    data_rate: float = 0.05  # share of the training set that is clean data
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 20
    batch_size: int = 128


def repair(
    model, images, labels, config=Config(), seed=0, on_epoch=None, dtype=torch.float32, keep=None, state=None,  # noqa: B008
):  # fmt: skip
    """Fine-tune a copy of `model` on clean images.

    images: uint8 (N, 3, H, W); labels: int64 (N,), both on the model's device; on_epoch: called after each epoch with
    (epoch, {"loss", "accuracy"}); dtype: what autocast computes in; keep, state: see defenses/__init__.py.
    Returns a Repaired.
    """
    net = copy_of(model, dtype).train()
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    training = Training(net, optimizer, torch.Generator().manual_seed(seed), state=state)

    def loss_of(x, index):
        logits = forward(net, x, dtype)
        return F.cross_entropy(logits, labels[index]), logits.argmax(1) == labels[index]

    for _ in range(training.done, config.epochs):
        loss, accuracy = train_epoch(images, config.batch_size, optimizer, training.generator, loss_of)
        training.end_epoch(on_epoch, keep, loss=loss, accuracy=accuracy)
    return Repaired(net.eval(), training.history)
