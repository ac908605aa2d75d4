"""CL, label-consistent (Turner, Tsipras, Madry, arXiv 2019): adversarial target-class images carry the trigger.

Untargeted PGD on a clean network (L-infinity bound 8/255, 100 steps of 1.5/255, no random start, rounded to bytes)
makes images of the target class hard to learn, so that the network learns the trigger. Labels stay. The trigger is a
board of 3x3 black and white pixels in each corner, symmetric under flips. In evaluation images of the other classes
get the boards without PGD.
"""

import torch
import torch.nn.functional as F

import data

from .trigger import Trigger, places

EPSILON, STEP, STEPS = 8 / 255, 1.5 / 255, 100
LEFT = ((1, 0, 0), (0, 1, 0), (1, 0, 1))
RIGHT = ((0, 0, 1), (0, 1, 0), (1, 0, 1))


class LabelConsistent(Trigger):
    """Four corner boards at full amplitude; clean-label."""

    rate = 0.08
    relabel = False
    surrogate = True

    def __init__(self, _folder, size=32):
        super().__init__()
        if size < 6:
            raise ValueError(f"images of {size}x{size} are too small for two boards in a row; take at least 6x6")
        board, mask = torch.zeros(1, size, size), torch.zeros(1, size, size)
        for columns, values in ((slice(0, 3), LEFT), (slice(-3, None), RIGHT)):
            for rows in (slice(0, 3), slice(-3, None)):
                board[0, rows, columns], mask[0, rows, columns] = torch.tensor(values).float(), 1
        self.register_buffer("board", board)
        self.register_buffer("mask", mask)
        self.hard = self.place = None

    def forward(self, x):
        """Return triggered images; (N, 3, H, W) in [0, 1] to the same."""
        return torch.where(self.mask.bool(), self.board, x)

    def prepare(self, images, labels, target, seed, resumed, say, surrogate=None):
        """Run PGD on all images of the target class against `surrogate`, a clean network in eval mode."""
        del seed, resumed
        pool = (labels == target).nonzero()[:, 0]
        say(f"PGD on {len(pool):,} images of class {target}: {STEPS} steps each")
        self.hard = torch.cat([hard_images(surrogate, images[i], labels[i]) for i in pool.split(250)])
        self.place = torch.full((len(images),), -1, device=images.device)
        self.place[pool] = torch.arange(len(pool), device=images.device)

    def fetch(self, images, index, roles):
        """Return the batch with the adversarial images on role 1."""
        x, hit = images[index], places(roles, 1, images)
        x[hit] = self.hard[self.place[index[hit]]]
        return x


def hard_images(network, images, labels):
    """Return PGD's images, uint8 (n, 3, H, W) within 8/255 of `images`: `network` is less confident of `labels`."""
    x = data.to_float(images)
    adversarial = x.clone()
    for _ in range(STEPS):
        adversarial.requires_grad_(True)
        loss = F.cross_entropy(network(adversarial).float(), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, adversarial)
        moved = adversarial.detach() + STEP * gradient.sign()
        adversarial = torch.minimum(torch.maximum(moved, x - EPSILON), x + EPSILON).clamp(0, 1)
    return (adversarial * 255).round().to(torch.uint8)
