"""Which images are poisoned, and the order and roles of an epoch's images."""

import numpy as np
import pytest
import torch

from backdoors import TRIGGERS, epoch_order, get_backdoor, poison_training_set
from tests.images import generator

LABELS = torch.randint(0, 10, (2003,), generator=generator(42))
CIFAR10 = torch.arange(10).repeat(5000)  # as many labels of each class as CIFAR-10 has
POISON_RATE = {"none": 0.0} | {name: trigger.rate for name, trigger in TRIGGERS.items()}


# which images are poisoned


@pytest.mark.parametrize(
    ("attack", "rate", "count"),
    [
        ("badnet", None, 200),
        ("badnet", 0.0, 0),
        ("badnet", 0.0333, 67),
        ("badnet", 0.5, 1002),
        ("blended", None, 100),
        ("reflection", None, 160),
        ("reflection", 0.0101, 20),
        ("none", None, 0),
    ],
)
def test_poison_count_is_exact(attack, rate, count):
    poison = poison_training_set(LABELS, attack, 3, rate, seed=5)
    assert poison.indices.dtype == torch.int64
    assert poison.indices.shape == (count,)
    assert len(set(poison.indices.tolist())) == count
    assert poison.indices.tolist() == sorted(poison.indices.tolist())
    assert all(0 <= i < len(LABELS) for i in poison.indices.tolist())
    assert (poison.target, poison.sampling) == (3, "fixed")


@pytest.mark.parametrize("attack", ["badnet", "reflection"])
def test_poison_follows_its_seed_alone(attack):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = poison_training_set(LABELS, attack, 3, seed=5).indices
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, poison_training_set(LABELS, attack, 3, seed=5).indices)
    assert not torch.equal(first, poison_training_set(LABELS, attack, 3, seed=6).indices)


@pytest.mark.parametrize("attack", ["badnet", "blended"])
@pytest.mark.parametrize("target", [0, 7])
def test_dirty_label_takes_every_class_but_the_target_and_relabels(attack, target):
    poison = poison_training_set(LABELS, attack, target, 0.2)
    assert poison.relabel
    assert set(LABELS[poison.indices].tolist()) == set(range(10)) - {target}


@pytest.mark.parametrize("target", [0, 7])
def test_clean_label_takes_the_target_class_and_keeps_labels(target):
    poison = poison_training_set(LABELS, "reflection", target)
    assert not poison.relabel
    assert set(LABELS[poison.indices].tolist()) == {target}


def test_a_rate_is_of_the_whole_set():
    assert len(poison_training_set(CIFAR10, "reflection", 0).indices) == 4000
    assert len(poison_training_set(CIFAR10, "reflection", 0, 0.1).indices) == 5000
    assert len(poison_training_set(CIFAR10, "badnet", 0, 0.9).indices) == 45_000
    with pytest.raises(ValueError, match="5001 images of class 0, of which there are 5000; lower it"):
        poison_training_set(CIFAR10, "reflection", 0, 0.10002)
    with pytest.raises(ValueError, match="45001 images outside class 0, of which there are 45000; lower it"):
        poison_training_set(CIFAR10, "badnet", 0, 0.90002)
    # drawn with replacement there are always enough, but of nothing
    assert len(poison_training_set(CIFAR10, "reflection", 0, 0.3, sampling="resampled").pool) == 5000
    for attack, target in (("badnet", 0), ("reflection", 1)):
        with pytest.raises(ValueError, match=f"no image may be poisoned with target {target}"):
            poison_training_set(torch.zeros_like(CIFAR10), attack, target, sampling="resampled")


def test_poisoning_leaves_the_labels():
    before = LABELS.clone()
    for attack in POISON_RATE:
        for sampling in ("fixed", "resampled"):
            poison_training_set(LABELS, attack, 3, sampling=sampling)
    assert torch.equal(LABELS, before)


def test_wanet_chooses_per_epoch():
    for sampling in ("fixed", "resampled"):
        poison = poison_training_set(LABELS, "wanet", 3, sampling=sampling)
        assert poison.sampling == "in_batch"
        assert poison.indices.tolist() == []
        assert poison.relabel
        assert (poison.rate, poison.cover_rate) == (0.1, 0.2)
    assert poison_training_set(LABELS, "badnet", 3).cover_rate == 0


@pytest.mark.parametrize(
    ("attack", "rate", "covers"), [("wanet", 0.05, 0.1), ("adaptive_blend", 0.01, 0.01), ("wanet", 0.0, 0.0)]
)
def test_covers_keep_their_proportion_to_the_poisoned(attack, rate, covers):
    poison = poison_training_set(LABELS, attack, 3, rate)
    assert (poison.rate, poison.cover_rate) == (rate, pytest.approx(covers))


def test_a_rate_that_leaves_no_room_for_the_covers():
    poison_training_set(LABELS, "wanet", 3, 1 / 3)  # and two thirds in noise mode
    with pytest.raises(ValueError, match=r"must lie in \[0, 0.333\], covers beside it"):
        poison_training_set(LABELS, "wanet", 3, 0.34)


@pytest.mark.parametrize(
    ("attack", "rate"),
    [("badnet", -0.1), ("badnet", 1.0), ("badnet", 1.5), ("badnet", float("nan")), ("wanet", 0.81), ("none", 0.1)],
)
def test_poison_rates_that_cannot_be(attack, rate):
    for sampling in ("fixed", "resampled"):
        with pytest.raises(ValueError, match="poison rate"):
            poison_training_set(LABELS, attack, 0, rate, sampling=sampling)


def test_the_images_asked_for_are_told_with_their_covers():
    labels = torch.arange(10).repeat(50)
    with pytest.raises(ValueError, match="asks for 250 images and 250 covers outside class 0, of which there are 450"):
        poison_training_set(labels, "adaptive_blend", 0, 0.5)


def test_unknown_sampling():
    with pytest.raises(ValueError, match="there are resampled, fixed"):
        poison_training_set(LABELS, "badnet", 0, sampling="in_batch")


# the order of an epoch


def epochs(poison, n, batch_size, count, seed=5):
    """(index, roles) of several epochs, each with its own generator."""
    return [epoch_order(poison, n, batch_size, generator(1000 * seed + epoch)) for epoch in range(count)]


def near(count, n, share):
    """Whether a count of n independent draws lies within five standard deviations of its expectation."""
    return abs(int(count) - n * share) < 5 * (n * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(
    ("attack", "rate", "n_triggered"),
    [("badnet", None, 5000), ("blended", None, 2500), ("reflection", None, 4000), ("reflection", 0.3, 15_000)],
)
@pytest.mark.parametrize("target", [0, 7])
def test_resampled_draws_each_place_anew_from_all_images_that_may_stand_there(attack, rate, n_triggered, target):
    poison = poison_training_set(CIFAR10, attack, target, rate, sampling="resampled")
    n, n_clean = len(CIFAR10), len(CIFAR10) - n_triggered
    for index, roles in epochs(poison, n, 128, 2):
        assert index.shape == roles.shape == (n,)
        assert roles.unique().tolist() == [0, 1]
        triggered, clean = index[roles == 1], index[roles == 0]
        assert len(triggered) == n_triggered
        # clean: every class alike, the target's too, as often as with replacement
        per_class = CIFAR10[clean].bincount(minlength=10)
        assert all(near(count, n_clean, 0.1) for count in per_class)
        # of N images drawn c N times with replacement, 1 - 1 / e^c are seen; the variance is less than the binomial's
        assert near(len(clean.unique()), n, 1 - np.exp(-n_clean / n))
        # triggered: of the classes that may be, alike
        per_class = CIFAR10[triggered].bincount(minlength=10)
        pool = [target] if attack == "reflection" else [c for c in range(10) if c != target]
        assert all(count == 0 for c, count in enumerate(per_class) if c not in pool)
        if len(pool) > 1:
            assert all(near(per_class[c], n_triggered, 1 / len(pool)) for c in pool)
        size = 5000 * len(pool)
        assert near(len(triggered.unique()), size, 1 - np.exp(-n_triggered / size))
        # neither comes first: the triggered places are spread over the epoch, and tell nothing of what is drawn there
        assert all(near(half.sum(), n // 2, n_triggered / n) for half in roles.split(n // 2))
        assert all(near((half < n // 2).sum(), n // 2, 0.5) for half in index.split(n // 2))


def test_badnet_victims_see_about_59_percent_of_the_images_clean_in_an_epoch():
    poison = poison_training_set(CIFAR10, "badnet", 0, sampling="resampled")
    for index, roles in epochs(poison, 50_000, 128, 2):
        assert len(index[roles == 0].unique()) / 50_000 == pytest.approx(1 - 1 / np.exp(0.9), abs=0.005)


@pytest.mark.parametrize("attack", ["badnet", "reflection", "blended", "none"])
def test_fixed_takes_every_image_once_and_the_same_poisoned_ones_each_epoch(attack):
    poison = poison_training_set(LABELS, attack, 3, seed=9)
    for index, roles in epochs(poison, 2003, 128, 3):
        assert index.sort().values.tolist() == list(range(2003))
        assert torch.equal(index[roles == 1].sort().values, poison.indices)
        assert (roles == 1).sum() == round(POISON_RATE[attack] * 2003)
        assert ((roles == 0) | (roles == 1)).all()


@pytest.mark.parametrize(
    ("attack", "sampling"),
    [
        ("badnet", "resampled"),
        ("reflection", "resampled"),
        ("badnet", "fixed"),
        ("wanet", "resampled"),
        ("none", "fixed"),
    ],
)
def test_an_epoch_follows_its_generator_alone(attack, sampling):
    poison = poison_training_set(LABELS, attack, 3, sampling=sampling)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = epoch_order(poison, 2003, 128, generator(5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (epoch_order(poison, 2003, 128, generator(seed)) for seed in (5, 6))
    for a, b, c in zip(first, again, other, strict=True):
        assert a.dtype == torch.int64
        assert torch.equal(a, b)
        assert attack == "none" or not torch.equal(a, c)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(("n", "batch_size"), [(2003, 128), (2000, 100), (50_000, 128), (64, 128), (501, 16)])
def test_in_batch_holds_its_shares_in_every_batch_and_exactly_in_the_epoch(n, batch_size):
    poison = poison_training_set(LABELS, "wanet", 3)
    counts = [n - round(0.1 * n) - round(0.2 * n), round(0.1 * n), round(0.2 * n)]
    for index, roles in epochs(poison, n, batch_size, 3):
        assert index.sort().values.tolist() == list(range(n))
        assert roles.shape == (n,)
        assert roles.dtype == torch.int64
        # a place has one role, so poison and noise mode are apart; every role has its full count
        assert torch.bincount(roles, minlength=3).tolist() == counts
        for batch in roles.split(batch_size):
            assert abs((batch == 1).sum() - 0.1 * len(batch)) <= 1
            assert abs((batch == 2).sum() - 0.2 * len(batch)) <= 1


def test_in_batch_draws_other_images_each_epoch():
    """Any image may be poisoned, also one of the target class."""
    poison = poison_training_set(LABELS, "wanet", 3)
    seen = torch.cat([index[roles == 1] for index, roles in epochs(poison, 2003, 128, 60)])
    # each image has a chance of 1 - 0.9^60 = 99.8 %
    assert len(seen.unique()) > 0.99 * 2003
    assert set(LABELS[seen].tolist()) == set(range(10))


def test_in_batch_reaches_every_place_of_a_batch():
    poison = poison_training_set(LABELS, "wanet", 3)
    roles = torch.stack([roles for _, roles in epochs(poison, 100, 50, 100)])
    for role in (1, 2):
        assert (roles == role).any(0).all()


def test_in_batch_catches_up_where_a_batch_has_no_room():
    poison = poison_training_set(torch.zeros(1000, dtype=torch.int64), "wanet", 0, 0.3)
    for batch_size in (1, 3, 128):
        _, roles = epoch_order(poison, 1000, batch_size, generator())
        assert roles.bincount().tolist() == [100, 300, 600]


@pytest.mark.parametrize("name", ["patch", "trojnn", "blend", "filter", "sig"])
def test_static_triggers_of_the_group_are_drawn_resampled(name):
    trigger = get_backdoor(name)
    poison = poison_training_set(CIFAR10, name, 0, sampling="resampled")
    assert (poison.sampling, poison.early, poison.cover_rate) == ("resampled", False, 0)
    _, roles = epoch_order(poison, 50_000, 128, generator())
    assert (roles == 1).sum() == round(trigger.rate * 50_000)
    assert trigger.extra_loss(None, None) is None
    assert trigger.optimizer() is None
