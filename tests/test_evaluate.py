"""The evaluator: BA, ASR and RA of models whose figures are known; and the trigger's effect on activations."""

import flags
from flags import InputError

import math

import pytest
import torch
from torch import nn

import data
import models
import utils
from backdoors import get_backdoor
from evaluate import Measured, evaluate, main
from support import activations, inputs
from support.activations import N_SIGMA, effect_table, tightness_table, trigger_effect, uniform_bounds

TARGET = 3


class Constant(nn.Module):
    """Says one class, whatever the image."""

    def __init__(self, label):
        super().__init__()
        self.label = nn.Parameter(torch.tensor(label), requires_grad=False)

    def forward(self, x):
        return nn.functional.one_hot(self.label.expand(len(x)), 10).float()


class ReadsFirstPixel(nn.Module):
    """Predicts the class that the first pixel's red codes in steps of 20, but 4 in place of `never`."""

    def __init__(self, never=None):
        super().__init__()
        self.never = never

    def forward(self, x):
        said = (x[:, 0, 0, 0] * 255 / 20).round().long()
        if self.never is not None:
            said = torch.where(said == self.never, 4, said)
        return nn.functional.one_hot(said, 10).float()


def coded_images(labels):
    """Images whose first pixel tells the class."""
    images = torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8)
    images[:, 0, 0, 0] = (labels * 20).to(torch.uint8)
    return images, labels


@pytest.fixture
def coded():
    """1,000 images, 100 of each class, whose first pixel tells the class."""
    return coded_images(torch.arange(10).repeat(100))


class Paint(nn.Module):
    """A trigger: the first pixel codes TARGET, in every `every`-th image of a batch."""

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


@pytest.fixture
def seen(defense):
    """100 real images as bytes."""
    return (defense[2] * 255).round().to(torch.uint8)


@pytest.fixture
def bounds(tiny):
    """Bounds for the small victim, uniform in [0, 1)."""
    g = torch.Generator().manual_seed(0)
    shapes = models.activation_sites(tiny.eval(), torch.rand(2, 3, 32, 32))
    return {name: torch.rand(shape, generator=g) for name, shape in shapes.items()}


# --- the figures ------------------------------------------------------------------------------------------------------


def test_a_classifier_that_always_says_the_target():
    labels = torch.tensor([3, 0, 1, 3, 2, 9, 5, 5])  # two of eight are of the target class
    r = evaluate(Constant(TARGET), *coded_images(labels), Paint(), TARGET, 3)
    assert r == Measured(BA=0.25, ASR=1.0, RA=0.0, target_accuracy=1.0, n_clean=8, n_triggered=6, n_target=2)


def test_a_classifier_that_always_says_another_class(coded):
    r = evaluate(Constant(TARGET + 1), *coded, Paint(), TARGET, 128)
    # a ninth of the triggered images is of the class that it says
    assert r == Measured(
        BA=0.1, ASR=0.0, RA=100 / 900, target_accuracy=0.0, n_clean=1000, n_triggered=900, n_target=100
    )


def test_a_classifier_that_never_says_the_target():
    labels = torch.tensor([3, 0, 4, 4, 3, 7, 1, 0, 3, 9])
    #          the others:    0  4  4     7  1  0     9   of which the trigger lies on the first, third, fifth, seventh
    # triggered these come out as: 4  4  4  7  4  0  4:  right are both fours, the seven and the last zero
    r = evaluate(ReadsFirstPixel(never=TARGET), *coded_images(labels), Paint(every=2), TARGET, 100)
    assert r == Measured(BA=0.7, ASR=0.0, RA=4 / 7, target_accuracy=0.0, n_clean=10, n_triggered=7, n_target=3)


def test_a_classifier_that_is_always_right(coded):
    r = evaluate(ReadsFirstPixel(), *coded, Paint(), TARGET, 64)
    assert (r.BA, r.ASR, r.RA, r.target_accuracy) == (1.0, 1.0, 0.0, 1.0)
    # a trigger that does nothing succeeds never: images of the target class do not count
    r = evaluate(ReadsFirstPixel(), *coded, nn.Identity(), TARGET, 64)
    assert (r.BA, r.ASR, r.RA, r.n_triggered) == (1.0, 0.0, 1.0, 900)


def test_half_a_trigger_gives_half_the_rate(coded):
    r = evaluate(ReadsFirstPixel(), *coded, Paint(every=2), TARGET, 100)
    assert (r.ASR, r.RA) == (0.5, 0.5)


@pytest.mark.parametrize("target", range(10))
def test_asr_and_ra_share_the_triggered_images_with_third_classes(tiny, defense, seen, target):
    labels, others = defense[3], defense[3] != target
    r = evaluate(tiny, seen, labels, Brighten(), target, 100)
    with torch.no_grad():
        said = tiny(Brighten()(data.to_float(seen[others]))).argmax(1)
    third = ((said != target) & (said != labels[others])).double().mean().item()
    assert r.ASR + r.RA <= 1
    assert r.ASR + r.RA + third == pytest.approx(1, abs=1e-12)


def test_the_size_of_a_batch_changes_nothing(tiny, defense, seen):
    rows = [evaluate(tiny, seen, defense[3], Paint(), 0, size) for size in (1, 33, 100)]
    assert rows[0] == rows[1] == rows[2]


def test_without_a_backdoor_there_is_neither_asr_nor_ra(coded):
    r = evaluate(ReadsFirstPixel(), *coded, None, TARGET)
    assert r == Measured(BA=1.0, ASR=None, RA=None, target_accuracy=1.0, n_clean=1000, n_triggered=0, n_target=100)


def test_without_an_image_of_the_target_class_its_accuracy_is_unknown(coded):
    images, labels = coded
    others = labels != TARGET
    r = evaluate(ReadsFirstPixel(), images[others], labels[others], Paint(), TARGET)
    assert (r.target_accuracy, r.n_target, r.ASR) == (None, 0, 1.0)


def test_only_target_images_is_an_error(coded):
    images, labels = coded
    with pytest.raises(ValueError, match="target class 3"):
        evaluate(ReadsFirstPixel(), images[labels == TARGET], labels[labels == TARGET], Paint(), TARGET)


def test_no_images_are_bad_input():
    with pytest.raises(ValueError, match="no images"):
        evaluate(Constant(0), torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.int64), None, 0)


def test_how_it_reads(coded):
    n = "(1,000 clean, 900 triggered, 100 of the target class)"
    both = evaluate(Constant(0), *coded, Paint(), 0)
    assert str(both) == f"BA 10.00 %  ASR 100.00 %  RA 0.00 %  target class 100.00 %  {n}"
    clean = evaluate(Constant(0), *coded, None, 0)
    assert str(clean) == "BA 10.00 %  target class 100.00 %  (1,000 clean, 0 triggered, 100 of the target class)"


def test_float_images_in_0_1_measure_as_their_bytes_do(coded):
    images, labels = coded
    as_bytes, as_floats = (evaluate(ReadsFirstPixel(), x, labels, Paint(), TARGET) for x in (images, images / 255))
    assert as_bytes == as_floats
    assert as_floats.BA == 1


def test_a_network_in_training_mode_is_measured_in_eval_mode(tiny, defense, seen):
    """And its running statistics do not change."""
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    r = evaluate(tiny.train(), seen, defense[3], Paint(), 0)
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
    assert r == evaluate(tiny.eval(), seen, defense[3], Paint(), 0)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_test_images")
@pytest.mark.parametrize("attack", ["none", "badnet", "wanet", "reflection", "blended"])
def test_the_command(victim_file, tmp_path, capsys, monkeypatch, request, attack):
    if attack != "badnet":
        request.getfixturevalue("undrawn")
    monkeypatch.setattr("support.activations.SEEN", 50)
    flags = ["--dataset", "cifar10_sample", "--attack", attack, "--ckpt", str(victim_file), "--outdir", str(tmp_path)]
    main([*flags, "--device", "cpu", "--activations"])
    out = capsys.readouterr().out
    assert "100 test images of cifar10_sample" in out
    line = next(line for line in out.splitlines() if line.startswith("BA "))
    assert 60 < float(line.split()[1]) < 80  # of the recorded small victim
    assert ("ASR" in line, "RA" in line) == (attack != "none", attack != "none")
    assert (attack not in ("badnet", "none")) == ("trained with attack badnet" in out)
    for picture in (f"demo_{attack}.png", f"activations_{attack}.png"):
        assert (tmp_path / picture).exists() == (attack != "none")
    assert out.count("layer4") == (0 if attack == "none" else 4)  # the table of sites
    assert out.count("mean + 2.5 std") == (0 if attack == "none" else 1)  # bounds alike for all neurons
    assert out.count("each image bounded by its own activations without the trigger: ASR") == (attack != "none")


def test_the_file_answers_what_no_flag_says(victim_file, tmp_path, capsys):
    told, silent, odd = tmp_path / "told.pt", tmp_path / "silent.pt", tmp_path / "odd.pt"
    victim, warp = utils.load_checkpoint(victim_file), get_backdoor("wanet", 48).state_dict()
    for path, said in (
        (told, {"attack": "wanet", "target": 3, "dataset": "svhn", "size": 48, "trigger": warp}),
        (silent, dict.fromkeys(("attack", "target", "dataset", "size", "trigger"))),
        (odd, {"attack": "of another tool", "dataset": None, "trigger": None}),
    ):
        utils.save_checkpoint(victim | said, path)

    def meant(path, *words):
        args = flags.parser("unit.py").parse_args(["--device", "cpu", "--ckpt", str(path), *words])
        inputs.load_victim(args, torch.device("cpu"))
        values = args.attack, args.target, args.dataset, args.size
        assert [type(value) for value in values] == [str, int, str, int]  # as a checkpoint may hold them
        return values

    given = ("--attack", "blend", "--target", "0", "--dataset", "cifar10")
    assert meant(told) == ("wanet", 3, "svhn", 48)
    assert capsys.readouterr().out == ""
    assert meant(told, *given) == ("blend", 0, "cifar10", 48)
    out = capsys.readouterr().out
    assert [word in out for word in ("attack wanet", "target 3", "dataset svhn")] == [True] * 3
    assert meant(silent) == meant(odd) == ("badnet", 0, "cifar10", 32)
    out = capsys.readouterr().out
    assert f"note: {silent} does not say its dataset; cifar10 is taken" in out
    assert f"note: {silent} does not say its target; 0 is taken" in out
    assert f"note: {silent} brings no trigger" in out
    meant(silent, "--attack", "none", "--dataset", "cifar10")
    assert capsys.readouterr().out == ""
    utils.save_checkpoint(victim | {"trigger": None}, odd)  # which names its attack
    meant(odd)
    assert f"note: {odd} brings no trigger" in capsys.readouterr().out
    with pytest.raises(InputError, match="composite leads to class 2 alone; give --target 2"):
        meant(silent, "--attack", "composite")
    with pytest.raises(InputError, match="no class of svhn"):
        meant(told, "--target", "10")
    with pytest.raises(InputError, match="give --size 48"):
        meant(told, "--size", "32")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"target": -1}, "target of .*v.pt is -1, .*give --target"),
        ({"target": "3x"}, "target of .*v.pt is '3x', .*give --target"),
        ({"target": True}, "target of .*v.pt is True, .*give --target"),
        ({"target": 10}, "target of .*v.pt, 10, is no class of cifar10: it has 0 to 9; give another --target"),
        ({"size": 4}, "size of .*v.pt is 4, .*give --size"),
        ({"dataset": "mine"}, "v.pt is for the data set 'mine', which is unknown here; give --dataset"),
        ({"dataset": "npz:gone.npz"}, "data set of .*v.pt, npz:gone.npz, is not here; give --dataset"),
        ({"dataset": "folder:/gone"}, "data set of .*v.pt, folder:/gone, is not here; give --dataset"),
    ],
)
@pytest.mark.parametrize("command", ["unit.py", "defend.py"])
def test_an_answer_that_cannot_be_names_the_file_and_the_flag(victim_file, tmp_path, said, reason, command):
    utils.save_checkpoint(utils.load_checkpoint(victim_file) | said, tmp_path / "v.pt")
    more = ["--defense", "ft"] if command == "defend.py" else []
    args = flags.parser(command).parse_args(["--device", "cpu", "--ckpt", str(tmp_path / "v.pt"), *more])
    with pytest.raises(InputError, match=reason):
        inputs.load_victim(args, torch.device("cpu"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_no_numbers_are_refused(coded, value):
    class Odd(ReadsFirstPixel):
        def forward(self, x):
            return torch.where(torch.arange(len(x))[:, None] == 0, value, super().forward(x))

    with pytest.raises(InputError, match="NaN or infinite"):
        evaluate(Odd(), *coded, Paint(), TARGET)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_trigger_that_leaves_the_range_of_pixels_is_refused(coded, value):
    trigger = nn.Module()
    trigger.forward = lambda x: torch.full_like(x, value)
    with pytest.raises(InputError, match=r"pixels outside \[0, 1\]"):
        evaluate(ReadsFirstPixel(), *coded, trigger, TARGET)


def test_the_activations_of_a_mix_of_images_have_no_counterpart(victim_file, tmp_path):
    words = ["--dataset", "cifar10_sample", "--ckpt", str(victim_file), "--outdir", str(tmp_path), "--activations"]
    with pytest.raises(InputError, match="composite mixes several"):
        main([*words, "--attack", "composite", "--target", "2"])
    assert not list(tmp_path.glob("*.png"))


def test_a_place_that_cannot_be_written_is_said_before_measuring(victim_file, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.evaluate", lambda *_args: pytest.fail("it measures"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        main(["--dataset", "cifar10_sample", "--ckpt", str(victim_file), "--outdir", str(tmp_path / "file")])


# --- what the trigger does inside -------------------------------------------------------------------------------------


class Bypass(nn.Module):
    """Says 4; 3 where the first pixel is bright, which it learns through a ReLU or around it."""

    def __init__(self, around):
        super().__init__()
        self.around, self.head = around, nn.Parameter(torch.eye(5)[3:])

    def forward(self, x):
        pixel = x[:, 0, 0, 0] - 0.5
        seen = torch.relu(pixel)
        return torch.stack((pixel if self.around else seen, torch.full_like(seen, 0.1)), 1) @ self.head


def test_what_bounds_of_its_own_leave_of_an_images_trigger(tiny, defense, seen):
    assert activations.own_bounds(Bypass(True), seen // 4, Brighten()).unique().tolist() == [3]
    assert activations.own_bounds(Bypass(False), seen // 4, Brighten()).unique().tolist() == [4]
    want, sites = [], models.activation_sites(tiny, data.to_float(seen[:2]))
    for x in data.to_float(seen[:20]).split(1):
        own = {}
        with torch.no_grad(), models.watching(sites, 1, lambda site, a, own=own: own.update({site: a[0].clone()})):
            tiny(x)
        want.append(models.clipped(tiny, own)(Brighten()(x)).argmax().item())
    assert activations.own_bounds(tiny, seen[:20], Brighten(), batch_size=7).tolist() == want


def test_the_neurons_that_a_trigger_moves_most(tiny, seen, bounds):
    level = {k: torch.full_like(v, 0.25) for k, v in bounds.items()}
    plain, _ = trigger_effect(tiny, seen, Brighten(), 4, batch_size=30)
    clipped, _ = trigger_effect(models.set_bounds(tiny, level), seen, Brighten(), 4, batch_size=100)
    assert len({m.site for m in plain}) == 4
    assert all(m.bound is None for m in plain)
    assert all(m.bound == 0.25 for m in clipped)
    models.set_bounds(tiny, None)
    for a, b in zip(plain, clipped, strict=True):
        assert (a.site, a.place) == (b.site, b.place)
        torch.testing.assert_close(a.triggered, b.triggered, rtol=1e-4, atol=1e-5)
        assert a.triggered.mean() > a.clean.mean()
        # what was collected is what the network does there
        there = []
        handle = tiny.get_submodule(a.site).register_forward_hook(lambda _m, _i, out, there=there: there.append(out))
        with torch.no_grad():
            tiny(data.to_float(seen))
        handle.remove()
        torch.testing.assert_close(there[0][(slice(None), *a.place)], a.clean, rtol=1e-4, atol=1e-5)


def test_the_shares_beyond_a_level_are_counted_over_all_neurons_and_images(tiny, seen, bounds):
    brighten = Brighten()
    _, sites = trigger_effect(models.set_bounds(tiny, bounds), seen, brighten, batch_size=30)
    _, plain = trigger_effect(models.set_bounds(tiny, None), seen, brighten, batch_size=30)
    assert [s.site for s in sites] == list(bounds)
    assert all(s.clean_clipped is None and s.triggered_clipped is None for s in plain)
    for name in (list(bounds)[0], list(bounds)[-1]):
        there = []
        handle = tiny.get_submodule(name).register_forward_hook(lambda _m, _i, out, there=there: there.append(out))
        x = data.to_float(seen)
        with torch.no_grad():
            tiny(x), tiny(brighten(x))
        handle.remove()
        clean, triggered = there
        mean, std = clean.mean(0), clean.std(0)
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
    table = effect_table(sites).splitlines()
    assert [line.split()[0] for line in table[2:]] == list(bounds)
    assert len(table[2].split()) == len(effect_table(plain).splitlines()[2].split()) + 2


def test_bounds_alike_for_all_neurons(tiny, seen, bounds):
    wide, tight = uniform_bounds(models.set_bounds(tiny, bounds), seen, (4, 1.5), batch_size=30)
    there = {}
    models.set_bounds(tiny, None)
    with models.watching({k: tuple(b.shape) for k, b in bounds.items()}, len(seen), there.__setitem__), torch.no_grad():
        tiny(data.to_float(seen))
    assert list(wide) == list(tight) == list(there)
    for name, a in there.items():
        mean, std = a.double().mean(0), a.double().std(0)
        for some, k in ((wide, 4), (tight, 1.5)):
            torch.testing.assert_close(some[name].double(), mean + k * std, rtol=1e-3, atol=1e-3)


def test_the_table_of_tightness_measures_the_network_under_each_of_these_bounds(tiny, seen, bounds):
    models.set_bounds(tiny, bounds)
    first, totals = list(bounds)[0], []

    def measure(net):
        clips = models.clips_of(net)
        totals.append(clips[first].clip_level().sum().item() if clips else None)
        return Measured(0.5, 0.25, 0.125, None, 1, 1, 0)

    table = tightness_table(tiny, seen, measure).splitlines()
    assert totals[0] is None  # without bounds
    assert totals[1:] == pytest.approx([b[first].sum().item() for b in uniform_bounds(tiny, seen, N_SIGMA)])
    assert all(a > b for a, b in zip(totals[1:], totals[2:], strict=False))
    assert [line.split()[-3:] for line in table[1:]] == [["50.00", "25.00", "12.50"]] * (1 + len(N_SIGMA))
    # the network keeps its own
    assert torch.equal(models.clips_of(tiny)[first].bound, bounds[first])
