"""DBD: Backdoor Defense via Decoupling the Training Process (Huang et al., ICLR 2022).

A training method for a set that may be poisoned. A backdoor is learned from the labels of triggered images. So stage 1
learns features without labels (SimCLR), stage 2 a linear layer on them, and stage 3 trains the whole network with the
labels of the samples of low loss alone; the others are used as unlabeled images (MixMatch).

Each stage is an object that trains one epoch at a time. Its state is a dictionary of tensors and plain values, from
which an interrupted run resumes and gives the same bits. `fast`: the compiled network, used for training batches of
full size. `before`: the previous stage.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data

from . import mixmatch, simclr
from .common import forward


@dataclass(frozen=True)
class Config:
    """The constants of DBD."""

    flip: bool = True  # whether augmentation mirrors the images
    # stage 1: SimCLR on the images without labels
    simclr_epochs: int = 100  # of the schedule; the published stage 2 starts from the checkpoint of epoch 100
    simclr_schedule: int = 1000  # epochs of the cosine schedule of the learning rate
    simclr_batch: int = 512
    simclr_temperature: float = 0.5
    simclr_lr: float = 0.4
    simclr_momentum: float = 0.9
    simclr_weight_decay: float = 1e-4
    views: simclr.Views = simclr.Views()
    # stage 2: a linear layer on the features
    linear_epochs: int = 10
    linear_batch: int = 128
    linear_lr: float = 2e-3  # of Adam, constant
    ce_weight: float = 0.1  # of symmetric cross-entropy
    rce_weight: float = 1.0
    rce_floor: float = 1e-4  # lower clamp of the one-hot target
    rce_probability_floor: float = 1e-7  # lower clamp of the predicted probability
    # stage 3: MixMatch
    trusted_share: float = 0.5  # of the samples, those of the lowest loss
    mixmatch_epochs: int = 190
    mixmatch_steps: int = 1024  # per epoch
    mixmatch_batch: int = 64  # of labeled and of unlabeled images each
    mixmatch_temperature: float = 0.5
    mixmatch_alpha: float = 0.75  # of the Beta distribution of the mixing weights
    mixmatch_weight: float = 15.0  # lambda_u, weight of the unlabeled loss after a linear ramp
    mixmatch_lr: float = 2e-3  # of the same Adam, constant


def initialize(network):
    """Initialize the weights of all convolutions in place as in DBD's ResNet, from torch's global generator.

    They are Kaiming normal: mean 0, variance 2 / fan_out, fan_out being output channels * kernel area.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def symmetric_cross_entropy(logits, labels, config, reduction="mean"):
    """Return 0.1 CE + 1 RCE (Wang et al., ICCV 2019); logits (N, classes) float, labels int64 (N,).

    RCE = -sum over classes of max(p, 1e-7) log(max(one-hot, 1e-4)).
    reduction: "mean", or "none" for one value per sample.
    """
    ce = F.cross_entropy(logits, labels, reduction="none")
    one_hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype).clamp_min(config.rce_floor)
    rce = -(logits.softmax(1).clamp_min(config.rce_probability_floor) * one_hot.log()).sum(1)
    loss = config.ce_weight * ce + config.rce_weight * rce
    return loss.mean() if reduction == "mean" else loss


def _generator(seed, stage, epoch):
    return torch.Generator().manual_seed((seed * 10 + stage) * 100_003 + epoch)


class Contrast:
    """Stage 1: SimCLR trains the network without its linear layer, and a projection head."""

    number = 1

    def __init__(self, network, config, seed, fast=None, _before=None):
        self.network, self.config, self.seed = network, config, seed
        self.views = config.views if config.flip else replace(config.views, flip_p=0.0)
        self.fast = network if fast is None else fast
        self.linear, network.linear = network.linear, nn.Identity()
        self.head = simclr.Projection(self.linear.in_features, config.views.projection).to(self.linear.weight.device)
        self.epochs = config.simclr_epochs
        self.optimizer = torch.optim.SGD(
            [*network.parameters(), *self.head.parameters()],
            lr=config.simclr_lr,
            momentum=config.simclr_momentum,
            weight_decay=config.simclr_weight_decay,
        )

    def train_epoch(self, images, _labels, epoch, dtype, progress):
        """Train one epoch; return {"loss", "found"}: found is the share of anchors nearest to their second view."""
        c, g = self.config, _generator(self.seed, self.number, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = c.simclr_lr * 0.5 * (1 + math.cos(math.pi * min(epoch / c.simclr_schedule, 1)))
        self.network.train()
        self.head.train()
        batches = [b for b in torch.randperm(len(images), generator=g).split(c.simclr_batch) if len(b) > 1]
        total, anchors = torch.zeros(2, device=images.device), 0
        for index in batches:
            x = data.to_float(images[index.to(images.device)])
            both = torch.cat([simclr.view(x, g, self.views) for _ in range(2)])
            net = self.fast if len(both) == 2 * c.simclr_batch else self.network
            a, b = self.head(forward(net, both, dtype)).chunk(2)
            loss, found = simclr.nt_xent(a, b, c.simclr_temperature)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total += torch.stack((loss.detach() * len(found), found.sum()))
            anchors += len(found)
            progress(len(index))
        loss, found = (total / anchors).tolist()
        return {"loss": loss, "found": found}

    def finish(self):
        """Put the linear layer back into the network."""
        self.network.linear = self.linear

    def state_dict(self):
        """Return the stage's whole state."""
        parts = {"network": self.network, "head": self.head, "optimizer": self.optimizer}
        return {k: v.state_dict() for k, v in parts.items()} | {"linear": self.linear.state_dict()}

    def load_state_dict(self, state):
        """Take back what state_dict() returned."""
        for part in ("network", "head", "optimizer", "linear"):
            getattr(self, part).load_state_dict(state[part])


class Linear:
    """Stage 2: symmetric cross-entropy trains the linear layer on the frozen features.

    Batch norm is in train mode, so its running statistics follow the batches.
    """

    number = 2

    def __init__(self, network, config, seed, _fast=None, _before=None):
        self.network, self.config, self.seed = network, config, seed
        self.epochs = config.linear_epochs
        # over the whole network, because stage 3 uses the same Adam; it skips parameters without a gradient
        self.optimizer = torch.optim.Adam(network.parameters(), lr=config.linear_lr)

    def train_epoch(self, images, labels, epoch, dtype, progress):
        """Train one epoch; return {"loss", "accuracy"} on the given labels, poisoned ones included."""
        g = _generator(self.seed, self.number, epoch)
        self.network.train()
        linear, self.network.linear = self.network.linear, nn.Identity()
        total = torch.zeros(2, device=images.device)
        try:
            for index in torch.randperm(len(images), generator=g).split(self.config.linear_batch):
                index = index.to(images.device)
                with torch.no_grad():
                    features = forward(self.network, augmented(images[index], g, self.config.flip), dtype)
                logits = linear(features)
                loss = symmetric_cross_entropy(logits, labels[index], self.config)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                total += torch.stack((loss.detach() * len(index), (logits.argmax(1) == labels[index]).sum()))
                progress(len(index))
        finally:
            self.network.linear = linear
        loss, accuracy = (total / len(images)).tolist()
        return {"loss": loss, "accuracy": accuracy}

    def finish(self):
        """Nothing is left to do."""

    def state_dict(self):
        """Return the stage's whole state."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        """Take back what state_dict() returned."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


class Semi(Linear):
    """Stage 3: MixMatch trains the whole network, with the labels of the trusted samples alone.

    It continues with the Adam of stage 2, which has moments for the linear layer alone.
    """

    number = 3

    def __init__(self, network, config, seed, fast=None, before=None):
        super().__init__(network, config, seed)
        self.fast = network if fast is None else fast
        self.epochs = config.mixmatch_epochs
        if before is not None:
            self.optimizer = before.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = config.mixmatch_lr

    def train_epoch(self, images, labels, epoch, dtype, progress):
        """Rank the samples, train one epoch; return {"loss", "trusted"}: the trusted samples' indices, on the CPU."""
        c, g = self.config, _generator(self.seed, self.number, epoch)
        losses = sample_losses(self.network, images, labels, c, dtype, g)
        trusted, others = split_by_loss(losses, c.trusted_share)
        self.network.train()
        classes = self.network.linear.out_features
        total = torch.zeros((), device=images.device)
        for step in range(c.mixmatch_steps):
            known, unknown = (
                pool[torch.randint(len(pool), (c.mixmatch_batch,), generator=g).to(pool.device)]
                for pool in (trusted, others)
            )
            x = augmented(images[known], g, c.flip)
            first, second = (augmented(images[unknown], g, c.flip) for _ in range(2))
            with torch.no_grad():
                guessed = [forward(self.network, u, dtype) for u in (first, second)]
                guessed = mixmatch.guess(guessed, c.mixmatch_temperature)
            inputs = torch.cat((x, first, second))
            targets = torch.cat((F.one_hot(labels[known], classes).float(), guessed, guessed))
            weight = mixmatch.draw_weight(c.mixmatch_alpha, g)
            order = torch.randperm(len(inputs), generator=g).to(images.device)
            inputs, targets = mixmatch.mix(inputs, targets, weight, order)
            logits = forward(self.fast, inputs, dtype)
            loss = mixmatch.mixmatch_loss(logits, targets, len(known), unlabeled_weight(c, epoch, step))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
            progress(len(inputs))
        return {"loss": total.item() / c.mixmatch_steps, "trusted": trusted.cpu()}


def unlabeled_weight(config, epoch, step):
    """Return lambda_u = 15 min(1, e / 190) of a step of stage 3; epoch and step are counted from 0.

    e is the time in epochs since the start of stage 2, fractions included: 10 at the start of stage 3.
    """
    e = config.linear_epochs + epoch + step / config.mixmatch_steps
    return config.mixmatch_weight * min(1.0, e / config.mixmatch_epochs)


def augmented(images, generator, flip=True):
    """Return uint8 images (N, 3, H, W) as floats in [0, 1] after random crop with reflection padding, and flip."""
    return data.augment(data.to_float(images), generator, mode="reflect", flip=flip)


@torch.no_grad()
def sample_losses(network, images, labels, config, dtype, generator, batch_size=512):
    """Return the symmetric cross-entropy of one augmented view of each sample in eval mode, float (N,).

    images: uint8 (N, 3, H, W); labels: int64 (N,); generator: on the CPU, draws the views.
    """
    network.eval()
    losses = [
        symmetric_cross_entropy(forward(network, augmented(x, generator, config.flip), dtype), y, config, "none")
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    ]
    return torch.cat(losses)


def split_by_loss(losses, share):
    """Return (indices of the `share` of samples with the lowest loss, indices of the rest), on the losses' device."""
    order = losses.argsort(stable=True)
    n = int(len(losses) * share)
    return order[:n], order[n:]


STAGES = (Contrast, Linear, Semi)


def train(network, images, labels, config=Config(), seed=0, dtype=torch.float32, fast=None, callback=None, state=None):
    """Train `network`, in place, on a training set that may be poisoned.

    images: uint8 (N, 3, H, W); labels: int64 (N,), both on its device; fast: the compiled network, for batches of full
    size, or None; callback: called after each epoch with (stage, epoch, figures, function that returns the state).
    Called with that as `state` and otherwise the same arguments, it resumes and gives the same bits.
    """
    state, stage = state or {"stage": 0, "epoch": 0, "state": None}, None
    for i, stage_of in enumerate(STAGES):
        stage = stage_of(network, config, seed, fast, stage)
        first = stage.epochs if i < state["stage"] else 0
        if i == state["stage"] and state["state"] is not None:
            stage.load_state_dict(state["state"])
            first = state["epoch"]
        for epoch in range(first, stage.epochs):
            with tqdm(desc=f"stage {stage.number}, epoch {epoch + 1}", unit="img", leave=False) as bar:
                now = stage.train_epoch(images, labels, epoch, dtype, bar.update)
            if callback is not None:

                def state_of(i=i, epoch=epoch, stage=stage):
                    return {"stage": i, "epoch": epoch + 1, "state": stage.state_dict()}

                callback(stage, epoch, now, state_of)
        stage.finish()
