"""How a training set is poisoned: which images get the trigger, when, and which of them a new label.

A set is drawn in one of three ways, and the victim's checkpoint says which:

- `resampled`, as the group's release trains its victims: in every epoch each poisoned place is filled from the images
  that may be poisoned, any other place from the whole set, with replacement. Augmentation first, then the trigger.
- `fixed`, what an attacker can do who only hands over data: the poisoned images are drawn once, and the trigger lies on
  them before augmentation. Every image is seen once an epoch.
- `in_batch`, WaNet's own: every image once an epoch, the poisoned ones drawn anew, an equal share in every batch; the
  trigger before augmentation.
"""

from dataclasses import dataclass

import torch

SAMPLINGS = ("resampled", "fixed")
# share of the training set that is poisoned, as the field trains such victims
POISON_RATE = {"none": 0.0, "badnet": 0.10, "wanet": 0.10, "reflection": 0.08, "blended": 0.05}
NOISE_RATE = {"wanet": 0.20}  # share in WaNet's noise mode, on top
CLEAN_LABEL = ("reflection",)


@dataclass(frozen=True)
class Poison:
    """A poisoned training set.

    sampling: `resampled`, `fixed` or `in_batch`, see the head of this module; rate: share of an epoch's images that
    carry the trigger; noise_rate: share in WaNet's noise mode; relabel: whether poisoned images get the target as
    label, clean-label attacks keep theirs; pool: int64 (M,), the images that may be poisoned; indices: int64 (n,), the
    poisoned images where they are fixed, else empty.
    """

    attack: str
    target: int
    sampling: str
    rate: float
    noise_rate: float
    relabel: bool
    pool: torch.Tensor
    indices: torch.Tensor


def poison_training_set(labels, attack, target, rate=None, seed=0, sampling="fixed"):
    """Choose how to poison a training set; the draw has a generator of its own, so that nothing else moves it.

    labels: int64 (N,); rate: share of the whole set in [0, 1), None for the attack's usual one; sampling: `resampled`
    or `fixed`. WaNet draws `in_batch` regardless, and a set without poison is `fixed`.
    A dirty-label attack poisons images of the other classes (WaNet of all), a clean-label attack those of the target.
    Returns a Poison; round(rate * N) images of an epoch are poisoned. Raises ValueError for a rate out of range, and
    when fewer images may be poisoned than a `fixed` set asks for.
    """
    labels = labels.cpu()
    rate = POISON_RATE[attack] if rate is None else rate
    noise_rate = NOISE_RATE.get(attack, 0.0)
    if sampling not in SAMPLINGS:
        raise ValueError(f"unknown sampling {sampling!r}; there are {', '.join(SAMPLINGS)}")
    if attack == "none" and rate:
        raise ValueError(f"poison rate {rate} without an attack; choose an attack or leave the rate out")
    if not 0 <= rate < 1 or rate + noise_rate > 1:
        raise ValueError(f"poison rate {rate} must lie in [0, {1 - noise_rate:g})")
    if attack in NOISE_RATE:
        sampling = "in_batch"
    elif attack == "none":
        sampling = "fixed"
    relabel = attack not in CLEAN_LABEL
    n, pool = round(rate * len(labels)), torch.arange(len(labels))
    if sampling != "in_batch":
        pool = pool[(labels != target) if relabel else (labels == target)]
    if sampling == "fixed" and n > len(pool):
        which = f"outside class {target}" if relabel else f"of class {target}"
        raise ValueError(f"poison rate {rate} asks for {n} images {which}, of which there are {len(pool)}; lower it")
    if n and not len(pool):
        raise ValueError(f"no image may be poisoned with target {target}; choose another target")
    chosen = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[: n if sampling == "fixed" else 0]
    return Poison(attack, target, sampling, rate, noise_rate, relabel, pool, pool[chosen].sort().values)


def epoch_order(poison, n, batch_size, generator):
    """Return (index, roles) of one epoch, int64 (n,) each: which image comes when, and as what.

    roles: 0 clean, 1 poisoned, 2 WaNet's noise mode. n: images in the training set; generator: on the CPU.
    """
    if poison.sampling == "resampled":
        n_poison = round(poison.rate * n)
        poisoned = poison.pool[torch.randint(len(poison.pool), (n_poison,), generator=generator)]
        clean = torch.randint(n, (n - n_poison,), generator=generator)
        place = torch.randperm(n, generator=generator)
        return torch.cat((poisoned, clean))[place], (place < n_poison).long()
    order = torch.randperm(n, generator=generator)
    if poison.sampling == "in_batch":
        return order, in_batch_roles(poison, n, batch_size, generator)
    roles = torch.zeros(n, dtype=torch.int64)
    roles[poison.indices] = 1
    return order, roles[order]


def in_batch_roles(poison, n, batch_size, generator):
    """Return int64 (n,), the role of each place of an epoch: 0 clean, 1 poisoned, 2 noise mode.

    Cut into batches of `batch_size`, every batch holds its share to one image where it has the room, and the epoch
    holds it exactly.
    """
    roles = torch.zeros(n, dtype=torch.int64)
    wanted, given = {1: poison.rate, 2: poison.noise_rate}, {1: 0, 2: 0}
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
