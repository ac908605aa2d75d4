"""How images are normalized: the flags, what a file says, and the trial of the known ways on clean images."""

import flags
from flags import NORMALIZATIONS, InputError

import numpy as np
import pytest
import torch

import data
import defend
import evaluate
import models
import train
import unit
import utils
from support import foreign
from tests.running import SMALL, TRAIN

AUTHORS, NONE, HALF = (NORMALIZATIONS[name] for name in ("authors", "none", "half"))


class Reader(models.Normalized):
    """Says the class by the mean of the normalized image, in steps of `step` from `start`."""

    def __init__(self, start, step):
        super().__init__()
        self.register_buffer("places", start + step * torch.arange(10.0))

    def forward(self, x):
        return -(self.normalize(x).mean((1, 2, 3))[:, None] - self.places).abs()


def coded(n):
    """Gray images whose brightness tells the class, and their labels."""
    labels = torch.arange(n) % 10
    return (labels * 25).to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous(), labels


@pytest.mark.parametrize(("name", "start", "step"), [("none", 0, 25 / 255), ("half", -1, 50 / 255)])
def test_the_normalization_that_fits_is_found(name, start, step):
    images, labels = coded(1200)
    model = Reader(start, step)
    before = model.mean.clone()
    tried, close = foreign.try_normalizations(model, images, labels)
    assert torch.equal(model.mean, before)
    assert (tried[0].name, tried[0].accuracy, close) == (name, 1.0, 1)
    assert {t.name for t in tried} == set(NORMALIZATIONS)
    assert all(t.accuracy < 0.6 and t.n == 250 for t in tried[1:])  # the others see no more images than it takes


def test_normalizations_that_are_all_alike_are_told_so():
    class Constant(Reader):
        def forward(self, x):
            return self.places.expand(len(x), 10)

    images, labels = coded(1200)
    tried, close = foreign.try_normalizations(Constant(0, 1), images, labels, also=((0.3, 0.3, 0.3), (1, 1, 1)))
    assert close == len(tried) == len(NORMALIZATIONS) + 1
    assert {t.n for t in tried} == {1200}
    assert [t.accuracy for t in tried] == pytest.approx([0.1] * len(tried))


def test_what_is_clearly_better():
    a = torch.zeros(100, dtype=torch.bool)
    b = a.clone()
    a[:9] = True  # nine images that a alone gets right: three standard deviations
    assert not foreign.clearly_better(a, b)
    a[9] = True
    assert foreign.clearly_better(a, b)
    assert not foreign.clearly_better(b, a)
    b[50:56] = True
    assert not foreign.clearly_better(a, b)


def settle(checkpoint, asked, images=coded(1000), start=0.0, step=25 / 255):  # noqa: B008
    def clean():
        if images is None:
            raise InputError("there are no images")
        return images

    model = Reader(start, step)
    line = foreign.settle_normalization("x.pt", model, checkpoint, asked, clean)
    assert model.mean.flatten().tolist() == pytest.approx(checkpoint["mean"])
    assert model.std.flatten().tolist() == pytest.approx(checkpoint["std"])
    return line, (checkpoint["mean"], checkpoint["std"])


def test_a_file_that_says_nothing_is_tried_and_that_is_said():
    for asked in (None, "auto"):
        line, taken = settle({"mean": None, "std": None}, asked)
        assert taken == NONE
        assert line.startswith("warning: how x.pt normalizes its images was tried on clean ones: none 100.0, ")
        assert "Taking none; give --mean" in line
        assert "\n" not in line
    with pytest.raises(InputError, match="how x.pt normalizes its images is not known; give --mean"):
        settle({"mean": None, "std": None}, None, None)


def test_a_poor_fit_is_said():
    line, _ = settle({"mean": None, "std": None}, None, start=100.0)
    assert "though none does well" in line


def test_what_is_given_is_taken_and_doubted():
    line, taken = settle({"mean": None, "std": None}, NONE)
    assert (line, taken) == (None, NONE)
    line, taken = settle({"mean": None, "std": None}, HALF)
    assert taken == HALF
    assert line.startswith("warning: x.pt does better on clean images with --mean none: none 100.0, ")
    line, taken = settle({"mean": None, "std": None}, HALF, None)
    assert line == "note: the normalization of x.pt could not be checked (there are no images)"


def test_what_a_file_says_is_taken_and_doubted():
    assert settle({"mean": NONE[0], "std": NONE[1]}, None) == (None, NONE)
    line, taken = settle({"mean": HALF[0], "std": HALF[1]}, None)
    assert taken == HALF
    assert "with --mean none" in line
    line, taken = settle({"mean": HALF[0], "std": HALF[1]}, "auto")
    assert taken == NONE
    odd = (0.1, 0.1, 0.1), (0.9, 0.9, 0.9)  # no known one
    line, taken = settle({"mean": odd[0], "std": odd[1]}, None, start=-0.1 / 0.9, step=25 / 255 / 0.9)
    assert (line, taken) == (None, odd)


def test_a_file_of_ours_is_believed_without_a_look():
    own = {"mean": list(HALF[0]), "std": list(HALF[1]), "format": 1}
    assert settle(dict(own), None, None) == (None, HALF)
    line, taken = settle(dict(own), NONE, None)
    assert taken == NONE
    assert line == "warning: x.pt was trained with mean 0.5 0.5 0.5 and std 0.5 0.5 0.5, not with the ones given"
    assert settle(dict(own), "auto")[1] == NONE


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ([], None),
        (["--mean", "none"], NONE),
        (["--mean", "half", "--std", "half"], HALF),
        (["--std", "half"], HALF),
        (["--mean", "auto"], "auto"),
        (["--mean", "0.1", "0.2", "0.3", "--std", "1", "2", "3"], ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))),
        (["--mean", "-0.1", "0", "0", "--std", "1", "2", "3"], ((-0.1, 0.0, 0.0), (1.0, 2.0, 3.0))),
    ],
)
def test_the_flags_of_the_normalization(words, want):
    assert flags.normalization(flags.parser("evaluate.py").parse_args(words)) == want


@pytest.mark.parametrize(
    "words",
    [
        ["--mean", "0.1", "0.2", "0.3"],
        ["--std", "1", "1", "1"],
        ["--mean", "0", "0", "--std", "1", "1"],
        ["--mean", "0", "0", "0", "--std", "1", "1", "0"],
        ["--mean", "none", "--std", "half"],
        ["--mean", "none", "--std", "1", "1", "1"],
        ["--mean", "none", "none"],
        ["--mean", "none", "0", "0", "--std", "1", "1", "1"],
    ],
)
def test_half_a_normalization_is_refused(words):
    with pytest.raises(InputError, match="give --mean and --std three numbers each"):
        flags.normalization(flags.parser("evaluate.py").parse_args(words))


@pytest.mark.parametrize("script", ["evaluate.py", "train.py"])
def test_a_normalization_of_images_up_to_255_is_refused(script):
    words = ["--mean", "125", "122", "113", "--std", "51", "50", "51"]
    with pytest.raises(InputError, match="divide them by 255"):
        flags.normalization(flags.parser(script).parse_args(words))


def test_the_measured_normalizations_stand_in_the_flags():
    assert NORMALIZATIONS["authors"] == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert NORMALIZATIONS["backdoorbench"] == ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))


# --- the commands -----------------------------------------------------------------------------------------------------


def about_defended(path):
    """What evaluate.py takes from a defended model where no flag says it."""
    saved = utils.load_checkpoint(path)
    return saved["std"], saved["attack"], saved["dataset"], saved["size"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.usefixtures("few_test_images", "few_tries")
def test_a_bare_file_is_tried_by_the_commands_and_its_normalization_kept(tiny, tmp_path, capsys):
    """The small victim, for raw images: its first layers take over the normalization, but for the padded border."""
    raw = {k: v.clone() for k, v in tiny.state_dict().items()}
    mean, std = (torch.tensor(v) for v in AUTHORS)
    weight = raw["conv1.weight"] / std[:, None, None]
    raw["bn1.running_mean"] += (weight * mean[:, None, None]).sum((1, 2, 3))
    raw["conv1.weight"] = weight
    torch.save(raw, tmp_path / "raw.pt")
    given = [*SMALL, "--attack", "none", "--outdir", str(tmp_path)]
    evaluate.main([*given, "--ckpt", str(tmp_path / "raw.pt")])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(
        f"warning: how {tmp_path / 'raw.pt'} normalizes its images was tried on clean ones: none "
    )
    assert "Taking none" in said[0]
    ba = float(said[-1].split()[1])
    evaluate.main([*given, "--ckpt", str(tmp_path / "raw.pt"), "--mean", "authors"])
    said = capsys.readouterr().out.splitlines()
    assert "does better on clean images with --mean none" in said[0]
    assert float(said[-1].split()[1]) < ba - 20
    more = ["--out", str(tmp_path / "d.pt"), "--results", str(tmp_path)]
    unit.main([*given, *more, "--ckpt", str(tmp_path / "raw.pt"), "--n_steps", "1", "--data_rate", "0.2"])
    assert about_defended(tmp_path / "d.pt") == ((1.0, 1.0, 1.0), "none", "cifar10_sample", 32)
    ft = ["--defense", "ft", "--epochs", "1", "--data_rate", "0.2"]
    defend.main([*given[:-2], *more, "--ckpt", str(tmp_path / "raw.pt"), *ft])
    assert about_defended(tmp_path / "d.pt") == ((1.0, 1.0, 1.0), "none", "cifar10_sample", 32)


@pytest.mark.usefixtures("undrawn")
def test_of_a_small_set_all_training_images_are_tried(tiny, tmp_path, capsys):
    images, labels = data.load_dataset("cifar10_sample", None, train=False)[0][:30].numpy(), np.arange(30) % 10
    np.savez(tmp_path / "s.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    torch.save(tiny.state_dict(), tmp_path / "m.pt")
    places = ["--ckpt", str(tmp_path / "m.pt"), "--dataset", str(tmp_path / "s.npz")]
    evaluate.main([*SMALL, *places, "--attack", "none", "--outdir", str(tmp_path)])
    assert " % of 30. Taking " in capsys.readouterr().out


def test_a_new_victim_keeps_the_normalization_that_it_was_given(tmp_path):
    out = tmp_path / "v.pt"
    short = [*TRAIN, "--epochs", "1", "--attack", "none", "--ckpt", str(out), "--network", "wideresnet16"]
    train.main([*short, "--mean", "half", "--width", "0.25"])
    model, checkpoint = utils.load_model(out)
    assert (checkpoint["mean"], checkpoint["std"]) == NORMALIZATIONS["half"]
    assert checkpoint["network"] == "wideresnet16"
    assert model.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    for odd in (["--mean", "auto"], ["--network", "torchvision:resnet18"]):
        with pytest.raises(InputError):
            train.main([*short, "--overwrite", *odd])
    dbd = ["--defense", "dbd", "--network", "vit", "--out", str(tmp_path / "x.pt"), "--results", str(tmp_path)]
    with pytest.raises(InputError, match="last layer is named `linear`"):
        defend.main([*SMALL, *dbd])
