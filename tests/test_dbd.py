"""DBD: each part against its definition, and the three stages on small networks."""

from flags import InputError

import colorsys
import copy
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import defend
import models
import utils
from backdoors import get_backdoor, poison_training_set
from data import cifar10
from defenses import dbd, mixmatch, simclr

pytestmark = pytest.mark.usefixtures("few_test_images")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.rand(6, 3, 32, 32, generator=generator())


def per_image(value, n=6):
    return torch.full((n, 1, 1, 1), value)


# --- SimCLR ---------------------------------------------------------------------------------------------------------


def test_nt_xent_is_the_obvious_formula():
    a, b = (torch.nn.functional.normalize(torch.randn(5, 8, generator=generator(s)).double()) for s in (0, 1))
    z, temperature = [*a, *b], 0.5
    total, nearest = 0, []
    for i in range(5):  # the first views are the anchors
        twin = i + 5
        others = [j for j in range(10) if j != i]
        score = {j: math.exp(float(z[i] @ z[j]) / temperature) for j in others}
        total -= math.log(score[twin] / sum(score.values()))
        nearest.append(max(others, key=score.get) == twin)
    loss, found = simclr.nt_xent(a, b, temperature)
    assert loss.item() == pytest.approx(total / 5, rel=1e-5)
    assert found.tolist() == nearest


def test_nt_xent_by_hand():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # similarities / 0.5 of the first anchor: 0 to a2, 2 to its twin, 1.2 to b2; of the second: 0, 0, 1.6 to its twin
    first = math.log(1 + math.exp(2) + math.exp(1.2)) - 2
    second = math.log(1 + 1 + math.exp(1.6)) - 1.6
    loss, found = simclr.nt_xent(a, b, 0.5)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-5)
    assert found.tolist() == [True, True]
    # with b as the anchors: 2 to its twin, 0 to a2, 1.2 to b2; 1.6 to its twin, 1.2 to a1 and to b1
    first = math.log(1 + math.exp(2) + math.exp(1.2)) - 2
    second = math.log(2 * math.exp(1.2) + math.exp(1.6)) - 1.6
    assert simclr.nt_xent(b, a, 0.5)[0].item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_identical_twins_among_strangers_are_found():
    z = torch.eye(8)
    _, found = simclr.nt_xent(z, z, 0.5)
    assert found.all()


def test_views_are_images_differ_and_follow_the_generator(images):
    a, again, b = (
        simclr.view(images, generator(1)),
        simclr.view(images, generator(1)),
        simclr.view(images, generator(2)),
    )
    assert torch.equal(a, again)
    assert a.shape == images.shape
    assert a.min() >= 0
    assert a.max() <= 1
    assert not torch.equal(a, b)
    # each image by a draw of its own
    same = simclr.view(images[:1].expand(50, -1, -1, -1), generator(3))
    assert len({tuple(v.flatten()[:50].tolist()) for v in same}) == 50


def test_a_whole_crop_is_the_image_and_a_flip_mirrors_it(images):
    one, nothing = torch.ones(6), torch.zeros(6)
    whole = simclr.crop_and_flip(images, one, one, nothing, nothing, nothing.bool())
    torch.testing.assert_close(whole, images, rtol=0, atol=1e-5)
    flipped = simclr.crop_and_flip(images, one, one, nothing, nothing, one.bool())
    torch.testing.assert_close(flipped, images.flip(3), rtol=0, atol=1e-5)


def test_a_crop_shows_its_box():
    """A quarter of the area in the upper left corner, without the dark pixels below and to the right."""
    x = torch.zeros(1, 3, 32, 32)
    x[:, :, :16, :16] = 1
    one = torch.ones(1)
    corner = simclr.crop_and_flip(x, one / 4, one, -one, -one, ~one.bool())
    assert (corner[:, :, :-1, :-1] > 0.99).all()
    assert simclr.crop_and_flip(x, one / 4, one, one, one, ~one.bool())[:, :, 1:, 1:].max() < 0.02


def test_a_crop_is_bicubic_and_stays_in_range():
    """Enlarged twice, a pixel lies 0.25, 0.75, 1.25 from the line; W is the cubic kernel of a = -0.75."""
    x = torch.full((1, 3, 32, 32), 0.5)
    x[..., 8] = 1  # a line
    one = torch.ones(1)
    corner = simclr.crop_and_flip(x, one / 4, one, -one, -one, ~one.bool())
    kernel = {14: -0.10546875, 16: 0.87890625, 18: 0.26171875}  # W(1.25), W(0.25), W(0.75)
    for column, w in kernel.items():
        torch.testing.assert_close(corner[0, :, 5, column], torch.full((3,), 0.5 + 0.5 * w))
    x = torch.zeros(1, 3, 32, 32)
    x[..., 8:] = 1  # at an edge bicubic interpolation overshoots
    corner = simclr.crop_and_flip(x, one / 4, one, -one, -one, ~one.bool())
    assert corner.min() == 0
    assert corner.max() == 1


def test_jitter_by_nothing_changes_nothing(images):
    for change, nothing in (
        (simclr.brightness, 1.0), (simclr.contrast, 1.0), (simclr.saturation, 1.0), (simclr.hue, 0.0), (simclr.hue, 1.0)
    ):  # fmt: skip
        torch.testing.assert_close(change(images, per_image(nothing)), images, rtol=0, atol=1e-5)


def test_jitter_does_what_it_says(images):
    torch.testing.assert_close(simclr.brightness(images, per_image(0.5)), images / 2)
    flat = simclr.contrast(images, per_image(0.0))
    assert flat.std((2, 3)).max() < 1e-6
    torch.testing.assert_close(flat[:, 0, 0, 0], simclr.gray(images).mean((1, 2, 3)))
    torch.testing.assert_close(simclr.saturation(images, per_image(0.0)), simclr.gray(images).expand_as(images))


@pytest.mark.parametrize("turn", [-0.1, 0.07, 0.5])
def test_hue_is_that_of_the_color_wheel(images, turn):
    turned = simclr.hue(images, per_image(turn))
    for i, row, column in itertools.product(range(2), (0, 7, 31), (0, 16)):
        h, s, v = colorsys.rgb_to_hsv(*images[i, :, row, column].tolist())
        want = colorsys.hsv_to_rgb((h + turn) % 1, s, v)
        assert turned[i, :, row, column].tolist() == pytest.approx(want, abs=1e-5)


def test_hue_leaves_gray_alone():
    gray = torch.full((1, 3, 4, 4), 0.3)
    torch.testing.assert_close(simclr.hue(gray, per_image(0.3, 1)), gray)


def test_blur_keeps_the_mean_of_a_point_and_a_flat_image():
    x = torch.zeros(1, 1, 9, 9)
    x[..., 4, 4] = 1
    blurred = simclr.blur(x, per_image(1.0, 1))
    assert blurred.sum().item() == pytest.approx(1, rel=1e-5)
    side = math.exp(-0.5)
    assert blurred[0, 0, 4, 5].item() == pytest.approx(side / (1 + 2 * side) ** 2, rel=1e-5)
    flat = torch.full((2, 3, 5, 5), 0.7)
    torch.testing.assert_close(simclr.blur(flat, per_image(2.0, 2)), flat)


# --- stage 2: symmetric cross-entropy ---------------------------------------------------------------------------------


def test_symmetric_cross_entropy_by_hand():
    logits = torch.tensor([[math.log(0.7), math.log(0.2), math.log(0.1)]])
    loss = dbd.symmetric_cross_entropy(logits, torch.tensor([0]), dbd.Config())
    # the target's log(1) is 0, the others' log(1e-4)
    assert loss.item() == pytest.approx(0.1 * -math.log(0.7) - 0.3 * math.log(1e-4), rel=1e-5)


def test_predictions_are_clamped_in_symmetric_cross_entropy():
    logits = torch.tensor([[100.0, 0.0, 0.0]], dtype=torch.float64)
    loss = dbd.symmetric_cross_entropy(logits, torch.tensor([1]), dbd.Config())
    # CE is 100; the predictions 1, 1e-7, 1e-7, of which the second meets log(1)
    assert loss.item() == pytest.approx(0.1 * 100 - math.log(1e-4) * (1 + 1e-7), rel=1e-10)


def test_the_trusted_half_has_the_lowest_losses():
    losses = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.5, 9.0])
    trusted, others = dbd.split_by_loss(losses, 0.5)
    assert trusted.tolist() == [5, 1, 3]
    assert sorted(others.tolist()) == [0, 2, 4, 6]


# --- stage 3: MixMatch ------------------------------------------------------------------------------------------------


def test_sharpening_by_hand():
    sharp = mixmatch.sharpen(torch.tensor([[0.25, 0.75], [0.5, 0.5]]), 0.5)
    torch.testing.assert_close(sharp, torch.tensor([[0.1, 0.9], [0.5, 0.5]]))


def test_a_guess_is_the_sharpened_mean():
    a, b = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0001, 0.9999]]).log()
    mean = torch.tensor([[0.25005, 0.74995]])
    torch.testing.assert_close(mixmatch.guess([a, b], 0.5), mixmatch.sharpen(mean, 0.5), rtol=1e-4, atol=1e-5)


def test_mixing_by_hand():
    x, t = torch.tensor([[0.0], [10.0], [20.0]]), torch.eye(3)
    mixed, targets = mixmatch.mix(x, t, 0.75, torch.tensor([1, 2, 0]))
    assert mixed.flatten().tolist() == [2.5, 12.5, 15.0]
    assert targets.tolist() == [[0.75, 0.25, 0], [0, 0.75, 0.25], [0.25, 0, 0.75]]


def test_mixing_weights_are_those_of_the_beta_distribution():
    g = generator()
    weights = torch.tensor([mixmatch.draw_weight(0.75, g) for _ in range(2000)])
    assert weights.min() >= 0.5
    assert weights.max() <= 1
    want = np.random.default_rng(0).beta(0.75, 0.75, 200_000)
    want = np.maximum(want, 1 - want).mean()
    assert weights.mean().item() == pytest.approx(want, abs=0.012)
    assert mixmatch.draw_weight(0.75, generator(4)) == mixmatch.draw_weight(0.75, generator(4))


def test_mixmatch_loss_by_hand():
    logits = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
    targets = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    labeled = -0.5 * math.log(0.8) - 0.5 * math.log(0.2)
    unlabeled = 0.4**2  # mean of (0.4)^2 twice
    loss = mixmatch.mixmatch_loss(logits, targets, 1, 3.0)
    assert loss.item() == pytest.approx(labeled + 3 * unlabeled, rel=1e-5)


def test_the_weight_of_the_unlabeled_loss_rises_from_the_start_of_stage_2():
    config = dbd.Config()
    assert dbd.unlabeled_weight(config, 0, 0) == pytest.approx(15 * 10 / 190)
    assert dbd.unlabeled_weight(config, 85, 0) == pytest.approx(7.5)
    assert dbd.unlabeled_weight(config, 0, 512) == pytest.approx(15 * 10.5 / 190)
    assert dbd.unlabeled_weight(config, 179, 1023) < 15
    assert dbd.unlabeled_weight(config, 180, 0) == dbd.unlabeled_weight(config, 189, 1023) == 15


# --- the stages ------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned():
    images, labels = data.load_dataset("cifar10_sample", None, train=True)
    poison = poison_training_set(labels, "badnet", 0, 0.1, seed=3)
    return *defend.poisoned_set(images, labels, poison, get_backdoor("badnet")), poison, images, labels


def test_the_poisoned_set_is_poisoned_where_it_says(poisoned):
    images, labels, poison, before, true = poisoned
    changed = (images != before).flatten(1).any(1).nonzero()[:, 0]
    assert torch.equal(changed, poison.indices)
    assert (labels[poison.indices] == 0).all()
    rest = torch.ones(500, dtype=torch.bool)
    rest[poison.indices] = False
    assert torch.equal(labels[rest], true[rest])
    # the trigger lies there, to half a step of a byte
    triggered = get_backdoor("badnet")(data.to_float(before[poison.indices]))
    assert (images[poison.indices] / 255 - triggered).abs().max() <= 0.5 / 255 + 1e-6


def test_a_clean_label_attack_leaves_the_labels():
    images, labels = data.load_dataset("cifar10_sample", None, train=True)
    poison = poison_training_set(labels, "reflection", 0, 0.05, seed=3)
    changed, same = defend.poisoned_set(images, labels, poison, get_backdoor("reflection"))
    assert torch.equal(same, labels)
    assert set((changed != images).flatten(1).any(1).nonzero()[:, 0].tolist()) == set(poison.indices.tolist())
    assert (labels[poison.indices] == 0).all()


def silent(_n):
    pass


def test_fresh_convolutions_are_kaiming_normal_by_fan_out():
    torch.manual_seed(0)
    network = models.get_model("resnet18", width=0.125)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    dbd.initialize(network)
    for name, weight in network.state_dict().items():
        if weight.ndim < 4:
            assert torch.equal(weight, before[name])
            continue
        c_out, _, k, _ = weight.shape
        n, std = weight.numel(), math.sqrt(2 / (c_out * k * k))
        assert abs(weight.std().item() / std - 1) < 4 / math.sqrt(2 * n)


def test_contrast_learns_to_find_the_twin_and_gives_the_linear_layer_back(poisoned):
    torch.manual_seed(0)
    network = models.get_model("resnet18", width=0.125)
    linear = network.linear
    stage = dbd.Contrast(network, dbd.Config(simclr_batch=50, simclr_lr=0.1), seed=0)
    epochs = [stage.train_epoch(poisoned[0][::2], poisoned[1][::2], e, torch.float32, silent) for e in range(4)]
    assert epochs[-1]["loss"] < epochs[0]["loss"] - 0.1
    assert epochs[-1]["found"] > 5 / 99  # by chance 1 in 99
    stage.finish()
    assert network.linear is linear


def test_the_linear_stage_moves_the_linear_layer_and_running_statistics_alone(tiny, poisoned):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    stage = dbd.Linear(tiny, dbd.Config(), seed=0)
    losses = [stage.train_epoch(*poisoned[:2], e, torch.float32, silent)["loss"] for e in range(3)]
    assert losses[-1] < losses[0]
    moved = {k for k, v in tiny.state_dict().items() if not torch.equal(v, before[k])}
    statistics = {k for k, _ in tiny.named_buffers() if ".bn" in k or k.startswith("bn1") or "shortcut" in k}
    assert len(statistics) == 3 * 20  # mean, variance and batches of each layer
    assert moved == {"linear.weight", "linear.bias"} | statistics


def test_the_ranking_is_of_augmented_views_in_eval_mode(tiny, poisoned):
    images, labels = poisoned[:2]
    before = copy.deepcopy(tiny.state_dict())

    def losses(seed):
        return dbd.sample_losses(tiny.train(), images, labels, dbd.Config(), torch.float32, generator(seed), 500)

    first = losses(1)
    assert torch.equal(first, losses(1))
    assert (first != losses(2)).float().mean() > 0.9
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())  # running statistics too
    with torch.no_grad():
        logits = tiny.eval()(data.augment(images / 255, generator(1), mode="reflect"))
    want = [dbd.symmetric_cross_entropy(logits[i : i + 1], labels[i : i + 1], dbd.Config()) for i in range(500)]
    torch.testing.assert_close(first, torch.stack(want), rtol=1e-4, atol=1e-4)


def test_one_adam_serves_stages_2_and_3(tiny, poisoned):
    config = dbd.Config(linear_batch=100, mixmatch_steps=3, mixmatch_batch=8)
    linear = dbd.Linear(tiny, config, seed=0)
    linear.train_epoch(*poisoned[:2], 0, torch.float32, silent)
    own = {id(p) for p in tiny.linear.parameters()}
    assert {id(p) for p in linear.optimizer.state} == own
    semi = dbd.Semi(tiny, config, 0, None, linear)
    semi.train_epoch(*poisoned[:2], 0, torch.float32, silent)
    steps = {id(p): state["step"].item() for p, state in semi.optimizer.state.items()}
    assert steps == {id(p): 5 + 3 if id(p) in own else 3 for p in tiny.parameters()}


def test_the_ramp_is_what_the_loss_gets(tiny, poisoned, monkeypatch):
    weights, loss = [], mixmatch.mixmatch_loss
    monkeypatch.setattr(mixmatch, "mixmatch_loss", lambda *args: (weights.append(args[-1]), loss(*args))[1])
    config = dbd.Config(linear_epochs=1, mixmatch_epochs=4, mixmatch_steps=2, mixmatch_batch=4)
    dbd.Semi(tiny, config, seed=0).train_epoch(*poisoned[:2], 1, torch.float32, silent)
    assert weights == [15 * 2 / 4, 15 * 2.5 / 4]


def test_the_semi_stage_trains_on_half_and_half(tiny, poisoned, monkeypatch):
    before = copy.deepcopy(tiny)
    split, split_by_loss = [], dbd.split_by_loss
    monkeypatch.setattr(dbd, "split_by_loss", lambda *args: split or split.extend(split_by_loss(*args)) or split)
    stage = dbd.Semi(tiny, dbd.Config(mixmatch_steps=2, mixmatch_batch=32, mixmatch_epochs=2), seed=0)
    now = stage.train_epoch(*poisoned[:2], 0, torch.float32, silent)
    assert len(now["trusted"]) == 250
    assert math.isfinite(now["loss"])
    assert not torch.equal(tiny.linear.weight, before.linear.weight)
    # the labels of the other half are not looked at
    labels = poisoned[1].clone()
    others = torch.ones(500, dtype=torch.bool)
    others[now["trusted"]] = False
    again = dbd.Semi(before, dbd.Config(mixmatch_steps=2, mixmatch_batch=32, mixmatch_epochs=2), seed=0)
    labels[others] = (labels[others] + 1) % 10
    again.train_epoch(poisoned[0], labels, 0, torch.float32, silent)
    assert torch.equal(tiny.linear.weight, before.linear.weight)


class Counting(torch.nn.Module):
    """Computes what `network` computes, and keeps the sizes of the batches."""

    def __init__(self, network):
        super().__init__()
        self.network, self.sizes = network, []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.network(x)


def test_what_computes_in_the_networks_place_gets_the_full_training_batches(tiny, poisoned):
    networks, losses, sizes = [tiny, copy.deepcopy(tiny)], [], []
    for network, fast in ((networks[0], None), (networks[1], Counting(networks[1]))):
        config = dbd.Config(simclr_batch=60, mixmatch_steps=2, mixmatch_batch=8)
        for stage_of in (dbd.Contrast, dbd.Semi):
            torch.manual_seed(0)
            stage = stage_of(network, config, 0, fast)
            losses.append(stage.train_epoch(poisoned[0][:200], poisoned[1][:200], 0, torch.float32, silent)["loss"])
            stage.finish()
            sizes += fast.sizes if fast else []
    assert losses[:2] == losses[2:]
    assert sizes == [120, 120, 120] + [120, 120, 120, 24, 24]  # 3 x 60 of 200 images, twice; 3 x 8


# --- the command -----------------------------------------------------------------------------------------------------

RUN = ["--defense", "dbd", "--dataset", "cifar10_sample", "--device", "cpu", "--precision", "fp32", "--width", "0.0625"]
RUN += ["--attack", "badnet"]
EPOCHS = ["--epochs", "2", "2", "2"]
PLACE = "cifar10_sample_resnet18-w0.0625_badnet/dbd,dataset=cifar10_sample,epochs=2+2+2.json"


@pytest.fixture(scope="module")
def short():
    """Every second image of the sample, and batches and epochs that suit so few."""
    init, whole = dbd.Config.__init__, cifar10.load_sample

    def short_init(self, **kwargs):
        init(self, **{"mixmatch_steps": 3, "mixmatch_batch": 20, "simclr_batch": 50, **kwargs})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dbd.Config, "__init__", short_init)
        patch.setattr(cifar10, "load_sample", lambda train: [t[::2] if train else t for t in whole(train)])
        yield


def run(folder, *flags):
    defend.main([*RUN, "--out", str(folder / "d.pt"), "--results", str(folder / "results"), *EPOCHS, *flags])


@pytest.fixture(scope="module")
def whole(short, few_test_images, tmp_path_factory):
    """The folder of one finished run."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def test_a_run_that_was_cut_off_goes_on_with_the_same_bits(whole, tmp_path, monkeypatch, capsys):
    save, saved = utils.save_checkpoint, []

    def save_and_stop(checkpoint, path):
        save(checkpoint, path)
        saved.append(path)
        if len(saved) in (1, 2, 4, 5, 7):  # within a stage, at the end of one, after all is done
            raise KeyboardInterrupt

    monkeypatch.setattr(utils, "save_checkpoint", save_and_stop)
    for _ in range(6):
        try:
            run(tmp_path, "--overwrite")
        except KeyboardInterrupt:
            continue
        break
    out = capsys.readouterr().out
    assert [int(line.split()[3]) for line in out.splitlines() if line.startswith("going on after")] == [1, 2, 4, 5, 6]
    a, b = (utils.load_checkpoint(p / "d.pt") for p in (whole, tmp_path))
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
    assert [a[k] for k in ("BA", "ASR", "RA")] == [b[k] for k in ("BA", "ASR", "RA")]
    assert not (tmp_path / "d.partial.pt").exists()
    records = [json.loads((p / "results" / PLACE).read_text()) for p in (whole, tmp_path)]
    assert records[0]["last"] == records[1]["last"]


def test_the_network_starts_from_the_initialization_of_dbd(monkeypatch, tmp_path):
    class Reached(Exception):  # noqa: N818
        pass

    def first_stage(network, *_rest):
        raise Reached(network)

    monkeypatch.setattr(dbd, "STAGES", (first_stage,))
    with pytest.raises(Reached) as reached:
        run(tmp_path)
    weight = reached.value.args[0].layer4[1].conv2.weight  # of 32 channels: 9,216 entries
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (32 * 9)), rel=0.03)


def test_it_is_given_the_poisoned_set_and_tells_what_share_of_the_poison_is_trusted(
    short, monkeypatch, tmp_path, capsys
):
    images, labels = data.load_dataset("cifar10_sample", None, train=True)
    poison = poison_training_set(labels, "badnet", 0, None, 1024)
    given = []

    def train(network, images, labels, config, seed, dtype, fast, callback, state):
        given.extend((images, labels))
        trusted = torch.cat((poison.indices[:10], (labels != 0).nonzero()[:100, 0]))
        callback(SimpleNamespace(number=3, epochs=9), 0, {"loss": 1.0, "trusted": trusted}, dict)

    monkeypatch.setattr(dbd, "train", train)
    run(tmp_path)
    assert torch.equal((given[0] != images).flatten(1).any(1).nonzero()[:, 0], poison.indices)
    assert (given[1][poison.indices] == 0).all()
    assert "stage 3 epoch   1  loss 1.0000  poisoned_trusted 0.4000" in capsys.readouterr().out  # 10 of 25
    record = json.loads((tmp_path / "results" / PLACE).read_text())
    assert record["last"] == {"stage_3": {"loss": 1.0, "poisoned_trusted": pytest.approx(0.4)}}


def test_what_it_saves_is_measured_and_recorded(whole):
    (path,) = (whole / "results").rglob("*.json")
    assert path == whole / "results" / PLACE
    record, saved = json.loads(path.read_text()), utils.load_checkpoint(whole / "d.pt")
    assert {k: saved[k] for k in record["after"]} == record["after"]
    assert (record["defense"], saved["defense"]["name"]) == ("dbd", "dbd")
    assert set(record["last"]) == {"stage_1", "stage_2", "stage_3"}
    assert 0 <= record["last"]["stage_3"]["poisoned_trusted"] <= 1
    assert (record["data"], record["poisoned"], record["settings"]["mixmatch_epochs"]) == (250, 25, 2)
    assert (saved["poison_rate"], len(saved["poison_indices"])) == (0.1, 25)
    model, _ = utils.load_model(whole / "d.pt")
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_a_finished_run_is_not_overwritten(tmp_path):
    (tmp_path / "d.pt").write_bytes(b"mine")
    with pytest.raises(InputError, match="--overwrite"):
        run(tmp_path)
    assert (tmp_path / "d.pt").read_bytes() == b"mine"
    (tmp_path / "d.pt").unlink()
    (tmp_path / "d.pt").mkdir()
    with pytest.raises(InputError, match="is a folder; give the name of a file"):
        run(tmp_path)


def test_without_an_attack_nothing_is_poisoned(short, tmp_path):
    run(tmp_path, "--attack", "none", "--epochs", "1", "1", "1")
    saved = utils.load_checkpoint(tmp_path / "d.pt")
    assert saved["ASR"] is None
    assert saved["poison_rate"] == 0


def test_a_cut_off_run_with_other_settings_is_not_taken(short, tmp_path, monkeypatch):
    monkeypatch.setattr(dbd.Contrast, "finish", lambda _self: pytest.fail("stage 1 is over"))
    with pytest.raises(pytest.fail.Exception):
        run(tmp_path, "--epochs", "1", "1", "1")
    before = (tmp_path / "d.partial.pt").read_bytes()
    for other, named in ((["--seed", "7"], "seed"), (["--epochs", "1", "1", "2"], "mixmatch_epochs")):
        with pytest.raises(InputError, match=f"another {named}.*--no-resume"):
            run(tmp_path, "--epochs", "1", "1", "1", *other)
    assert (tmp_path / "d.partial.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--attack", "wanet"], "no poisoned set"),
        (["--data_rate", "0.5"], "--data_rate"),
        (["--trigger_of", "v.pt"], "leave --trigger_of out"),
        (["--ckpt", "v.pt"], "leave --ckpt out"),
        (["--epochs", "3"], "three numbers"),
        (["--poison_rate", "0.95"], "lower it"),
        (["--attack", "none", "--poison_rate", "0.1"], "without an attack"),
    ],
)
def test_what_it_cannot_be_given_is_refused(tmp_path, given, said):
    with pytest.raises(InputError, match=said):
        run(tmp_path, *given)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
