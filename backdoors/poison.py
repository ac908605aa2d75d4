"""How a training set is poisoned: which images get the trigger, when, and which of them a new label.

A set is drawn in one of three ways, and the victim's checkpoint says which:

- `resampled`, as the group's release trains its victims: in every epoch each poisoned place is filled from the images
  that may be poisoned, any other place from the whole set, with replacement. Augmentation first, then the trigger.
- `fixed`, what an attacker can do who only hands over data: the poisoned images are drawn once, and the trigger lies on
  them before augmentation. Every image is seen once an epoch.
- `in_batch`, what some attacks ask for, as WaNet: every image once an epoch, the poisoned ones drawn anew, an equal
  share in every batch.
"""

from dataclasses import dataclass

import torch

SAMPLINGS = ("resampled", "fixed")  # between which a user may choose


@dataclass(frozen=True)
class Poison:
    """A poisoned training set.

    target: a class, or -1 where each class is sent to the next ("all-to-all"); num_classes: of the set;
    sampling: `resampled`, `fixed` or `in_batch`, see the head of this module; early: whether the trigger comes before
    augmentation; rate: share of an epoch's images that carry the trigger; cover_rate: share that is changed but keeps
    its labels; relabel: whether poisoned images get the target as label; pool: int64 (M,), the images that may be
    poisoned; indices, cover: int64 (n,), the poisoned and the cover images where they are fixed, else empty.
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
        """Return what poisoned images of the classes `labels`, int64 (n,), are to be taken for, int64 (n,)."""
        return torch.full_like(labels, self.target) if self.target >= 0 else (labels + 1) % self.num_classes


def choose(labels, trigger, target, rate=None, seed=0, sampling="fixed"):
    """Choose how to poison a training set; the draw has a generator of its own, so that nothing else moves it.

    labels: int64 (N,); trigger: a Trigger or its class, None for a clean set; target: a class, or "all" for the next of
    each; rate: share of the whole set in [0, 1),
    None for the attack's usual one; sampling: `resampled` or `fixed`, for a trigger that leaves the choice.
    A dirty-label attack poisons images of the other classes (in a batch of all), a clean-label attack those of the
    target. Returns a Poison; round(rate * N) images of an epoch are poisoned.
    Raises ValueError for a rate out of range, and when fewer images may be poisoned than a `fixed` set asks for.
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
    rate, cover_rate, relabel = trigger.rate if rate is None else rate, trigger.cover_rate, trigger.relabel
    if not 0 <= rate < 1 or rate + cover_rate > 1:
        raise ValueError(f"poison rate {rate} must lie in [0, {1 - cover_rate:g})")
    sampling = sampling if trigger.sampling == "resampled" else trigger.sampling
    early = sampling == "fixed" or (sampling == "in_batch" and trigger.early)
    n, n_cover = round(rate * len(labels)), round(cover_rate * len(labels))
    pool = torch.arange(len(labels))
    if sampling != "in_batch":
        pool = pool[(labels != target) if relabel else (labels == target)]
    if sampling == "fixed" and n + n_cover > len(pool):
        which = f"outside class {target}" if relabel else f"of class {target}"
        raise ValueError(f"poison rate {rate} asks for {n} images {which}, of which there are {len(pool)}; lower it")
    if n and not len(pool):
        raise ValueError(f"no image may be poisoned with target {target}; choose another target")
    order = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    indices, cover = (order[:n], order[n : n + n_cover]) if sampling == "fixed" else (order[:0], order[:0])
    indices, cover = indices.sort().values, cover.sort().values
    return Poison(target, n_classes, sampling, early, rate, cover_rate, relabel, pool, indices, cover)


def epoch_order(poison, n, batch_size, generator):
    """Return (index, roles) of one epoch, int64 (n,) each: which image comes when, and as what.

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
    """Return int64 (n,), the role of each place of an epoch: 0 clean, 1 poisoned, 2 cover.

    Cut into batches of `batch_size`, every batch holds its share to one image where it has the room, and the epoch
    holds it exactly.
    """
    roles = torch.zeros(n, dtype=torch.int64)
    wanted, given = {1: poison.rate, 2: poison.cover_rate}, {1: 0, 2: 0}
    for start in range(0, n, batch_size):
        stop = min(start + batch_size, n)
        # a later batch makes up for what an earlier one had no room for; the loop below for the rest
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
