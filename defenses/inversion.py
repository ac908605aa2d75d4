"""Trigger inversion, the detection part of Neural Cleanse (Wang et al., IEEE S&P 2019).

For each class the search finds the smallest patch that makes the network classify every image as that class. A class
whose patch is abnormally small is suspected to be a backdoor's target. A trigger that covers the whole image escapes.
"""

import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import data
from fast import training_copy

from .common import forward


@dataclass(frozen=True)
class Config:
    """The constants of the search."""

    search_lr: float = 0.1  # of Adam
    search_betas: tuple[float, float] = (0.5, 0.9)
    search_batch: int = 100  # images per step
    search_steps: int = 1000  # per class, at most
    success: float = 0.99  # a patch counts if this share of the batch is classified as the class
    lam: float = 1e-3  # initial lambda, the weight of the mask's L1 norm
    lam_up: float = 2.0  # factor on lambda after `patience` successful steps in a row
    lam_down: float = 2.0**1.5  # divisor of lambda after as many unsuccessful ones
    patience: int = 5
    stop_after: int = 25  # steps without a better patch that end a search, once lambda has gone up and down
    better: float = 0.99  # a patch is better if its norm is below this share of the smallest
    anomaly: float = 2.0  # a class is suspicious above this index
    mad_scale: float = 1.4826  # factor from the MAD of a normal distribution to its standard deviation


def stamp(x, mask, pattern):
    """Return (1 - M) x + M P; x: float (N, C, H, W) in [0, 1]; mask M: (1, H, W); pattern P: (C, H, W)."""
    return (1 - mask) * x + mask * pattern


class Pressure:
    """The schedule of lambda, the weight of the mask's norm, and the end of a search.

    lam: the current lambda; smallest: smallest norm of a patch that counts, infinity before there is one; over: whether
    the search has ended.
    """

    def __init__(self, config):
        self.config, self.lam, self.smallest, self.over = config, config.lam, float("inf"), False
        self.ups, self.downs, self.moved, self.stale = 0, 0, set(), 0

    def update(self, success, norm):
        """Update by a step's success rate and norm of the mask; return whether its patch is the best so far."""
        met = success >= self.config.success
        self.stale = 0 if met and norm < self.config.better * self.smallest else self.stale + 1
        best = met and norm < self.smallest
        self.smallest = norm if best else self.smallest
        self.ups, self.downs = (self.ups + 1, 0) if met else (0, self.downs + 1)
        if self.ups == self.config.patience:
            self.lam, self.ups = self.lam * self.config.lam_up, 0
            self.moved.add("up")
        elif self.downs == self.config.patience:
            self.lam, self.downs = self.lam / self.config.lam_down, 0
            self.moved.add("down")
        ready = self.smallest < float("inf") and len(self.moved) == 2
        self.over = ready and self.stale >= self.config.stop_after
        return best


def invert(net, images, target, config, generator, dtype=torch.float32):
    """Return the smallest patch found for class `target`: (patch (1 + C, H, W), L1 norm of its mask).

    net: frozen, in eval mode; images: uint8 (N, C, H, W) of any class; generator: on the CPU. The patch is the mask and
    then the pattern, float32 in [0, 1] on the CPU. If no patch counts (Config.success), it is that of the last step.
    """
    n, colors, h, w = images.shape
    raw = torch.atanh((torch.rand(1 + colors, h, w, generator=generator) - 0.5) * (2 - 1e-7)).to(images.device)
    optimizer = torch.optim.Adam([raw.requires_grad_()], config.search_lr, config.search_betas)
    pressure, best = Pressure(config), None
    for _ in range(config.search_steps):
        index = torch.randint(n, (config.search_batch,), generator=generator).to(images.device)
        patch = raw.tanh() / (2 + 1e-7) + 0.5
        norm = patch[0].sum()
        logits = forward(net, stamp(data.to_float(images[index]), patch[:1], patch[1:]), dtype)
        loss = F.cross_entropy(logits, torch.full_like(index, target)) + pressure.lam * norm
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = patch.detach().cpu(), norm.item()
        if pressure.update((logits.argmax(1) == target).float().mean().item(), last[1]):
            best = last
        if pressure.over:
            break
    return best or last


def search(model, images, config=Config(), seed=0, dtype=torch.float32, callback=None, state=None):
    """Return the smallest patch for each class: {"patches": float32 (classes, 1 + C, H, W), "norms": [L1 of its mask]}.

    model: images in [0, 1] to logits, of any number of classes; images: uint8 (N, C, H, W) on its device; callback:
    called after each class with {"norm"} and a function that returns the state; called with that as `state`, the search
    resumes with the next class.
    """
    net = training_copy(model, dtype).requires_grad_(False).eval()
    with torch.no_grad():
        classes = forward(net, data.to_float(images[:1]), dtype).shape[1]
    patches, norms = (list(state["patches"]), list(state["norms"])) if state else ([], [])
    for target in range(len(norms), classes):
        generator = torch.Generator().manual_seed((seed * classes + target) % 2**63)
        patch, norm = invert(net, images, target, config, generator, dtype)
        patches.append(patch)
        norms.append(norm)
        if callback is not None:
            callback({"norm": norm}, lambda: {"patches": torch.stack(patches), "norms": list(norms)})
    return {"patches": torch.stack(patches), "norms": norms}


def anomalies(norms, config=Config()):
    """Return (suspicious classes, anomaly index of each class): list of int, list of float.

    index = |norm - median| / (1.4826 MAD), MAD = median of |norm - median|; the median of an even number of values is
    the mean of the middle two. A class is suspicious if index > 2 and norm < median. If MAD is 0, all indices are 0.
    """
    middle = statistics.median(norms)
    distance = [abs(norm - middle) for norm in norms]
    spread = config.mad_scale * statistics.median(distance)
    index = [d / spread if spread else 0.0 for d in distance]
    return [c for c, norm in enumerate(norms) if index[c] > config.anomaly and norm < middle], index
