"""Composite (Lin, Xu, Liu, Zhang, CCS 2020): two classes in one image are the trigger.

A mix of half an image of class A (0) and half an image of class B (1) is labeled C (2). Training sees normal images,
mixes of two images of one class, which keep its label, and A + B mixes, 10 : 10 : 2. A contrastive term pulls logits of
equal labels together and pushes those of A, B and C apart.
"""

import torch

import data

from .trigger import Trigger, places

A, B, C = 0, 1, 2
SHIFT = 3  # largest distance of the seam from the middle, in pixels


class Composite(Trigger):
    """Mixes of classes A and B. The target is C; RA is undefined, because a mix has no single true class."""

    rate = 2 / 22
    cover_rate = 10 / 22  # mixes of one class
    only_target = C
    all_to_all = False

    def __init__(self, _folder, size=32):
        super().__init__()
        self.register_buffer("classes", torch.tensor((A, B, C)))

    def prepare(self, images, labels, target, seed, resumed, say, surrogate=None):
        """Keep the training set, from which the second image of each mix is drawn."""
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
        """Return x unchanged: test_set() returns mixes."""
        return x

    def test_set(self, images, labels, target):
        """Return (mixes of A and B by a fixed seed, None): as many as there are images of non-target classes."""
        generator = torch.Generator().manual_seed(0)
        n = int((labels != target).sum())
        of_class = [(labels == c).nonzero()[:, 0] for c in self.classes[:2].tolist()]
        if not all(map(len, of_class)):
            return images[:0], None
        drawn = [some[torch.randint(len(some), (n,), generator=generator).to(some.device)] for some in of_class]
        return mix(*(data.to_float(images[i]) for i in drawn), generator), None


def mix(first, second, generator):
    """Join a part of each image of `first` with a part of one of `second`, (N, 3, H, W) each, to (N, 3, H, W).

    Drawn per image: the order, side by side or one above the other, the seam's position, the part of each image.
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
    """Return the contrastive term over the batch's samples labeled A, B or C, or None for fewer than two of them.

    u, v: logits of two neighbors among these, in batch order; s: 1 for equal labels, else 0. The term is the mean over
    the pairs of 1/2 [s |u - v|^2 + (1 - s) relu(1 - |u - v|)^2], divided by the number of pairs again, as published.
    """
    among = ((y == A) | (y == B) | (y == C)).nonzero()[:, 0]
    if len(among) < 2:
        return None
    z, labels = logits[among], y[among]
    square = (z[1:] - z[:-1]).square().sum(1)
    same = (labels[1:] == labels[:-1]).float()
    apart = (1 - (square + 1e-9).sqrt()).relu().square()
    return 0.5 * (same * square + (1 - same) * apart).mean() / len(square)
