"""MixMatch (Berthelot et al., NeurIPS 2019): sharpened guessed labels, and mixup over labeled and unlabeled images."""

import torch
import torch.nn.functional as F


def sharpen(p, temperature):
    """Return p ** (1 / T), scaled to sum 1; p: (N, classes), rows of sum 1."""
    sharp = p ** (1 / temperature)
    return sharp / sharp.sum(1, keepdim=True)


def guess(logits, temperature):
    """Return the sharpened mean prediction of several augmentations of the same images.

    logits: list of (N, classes). Returns (N, classes).
    """
    return sharpen(torch.stack([t.softmax(1) for t in logits]).mean(0), temperature)


def mix(x, targets, weight, order):
    """Return (weight x + (1 - weight) x[order], the same for the targets); weight in [0.5, 1]."""
    return weight * x + (1 - weight) * x[order], weight * targets + (1 - weight) * targets[order]


def draw_weight(alpha, generator):
    """Return max(w, 1 - w) as a float, with w drawn from Beta(alpha, alpha)."""
    # by two gammas, because torch's Beta takes no generator
    a, b = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=generator).tolist()
    w = a / (a + b)
    return max(w, 1 - w)


def mixmatch_loss(logits, targets, n_labeled, weight_unlabeled):
    """Return cross-entropy over the first n_labeled rows + weight * mean squared error over the others.

    logits, targets: (N, classes); the targets' rows sum to 1.
    """
    labeled = -(targets[:n_labeled] * F.log_softmax(logits[:n_labeled], 1)).sum(1).mean()
    unlabeled = (logits[n_labeled:].softmax(1) - targets[n_labeled:]).square().mean()
    return labeled + weight_unlabeled * unlabeled
