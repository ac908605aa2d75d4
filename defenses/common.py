"""What the defenses share: an epoch of training, a training that can be resumed, and the result."""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

import data
import fast
import utils


@dataclass
class Repaired:
    """The result of a defense.

    model: the repaired network in eval mode; history: {figure: [one value per epoch]}; findings: {name: plain value},
    `outcome` being a sentence for the table.
    """

    model: nn.Module
    history: dict = field(default_factory=dict)
    findings: dict = field(default_factory=dict)


def linear_layer(model):
    """Return the last linear layer. Raises ValueError when there is none."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise ValueError("the network has no linear layer")
    return layers[-1]


def forward(net, x, dtype):
    """Return the float32 logits of `net`, computed under autocast to `dtype` in the memory layout it trains in."""
    with utils.autocast(x.device, dtype):
        return net(x.contiguous(memory_format=fast.training_layout(net))).float()


def train_epoch(images, config, optimizer, generator, loss_of, clip_norm=None):
    """Train for one epoch in place, with random crop and flip.

    images: uint8 (N, 3, H, W); config: has batch_size and flip; generator: on the CPU, draws order and augmentation;
    loss_of: a function of a batch, (float images (B, 3, H, W) in [0, 1], their indices int64 (B,)), that returns (loss
    to minimize, bool (B,) whether each image is classified correctly); clip_norm: largest norm of the gradient, None
    for no limit. Returns (mean loss, accuracy).
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = torch.zeros(2, device=images.device)
    for index in torch.randperm(len(images), generator=generator).split(config.batch_size):
        index = index.to(images.device)
        loss, right = loss_of(data.augment(data.to_float(images[index]), generator, flip=config.flip), index)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        total += torch.stack((loss.detach() * len(index), right.sum()))
    loss, right = (total / len(images)).tolist()
    return loss, right


class Training:
    """A training that can be resumed after any epoch, with the same bits as an uninterrupted one.

    net, optimizer, generator: the objects that an epoch changes; rate: a scheduler of the optimizer, stepped once per
    epoch, or None; state: the state_dict() to resume from, or None.
    """

    def __init__(self, net, optimizer, generator, rate=None, state=None):
        self.parts = {"net": net, "optimizer": optimizer} | ({} if rate is None else {"rate": rate})
        self.generator, self.rate = generator, rate
        self.history = {}
        if state is not None:
            for name, part in self.parts.items():
                part.load_state_dict(copy.deepcopy(state[name]))
            generator.set_state(state["generator"])
            self.history = copy.deepcopy(state["history"])

    @property
    def done(self):
        """Number of epochs done."""
        return len(next(iter(self.history.values()), ()))

    def end_epoch(self, callback, **now):
        """Append the figures of an epoch to the history, then call callback(figures, self.state_dict), if any."""
        if self.rate is not None:
            self.rate.step()
        for name, value in now.items():
            self.history.setdefault(name, []).append(value)
        if callback is not None:
            callback(now, self.state_dict)

    def state_dict(self):
        """Return a copy of all state that later epochs depend on, and the history, as tensors and plain values."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        return copy.deepcopy({**state, "generator": self.generator.get_state(), "history": self.history})
