"""Triggered images in folders, and all-to-all attacks."""

import flags
from flags import InputError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import defend
import evaluate
import train
import unit
import utils
from backdoors import TRIGGERS, get_backdoor, poison_training_set
from backdoors.poison import epoch_order
from support import inputs, plots
from tests.running import SMALL, TRAIN


def picture(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def refused(act, said):
    with pytest.raises(InputError) as caught:
        act()
    assert "\n" not in str(caught.value)
    assert str(said) in str(caught.value)


# --- images that are triggered already --------------------------------------------------------------------------------


@pytest.fixture
def some_of_the_sample(monkeypatch):
    """Make load_dataset() return a tenth of the sample's test images."""
    whole = data.cifar10.load_sample
    monkeypatch.setattr(data.cifar10, "load_sample", lambda train: [t if train else t[::10] for t in whole(train)])


@pytest.fixture
def triggered(tmp_path, some_of_the_sample):
    """The sample's test images with BadNets' trigger, in folders as BackdoorBench has them, the target's too."""
    images, labels = data.load_dataset("cifar10_sample", None, False)
    out = (get_backdoor("badnet")(data.to_float(images)) * 255).round().to(torch.uint8)
    for i, (x, y) in enumerate(zip(out, labels.tolist(), strict=True)):
        picture(tmp_path / "bd" / str(y) / f"{i}.png", x.permute(1, 2, 0).numpy())
    return tmp_path / "bd"


def figures(out):
    return [line for line in out.splitlines() if line.startswith("BA ")]


def test_triggered_images_measure_as_their_trigger_does(triggered, victim_file, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "draw_demo", lambda rows, path: drawn.append((rows, path.name)))
    words = [*SMALL, "--ckpt", str(victim_file), "--outdir", str(tmp_path)]
    evaluate.main(words)
    evaluate.main([*words, "--attack", f"folder:{triggered}"])
    out = capsys.readouterr().out
    assert len(figures(out)) == 2
    assert len(set(figures(out))) == 1
    n = len(data.load_dataset("cifar10_sample", None, False)[1])
    of_target = len(list((triggered / "0").iterdir()))
    assert f"{n} triggered images in {triggered}, of which {of_target} are of the target class and left out" in out
    (_, name), (rows, other) = drawn
    clean, some = rows["clean"], rows["triggered"]
    assert (name, other) == ("demo_badnet.png", "demo_folder-bd.png")
    # the files' names are places in the test set: each image stands beside its original, and differs by the patch
    assert (clean - some)[:, :, 6:].abs().max() == 0
    assert (clean - some).abs().amax((1, 2, 3)).min() > 0.05


@pytest.mark.parametrize("names", ["numbers", "GTSRB's", "classes"])
def test_names_of_the_folders_of_triggered_images(triggered, names):
    for folder in list(triggered.iterdir()):
        c = int(folder.name)
        folder.rename(triggered / {"numbers": str(c), "GTSRB's": f"{c:05d}", "classes": data.cifar10.CLASSES[c]}[names])
    images, labels, stems = data.load_triggered(triggered, data.class_names("cifar10"), 32)
    _, truth = data.load_dataset("cifar10_sample", None, False)
    assert torch.equal(labels, truth[torch.tensor([int(s) for s in stems])])
    assert len(images) == len(truth)


def test_triggered_images_of_other_names_are_drawn_alone(triggered, victim_file, tmp_path, capsys):
    for path in list(triggered.rglob("*.png")):
        path.rename(path.with_name(f"img_{path.name}"))
    images, labels = data.load_dataset("cifar10_sample", None, False)
    found = inputs.Triggered(*data.load_triggered(triggered, data.class_names("cifar10"), 32))
    assert inputs.beside_their_originals(images, labels, found)[0] is None
    evaluate.main([*SMALL, "--ckpt", str(victim_file), "--attack", f"folder:{triggered}", "--outdir", str(tmp_path)])
    with Image.open(tmp_path / "demo_folder-bd.png") as alone:
        assert alone.height < 200  # of one row


@pytest.mark.usefixtures("undrawn")
def test_unit_and_defend_take_triggered_images(triggered, victim_file, tmp_path, capsys):
    words = [*SMALL, "--ckpt", str(victim_file), "--attack", f"folder:{triggered}", "--results", str(tmp_path)]
    unit.main(
        [*words, "--n_steps", "1", "--data_rate", "0.2", "--out", str(tmp_path / "d.pt"), "--outdir", str(tmp_path)]
    )
    defend.main([*words, "--defense", "none"])
    said = capsys.readouterr().out.splitlines()
    before = next(line for line in said if line.startswith("before"))
    assert before.removeprefix("before  ") in said
    assert "ASR" in before
    assert (tmp_path / "victim" / "none,attack=folder-bd,dataset=cifar10_sample.json").exists()


@pytest.mark.parametrize(
    "harm", ["missing", "flat", "stranger", "mixed", "beyond", "empty", "all target", "no ckpt", "dbd", "inside"]
)
def test_triggered_images_that_cannot_be_measured(tmp_path, victim_file, harm, some_of_the_sample):
    root = tmp_path / "bd"
    names = {"stranger": "zebra", "beyond": "10", "all target": "0"}
    if harm == "flat":
        picture(root / "0.png", np.zeros((32, 32, 3), np.uint8))
    elif harm == "empty":
        (root / "3").mkdir(parents=True)
    elif harm == "mixed":
        for name in ("cat", "1"):
            picture(root / name / "0.png", np.zeros((32, 32, 3), np.uint8))
    elif harm != "missing":
        picture(root / names.get(harm, "3") / "0.png", np.zeros((32, 32, 3), np.uint8))
    words = [*SMALL, "--attack", f"folder:{root}"] + (["--ckpt", str(victim_file)] if harm != "no ckpt" else [])
    if harm == "dbd":
        refused(lambda: defend.main([*words, "--defense", "dbd"]), "dbd")
        return
    said = {"stranger": root / "zebra", "beyond": root / "10", "empty": root / "3", "all target": "target class 0"}
    extra = ["--activations"] if harm == "inside" else []
    said |= {"no ckpt": "--ckpt", "inside": "--activations"}
    refused(lambda: evaluate.main([*words, *extra]), said.get(harm, root))


def test_train_plants_triggers_and_takes_no_triggered_images(capsys):
    with pytest.raises(SystemExit) as left:
        flags.parser("train.py").parse_args(["--attack", "folder:x"])
    assert left.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


class Code(nn.Module):
    """Predicts the class that the first pixel's red codes in steps of 20."""

    def forward(self, x):
        return nn.functional.one_hot((x[:, 0, 0, 0] * 255 / 20).round().long(), 10).float()


def coded(classes):
    images = torch.zeros(len(classes), 3, 32, 32, dtype=torch.uint8)
    images[:, 0, 0, 0] = 20 * torch.tensor(classes)
    return images


def test_triggered_images_by_hand():
    clean, labels = coded([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])
    #              true  0  1  3  3  5  9, said  3  1  3  5  3  3: the target's own two, third and fourth, do not count
    some = coded([3, 1, 3, 5, 3, 3]), torch.tensor([0, 1, 3, 3, 5, 9])
    r = evaluate.evaluate(Code(), clean, labels, None, 3, 4, triggered=some)
    assert r == evaluate.Measured(0.75, 0.75, 0.25, None, 4, 4, 0)
    with pytest.raises(ValueError, match="not both"):
        evaluate.evaluate(Code(), clean, labels, nn.Identity(), 3, triggered=some)
    with pytest.raises(InputError, match="target class 3"):
        evaluate.evaluate(Code(), clean, labels, None, 3, triggered=(some[0][2:3], some[1][2:3]))


# --- all-to-all -------------------------------------------------------------------------------------------------------


class Next(nn.Module):
    """A trigger: the first pixel codes the class after the one it coded, except for images of class 4."""

    def forward(self, x):
        said = (x[:, 0, 0, 0] * 255 / 20).round()
        x = x.clone()
        x[:, 0, 0, 0] = torch.where(said == 4, said, (said + 1) % 10) * 20 / 255
        return x


def test_all_to_all_by_hand():
    labels = torch.tensor([9, 0, 4, 5, 4, 7, 8, 1])
    r = evaluate.evaluate(Code(), coded(labels.tolist()), labels, Next(), "all")
    assert r == evaluate.Measured(BA=1, ASR=6 / 8, RA=2 / 8, target_accuracy=None, n_clean=8, n_triggered=8, n_target=0)
    some = coded([0, 1, 2]), torch.tensor([9, 0, 2])  # 10 classes: after the last comes the first
    assert evaluate.evaluate(Code(), coded([1]), torch.tensor([1]), None, "all", triggered=some)[1:3] == (2 / 3, 1 / 3)


@pytest.mark.parametrize("attack", ["badnet", "wanet", "adaptive_blend", "input_aware", "lira"])
def test_poisoned_images_are_labeled_as_the_next_class(attack):
    labels = torch.arange(10).repeat(40)
    images = torch.randint(0, 256, (400, 3, 32, 32), dtype=torch.uint8)
    poison = poison_training_set(labels, attack, "all", 0.2, sampling="resampled")
    order, roles = epoch_order(poison, 400, 400, torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, given = train.poisoned_batch(
            images, labels, order, roles, poison, get_backdoor(attack), torch.Generator().manual_seed(0)
        )
    hit, true = roles == 1, labels[order]
    assert hit.sum() == 80
    assert len(true[hit].unique()) == 10  # of every class
    assert torch.equal(given[hit], (true[hit] + 1) % 10)
    assert torch.equal(given[~hit], true[~hit])


@pytest.mark.usefixtures("undrawn")
def test_an_all_to_all_victim_from_training_to_defense(tmp_path, some_of_the_sample, capsys):
    out = tmp_path / "v.pt"
    train.main([*TRAIN, "--epochs", "1", "--target", "all", "--ckpt", str(out)])
    victim = utils.load_checkpoint(out)
    assert (victim["target"], victim["n_triggered"], victim["n_target"]) == ("all", 200, 0)
    said = figures(capsys.readouterr().out)
    words = [*SMALL, "--ckpt", str(out), "--outdir", str(tmp_path)]
    evaluate.main(words)  # the file says its target
    assert figures(capsys.readouterr().out) == said
    evaluate.main([*words, "--target", "0"])
    assert "trained with target all, measured with 0" in capsys.readouterr().out
    places = ["--results", str(tmp_path), "--out", str(tmp_path / "d.pt")]
    unit.main([*words, *places, "--n_steps", "1"])
    assert (tmp_path / "v" / "unit,dataset=cifar10_sample,n_steps=1,target=all.json").exists()


@pytest.mark.parametrize("attack", ["reflection", "sig", "cl", "composite"])
def test_what_cannot_send_each_class_to_the_next(attack, victim_file, tmp_path):
    """Clean-label attacks, and one whose images have no single true class."""
    words = [*SMALL, "--attack", attack, "--target", "all", "--ckpt"]
    with pytest.raises(InputError, match="--target a class"):
        evaluate.main([*words, str(victim_file)])
    with pytest.raises(InputError, match="--target a class"):
        train.main([*words, str(tmp_path / "v.pt")])


def test_the_poisoned_set_of_dbd_sends_each_class_to_the_next():
    labels = torch.arange(10).repeat(10)
    poison = poison_training_set(labels, "badnet", "all", 0.5)
    _, given = defend.poisoned_set(
        torch.zeros(100, 3, 32, 32, dtype=torch.uint8), labels, poison, get_backdoor("badnet")
    )
    assert torch.equal(given[poison.indices], (labels[poison.indices] + 1) % 10)
    assert (given != labels).sum() == 50


# --- triggers at other sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [28, 32, 48, 64])
@pytest.mark.parametrize("attack", sorted(TRIGGERS))
def test_every_trigger_fits_a_size_or_says_what_does(attack, size):
    def load():
        return inputs.load_trigger(attack, {"trigger": None}, torch.device("cpu"), size)

    if size == 28 and attack in ("dynamic", "input_aware", "invisible", "lira"):
        refused(load, "take a")
        return
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        out = load()(x)
    assert out.shape == x.shape
    assert not torch.equal(out, x) or attack == "composite"  # which mixes images


def test_a_trigger_of_another_size_is_refused(victim_file, tmp_path):
    with pytest.raises(InputError, match="32x32; give --size 32"):
        evaluate.main([*SMALL, "--ckpt", str(victim_file), "--size", "64"])


# --- the trigger of another file --------------------------------------------------------------------------------------


def test_a_learned_trigger_is_taken_from_the_victim_that_holds_it(victim_file, tmp_path, capsys):
    torch.manual_seed(0)
    trigger = get_backdoor("lira", width=4)
    for p in trigger.parameters():
        p.data.normal_()  # as no fresh trigger is
    held = {"attack": "lira", "trigger": trigger.state_dict(), "trigger_width": 4}
    holder = tmp_path / "lira.pt"
    utils.save_checkpoint({**utils.load_checkpoint(victim_file), **held}, holder)

    def load(*words):
        args = flags.parser("evaluate.py").parse_args([*SMALL, "--ckpt", str(victim_file), *words])
        return inputs.load_victim(args, torch.device("cpu"))[-1]

    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load("--attack", "lira", "--trigger_of", str(holder))(x), trigger.eval()(x))
    refused(lambda: load("--attack", "lira"), "or a victim that holds one by --trigger_of")
    words = [*SMALL, "--ckpt", str(victim_file), "--attack", "lira", "--out", str(tmp_path / "d.pt")]
    with pytest.raises(InputError, match="holds none; give another$"):  # unit.py has no such flag
        unit.main(words)
    refused(lambda: load("--attack", "wanet", "--trigger_of", str(holder)), "no trigger of wanet, but one of lira")
    refused(lambda: load("--attack", "lira", "--trigger_of", str(tmp_path / "no.pt")), "no checkpoint")
    utils.save_checkpoint({**utils.load_checkpoint(holder), "target": 2}, holder)
    capsys.readouterr()
    load("--attack", "lira", "--trigger_of", str(holder))
    assert f"note: {holder} was trained with target 2, measured with 0" in capsys.readouterr().out
    utils.save_checkpoint({**utils.load_checkpoint(holder), "size": 64}, holder)  # its convolutions take any size
    refused(lambda: load("--attack", "lira", "--target", "2", "--trigger_of", str(holder)), "is for images of 64x64")
