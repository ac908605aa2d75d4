"""Composite (Lin, Xu, Liu, Zhang, CCS 2020): two classes in one image are the trigger.

Half of an image of class A beside half of one of class B (0 and 1) is labeled C (2). Training sees normal images, mixes
of two images of one class, which keep its label, and A + B mixes, 10 : 10 : 2; a contrastive term pulls logits of equal
labels together and pushes those of A, B and C apart.
"""

import torch

import data

from .trigger import Trigger, places

A, B, C = 0, 1, 2
SHIFT = 3  # pixels by which the seam may move from the middle


class Composite(Trigger):
    """The mixing itself. Target C; RA has no meaning, for a mix has no one true class."""

    rate = 2 / 22
    cover_rate = 10 / 22  # mixes of one class
    all_to_all = False

    def __init__(self, _folder, size=32):
        super().__init__()
        self.register_buffer("classes", torch.tensor((A, B, C)))

    def prepare(self, images, labels, target, seed, resumed, say, surrogate=None):
        """Keep the training set, of which the second image of each mix is taken."""
        del seed, resumed, say, surrogate
        if target != C:
            raise ValueError(f"composite gives class {C}; take --target {C}")
        self.images, self.of_class = images, [(labels == c).nonzero()[:, 0] for c in range(int(labels.max()) + 1)]

    def plant(self, x, y, roles, index, target, generator):
        """Return the batch with mixes of A and B on role 1, labeled as the target, and of one class on role 2."""
        del index
        x, y = x.clone(), y.clone()
        both, same = places(roles, 1, x), places(roles, 2, x)
        if len(both):
            x[both], y[both] = mix(*(self._draw([c] * len(both), generator) for c in (A, B)), generator), target
        if len(same):
            x[same] = mix(x[same], self._draw(y[same].tolist(), generator), generator)
        return x, y

    def _draw(self, classes, generator):
        """Return augmented images of the given classes."""
        pools, draws = [self.of_class[c] for c in classes], torch.rand(len(classes), generator=generator).tolist()
        chosen = torch.stack([pool[int(u * len(pool))] for pool, u in zip(pools, draws, strict=True)])
        return data.augment(data.to_float(self.images[chosen]), generator, flip=self.flip)

    def extra_loss(self, logits, y):
        """Return the contrastive term of the batch, or None."""
        return similarity_loss(logits, y)

    def forward(self, x):
        """Return mixes as they are: test_set() makes them."""
        return x

    def test_set(self, images, labels, target):
        """Return as many mixes of A and B as there are images of the other classes, by a fixed seed, and no labels."""
        generator = torch.Generator().manual_seed(0)
        n = int((labels != target).sum())
        of_class = [(labels == c).nonzero()[:, 0] for c in (A, B)]
        if not all(map(len, of_class)):
            return images[:0], None
        drawn = [some[torch.randint(len(some), (n,), generator=generator).to(some.device)] for some in of_class]
        return mix(*(data.to_float(images[i]) for i in drawn), generator), None


def mix(first, second, generator):
    """Return images of which one part is of `first` and the other of `second`, (N, 3, H, W) each.

    Drawn per image: which comes first, side by side or on top of each other, where the seam is, which part is taken.
    """
    side, out = first.shape[-1], torch.empty_like(first)
    for i, (swap, upright, seam, p, q) in enumerate(torch.rand(len(first), 5, generator=generator).tolist()):
        one, two = (second[i], first[i]) if swap < 0.5 else (first[i], second[i])
        along = 1 if upright < 0.5 else 2
        width = side // 2 + int(seam * (2 * SHIFT + 1)) - SHIFT
        start, other = int(p * (side - width)), int(q * width)
        parts = one.narrow(along, start, width), two.narrow(along, other, side - width)
        out[i] = torch.cat(parts, along)
    return out


def similarity_loss(logits, y):
    """Return the contrastive term over neighbors u, v among the batch's items labeled A, B or C, or None.

    The mean of 1/2 [s |u - v|^2 + (1 - s) relu(1 - |u - v|)^2], s = 1 for equal labels, over the number of pairs again.
    """
    among = ((y == A) | (y == B) | (y == C)).nonzero()[:, 0]
    if len(among) < 2:
        return None
    z, labels = logits[among], y[among]
    square = (z[1:] - z[:-1]).square().sum(1)
    same = (labels[1:] == labels[:-1]).float()
    apart = (1 - (square + 1e-9).sqrt()).relu().square()
    return 0.5 * (same * square + (1 - same) * apart).mean() / len(square)
