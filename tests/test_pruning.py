"""The pruning defenses: each against its definition, on networks small enough to compute by hand."""

import flags  # first, as in the commands

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import defend
from defenses import anp, clp, fp, pruning, rnp
from tests.running import run_defend

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def few():
    """100 of the embedded clean images, ten of each class, in defend.py's order, validation images last."""
    images, labels = data.load_dataset("cifar10_sample", None, train=True)
    index = torch.cat(data.defense_split(labels, 0.2))
    return images[index], labels[index]


class Small(nn.Module):
    """Convolution, batch norm, ReLU, mean over the picture, linear layer."""

    def __init__(self, channels=5, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x):
        return self.linear(self.bn(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def small():
    torch.manual_seed(3)
    net = Small()
    with torch.no_grad():
        for t in (net.bn.weight, net.bn.bias, net.bn.running_mean):
            t.uniform_(-1, 1)
        net.bn.running_var.uniform_(0.5, 2)
    return net.eval()


# --- CLP --------------------------------------------------------------------------------------------------------------


def test_a_lipschitz_bound_is_the_largest_singular_value_times_the_scale(small):
    bounds = clp.lipschitz_bounds(small.conv, small.bn)
    assert bounds.shape == (5,)
    for c in range(5):
        kernel = small.conv.weight[c].detach().numpy().reshape(3, 9)
        sigma = math.sqrt(np.linalg.eigvalsh(kernel @ kernel.T).max())  # not by the same decomposition
        want = sigma * abs(small.bn.weight[c].item()) / math.sqrt(small.bn.running_var[c].item())
        assert bounds[c].item() == pytest.approx(want, rel=1e-5)


def test_a_constant_channel_has_bound_0(small):
    with torch.no_grad():
        small.bn.running_var[2] = 0
    bounds = clp.lipschitz_bounds(small.conv, small.bn)
    assert bounds[2] == 0
    assert bounds.isfinite().all()


def test_outlying_is_by_the_unbiased_deviation():
    # 9 times 1 and once 11: mean 2, squares 9 + 81 = 90, unbiased variance 10, z = 9 / sqrt(10) = 2.846; biased 3
    bounds = torch.tensor([1.0] * 9 + [11.0])
    assert not clp.outlying(bounds, 2.9).any()
    assert clp.outlying(bounds, 2.8).tolist() == [False] * 9 + [True]
    assert not clp.outlying(-bounds, 2.8).any()  # below the mean


def test_each_batch_norm_is_paired_with_the_convolution_that_it_reads(untouched):
    x = torch.zeros(1, 3, 32, 32)
    pairs = {name: conv for name, _, conv in clp.convolutions_before_norms(untouched, x)}
    assert len(pairs) == 20
    for name, conv in pairs.items():
        path = name.replace("shortcut.1", "shortcut.0").replace("bn", "conv")
        assert conv is untouched.get_submodule(path)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in untouched.modules())


def test_a_batch_norm_that_reads_a_sum_is_left_out():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn2, self.conv1, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.bn1 = nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv1(x)
            return self.bn2(x + self.conv2(self.bn1(x)))

    net = PreActivation().eval()
    assert clp.convolutions_before_norms(net, torch.zeros(1, 3, 4, 4)) == [("bn1", net.bn1, net.conv1)]


def test_clp_prunes_the_channel_that_stands_out_and_no_other(untouched):
    loud = copy.deepcopy(untouched)
    with torch.no_grad():
        loud.layer4[0].bn2.weight[7] *= 1000
    none = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    quiet, repaired = clp.repair(untouched, none), clp.repair(loud, none)
    assert repaired.findings["pruned"]["layer4.0.bn2"] == [7]
    before, after = loud.state_dict(), repaired.model.state_dict()
    pruned = repaired.findings["pruned"]
    for key, value in before.items():
        name, _, what = key.rpartition(".")
        want = value.clone()
        if what in ("weight", "bias"):
            want[pruned.get(name, [])] = 0
        assert torch.equal(after[key], want)
    others = {k: v for k, v in pruned.items() if k != "layer4.0.bn2"}
    assert others == {k: v for k, v in quiet.findings["pruned"].items() if k != "layer4.0.bn2"}
    n = sum(map(len, pruned.values()))
    assert repaired.findings["outcome"] == f"{n} of 600 channels pruned"


# --- what they share --------------------------------------------------------------------------------------------------

BARE = nn.Sequential(nn.Conv2d(3, 4, 32), nn.Flatten(), nn.Linear(4, 10))  # without batch norm


@pytest.mark.parametrize("method", [clp, anp, rnp])
def test_a_network_without_batch_norm_is_refused(method, few):
    with pytest.raises(ValueError, match="batch norm"):
        method.repair(BARE, *few)


@pytest.mark.parametrize("missing", [0, 3])
def test_what_is_held_out_is_what_unit_validates_on(missing):
    images, labels = data.load_dataset("cifar10_sample", None, train=True)
    labels = labels[missing * 10 :]  # classes of fewer images, not multiples of five
    train, valid = data.defense_split(labels, 1.0)
    given = torch.cat((train, valid))  # as defend.py gives them
    learn, held = pruning.held_out(labels[given], 0.2)
    assert sorted(given[learn].tolist()) == sorted(train.tolist())
    assert sorted(given[held].tolist()) == sorted(valid.tolist())


def test_too_few_images_to_hold_out_are_refused():
    with pytest.raises(ValueError, match="data_rate"):
        pruning.held_out(torch.arange(10), 0.2)


def test_pruning_sets_the_scale_to_0_up_to_the_threshold_and_keeps_the_shift(small):
    channels = pruning.Channels(small)
    net = channels.pruned(small, torch.tensor([0.3, 0.2, 0.0, 1.0, 0.21]), 0.2)
    before, after = small.state_dict(), net.state_dict()
    assert after["bn.weight"].tolist() == [before["bn.weight"][0], 0, 0, *before["bn.weight"][3:].tolist()]
    assert all(torch.equal(after[k], before[k]) for k in before if k != "bn.weight")


@pytest.mark.parametrize(
    ("accuracies", "want"),
    # of the undefended network, then of 0.9, 0.5, 0.1, of which the first that leaves more than 90 % is taken
    [([0.9, 0.5, 0.82, 0.9], 0.5), ([0.9, 0.5, 0.81, 0.9], 0.1), ([0.9, 0.5, 0.6, 0.7], None)],
)
def test_the_threshold_is_the_largest_that_keeps_the_accuracy(small, monkeypatch, accuracies, want):
    told = iter(accuracies)
    monkeypatch.setattr(pruning, "accuracy", lambda *_: next(told))
    masks, channels = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]), pruning.Channels(small)
    net, findings = channels.most_aggressive(small, masks, (0.1, 0.9, 0.5), 0.1, None, None, None)
    assert findings["threshold"] == want
    pruned = int((net.bn.weight == 0).sum())
    assert pruned == {None: 0, 0.1: 2, 0.5: 3}[want]
    assert findings["outcome"].startswith(f"{pruned} of 5 channels")
    held = {0.5: accuracies[2], 0.1: accuracies[3], None: 0.9}
    assert findings["accuracy_held_out"] == {"before": 0.9, "after": held[want]}


def test_accuracy_is_in_eval_mode_without_augmentation(untouched, few):
    net = copy.deepcopy(untouched).train()
    got = pruning.accuracy(net, *few, torch.float32, batch_size=7)
    with torch.no_grad():
        want = (untouched(few[0].float() / 255).argmax(1) == few[1]).float().mean().item()
    assert got == pytest.approx(want)


# --- ANP --------------------------------------------------------------------------------------------------------------


def by_hand(net, x, y, scales, shifts):
    """The cross-entropy of a Small network in training mode, batch norm written out; scales, shifts: per channel."""
    a = F.conv2d(x, net.conv.weight)
    mean = a.mean((0, 2, 3), keepdim=True)
    a = (a - mean) / ((a - mean).square().mean((0, 2, 3), keepdim=True) + net.bn.eps).sqrt()
    a = a * (scales * net.bn.weight).view(1, -1, 1, 1) + (shifts * net.bn.bias).view(1, -1, 1, 1)
    logits = a.clamp_min(0).mean((2, 3)) @ net.linear.weight.T + net.linear.bias
    return (logits.exp().sum(1).log() - logits[torch.arange(len(y)), y]).mean()


def test_anp_learns_masks_as_a_loop_by_hand_does(small, few):
    config = anp.Config(epochs=2, epoch_steps=3, batch_size=20)
    states = []
    anp.repair(small, *few, config, 5, callback=lambda now, state_of: states.append((now, state_of()["net"]["values"])))

    net = copy.deepcopy(small).requires_grad_(False)
    generator, learn = torch.Generator().manual_seed(5), few[0][:80]
    masks, velocity, losses = torch.ones(5), torch.zeros(5), []
    for step in range(6):
        index = torch.randint(80, (20,), generator=generator)
        x, y = data.augment(learn[index].float() / 255, generator), few[1][index]
        noise = ((torch.rand(2, 5, generator=generator) * 2 - 1) * 0.4).requires_grad_()
        up = torch.autograd.grad(by_hand(net, x, y, masks + noise[0], 1 + noise[1]), noise)[0].sign()
        noise = noise.detach() + 0.4 * up
        m = masks.clone().requires_grad_()
        clean, perturbed = by_hand(net, x, y, m, 1), by_hand(net, x, y, m + noise[0], 1 + noise[1])
        gradient = torch.autograd.grad(0.2 * clean + 0.8 * perturbed, m)[0]
        velocity = 0.9 * velocity + gradient
        masks = (masks - 0.2 * velocity).clamp(0, 1)
        losses.append((clean.item(), perturbed.item()))
        if step % 3 == 2:
            now, values = states[step // 3]
            torch.testing.assert_close(values, masks, rtol=1e-4, atol=1e-5)
            assert (now["loss"], now["perturbed"]) == pytest.approx(np.mean(losses[-3:], 0), rel=1e-4)
    assert 0 < masks.min() < 1


def test_the_noise_steps_up_from_a_uniform_start_and_is_not_cut_off():
    slope = torch.tensor([[1.0, -2.0, 3.0, 0.0] * 50] * 2)
    noise = anp.adversarial_noise(lambda e: (slope * e).sum(), 200, 0.4, torch.Generator().manual_seed(0), CPU)
    start = noise - 0.4 * slope.sign()
    assert start.abs().max() <= 0.4
    assert start.std() > 0.1
    assert noise.abs().max() > 0.7


# --- RNP --------------------------------------------------------------------------------------------------------------


def test_recovering_moves_masks_alone_and_keeps_them_within_0_and_1(small, few):
    before = {k: v.clone() for k, v in small.named_parameters()}
    config = rnp.Config(recover_lr=5.0, recover_epochs=4, batch_size=20)
    masks, history = rnp.recover(small, *few, config, torch.Generator().manual_seed(0))
    assert len(history["loss"]) == 4
    assert 0 <= masks.min() < masks.max() <= 1
    assert all(torch.equal(v, before[k]) for k, v in small.named_parameters())


def test_recovering_follows_the_gradient_of_a_fifth_of_the_loss(small, few):
    """One step over all images at once, by hand."""
    config = rnp.Config(recover_epochs=1, batch_size=100)
    masks, history = rnp.recover(small, *few, config, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(100, generator=generator)
    x, m = data.augment(few[0][order].float() / 255, generator), torch.ones(5, requires_grad=True)
    loss = 0.2 * by_hand(small, x, few[1][order], m, 1)
    (gradient,) = torch.autograd.grad(loss, m)
    torch.testing.assert_close(masks, (1 - 0.2 * gradient).clamp(0, 1), rtol=1e-4, atol=1e-6)
    assert history["loss"] == pytest.approx([loss.item()], rel=1e-4)


@pytest.mark.parametrize(("n", "each"), [(40, 4), (50, 5), (500, 8)])  # of 80 to learn from, eight of each class
def test_rnp_unlearns_on_some_of_the_images_unclipped_and_prunes_the_victim(small, few, monkeypatch, n, each):
    seen = {}

    def unlearn(model, images, labels, config, *_):
        seen.update(images=images, labels=labels, clip=config.clip_norm)
        other = copy.deepcopy(model)
        nn.init.zeros_(other.linear.weight)
        return other, {"unlearn_accuracy": [0.5]}

    monkeypatch.setattr(rnp, "unlearn", unlearn)
    config = rnp.Config(recover_epochs=1, unlearn_images=n, thresholds=(1.0,), max_drop=1.1)
    repaired = rnp.repair(small, *few, config)
    assert len(seen["images"]) == 10 * each
    assert torch.equal(seen["labels"].bincount(), torch.full((10,), each))
    assert seen["clip"] is None
    assert (repaired.model.bn.weight == 0).all()  # each mask is at most 1
    assert torch.equal(repaired.model.linear.weight, small.linear.weight)  # the victim's, not the unlearned network's
    assert repaired.findings["outcome"].endswith("unlearning did not reach 20% accuracy")


# --- FP ---------------------------------------------------------------------------------------------------------------


class Dormant(nn.Module):
    """Features 0.1, 0.4, 0.2, 0.3 times an image's mean, then two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.last = nn.Conv2d(3, 4, 1, bias=False), nn.Linear(4, 6), nn.Linear(6, 10)
        with torch.no_grad():
            self.conv.weight[:] = torch.tensor([0.1, 0.4, 0.2, 0.3]).view(4, 1, 1, 1) / 3

    def forward(self, x):
        return self.last(self.first(self.conv(x).mean((2, 3))).relu())


def test_features_are_ranked_by_their_mean_on_clean_images(few):
    net = Dormant()
    layer = fp.reader_of_features(net, torch.zeros(1, 3, 32, 32))
    assert layer is net.first
    mean = fp.mean_features(net, layer, few[0], torch.float32, batch_size=30)
    level = few[0].double().mean() / 255
    torch.testing.assert_close(mean, level * torch.tensor([0.1, 0.4, 0.2, 0.3]).double(), rtol=1e-5, atol=0)
    assert mean.argsort().tolist() == [0, 2, 3, 1]
    assert not layer._forward_pre_hooks


def test_the_reader_of_a_resnets_features_is_its_linear_layer(untouched):
    assert fp.reader_of_features(untouched, torch.zeros(1, 3, 32, 32)) is untouched.linear


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), "no convolution"),
        (nn.Sequential(nn.Conv2d(3, 10, 32), nn.Flatten()), "no linear layer"),
        (nn.Sequential(nn.Linear(32, 32), nn.Conv2d(3, 10, 32), nn.Flatten()), "no linear layer"),
    ],
)
def test_a_network_without_features_is_refused(net, said, few):
    with pytest.raises(ValueError, match=said):
        fp.repair(net, *few)


def test_pruning_goes_by_the_order_until_accuracy_would_fall_by_a_tenth(monkeypatch):
    net = SimpleNamespace(linear=nn.Linear(12, 10))
    before = net.linear.weight.detach().clone()
    told = iter([0.8, 0.79, 0.73, 0.72])  # the victim's, then after each step: 0.72 is a tenth less
    monkeypatch.setattr(fp, "accuracy", lambda *_: next(told))
    order = torch.tensor([3, 1, 0, 2, 11, 10, 9, 8, 7, 6, 5, 4])
    n = fp.prune(net, net.linear, order, fp.Config(step=2 / 12), None, None, None)
    assert n == 4
    assert (net.linear.weight[:, [3, 1, 0, 2]] == 0).all()
    kept = [11, 10, 9, 8, 7, 6, 5, 4]
    assert torch.equal(net.linear.weight[:, kept], before[:, kept])


def test_what_is_pruned_stays_so_while_the_rest_is_fine_tuned(untouched, few):
    repaired = fp.repair(untouched, *few, fp.Config(epochs=2, batch_size=25))
    pruned, weight = repaired.findings["pruned"], repaired.model.linear.weight
    assert 0 < len(pruned) < 64
    kept = [c for c in range(64) if c not in pruned]
    assert (weight[:, pruned] == 0).all()
    assert (weight[:, kept] != untouched.linear.weight[:, kept]).any(0).all()
    assert not repaired.model.linear._forward_pre_hooks


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_test_images")
def test_clp_needs_no_images(victim_file, tmp_path, capsys):
    run_defend(victim_file, tmp_path, "--defense", "clp")
    assert "clp: 0 clean images" in capsys.readouterr().out
    assert (tmp_path / "results" / "victim" / "clp,dataset=cifar10_sample.json").exists()
    with pytest.raises(flags.InputError, match="sees no images"):
        run_defend(victim_file, tmp_path, "--defense", "clp", "--data_rate", "0.5")


def test_clp_gets_the_size_of_the_images_without_loading_any(monkeypatch):
    monkeypatch.setattr(data, "load_dataset", lambda *_args, **_kwargs: pytest.fail("the data set was loaded"))
    args = flags.parser("defend.py").parse_args(["--defense", "clp", "--size", "64"])
    images, labels = defend.clean_images(args, clp.Config())
    assert (images.shape, images.dtype, labels.shape) == ((0, 3, 64, 64), torch.uint8, (0,))
