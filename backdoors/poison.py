"""How a training set is poisoned: which images get the trigger, and which of them a new label."""

from dataclasses import dataclass

import torch

# share of the training set that is poisoned, as the field trains such victims
POISON_RATE = {"none": 0.0, "badnet": 0.10, "wanet": 0.10, "reflection": 0.08, "blended": 0.05}
NOISE_RATE = {"wanet": 0.20}  # share in WaNet's noise mode, on top
CLEAN_LABEL = ("reflection",)


@dataclass(frozen=True)
class Poison:
    """A poisoned training set.

    indices: int64 (n,), the poisoned images, drawn once; empty where every epoch draws anew (wanet, whose
    attacker controls the training: rate * N other images each epoch, spread evenly over the batches).
    relabel: whether poisoned images get the target as label; clean-label attacks keep theirs.
    """

    attack: str
    target: int
    rate: float
    noise_rate: float
    relabel: bool
    indices: torch.Tensor


def poison_training_set(labels, attack, target, rate=None, seed=0):
    """Choose the images to poison, from a generator of its own, so that nothing else moves the choice.

    labels: int64 (N,); rate: share of the whole training set in [0, 1), None for the attack's usual one.
    Returns a Poison whose number of images is round(rate * N) exactly.
    Raises ValueError for a rate that cannot be, and when a clean-label attack wants more images than the target class
    has.
    """
    rate = POISON_RATE[attack] if rate is None else rate
    noise_rate = NOISE_RATE.get(attack, 0.0)
    if attack == "none" and rate:
        raise ValueError(f"poison rate {rate} without an attack; choose an attack or leave the rate out")
    if not 0 <= rate < 1 or rate + noise_rate > 1:
        raise ValueError(f"poison rate {rate} must lie in [0, {1 - noise_rate:g})")
    n = round(rate * len(labels))
    pool = torch.arange(len(labels))
    if attack in CLEAN_LABEL:
        pool = pool[labels.cpu() == target]
        if n > len(pool):
            raise ValueError(
                f"poison rate {rate} asks for {n} images of class {target}, which has {len(pool)}; lower it"
            )
    if attack in NOISE_RATE:
        n = 0
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    indices = pool[order[:n]].sort().values
    return Poison(attack, target, rate, noise_rate, attack not in CLEAN_LABEL, indices)


def epoch_roles(poison, n, batch_size, seed, epoch):
    """Return int64 (n,), the role of each position of an epoch's order: 0 plain, 1 poisoned, 2 noise mode (WaNet).

    Cut into batches of `batch_size`, every batch holds its share to one image where it has the room, and the epoch
    holds it exactly. Only for attacks that draw anew each epoch.
    """
    g = torch.Generator().manual_seed(seed * 100_003 + epoch)
    roles = torch.zeros(n, dtype=torch.int64)
    wanted, given = {1: poison.rate, 2: poison.noise_rate}, {1: 0, 2: 0}
    for start in range(0, n, batch_size):
        stop = min(start + batch_size, n)
        # what an earlier batch had no room for is owed by this one; the last may owe to the whole epoch
        free = start + torch.randperm(stop - start, generator=g)
        for role, rate in wanted.items():
            chosen, free = free.tensor_split([max(0, round(stop * rate) - given[role])])
            roles[chosen] = role
            given[role] += len(chosen)
    for role, rate in wanted.items():
        plain = (roles == 0).nonzero()[:, 0]
        owed = round(n * rate) - given[role]
        roles[plain[torch.randperm(len(plain), generator=g)[:owed]]] = role
    return roles
