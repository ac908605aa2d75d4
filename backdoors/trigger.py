"""What every attack is: a trigger, and what its victim's training asks for.

train.py and poison.py know this class alone, no attack by name. A static trigger sets class attributes and defines
forward(); one that is trained along with the victim, or asks more of the training, overrides the hooks.
"""

from torch import nn


class Trigger(nn.Module):
    """Images (N, 3, H, W) in [0, 1] to the same, triggered; its state lies in buffers and parameters.

    rate: share of an epoch's images that is poisoned (role 1). cover_rate: share that is changed, too, but keeps its
    labels (role 2). relabel: whether poisoned images get the target as label; clean-label attacks keep theirs.
    sampling: how a training set is drawn, see poison.py. early: whether in a batch drawn `in_batch` the trigger comes
    before augmentation. times: factor on the difference in the trigger's picture. surrogate: whether prepare() takes a
    clean network. all_to_all: whether it can send each class to the next. flip: whether augmentation mirrors the
    images; whoever trains sets it. width: of a trigger that is learned, the channels of its networks' first layer, by
    default as many as two cores can train; its class takes (folder, size, width). None: nothing is learned.
    """

    rate = 0.10
    cover_rate = 0.0
    relabel = True
    sampling = "resampled"
    early = False
    times = 1
    surrogate = False
    all_to_all = True
    flip = True
    width = None

    # --- before training

    def prepare(self, images, labels, target, seed, resumed, say, surrogate=None):
        """Make what has to exist before the victim is trained, as an encoder.

        images: uint8 (N, 3, H, W), the training set, on the trigger's device; labels: int64 (N,); resumed: whether
        state_dict() of an earlier part of the run is loaded already; say: takes a line; surrogate: a clean network in
        eval mode, where asked for. Raises ValueError where the attack cannot be.
        """

    def optimizer(self):
        """Return the optimizer of a trigger that is trained along with the victim, else None."""
        return None

    def start_epoch(self, epoch, n_epochs):
        """Set the trigger up for an epoch, counted from 0: what learns in it, what is in eval mode."""
        del epoch, n_epochs
        self.eval()

    # --- in training

    def fetch(self, images, index, roles):
        """Return the images of a batch as they lie on the disk, uint8 (B, 3, H, W)."""
        del roles
        return images[index]

    def plant(self, x, y, roles, index, target, generator):
        """Return a batch with the trigger in it, (x, y), new tensors.

        x: float (B, 3, H, W) in [0, 1]; y: int64 (B,); roles: int64 (B,) on the CPU, 0 clean, 1 poisoned, 2 cover;
        index: int64 (B,), the images' places in the training set; generator: on the CPU.
        """
        del index
        x, y = x.clone(), y.clone()
        hit = places(roles, 1, x)
        if len(hit):
            x[hit] = self.in_training(x[hit], generator)
            if self.relabel:
                y[hit] = target
        return x, y

    def in_training(self, x, generator):
        """Return triggered images as training sees them, (N, 3, H, W); what is random comes from `generator`."""
        del generator
        return self(x)

    def extra_loss(self, logits, y):
        """Return what is added to the batch's mean cross-entropy, a scalar, or None."""
        del logits, y

    # --- in evaluation

    def test_set(self, images, labels, target):
        """Return (images, labels) that ASR and RA are measured on: uint8 or float images that forward() is applied to.

        labels: their true classes, int64, or None where the images have no one true class and RA has no meaning.
        """
        others = labels != target
        return images[others], labels[others]

    def control_sets(self, images, labels):
        """Return {name: (images, labels)}: test images changed so that they should not trigger, and their true classes.

        images: uint8 (N, 3, H, W), the test set, on the trigger's device; those returned are float in [0, 1].
        evaluate.py prints the share of them that is classified correctly.
        """
        del images, labels
        return {}


def places(roles, role, x):
    """Return the places of a role in a batch, int64 on the device of x, without waiting for a GPU."""
    return (roles == role).nonzero()[:, 0].to(x.device, non_blocking=x.is_cuda)
