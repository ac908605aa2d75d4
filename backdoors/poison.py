"""How a training set is poisoned: which images get the trigger, in which epochs, and which get a new label.

There are three ways to draw a set, and the victim's checkpoint names the one used:

- `resampled`, as in the release of UNIT's authors' group (OrthogLinearBackdoor, S&P 2024): in every epoch the poisoned
  images are drawn from those that may be poisoned, all others from the whole set, both with replacement. The trigger
  comes after augmentation. It needs control of the training.
- `fixed`, pure data poisoning: the poisoned images are drawn once and carry the trigger before augmentation. Every
  image is seen once per epoch.
- `in_batch`, as WaNet and other attacks need it: every image is seen once per epoch, and the poisoned ones are drawn
  afresh in each epoch, an equal share of every batch.
"""

from dataclasses import dataclass

import torch

SAMPLINGS = ("resampled", "fixed")  # those that a user may choose


@dataclass(frozen=True)
class Poison:
    """A poisoned training set.

    target: a class, or -1 for an all-to-all attack (each class to the next); num_classes: of the set;
    sampling: `resampled`, `fixed` or `in_batch`, see above; early: whether the trigger comes before augmentation;
    rate: share of an epoch's images that are poisoned; cover_rate: share that are changed but keep their labels;
    relabel: whether poisoned images get the target as label; pool: int64 (M,), the images that may be poisoned;
    indices, cover: int64 (n,), the poisoned and the cover images with `fixed` sampling, else empty.
    """

    target: int
    num_classes: int
    sampling: str
    early: bool
    rate: float
    cover_rate: float
    relabel: bool
    pool: torch.Tensor
    indices: torch.Tensor
    cover: torch.Tensor

    def wanted(self, labels):
        """Return the attacker's label for poisoned images of true classes `labels`; int64 (n,) to int64 (n,)."""
        return torch.full_like(labels, self.target) if self.target >= 0 else (labels + 1) % self.num_classes


def choose(labels, trigger, target, rate=None, seed=0, sampling="fixed"):
    """Choose how to poison a training set; the draw depends on `seed` alone.

    labels: int64 (N,); trigger: a Trigger or its class, None for a clean set; target: a class, or "all" for all-to-all;
    rate: share of the whole set in [0, 1), None for the attack's default; that of covers in proportion to it;
    sampling: `resampled` or `fixed`, ignored if the trigger has a sampling of its own.
    A dirty-label attack poisons images of the other classes, with `in_batch` sampling of all classes; a clean-label
    attack those of the target. Returns a Poison; round(rate * N) images of an epoch are poisoned.
    Raises ValueError for a rate out of range, and for a `fixed` set with too few images that may be poisoned.
    """
    labels = labels.cpu()
    n_classes = int(labels.max()) + 1
    if target == "all":
        if trigger is not None and not (trigger.relabel and trigger.all_to_all):
            raise ValueError("this attack cannot send each class to the next; give --target a class")
        target = -1
    if sampling not in SAMPLINGS:
        raise ValueError(f"unknown sampling {sampling!r}; there are {', '.join(SAMPLINGS)}")
    if trigger is None:
        if rate:
            raise ValueError(f"poison rate {rate} without an attack; choose an attack or leave the rate out")
        none = torch.arange(0)
        return Poison(target, n_classes, "fixed", True, 0.0, 0.0, True, none, none, none)
    rate, relabel = trigger.rate if rate is None else rate, trigger.relabel
    cover_rate = trigger.cover_rate * (rate / trigger.rate)
    if not 0 <= rate < 1 or rate + cover_rate > 1:
        most = trigger.rate / (trigger.rate + trigger.cover_rate)
        raise ValueError(f"poison rate {rate} must lie in [0, {most:.3g}{']' if most < 1 else ')'}, covers beside it")
    sampling = sampling if trigger.sampling == "resampled" else trigger.sampling
    early = sampling == "fixed" or (sampling == "in_batch" and trigger.early)
    n, n_cover = round(rate * len(labels)), round(cover_rate * len(labels))
    pool = torch.arange(len(labels))
    if sampling != "in_batch":
        pool = pool[(labels != target) if relabel else (labels == target)]
    if sampling == "fixed" and n + n_cover > len(pool):
        which = f"outside class {target}" if relabel else f"of class {target}"
        asked = f"{n} images" if not n_cover else f"{n} images and {n_cover} covers"
        raise ValueError(f"poison rate {rate} asks for {asked} {which}, of which there are {len(pool)}; lower it")
    if n and not len(pool):
        raise ValueError(f"no image may be poisoned with target {target}; choose another target")
    order = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    indices, cover = (order[:n], order[n : n + n_cover]) if sampling == "fixed" else (order[:0], order[:0])
    indices, cover = indices.sort().values, cover.sort().values
    return Poison(target, n_classes, sampling, early, rate, cover_rate, relabel, pool, indices, cover)


def epoch_order(poison, n, batch_size, generator):
    """Return (index, roles) of one epoch, int64 (n,) each: the images in training order, and the role of each.

    roles: 0 clean, 1 poisoned, 2 cover. n: images in the training set; generator: on the CPU.
    """
    if poison.sampling == "resampled":
        n_poison, n_cover = round(poison.rate * n), round(poison.cover_rate * n)
        poisoned = poison.pool[torch.randint(len(poison.pool), (n_poison,), generator=generator)]
        others = torch.randint(n, (n - n_poison,), generator=generator)
        place = torch.randperm(n, generator=generator)
        return torch.cat((poisoned, others))[place], (place < n_poison).long() + 2 * (
            (place >= n_poison) & (place < n_poison + n_cover)
        )
    order = torch.randperm(n, generator=generator)
    if poison.sampling == "in_batch":
        return order, in_batch_roles(poison, n, batch_size, generator)
    roles = torch.zeros(n, dtype=torch.int64)
    roles[poison.indices], roles[poison.cover] = 1, 2
    return order, roles[order]


def in_batch_roles(poison, n, batch_size, generator):
    """Return the roles of an epoch's images in training order, int64 (n,): 0 clean, 1 poisoned, 2 cover.

    Each batch of `batch_size` has the declared share of each role to within one image, unless it is too small. The
    whole epoch has it exactly.
    """
    roles = torch.zeros(n, dtype=torch.int64)
    wanted, given = {1: poison.rate, 2: poison.cover_rate}, {1: 0, 2: 0}
    for start in range(0, n, batch_size):
        stop = min(start + batch_size, n)
        # a batch may be too small for its share; later batches, and then the loop below, add what is missing
        free = start + torch.randperm(stop - start, generator=generator)
        for role, rate in wanted.items():
            chosen, free = free.tensor_split([max(0, round(stop * rate) - given[role])])
            roles[chosen] = role
            given[role] += len(chosen)
    for role, rate in wanted.items():
        plain = (roles == 0).nonzero()[:, 0]
        owed = round(n * rate) - given[role]
        roles[plain[torch.randperm(len(plain), generator=generator)[:owed]]] = role
    return roles
