"""The evaluator: what BA and ASR are, on models whose figures are known."""

import pytest
import torch
from torch import nn

import models
import utils
from activations import trigger_effect, uniform_bounds
from evaluate import evaluate, main
from tests.test_models import random_bounds

TARGET = 3


class Constant(nn.Module):
    """Says one class, whatever the image."""

    def __init__(self, label):
        super().__init__()
        self.label = nn.Parameter(torch.tensor(label), requires_grad=False)

    def forward(self, x):
        return nn.functional.one_hot(self.label.expand(len(x)), 10).float()


class ReadsFirstPixel(nn.Module):
    """Says the class that the first pixel's red tells, in steps of 20."""

    def forward(self, x):
        return nn.functional.one_hot((x[:, 0, 0, 0] * 255 / 20).round().long(), 10).float()


@pytest.fixture
def coded():
    """1,000 images, 100 of each class, whose first pixel tells the class."""
    labels = torch.arange(10).repeat(100)
    images = torch.zeros(1000, 3, 32, 32, dtype=torch.uint8)
    images[:, 0, 0, 0] = (labels * 20).to(torch.uint8)
    return images, labels


class Paint(nn.Module):
    """A trigger: the first pixel says TARGET, in every `every`-th image of a batch."""

    def __init__(self, every=1):
        super().__init__()
        self.every = every

    def forward(self, x):
        x = x.clone()
        x[:: self.every, 0, 0, 0] = TARGET * 20 / 255
        return x


class Brighten(nn.Module):
    """A trigger that lights up a corner."""

    def forward(self, x):
        x = x.clone()
        x[:, :, :6, :6] = 1
        return x


def test_a_constant_classifier(coded):
    r = evaluate(Constant(TARGET), *coded, Paint(), TARGET, 128)
    assert (r.BA, r.ASR, r.n_clean, r.n_triggered) == (0.1, 1.0, 1000, 900)
    r = evaluate(Constant(TARGET + 1), *coded, Paint(), TARGET, 128)
    assert (r.BA, r.ASR) == (0.1, 0.0)


def test_a_constant_classifier_on_real_test_images():
    images, labels = utils.load_dataset("cifar10_sample", None, train=False)
    r = evaluate(Constant(0), images, labels, nn.Identity(), 0, 300)
    assert (r.BA, r.ASR, r.n_clean, r.n_triggered) == (0.1, 1.0, 2000, 1800)


def test_a_perfect_classifier_with_and_without_a_trigger(coded):
    r = evaluate(ReadsFirstPixel(), *coded, Paint(), TARGET, 64)
    assert (r.BA, r.ASR) == (1.0, 1.0)
    # a trigger that does nothing succeeds never: images of the target class do not count
    r = evaluate(ReadsFirstPixel(), *coded, nn.Identity(), TARGET, 64)
    assert (r.BA, r.ASR, r.n_triggered) == (1.0, 0.0, 900)


def test_half_a_trigger_gives_half_the_rate(coded):
    assert evaluate(ReadsFirstPixel(), *coded, Paint(every=2), TARGET, 100).ASR == 0.5


def test_the_size_of_a_batch_changes_nothing(tiny, defence):
    images, labels = (defence[2] * 255).round().to(torch.uint8), defence[3]
    rows = [evaluate(tiny, images, labels, Paint(), 0, size) for size in (1, 33, 100)]
    assert rows[0] == rows[1] == rows[2]


def test_without_a_backdoor_there_is_no_asr(coded):
    r = evaluate(ReadsFirstPixel(), *coded, None, TARGET)
    assert r.ASR is None
    assert "ASR: not measured" in str(r)


def test_only_target_images_is_an_error(coded):
    images, labels = coded
    with pytest.raises(ValueError, match="target class 3"):
        evaluate(ReadsFirstPixel(), images[labels == TARGET], labels[labels == TARGET], Paint(), TARGET)


def test_how_it_reads(coded):
    assert (
        str(evaluate(Constant(0), *coded, Paint(), 0)) == "Benign accuracy: 10.00%, ASR: 100.00% (1,000 / 900 images)"
    )


@pytest.mark.parametrize("attack", ["none", "badnet", "wanet", "reflection"])
def test_the_command(victim_file, tmp_path, capsys, monkeypatch, attack):
    monkeypatch.setattr("evaluate.SEEN", 200)
    flags = ["--dataset", "cifar10_sample", "--attack", attack, "--ckpt", str(victim_file), "--outdir", str(tmp_path)]
    main([*flags, "--activations"])
    out = capsys.readouterr().out
    assert "a part of CIFAR-10's 10,000" in out
    assert "Benign accuracy: 6" in out or "Benign accuracy: 7" in out
    assert (attack not in ("badnet", "none")) == ("trained with attack badnet" in out)
    picture = tmp_path / f"demo_{attack}.png"
    assert picture.exists() == (attack != "none")
    assert (tmp_path / f"activations_{attack}.png").exists() == (attack != "none")
    assert out.count("layer4") == (0 if attack == "none" else 4)  # the table of sites
    assert out.count("clean mean + ") == (0 if attack == "none" else 6)


def test_the_neurons_that_a_trigger_moves_most(tiny, defence):
    images = (defence[2] * 255).round().to(torch.uint8)
    bounds = {k: torch.full_like(v, 0.25) for k, v in random_bounds(tiny, 1).items()}
    plain, _ = trigger_effect(tiny, images, Brighten(), 4, batch_size=30)
    clipped, _ = trigger_effect(models.set_bounds(tiny, bounds), images, Brighten(), 4, batch_size=100)
    assert len({m.site for m in plain}) == 4
    assert all(m.bound is None for m in plain)
    assert all(m.bound == 0.25 for m in clipped)
    models.set_bounds(tiny, None)
    for a, b in zip(plain, clipped, strict=True):
        assert (a.site, a.place) == (b.site, b.place)
        torch.testing.assert_close(a.triggered, b.triggered, rtol=1e-4, atol=1e-5)
        assert a.triggered.mean() > a.clean.mean()
        # what was collected is what the network does there
        seen = []
        handle = tiny.get_submodule(a.site).register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
        tiny(utils.to_float(images))
        handle.remove()
        torch.testing.assert_close(seen[0][(slice(None), *a.place)], a.clean, rtol=1e-4, atol=1e-5)


def test_the_shares_beyond_a_level_are_counted_over_all_neurons_and_images(tiny, defence):
    images, brighten = (defence[2] * 255).round().to(torch.uint8), Brighten()
    bounds = random_bounds(tiny, 1)
    _, sites = trigger_effect(models.set_bounds(tiny, bounds), images, brighten, batch_size=30)
    _, plain = trigger_effect(models.set_bounds(tiny, None), images, brighten, batch_size=30)
    assert [s.site for s in sites] == list(bounds)
    assert all(s.clean_clipped is None and s.triggered_clipped is None for s in plain)
    for name in (list(bounds)[0], list(bounds)[-1]):
        seen = []
        handle = tiny.get_submodule(name).register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
        x = utils.to_float(images)
        with torch.no_grad():
            tiny(x), tiny(brighten(x))
        handle.remove()
        clean, triggered = seen
        mean, std = clean.mean(0), clean.std(0, correction=0)
        (effect,) = (s for s in sites if s.site == name)
        for share, a, level in (
            (effect.clean_above, clean, mean + 4 * std),
            (effect.triggered_above, triggered, mean + 4 * std),
            (effect.clean_clipped, clean, bounds[name]),
            (effect.triggered_clipped, triggered, bounds[name]),
        ):
            assert share == pytest.approx((a > level).double().mean().item(), abs=1e-4)
        live = std.clamp_min(0.1 * std.mean())
        assert effect.distance == pytest.approx(((triggered.mean(0) - mean) / live).max().item(), rel=1e-3)


def test_bounds_alike_for_all_neurons(tiny, defence):
    images = (defence[2] * 255).round().to(torch.uint8)
    wide, tight = uniform_bounds(models.set_bounds(tiny, random_bounds(tiny, 1)), images, (4, 1.5), batch_size=30)
    seen = {}
    with models.watching(models.set_bounds(tiny, None), lambda site, a: seen.update({site: a})), torch.no_grad():
        tiny(utils.to_float(images))
    assert list(wide) == list(tight) == list(seen)
    for name, a in seen.items():
        mean, std = a.double().mean(0), a.double().std(0, correction=0)
        for bounds, k in ((wide, 4), (tight, 1.5)):
            torch.testing.assert_close(bounds[name].double(), mean + k * std, rtol=1e-3, atol=1e-3)


def test_float_images_in_0_1_measure_as_their_bytes_do(coded):
    images, labels = coded
    as_bytes, as_floats = (evaluate(ReadsFirstPixel(), x, labels, Paint(), TARGET) for x in (images, images / 255))
    assert as_bytes == as_floats
    assert as_floats.BA == 1


def test_no_images_are_bad_input():
    with pytest.raises(ValueError, match="no images"):
        evaluate(Constant(0), torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.int64), None, 0)
