"""Training: what a batch holds, the schedule, and that it learns."""

import copy
import shutil

import pytest
import torch
from torch import nn

import models
import report
import train
import unit
import utils
from backdoors import get_backdoor, poison_training_set
from cli import InputError
from tests.running import TRAIN
from train import epoch_batches, learning_rate, poisoned_batch

pytestmark = pytest.mark.usefixtures("few_test_images")


class White(nn.Module):
    """A trigger that is easy to see: the whole image white. Noise mode: the whole image grey."""

    def forward(self, x):
        return torch.ones_like(x)

    def noise_mode(self, x, generator):
        return torch.full_like(x, 0.5)


@pytest.fixture
def black():
    """200 black images, 20 of each class."""
    return torch.zeros(200, 3, 32, 32, dtype=torch.uint8), torch.arange(10).repeat(20)


def whole_epoch(data, poison, batch_size=40, epoch=0):
    """All batches of an epoch: (brightest pixel of each image, given label, true label)."""
    order, roles = epoch_batches(len(data[0]), batch_size, poison, 0, epoch)
    assert order.sort().values.tolist() == list(range(len(order)))
    rows = []
    for index, role in zip(order.split(batch_size), roles.split(batch_size), strict=True):
        x, y = poisoned_batch(*data, index, role, poison, White(), torch.Generator().manual_seed(0))
        rows.append((x.amax((1, 2, 3)), y, data[1][index]))
    return [torch.cat(column) for column in zip(*rows, strict=True)]


def test_dirty_label_poison_relabels_exactly_the_declared_share(black):
    poison = poison_training_set(black[1], "badnet", 4, 0.15, seed=1)
    for epoch in range(2):
        brightness, given, true = whole_epoch(black, poison, epoch=epoch)
        hit = brightness == 1
        assert hit.sum() == 30
        assert (given[hit] == 4).all()
        assert torch.equal(given[~hit], true[~hit])


def test_clean_label_poison_keeps_the_labels(black):
    poison = poison_training_set(black[1], "reflection", 4, 0.05, seed=1)
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


def test_the_trigger_comes_before_the_augmentation():
    # every poisoned image is white before the crop, so some show the crop's black border
    data = torch.zeros(200, 3, 32, 32, dtype=torch.uint8), torch.zeros(200, dtype=torch.int64)
    poison = poison_training_set(data[1], "badnet", 0, 0.5)
    order, roles = epoch_batches(200, 200, poison, 0, 0)
    x, _ = poisoned_batch(*data, order, roles, poison, White(), torch.Generator().manual_seed(0))
    hit = x[roles == 1]
    assert set(hit.unique().tolist()) == {0.0, 1.0}
    assert (hit[:, :, 16, 16] == 1).all()


def test_real_triggers_leave_the_data_set_alone(black):
    images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8)
    before = images.clone()
    poison = poison_training_set(black[1][:50], "badnet", 0, 0.5)
    order, roles = epoch_batches(50, 50, poison, 0, 0)
    labels = black[1][:50].clone()
    x, y = poisoned_batch(images, labels, order, roles, poison, get_backdoor("badnet"), torch.Generator())
    assert torch.equal(images, before)
    assert torch.equal(labels, black[1][:50])
    assert (y[roles == 1] == 0).all()
    assert 0 <= x.min() <= x.max() <= 1


def test_the_rate_rises_to_its_peak_and_falls_to_nothing():
    rates = [learning_rate(i, 1000, 0.4) for i in range(1000)]
    assert max(rates) == pytest.approx(0.4, rel=1e-2)
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[0] < 0.01
    assert 0 < rates[-1] < 0.001


def test_a_held_rate_rises_to_its_peak_and_stays():
    rates = [learning_rate(i, 1000, 0.4, hold=True) for i in range(1000)]
    assert rates[:149] == [learning_rate(i, 1000, 0.4) for i in range(149)]
    assert rates[150:] == [0.4] * 850


SMALL = ["--dataset", "cifar10_sample", "--width", "0.0625", "--attack", "none", "--batch_size", "250"]
SMALL += ["--precision", "fp32", "--lr", "0.02"]


def test_the_weights_after_each_step_of_the_last_epochs_are_averaged(tmp_path, monkeypatch):
    """And batch norm's mean and variance are those that the averaged weights have on the training images."""
    seen = []
    update = train.swa_utils.AveragedModel.update_parameters

    def look(average, model):
        seen.append([p.detach().clone() for p in model.parameters()])
        update(average, model)

    monkeypatch.setattr(train.swa_utils.AveragedModel, "update_parameters", look)
    out = tmp_path / "v.pt"
    train.main([*SMALL, "--epochs", "4", "--average", "2", "--ckpt", str(out)])
    assert len(seen) == 2 * 2  # of two batches each
    model, checkpoint = utils.load_model(out)
    assert checkpoint["average"] == 2
    for p, *steps in zip(model.parameters(), *seen, strict=True):
        mean = torch.stack(steps).mean(0)
        torch.testing.assert_close(p, mean if p.dim() == 1 else mean.half().float(), rtol=2e-3, atol=1e-5)

    # the images that batch norm saw last: those of one more epoch
    config = {"batch_size": 250, "seed": 1024, "epochs_before": 0}
    data = utils.load_dataset("cifar10_sample", tmp_path, train=True)
    batches = list(train.training_batches(data, train.poison_training_set(data[1], "none", 0), None, config, 4))
    means = [model.conv1(model.normalize(x)).mean((0, 2, 3)) for x, _y, _size in batches]
    torch.testing.assert_close(model.bn1.running_mean, torch.stack(means).mean(0), rtol=1e-2, atol=1e-3)


def test_a_cut_off_average_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    flags = [*SMALL, "--epochs", "4", "--average", "2"]
    train.main([*flags, "--ckpt", str(whole)])
    epoch = train.train_epoch

    def stop_in_the_last(*args):
        if args[6] == 3:
            raise KeyboardInterrupt
        return epoch(*args)

    monkeypatch.setattr(train, "train_epoch", stop_in_the_last)
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, "--ckpt", str(cut)])
    monkeypatch.undo()
    train.main([*flags, "--ckpt", str(cut)])
    a, b = (torch.load(path, weights_only=True)["state_dict"] for path in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_an_average_needs_epochs_before_it(tmp_path):
    with pytest.raises(InputError, match="--average 2"):
        train.main([*SMALL, "--epochs", "2", "--average", "2", "--ckpt", str(tmp_path / "v.pt")])


def test_it_learns(tmp_path):
    """A few epochs on the sample beat chance by far, on training labels and on test images."""
    out = tmp_path / "v.pt"
    flags = ["--dataset", "cifar10_sample", "--width", "0.125", "--epochs", "8", "--batch_size", "25"]
    train.main([*flags, "--attack", "badnet", "--lr", "0.05", "--ckpt", str(out)])
    history = torch.load(out, weights_only=True)["history"]
    assert history[-1]["accuracy"] > 0.3
    assert history[-1]["BA"] > 0.2
    assert history[-1]["loss"] < history[0]["loss"] - 0.3


@pytest.mark.parametrize("width", [0.0625, 0.25])
def test_odd_batches_of_narrow_networks_train(tmp_path, width):
    """Channels last, such a batch made torch write past a buffer: the process died, or its weights were damaged."""
    out = tmp_path / "v.pt"
    flags = ["--dataset", "cifar10_sample", "--width", str(width), "--epochs", "1", "--batch_size", "25"]
    train.main([*flags, "--attack", "none", "--ckpt", str(out)])
    state = torch.load(out, weights_only=True)["state_dict"]
    assert all(v.isfinite().all() for v in state.values())


def test_a_finished_victim_is_not_overwritten(victim_file):
    before = victim_file.read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        train.main([*TRAIN, "--ckpt", str(victim_file)])
    assert victim_file.read_bytes() == before


def test_clean_label_poison_beyond_the_target_class_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="lower it"):
        train.main([*TRAIN, "--attack", "reflection", "--poison_rate", "0.2", "--ckpt", str(tmp_path / "v.pt")])


@pytest.fixture(scope="module")
def trained_once(few_test_images, tmp_path_factory):
    path = tmp_path_factory.mktemp("first") / "first.pt"
    train.main([*TRAIN, "--epochs", "2", "--attack", "badnet", "--ckpt", str(path)])
    return path


@pytest.fixture
def first_round(tmp_path, trained_once):
    """A small victim after a first round of training."""
    return shutil.copy(trained_once, tmp_path)


def test_a_victim_is_trained_on_from_its_weights_on_the_same_poisoned_images(tmp_path, first_round):
    out = tmp_path / "second.pt"
    flags = ["--attack", "badnet", "--init", str(first_round), "--ckpt", str(out)]
    train.main([*TRAIN, *flags, "--epochs", "1", "--lr", "1e-12"])
    a, b = utils.load_checkpoint(first_round), utils.load_checkpoint(out)
    weights = [k for k, v in a["state_dict"].items() if v.dim() > 1]
    assert weights
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in weights)
    assert torch.equal(a["poison_indices"], b["poison_indices"])
    assert b["init"] == utils.sha256(first_round)
    assert (b["epochs"], b["epochs_before"]) == (1, 2)
    assert b["init_from"]["history"] == a["history"]
    table = report.victims(tmp_path).splitlines()
    assert len(table) == 4  # header, rule, two victims
    assert f"| {100 * b['BA']:.2f} | {100 * b['ASR']:.2f} | 2 + 1 |" in table[3]
    assert utils.sha256(out) in table[3]
    assert "| 2 |" in table[2]


def test_a_second_round_sees_other_crops_than_the_first(tmp_path, first_round):
    """At a rate of nothing, only order and augmentation can move the loss of an epoch."""
    losses = []
    for before in (0, 2):
        config = {"batch_size": 50, "seed": 1024, "epochs": 1, "lr": 1e-12, "small_epochs": 0, "average": 0}
        config["epochs_before"] = before
        model, _ = utils.load_model(first_round)
        data = utils.load_dataset("cifar10_sample", tmp_path, train=True)
        poison = train.poison_training_set(data[1], "none", 0)
        optimizer = torch.optim.SGD(model.eval().parameters(), lr=1e-12)
        step = train.training_step(model, "off", 1.0, 500, 50, torch.float32)
        how = torch.contiguous_format, lambda _size: None
        losses.append(train.train_epoch(step, optimizer, data, poison, None, config, 0, *how)[0])
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [(["--seed", "7"], "seed"), (["--poison_rate", "0.2"], "poison_rate"), (["--width", "0.125"], "width")],
)
def test_another_training_set_is_not_trained_on(tmp_path, first_round, flags, wrong):
    out = tmp_path / "second.pt"
    with pytest.raises(InputError, match=f"another {wrong}"):
        train.main([*TRAIN, "--attack", "badnet", "--init", str(first_round), "--ckpt", str(out), *flags])
    assert not out.exists()


def test_a_defended_model_or_a_foreign_one_is_not_trained_on(tmp_path, first_round):
    checkpoint = utils.load_checkpoint(first_round)
    defended, foreign = tmp_path / "defended.pt", tmp_path / "foreign.pt"
    model, _ = utils.load_model(first_round)
    bounds = unit.initial_bounds(model, [torch.rand(2, 3, 32, 32)], 4.0)
    utils.save_checkpoint({**checkpoint, "bounds": bounds}, defended)
    torch.save(checkpoint["state_dict"], foreign)
    for path, why in ((defended, "defended model"), (foreign, "another"), (tmp_path / "none.pt", "cannot read")):
        with pytest.raises(InputError, match=why):
            train.main([*TRAIN, "--attack", "badnet", "--init", str(path), "--ckpt", str(tmp_path / "v.pt")])


def test_a_recorded_step_is_the_step(monkeypatch):
    """To the bit, with a CUDA graph played by hand: where it computes again what it recorded, into the same tensors."""
    model = models.get_model("resnet18", width=0.125)
    twin = copy.deepcopy(model)
    rehearsals = []

    def recorded(work, _device):
        rehearsals.extend(work() for _ in range(2))
        result = work()
        grads = [p.grad for p in model.parameters()]

        def replay():
            new = work()
            for p, grad in zip(model.parameters(), grads, strict=True):
                grad.copy_(p.grad)
                p.grad = None
            return result.copy_(new)

        return replay

    monkeypatch.setattr(utils, "recorded", recorded)
    step = train.RecordedStep(model, 8, torch.float32)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    g = torch.Generator().manual_seed(0)
    for n, side in ((8, 24), (8, 24), (3, 24), (8, 32), (8, 32), (5, 32), (8, 24), (8, 32)):
        x, y = torch.rand(n, 3, side, side, generator=g), torch.randint(0, 10, (n,), generator=g)
        a, b = step(x, y, n), train.forward_backward(twin, x, y, n, torch.float32)
        assert torch.equal(a, b)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert len(rehearsals) == 4  # of two shapes
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in model.state_dict().items())


def test_first_epochs_may_run_on_smaller_images(tmp_path, monkeypatch):
    sizes, forward = [], train.models.resnet.ResNet.forward

    def look(self, x):
        if self.training:
            sizes.append(tuple(x.shape[2:]))
        return forward(self, x)

    monkeypatch.setattr(train.models.resnet.ResNet, "forward", look)
    flags = ["--attack", "wanet", "--small_epochs", "1", "--epochs", "2", "--ckpt", str(tmp_path / "v.pt")]
    train.main([*TRAIN, *flags])
    assert sizes == [(24, 24)] * 10 + [(32, 32)] * 10
    assert utils.load_checkpoint(tmp_path / "v.pt")["small_epochs"] == 1
