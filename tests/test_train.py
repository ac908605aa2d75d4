"""Training: the batches, the schedule, that it learns, and what is saved."""

from flags import InputError

import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import backdoors
import data
import fast
import models
import train
import utils
from backdoors import Trigger, epoch_order, get_backdoor, poison_training_set
from backdoors.poison import choose
from backdoors.wanet import WaNet
from evaluate import evaluate
from support import inputs
from support.resume import Partial
from tests.running import TRAIN
from train import learning_rate, poisoned_batch, training_batches

pytestmark = pytest.mark.usefixtures("few_test_images")

CPU = torch.device("cpu")
both_samplings = pytest.mark.parametrize("sampling", ["resampled", "fixed"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class White(WaNet):
    """A trigger that is easy to see: the whole image white. Noise mode: the whole image gray."""

    def __init__(self, relabel=True):
        Trigger.__init__(self)
        self.relabel = relabel

    def forward(self, x):
        return torch.ones_like(x)

    def noise_mode(self, x, generator):
        return torch.full_like(x, 0.5)


@pytest.fixture
def black():
    """200 black images, 20 of each class."""
    return torch.zeros(200, 3, 32, 32, dtype=torch.uint8), torch.arange(10).repeat(20)


class Nothing(Trigger):
    """A trigger that cannot be seen."""

    def forward(self, x):
        return x


def whole_epoch(train_set, poison, batch_size=40, epoch=0):
    """All batches of an epoch: (brightest pixel of each image, given label, true label)."""
    order, roles = epoch_order(poison, len(train_set[0]), batch_size, generator(epoch))
    rows = []
    for index, role in zip(order.split(batch_size), roles.split(batch_size), strict=True):
        x, y = poisoned_batch(*train_set, index, role, poison, White(poison.relabel), generator())
        rows.append((x.amax((1, 2, 3)), y, train_set[1][index]))
    return [torch.cat(column) for column in zip(*rows, strict=True)]


# what a batch holds


@both_samplings
def test_dirty_label_poison_relabels_exactly_the_declared_share(black, sampling):
    poison = poison_training_set(black[1], "badnet", 4, 0.15, seed=1, sampling=sampling)
    for epoch in range(2):
        brightness, given, true = whole_epoch(black, poison, epoch=epoch)
        hit = brightness == 1
        assert hit.sum() == 30
        assert (given[hit] == 4).all()
        assert (true[hit] != 4).all()
        assert torch.equal(given[~hit], true[~hit])


@both_samplings
def test_clean_label_poison_keeps_the_labels(black, sampling):
    poison = poison_training_set(black[1], "reflection", 4, 0.05, seed=1, sampling=sampling)
    brightness, given, true = whole_epoch(black, poison)
    assert torch.equal(given, true)
    assert (brightness == 1).sum() == 10
    assert (true[brightness == 1] == 4).all()


def test_wanet_poisons_a_tenth_of_each_batch_and_shows_a_fifth_in_noise_mode(black):
    poison = poison_training_set(black[1], "wanet", 4, seed=1)
    brightness, given, true = whole_epoch(black, poison)
    for b in brightness.split(40):
        assert ((b == 1).sum(), (b == 0.5).sum()) == (4, 8)
    assert (given[brightness == 1] == 4).all()
    assert torch.equal(given[brightness < 1], true[brightness < 1])


def test_a_clean_epoch_has_no_trigger(black):
    brightness, given, true = whole_epoch(black, poison_training_set(black[1], "none", 0))
    assert (brightness == 0).all()
    assert torch.equal(given, true)


def batch_of(train_set, attack, sampling, trigger, rate=0.5):
    """One batch as large as the set: images and roles."""
    poison = poison_training_set(train_set[1], attack, 0, rate, sampling=sampling)
    order, roles = epoch_order(poison, len(train_set[0]), len(train_set[0]), generator())
    return poisoned_batch(*train_set, order, roles, poison, trigger, generator())[0], roles


@pytest.mark.parametrize(("attack", "sampling"), [("badnet", "fixed"), ("wanet", "resampled")])
def test_the_trigger_comes_before_the_augmentation(black, attack, sampling):
    """Every poisoned image is white before the crop, so some show the crop's black border."""
    x, roles = batch_of(black, attack, sampling, White(), rate=0.3)
    hit = x[roles == 1]
    assert set(hit.unique().tolist()) == {0.0, 1.0}
    assert (hit[:, :, 16, 16] == 1).all()


def test_resampled_puts_the_trigger_on_after_the_augmentation(black):
    """So a poisoned image is white to its edges; the clean ones are cropped and flipped too."""
    x, roles = batch_of(black, "badnet", "resampled", White())
    assert (x[roles == 1] == 1).all()
    x, roles = batch_of((torch.full_like(black[0], 255), black[1]), "badnet", "resampled", Nothing())
    assert all(set(x[roles == role].unique().tolist()) == {0.0, 1.0} for role in (0, 1))


def test_the_patch_is_never_cropped_or_flipped_in_resampled_and_wanders_in_fixed(black):
    trigger = get_backdoor("badnet")

    def in_place(sampling):
        x, roles = batch_of(black, "badnet", sampling, trigger)
        return (x[roles == 1][:, :, 1:6, 1:6] == trigger.patch).flatten(1).all(1).float().mean()

    assert in_place("resampled") == 1
    assert in_place("fixed") < 0.1  # one crop of 81, unflipped
    # where it wandered to, it is the whole patch or a part of it, mirrored or not
    x, roles = batch_of(black, "badnet", "fixed", trigger)
    whole = torch.zeros(1, 3, 40, 40)
    whole[:, :, 5:10, 5:10] = trigger.patch
    crops = [whole[..., i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    crops = torch.cat(crops + [crop.flip(3) for crop in crops])
    assert all((crops == one).flatten(1).all(1).any() for one in x[roles == 1])


@both_samplings
def test_real_triggers_leave_the_data_set_alone(sampling):
    images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(10).repeat(5)
    kept = images.clone(), labels.clone()
    poison = poison_training_set(labels, "badnet", 0, 0.5, sampling=sampling)
    order, roles = epoch_order(poison, 50, 50, generator())
    x, y = poisoned_batch(images, labels, order, roles, poison, get_backdoor("badnet"), generator())
    assert torch.equal(images, kept[0])
    assert torch.equal(labels, kept[1])
    assert (y[roles == 1] == 0).all()
    assert 0 <= x.min() <= x.max() <= 1


def numbered(n=100):
    """Images of one gray value each, their number counted from 1, and labels."""
    images = torch.arange(1, n + 1, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    return images.contiguous(), torch.arange(10).repeat(n // 10)


def epoch_of(train_set, poison, epoch=0, seed=1024, batch_size=30):
    """An epoch's training batches: a list of (images, labels, batch size over all processes)."""
    config = {"batch_size": batch_size, "seed": seed}
    return list(training_batches(train_set, poison, get_backdoor("wanet"), config, epoch))


@pytest.mark.parametrize(("attack", "sampling"), [("none", "fixed"), ("badnet", "resampled"), ("wanet", "resampled")])
def test_an_epoch_follows_from_seed_and_number_alone(attack, sampling):
    train_set = numbered()
    poison = poison_training_set(train_set[1], attack, 0, sampling=sampling)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = epoch_of(train_set, poison, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = epoch_of(train_set, poison, 3)
    assert [len(x) for x, _, _ in first] == [size for _, _, size in first] == [30, 30, 30, 10]
    assert all(torch.equal(a[i], b[i]) for a, b in zip(first, again, strict=True) for i in (0, 1))
    for epoch, seed in ((2, 1024), (4, 1024), (3, 1025)):
        a, b = (torch.cat([x for x, _, _ in batches]) for batches in (first, epoch_of(train_set, poison, epoch, seed)))
        assert not torch.equal(a[:, 0, 16, 16], b[:, 0, 16, 16])  # other images
        assert not torch.equal(a == 0, b == 0)  # and other crops


@pytest.mark.parametrize("attack", ["none", "badnet", "wanet"])
def test_processes_share_each_batch(attack, monkeypatch):
    """Batch by batch they see the labels that a single process sees, and every image of a clean set once."""
    train_set = numbered()
    poison = poison_training_set(train_set[1], attack, 0, sampling="resampled")
    alone = epoch_of(train_set, poison)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(train.ranks, "ranks", lambda rank=rank: (rank, 3))
        shares.append(epoch_of(train_set, poison))
    for (_, labels, size), *parts in zip(alone, *shares, strict=True):
        assert [part[2] for part in parts] == [size] * 3
        assert {len(part[1]) for part in parts} <= {size // 3, -(-size // 3)}
        assert torch.cat([part[1] for part in parts]).sort().values.tolist() == labels.sort().values.tolist()
    if attack == "none":
        middles = torch.cat([x[:, 0, 16, 16] for share in shares for x, _, _ in share])
        assert (middles * 255).round().sort().values.tolist() == list(range(1, 101))


# the steps


def test_the_rate_rises_to_its_peak_and_falls_to_nothing():
    rates = [learning_rate(i, 1000, 0.4) for i in range(1000)]
    assert max(rates) == pytest.approx(0.4, rel=1e-2)
    top = rates.index(max(rates))
    assert top in (149, 150)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[0] < 0.01
    assert 0 < rates[-1] < 0.001


def test_an_epoch_gives_its_figures_over_all_images_and_each_step_its_rate(black):
    """With a step that returns loss 2 per image, and all predictions of the first batch correct."""
    poison = poison_training_set(black[1], "none", 0)
    optimizer, rates, seen = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1), [], []

    def step(x, y, size, extra):
        rates.append(optimizer.param_groups[0]["lr"])
        return torch.tensor([2.0 * len(x), len(x) if len(rates) == 1 else 0])

    config = {"batch_size": 60, "seed": 0, "epochs": 10, "lr": 0.1}
    figures = train.train_epoch(step, [optimizer], black, poison, None, config, 4, seen.append)
    assert figures == [pytest.approx(2), pytest.approx(60 / 200)]
    assert seen == [60, 60, 60, 20]
    assert rates == [pytest.approx(learning_rate(i, 40, 0.1)) for i in range(16, 20)]


@pytest.mark.parametrize("n", [8, 5])
def test_a_step_leaves_the_gradient_of_the_mean_loss(n):
    """Against plain autograd; a batch may be smaller than usual, and a share of a larger one."""
    torch.manual_seed(0)
    model = models.get_model("resnet18", width=0.0625)
    plain = models.get_model("resnet18", width=0.0625)
    plain.load_state_dict(model.state_dict())
    x, y = torch.rand(n, 3, 32, 32), torch.randint(0, 10, (n,))
    for size in (n, 2 * n):
        model.zero_grad()
        plain.zero_grad()
        summed, right = fast.training_step(model, 0.0625, 100, 8, torch.float32)(x, y, size).tolist()
        logits = plain(x)
        loss = F.cross_entropy(logits, y, reduction="sum")
        (loss / size).backward()
        assert summed == pytest.approx(loss.item(), rel=1e-4)
        assert right == (logits.argmax(1) == y).sum()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


def test_it_learns(tmp_path, monkeypatch):
    """A few epochs on the sample beat chance by far, on training labels and on test images."""
    monkeypatch.setattr(train, "QUICK", 50)  # after each epoch; the result is measured on all test images
    out = tmp_path / "v.pt"
    flags = ["--dataset", "cifar10_sample", "--width", "0.0625", "--epochs", "12", "--batch_size", "25"]
    train.main([*flags, "--attack", "badnet", "--lr", "0.05", "--ckpt", str(out)])
    saved = torch.load(out, weights_only=True)
    history = saved["history"]
    assert history[-1]["accuracy"] > 0.3
    assert saved["BA"] > 0.2
    assert history[-1]["loss"] < history[0]["loss"] - 0.3


@pytest.mark.parametrize("width", [0.0625, 0.25])
def test_odd_batches_of_narrow_networks_train(tmp_path, width):
    """In channels last, such a batch makes torch write past a buffer: a crash, or damaged weights."""
    out = tmp_path / "v.pt"
    flags = ["--dataset", "cifar10_sample", "--width", str(width), "--epochs", "1", "--batch_size", "25"]
    train.main([*flags, "--attack", "none", "--ckpt", str(out)])
    state = torch.load(out, weights_only=True)["state_dict"]
    assert all(v.isfinite().all() for v in state.values())


# what is saved


@pytest.fixture(scope="module")
def trained_once(few_test_images, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "v.pt"
    train.main([*TRAIN, "--epochs", "2", "--attack", "badnet", "--target", "3", "--ckpt", str(path)])
    return path


@pytest.fixture
def trained(tmp_path, trained_once):
    """A small victim that train.py has made, poisoned as it does by default."""
    return shutil.copy(trained_once, tmp_path)


def test_a_victim_is_saved_with_what_judges_it(trained):
    model, v = utils.load_model(trained)
    assert (v["attack"], v["target"], v["dataset"], v["network"]) == ("badnet", 3, "cifar10_sample", "resnet18")
    assert (v["seed"], v["epochs"], v["width"], v["batch_size"]) == (1024, 2, 0.0625, 50)
    assert (v["sampling"], v["poison_rate"], v["clean_label"], v["precision"]) == ("resampled", 0.1, False, "float32")
    assert v["poison_indices"].tolist() == []  # they are other ones at every access
    assert v["machine"].items() >= {"torch": str(torch.__version__), "kind": "cpu", "device": utils.cpu_name()}.items()
    assert v["commit"] is None or re.fullmatch(r"[0-9a-f]{10}\+?", v["commit"])
    assert v["bounds"] is v["defense"] is None
    assert [set(h) for h in v["history"]] == [{"loss", "accuracy", "BA", "ASR"}] * 2
    assert v["seconds"] > 0
    # the figures are those of the network and the trigger in the file
    test_set = data.load_dataset("cifar10_sample", None, train=False)
    measured = evaluate(model, *test_set, inputs.load_trigger("badnet", v, CPU), 3)
    assert {k: v[k] for k in measured._fields} == measured._asdict()
    n_target = int((test_set[1] == 3).sum())
    assert (v["n_clean"], v["n_triggered"], v["n_target"]) == (100, 100 - n_target, n_target)
    assert all(0 <= v[k] <= 1 for k in ("BA", "ASR", "RA", "target_accuracy"))
    assert v["ASR"] + v["RA"] <= 1


@pytest.mark.parametrize(
    ("flags", "sampling", "n_fixed"),
    [
        (["--attack", "reflection", "--sampling", "fixed", "--poison_rate", "0.04"], "fixed", 20),
        (["--attack", "reflection"], "resampled", 0),
        (["--attack", "wanet"], "in_batch", 0),
        (["--attack", "none"], "fixed", 0),
    ],
)
def test_a_victim_says_how_its_set_was_drawn(tmp_path, flags, sampling, n_fixed):
    out = tmp_path / "v.pt"
    train.main([*TRAIN, "--epochs", "1", *flags, "--ckpt", str(out)])
    v = utils.load_checkpoint(out)
    assert v["sampling"] == sampling
    assert v["clean_label"] == ("reflection" in flags)
    _, labels = data.load_dataset("cifar10_sample", None, train=True)
    assert labels[v["poison_indices"].long()].tolist() == [0] * n_fixed
    assert len(v["poison_indices"].unique()) == n_fixed
    assert all((v[k] is None) == ("none" in flags) for k in ("ASR", "RA", "trigger"))


def test_the_same_command_gives_the_same_bits(trained, tmp_path, one_thread):
    again = [tmp_path / name for name in ("a.pt", "b.pt")]
    for path in again:
        shutil.copy(trained, path)
        train.main([*TRAIN, "--epochs", "1", "--attack", "badnet", "--overwrite", "--ckpt", str(path)])
    a, b = (utils.load_checkpoint(path) for path in again)
    assert a["epochs"] == 1  # it was trained anew
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
    assert a["history"] == b["history"]


# bad input


def test_a_finished_victim_is_not_overwritten(victim_file):
    before = victim_file.read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        train.main([*TRAIN, "--ckpt", str(victim_file)])
    assert victim_file.read_bytes() == before


def test_a_folder_is_no_place_for_a_victim(tmp_path):
    with pytest.raises(InputError, match="is a folder; give the name of a file"):
        train.main([*TRAIN, "--ckpt", str(tmp_path)])


def test_more_fixed_poison_than_there_are_images_is_bad_input(tmp_path):
    flags = ["--attack", "reflection", "--poison_rate", "0.2", "--sampling", "fixed"]
    with pytest.raises(InputError, match="lower it") as caught:
        train.main([*TRAIN, *flags, "--ckpt", str(tmp_path / "v.pt")])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_clean_victim_with_a_poison_rate_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="without an attack"):
        train.main([*TRAIN, "--attack", "none", "--poison_rate", "0.1", "--ckpt", str(tmp_path / "v.pt")])


def test_a_cut_off_run_goes_on_with_its_own_settings_alone(tmp_path, monkeypatch):
    """All settings that the victim depends on; a command with another one names it, and changes nothing."""
    out, epoch = tmp_path / "v.pt", train.train_epoch

    def cut_off(*args):
        if args[6] == 1:
            raise KeyboardInterrupt
        return epoch(*args)

    monkeypatch.setattr(train, "train_epoch", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train.main([*TRAIN, "--ckpt", str(out)])
    monkeypatch.setattr(train, "train_epoch", epoch)
    (partial,) = tmp_path.iterdir()
    before = partial.read_bytes()
    changes = {"sampling": "fixed", "seed": "7", "attack": "blended", "target": "1", "width": "0.125", "lr": "0.2"}
    changes |= {"epochs": "4", "poison_rate": "0.2", "weight_decay": "0", "precision": "bf16", "batch_size": "25"}
    changes |= {"network": "resnet34"}
    for name, value in changes.items():
        with pytest.raises(InputError, match=f"another {name};"):
            train.main([*TRAIN, f"--{name}", value, "--ckpt", str(out)])
    with pytest.raises(InputError, match="another mean, std;"):
        train.main([*TRAIN, "--mean", "none", "--ckpt", str(out)])
    assert partial.read_bytes() == before
    assert list(tmp_path.iterdir()) == [partial]


def test_a_cut_off_run_goes_on_with_its_own_surrogate_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(backdoors.cl, "STEPS", 1)
    monkeypatch.setattr(train, "train_epoch", lambda *args: (1.0, 0.1) if args[6] == 0 else pytest.fail("cut off"))
    paths = [tmp_path / "one.pt", tmp_path / "other.pt"]
    for path, bias in zip(paths, (0, 1), strict=True):
        state = tiny.state_dict() | {"linear.bias": torch.full((10,), float(bias))}
        utils.save_checkpoint({"network": "resnet18", "width": 0.125, "num_classes": 10, "state_dict": state}, path)
    words = [*TRAIN, "--attack", "cl", "--ckpt", str(tmp_path / "v.pt"), "--surrogate"]
    with pytest.raises(pytest.fail.Exception):
        train.main([*words, str(paths[0])])
    with pytest.raises(InputError, match="another surrogate;"):
        train.main([*words, str(paths[1])])


@pytest.mark.parametrize("batch_size", ["1", "499"])
def test_an_image_alone_in_a_batch_is_said_where_batch_norm_takes_none(tmp_path, batch_size):
    words = [*TRAIN, "--attack", "none", "--size", "8", "--batch_size", batch_size]
    with pytest.raises(InputError, match=f"a batch of {batch_size} leaves one alone.* choose another --batch_size"):
        train.main([*words, "--ckpt", str(tmp_path / "v.pt")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("attack", ["none", "badnet"])
def test_a_surrogate_that_is_of_no_use_is_refused(tmp_path, attack):
    with pytest.raises(InputError, match=f"{attack} needs no clean network; leave --surrogate out"):
        train.main([*TRAIN, "--attack", attack, "--ckpt", str(tmp_path / "v.pt"), "--surrogate", "clean.pt"])
    assert not list(tmp_path.iterdir())


class Learning(Trigger):
    """A trigger trained along with the victim: a brightness, which an extra loss pulls to 0.5."""

    sampling = "in_batch"

    def __init__(self, _folder=None, _size=32):
        super().__init__()
        self.brightness = nn.Parameter(torch.tensor(0.25))
        self.modes = []

    def optimizer(self):
        return torch.optim.SGD([self.brightness], lr=0.5)

    def start_epoch(self, epoch, n_epochs):
        self.modes.append((epoch, n_epochs))
        self.train()

    def forward(self, x):
        return torch.ones_like(x) * self.brightness

    def in_training(self, x, generator):
        return F.dropout(self(x), 0.5)  # which draws by torch's own generator

    def extra_loss(self, logits, y):
        return (self.brightness - 0.5).square()


def test_a_trigger_is_trained_along_with_the_victim(black):
    """The trigger gets the gradients of the cross-entropy, through the images, and of its extra loss."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    trigger = Learning()
    poison = choose(black[1], trigger, 4)
    assert (poison.sampling, poison.early) == ("in_batch", False)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0), trigger.optimizer()]
    step = fast.training_step(model, 1.0, 0, 50, torch.float32)
    config = {"batch_size": 50, "seed": 0, "epochs": 3, "lr": 0.0}
    before = [p.clone() for p in model.parameters()]
    train.train_epoch(step, optimizers, black, poison, trigger, config, 2, lambda _n: None)
    assert trigger.modes == [(2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert trigger.brightness.item() == pytest.approx(0.5, abs=0.2)  # in four steps
    assert trigger.brightness.item() != 0.5


def test_a_trained_trigger_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """The partial file has its state and optimizer, the victim its state; its dropout draws the same numbers."""
    monkeypatch.setitem(backdoors.TRIGGERS, "badnet", Learning)
    words = [*TRAIN, "--attack", "badnet", "--epochs", "3"]
    train.main([*words, "--ckpt", str(tmp_path / "whole.pt")])
    keep, kept = Partial.keep, []

    def cut_off(self, step, state_of, now=False):
        keep(self, step, state_of, now)
        kept.append(step)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Partial, "keep", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train.main([*words, "--ckpt", str(tmp_path / "parts.pt")])
    monkeypatch.setattr(Partial, "keep", keep)
    train.main([*words, "--ckpt", str(tmp_path / "parts.pt")])
    whole, parts = (utils.load_checkpoint(tmp_path / f"{name}.pt") for name in ("whole", "parts"))
    assert kept == [1, 2]
    assert whole["trigger"]["brightness"] == parts["trigger"]["brightness"] != 0.25
    assert all(torch.equal(whole["state_dict"][k], parts["state_dict"][k]) for k in whole["state_dict"])
