"""The evaluator: what BA and ASR are, on models whose figures are known."""

import pytest
import torch
from torch import nn

import utils
from evaluate import evaluate, main

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
def test_the_command(victim_file, tmp_path, capsys, attack):
    main(["--dataset", "cifar10_sample", "--attack", attack, "--ckpt", str(victim_file), "--outdir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "a part of CIFAR-10's 10,000" in out
    assert "Benign accuracy: 6" in out or "Benign accuracy: 7" in out
    assert (attack not in ("badnet", "none")) == ("trained with attack badnet" in out)
    picture = tmp_path / f"demo_{attack}.png"
    assert picture.exists() == (attack != "none")
