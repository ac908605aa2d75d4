"""The base class of every attack: the trigger itself, and hooks for the training of its victim.

train.py and poison.py use this interface and know no attack by name. A static trigger sets class attributes and defines
forward(). A trigger that is trained along with the victim, or that changes the training, overrides the hooks.
"""

from torch import nn


class Trigger(nn.Module):
    """Puts a trigger on images, (N, 3, H, W) in [0, 1] to the same; its state lies in buffers and parameters.

    rate: share of an epoch's images that are poisoned (role 1). cover_rate: share that are changed but keep their
    labels (role 2). relabel: whether poisoned images get the target as label; clean-label attacks keep theirs.
    sampling: how a training set is drawn, see poison.py. early: whether, with sampling `in_batch`, the trigger comes
    before augmentation. times: factor on the difference shown in the trigger's picture. surrogate: whether prepare()
    needs a clean network. all_to_all: whether the attack can map each class to the next. only_target: the one class
    that it leads to, None for any. flip: whether augmentation mirrors the images, set by train.py. width: for a learned
    trigger, the default number of channels of its networks' first layer, and its class takes (folder, size, width);
    None for any other trigger.
    """

    rate = 0.10
    cover_rate = 0.0
    relabel = True
    sampling = "resampled"
    early = False
    times = 1
    surrogate = False
    all_to_all = True
    only_target = None
    flip = True
    width = None

    # --- before training

    def prepare(self, images, labels, target, seed, resumed, say, surrogate=None):
        """Prepare the trigger before the victim is trained, for example train its encoder.

        images: uint8 (N, 3, H, W), the training set, on the trigger's device; labels: int64 (N,); resumed: whether the
        state_dict() of an interrupted run is already loaded; say: prints a line; surrogate: a clean network in eval
        mode if the class asks for one, else None. Raises ValueError where the attack is impossible.
        """

    def optimizer(self):
        """Return the optimizer of a trigger that is trained along with the victim, None for any other."""
        return None

    def start_epoch(self, epoch, n_epochs):
        """Choose which parts of the trigger are in train and eval mode in this epoch, counted from 0."""
        del epoch, n_epochs
        self.eval()

    # --- in training

    def fetch(self, images, index, roles):
        """Return the images of a batch as the poisoned training set stores them, uint8 (B, 3, H, W)."""
        del roles
        return images[index]

    def plant(self, x, y, roles, index, target, generator):
        """Return the poisoned batch (x, y) as new tensors.

        x: float (B, 3, H, W) in [0, 1]; y: int64 (B,); roles: int64 (B,) on the CPU, 0 clean, 1 poisoned, 2 cover;
        index: int64 (B,), the images' indices in the training set; generator: on the CPU.
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
        """Return triggered images as training sees them, (N, 3, H, W); all random draws come from `generator`."""
        del generator
        return self(x)

    def extra_loss(self, logits, y):
        """Return a scalar to add to the batch's mean cross-entropy, or None."""
        del logits, y

    # --- in evaluation

    def test_set(self, images, labels, target):
        """Return (images, labels) for ASR and RA: uint8 or float images, to which the evaluator applies forward().

        labels: their true classes, int64, or None where an image has no single true class, so that RA is undefined.
        """
        others = labels != target
        return images[others], labels[others]

    def control_sets(self, images, labels):
        """Return {name: (images, labels)}: changed test images that should not trigger, and their true classes.

        images: uint8 (N, 3, H, W), the test set, on the trigger's device; those returned are float in [0, 1].
        evaluate.py prints the accuracy on each set.
        """
        del images, labels
        return {}


def places(roles, role, x):
    """Return the indices in the batch that have this role, int64 on the device of x, without synchronizing a GPU."""
    return (roles == role).nonzero()[:, 0].to(x.device, non_blocking=x.is_cuda)
