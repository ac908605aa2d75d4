"""Defense data, augmentation, bytes to floats; the full set and the sample have tests of their own."""

import flags
from flags import InputError

import pytest
import torch

import data
import utils
from support import inputs


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# the share that a defense sees


def test_defense_images_are_the_first_of_each_class():
    labels = torch.randint(0, 10, (5000,), generator=generator())
    train, valid = data.defense_split(labels, 0.05)
    assert (len(train), len(valid)) == (200, 50)
    for c in range(10):
        first = (labels == c).nonzero()[:25, 0]
        assert torch.equal(train[labels[train] == c], first[:20])
        assert torch.equal(valid[labels[valid] == c], first[20:])


def test_the_papers_setting_is_2000_and_500():
    labels = torch.arange(10).repeat(5000)
    for train, valid in (data.defense_split(labels, 0.05), data.defense_indices(labels, "cifar10")):
        assert (len(train), len(valid)) == (2000, 500)
        assert not set(train.tolist()) & set(valid.tolist())


def test_a_generator_draws_other_images_of_each_class():
    labels = torch.arange(10).repeat(500)
    draws = [data.defense_split(labels, 0.1, generator=generator(s)) for s in (0, 0, 1)]
    draws += [data.defense_indices(labels, "cifar10", 0.1, draw="random", seed=s) for s in (0, 1)]
    for train, valid in draws:
        assert labels[train].bincount().tolist() == [40] * 10
        assert labels[valid].bincount().tolist() == [10] * 10
        assert len(set(train.tolist()) | set(valid.tolist())) == 500
    assert torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][0], draws[2][0])
    assert not torch.equal(draws[3][0], draws[4][0])
    first, _ = data.defense_indices(labels, "cifar10", 0.1, seed=1)
    assert torch.equal(first, data.defense_split(labels, 0.1)[0])  # the seed is for the random draw alone


def test_of_a_class_with_fewer_images_the_defense_sees_all():
    labels = torch.cat([torch.zeros(900), torch.arange(1, 10).repeat(10)]).long()  # 99 of each are asked for
    train, valid = data.defense_split(labels, 1.0)
    assert labels[train].bincount().tolist() == [79, *9 * [8]]
    assert labels[valid].bincount().tolist() == [20, *9 * [2]]
    assert torch.equal(train[79:87], (labels == 1).nonzero()[:8, 0])
    three = torch.tensor([0, 2, 1, 1, 2, 0, 2])
    train, valid = data.defense_split(three, 1.0, num_classes=3)
    assert (train.tolist(), valid.tolist()) == ([0, 2, 1], [5, 3, 4])


@pytest.mark.parametrize(
    ("rate", "counts", "reason"), [(1e-3, [900, 90], "raise it"), (1.0, [900, 1], "class 1 has 1 images")]
)
def test_too_few_images(rate, counts, reason):
    labels = torch.arange(2).repeat_interleave(torch.tensor(counts))
    with pytest.raises(InputError, match=reason) as caught:
        data.defense_split(labels, rate, num_classes=2)
    assert "\n" not in str(caught.value)


def test_the_sample_is_what_one_percent_of_the_full_set_takes():
    _, labels = data.load_dataset("cifar10_sample", None, train=True)
    for train, valid in (data.defense_split(labels, 1.0), data.defense_indices(labels, "cifar10_sample")):
        assert (len(train), len(valid)) == (400, 100)
        assert labels[valid].bincount().tolist() == [10] * 10


def test_a_method_has_its_usual_share_and_the_flag_goes_before_it():
    labels = torch.arange(10).repeat(5000)
    counts = [sum(map(len, data.defense_indices(labels, "cifar10", rate, usual=0.01))) for rate in (None, 0.02)]
    assert counts == [500, 1000]


def test_defense_data_follow_the_flags():
    def seen(take, *words):
        return take(flags.parser("unit.py").parse_args(["--dataset", "cifar10_sample", *words]))

    plain, a, b, c = (
        seen(take, *words)
        for take, words in (
            (inputs.defense_data, ()),
            (inputs.augmented_defense_data, ()),
            (inputs.augmented_defense_data, ()),
            (inputs.augmented_defense_data, ("--seed", "7")),
        )
    )
    assert [len(t) for t in plain] == [400, 400, 100, 100]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], plain[0])
    assert not torch.equal(a[0], c[0])  # other crops of the same images
    assert all(torch.equal(one[i], plain[i]) for one in (a, c) for i in (1, 3))
    assert [len(t) for t in seen(inputs.defense_data, "--data_rate", "0.2")] == [80, 80, 20, 20]
    drawn = seen(inputs.defense_data, "--data_rate", "0.2", "--draw", "random")
    assert not torch.equal(drawn[0], plain[0][:80])


# augmentation


@pytest.mark.parametrize("kind", ["float", "bytes"])
def test_augmentation_is_crop_of_the_zero_padded_image_and_flip(kind):
    x = torch.randint(1, 256, (200, 3, 32, 32), generator=generator()).to(torch.uint8)
    x = x / 255 if kind == "float" else x
    before = x.clone()
    out = data.augment(x, generator())
    assert torch.equal(x, before)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    seen = set()
    for one, after in zip(x, out, strict=True):
        padded = torch.nn.functional.pad(one, (4,) * 4)
        places = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal(padded[:, top : top + 32, left : left + 32].flip(2) if flip else
                           padded[:, top : top + 32, left : left + 32], after)
        ]  # fmt: skip
        assert len(places) == 1
        seen.add(places[0])
    assert {p[0] for p in seen} == {p[1] for p in seen} == set(range(9))
    assert {p[2] for p in seen} == {False, True}


def test_augmentation_may_pad_by_reflection():
    """A ramp from left to right: the crop shows its mirrored border."""
    x = (torch.arange(32.0) / 31).expand(50, 3, 32, 32)
    out = data.augment(x, generator(), mode="reflect")
    ramp = torch.cat([x[0, 0, 0, 1:5].flip(0), x[0, 0, 0], x[0, 0, 0, -5:-1].flip(0)])
    rows = {tuple(ramp[i : i + 32].tolist()) for i in range(9)}
    rows |= {row[::-1] for row in rows}
    assert all(tuple(line.tolist()) in rows for line in out.flatten(0, 2))


def test_augmentation_may_leave_the_images_unmirrored():
    x = (torch.arange(32.0) / 31).expand(50, 3, 32, 32)
    out, mirrored = (data.augment(x, generator(), flip=flip) for flip in (False, True))
    assert (out[:, 0, 16, 20] > out[:, 0, 16, 12]).all()
    kept = mirrored[:, 0, 16, 20] > mirrored[:, 0, 16, 12]
    assert 0 < kept.sum() < 50
    assert torch.equal(out[kept], mirrored[kept])  # the crops are the same


def test_augmentation_follows_its_generator():
    x = torch.rand(50, 3, 32, 32)
    first, again, other = (data.augment(x, generator(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# the data sets in memory


def test_bytes_become_zero_to_one_and_floats_stay():
    x = data.to_float(torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1))
    assert x.flatten().tolist() == [0, pytest.approx(128 / 255), 1]
    y = torch.rand(2, 3, 4, 4)
    assert torch.equal(data.to_float(y), y)


def test_unknown_data_set():
    for load in (data.load_dataset, utils.load_dataset):
        with pytest.raises(InputError, match="cifar10_sample"):
            load("cifar1000", None, True)
