"""Defence data, augmentation, devices."""

import subprocess
import sys

import pytest
import torch

import unit
import utils
from cli import ROOT, InputError


def test_defence_images_are_the_first_of_each_class():
    labels = torch.randint(0, 10, (5000,), generator=torch.Generator().manual_seed(0))
    train, valid = utils.defence_split(labels, 0.05)
    assert (len(train), len(valid)) == (200, 50)
    for c in range(10):
        first = (labels == c).nonzero()[:25, 0]
        assert torch.equal(train[labels[train] == c], first[:20])
        assert torch.equal(valid[labels[valid] == c], first[20:])


def test_the_papers_setting_is_2000_and_500():
    labels = torch.arange(10).repeat(5000)
    train, valid = utils.defence_split(labels, 0.05)
    assert (len(train), len(valid)) == (2000, 500)
    assert not set(train.tolist()) & set(valid.tolist())


def test_a_generator_draws_other_images_of_each_class():
    labels = torch.arange(10).repeat(500)
    draws = [utils.defence_split(labels, 0.1, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    for train, valid in draws:
        assert labels[train].bincount().tolist() == [40] * 10
        assert labels[valid].bincount().tolist() == [10] * 10
        assert len(set(train.tolist()) | set(valid.tolist())) == 500
    assert torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][0], draws[2][0])


@pytest.mark.parametrize(("rate", "reason"), [(1e-3, "raise it"), (1.0, "lower it")])
def test_too_few_and_too_many(rate, reason):
    labels = torch.cat([torch.zeros(900), torch.arange(1, 10).repeat(10)]).long()
    with pytest.raises(InputError, match=reason):
        utils.defence_split(labels, rate)


def test_the_sample_is_what_one_percent_of_the_full_set_takes():
    _, labels = utils.load_dataset("cifar10_sample", None, train=True)
    train, valid = utils.defence_split(labels, 1.0)
    assert (len(train), len(valid)) == (400, 100)
    assert labels[valid].bincount().tolist() == [10] * 10


def test_augmentation_is_crop_of_the_zero_padded_image_and_flip():
    x = torch.rand(200, 3, 32, 32) * 0.9 + 0.1
    out = utils.augment(x, torch.Generator().manual_seed(0))
    assert out.shape == x.shape
    seen = set()
    for before, after in zip(x, out, strict=True):
        padded = torch.nn.functional.pad(before, (4,) * 4)
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


def test_augmentation_follows_its_generator():
    x = torch.rand(50, 3, 32, 32)
    first, again, other = (utils.augment(x, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_defence_data_follow_the_seed():
    def data(*flags):
        return unit.defence_data(unit.parser().parse_args(["--dataset", "cifar10_sample", *flags]))

    a, b, c = data(), data(), data("--seed", "7")
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0])
    assert (len(a[0]), len(a[2])) == (400, 100)
    assert [len(t) for t in data("--data_rate", "0.2")] == [80, 80, 20, 20]


def test_uint8_becomes_zero_to_one():
    x = utils.to_float(torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1))
    assert x.flatten().tolist() == [0, pytest.approx(128 / 255), 1]


def test_devices_and_precisions():
    cpu = torch.device("cpu")
    assert utils.get_device("cpu") == cpu
    assert utils.get_dtype("fp32", cpu) == torch.float32
    assert utils.get_dtype("bf16", cpu) == torch.bfloat16
    assert utils.get_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            with pytest.raises(InputError, match="--device"):
                utils.get_device(name)


@pytest.mark.parametrize(
    ("name", "avx512_bf16", "amx", "fast"),
    [
        ("AMD EPYC", True, False, True),
        ("AMD EPYC", False, False, False),
        ("Intel(R) Xeon(R) Processor", True, True, True),
        ("Intel(R) Xeon(R) Processor", True, False, False),
    ],
)
def test_bf16_is_taken_where_it_is_fast(monkeypatch, name, avx512_bf16, amx, fast):
    monkeypatch.setattr(utils.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(utils, "_cpu_name", lambda: name)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    cpu = torch.device("cpu")
    assert utils.has_fast_bf16(cpu) == fast
    assert utils.get_dtype("auto", cpu) == (torch.bfloat16 if fast else torch.float32)


def test_compiling_pays_for_long_runs_on_a_cpu():
    assert not utils.compiling_pays(torch.device("cpu"), 199_999, 1.0)
    assert not utils.compiling_pays(torch.device("cuda"), 10**9, 1.0)


def test_unknown_data_set():
    with pytest.raises(InputError, match="cifar10_sample"):
        utils.load_dataset("cifar100", None, True)


def test_peak_memory_counts_what_was_held():
    """In a process of its own, whose peak nothing else has raised."""
    code = """if True:
        import torch, utils
        cpu = torch.device("cpu")
        before = utils.peak_memory(cpu)
        held = torch.ones(2**29, dtype=torch.uint8)
        del held
        print(utils.peak_memory(cpu) - before)
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(out.stdout) == pytest.approx(0.5, abs=0.05)
