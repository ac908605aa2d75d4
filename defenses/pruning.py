"""What the pruning defenses share: the channels of batch norms, held-out images, the choice of a threshold."""

import copy

import torch
from torch import nn

import data
import fast
import utils


class Channels:
    """All channels of a network's batch norms, concatenated.

    gamma, beta: float32 (n,), the scales and shifts of `model`. Raises ValueError for a network without batch norm.
    """

    def __init__(self, model):
        norms = {k: m for k, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine}
        if not norms:
            raise ValueError("the network has no batch norm with a scale, and this method prunes only its channels")
        self.names, self.sizes = list(norms), [m.num_features for m in norms.values()]
        self.gamma, self.beta = (
            torch.cat([getattr(m, which).detach() for m in norms.values()]) for which in ("weight", "bias")
        )

    def parameters(self, gamma, beta):
        """Return {path: tensor} of all scales and shifts, as forward_with() takes them; gamma, beta: (n,)."""
        scales, shifts = gamma.split(self.sizes), beta.split(self.sizes)
        return {
            f"{name}.{which}": part
            for name, *parts in zip(self.names, scales, shifts, strict=True)
            for which, part in zip(("weight", "bias"), parts, strict=True)
        }

    def pruned(self, model, masks, threshold):
        """Return a copy of `model` with gamma 0 where the mask is at or below the threshold; beta stays."""
        net = copy.deepcopy(model).eval()
        scales = self.parameters(torch.where(masks <= threshold, 0, self.gamma), self.beta)
        net.load_state_dict({**net.state_dict(), **scales})
        return net

    def most_aggressive(self, model, masks, thresholds, max_drop, images, labels, dtype):
        """Prune by the largest threshold that keeps more than 1 - max_drop of the accuracy on held-out images.

        Returns (pruned copy of `model`, findings: the outcome, the threshold, the accuracies before and after). If no
        threshold does, the copy is unpruned and the threshold None.
        """
        net, best = copy.deepcopy(model).eval(), None
        before = after = accuracy(net, images, labels, dtype)
        for threshold in sorted(thresholds, reverse=True):
            candidate = self.pruned(model, masks, threshold)
            now = accuracy(candidate, images, labels, dtype)
            if now > (1 - max_drop) * before:
                net, best, after = candidate, threshold, now
                break
        n = 0 if best is None else int((masks <= best).sum())
        outcome = f"{n} of {len(masks):,} channels pruned" + (f", masks up to {best:g}" if n else "")
        held = {"before": before, "after": after}
        return net, {"outcome": outcome, "threshold": best, "accuracy_held_out": held}


class Masks(nn.Module):
    """A trainable factor per channel, `values` (n,), initially 1."""

    def __init__(self, channels):
        super().__init__()
        self.values = nn.Parameter(torch.ones_like(channels.gamma))

    def optimizer(self, lr, momentum):
        """Return SGD on the masks, which clips them to [0, 1] after each step."""
        optimizer = torch.optim.SGD(self.parameters(), lr=lr, momentum=momentum)
        optimizer.register_step_post_hook(lambda *_: self.values.data.clamp_(0, 1))
        return optimizer


def forward_with(net, parameters, x, dtype):
    """Return the float32 logits of `net` with other parameters, {path: tensor}, and its own buffers."""
    with utils.autocast(x.device, dtype):
        x = x.contiguous(memory_format=fast.training_layout(net))
        return torch.func.functional_call(net, parameters, (x,)).float()


def held_out(labels, share):
    """Return (training indices, held-out indices): the last `share` of each class is held out.

    labels: int64 (N,). Of the images that defend.py passes, a share of 0.2 holds out UNIT's validation images.
    Raises ValueError where either would be empty.
    """
    learn, valid = [], []
    for c in labels.unique():
        index = (labels == c).nonzero()[:, 0]
        n = int((1 - share) * len(index))
        learn.append(index[:n])
        valid.append(index[n:])
    learn, valid = torch.cat(learn), torch.cat(valid)
    if not len(learn) or not len(valid):
        raise ValueError(f"{len(labels)} images are too few to hold some out; raise data_rate")
    return learn, valid


@torch.no_grad()
def accuracy(net, images, labels, dtype, batch_size=250):
    """Return the share of images uint8 (N, 3, H, W) that `net` classifies correctly in eval mode."""
    net.eval()
    right = 0
    with utils.autocast(images.device, dtype):
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            right += (net(data.to_float(x)).argmax(1) == y).sum().item()
    return right / len(images)
