"""The clean images that a defense sees: a small share of the training set, equally many of each class."""

from flags import InputError

import torch


def defense_split(labels, data_rate, num_classes=10, train_share=0.8, generator=None):
    """Choose the defense images: of each class the first ones in the data set's order, or those drawn by `generator`.

    labels: int64 (N,). n = int(N * data_rate), n // num_classes images of each class, or all of a smaller class. Of
    each class the first 80 % are for training, the rest for validation. Returns the two index tensors, int64, class by
    class. Raises InputError if a class has no image for one of the two.
    """
    per_class = int(len(labels) * data_rate) // num_classes
    if per_class < 2:
        raise InputError(f"data_rate {data_rate} leaves {per_class} images per class; raise it to have at least 2")
    train, valid = [], []
    for c in range(num_classes):
        chosen = (labels == c).nonzero()[:, 0]
        if generator is not None:
            chosen = chosen[torch.randperm(len(chosen), generator=generator)]
        chosen = chosen[:per_class]
        n_train = int(len(chosen) * train_share)
        if n_train < 1 or n_train == len(chosen):
            raise InputError(f"class {c} has {len(chosen)} images, and a defense needs at least 2; add some to it")
        train.append(chosen[:n_train])
        valid.append(chosen[n_train:])
    return torch.cat(train), torch.cat(valid)


def defense_indices(labels, dataset, data_rate=None, usual=0.05, draw="first", seed=0, num_classes=10):
    """Return the split that a command's flags ask for: two int64 index tensors, for training and validation.

    data_rate: None for `usual`, or for all of the embedded sample, which is one hundredth of the full set. draw:
    `first`, or `random` by `seed`. Errors as in defense_split().
    """
    rate = data_rate or (1.0 if dataset == "cifar10_sample" else usual)
    generator = torch.Generator().manual_seed(seed) if draw == "random" else None
    return defense_split(labels, rate, num_classes, generator=generator)
