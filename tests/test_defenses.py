"""The defenses that UNIT is compared with: each against its definition, on a small real BadNets victim."""

import flags
from flags import InputError

import copy
import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import utils
from defenses import DEFENSES, bcu, finetune, ulrl
from defenses.common import train_epoch
from evaluate import main as evaluate_main
from support import records
from tests.running import SMALL, run_defend

pytestmark = pytest.mark.usefixtures("few_test_images", "undrawn")


@pytest.fixture(scope="session")
def clean():
    """The embedded clean images: uint8 (500, 3, 32, 32), labels."""
    return data.load_dataset("cifar10_sample", None, train=True)


# besides few epochs
FEW = {
    "anp": {"epoch_steps": 2, "batch_size": 20},
    "nc": {"search_steps": 2, "search_batch": 10},
    "i_bau": {"terms": 2},
}
RESUMED = [name for name, module in DEFENSES.items() if module.Config().data_rate]  # the others take no time


def short(name, epochs=2):
    """The configuration of a method with few epochs."""
    config = DEFENSES[name].Config()
    few = {k: epochs for k in vars(config) if k.endswith("epochs")} | FEW.get(name, {})
    return dataclasses.replace(config, **few)


def test_every_defense_is_known_to_the_commands():
    assert tuple(DEFENSES) == flags.DEFENSES
    for module in DEFENSES.values():
        config = module.Config()
        assert isinstance(config.uses_labels, bool)
        assert 0 <= config.data_rate <= 1
        assert "uses_labels" not in dataclasses.asdict(config)  # no setting


@pytest.mark.parametrize("name", DEFENSES)
def test_same_seed_same_bits_and_the_victim_is_left_alone(name, tiny, clean):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    few = clean[0][::25], clean[1][::25]
    a, b, c = (DEFENSES[name].repair(tiny, *few, short(name, 1), seed=s) for s in (1, 1, 2))
    state_a, state_b, state_c = (r.model.state_dict() for r in (a, b, c))
    assert all(torch.equal(state_a[k], state_b[k]) for k in state_a)
    assert a.history == b.history
    if name in (
        "anp",
        "rnp",
        "nc",
    ):  # which prune, or leave an unsuspected network as it is: the weights may be the same
        assert a.history != c.history
    elif name != "clp":  # where nothing is drawn
        assert not torch.equal(state_a["conv1.weight"], state_c["conv1.weight"])
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
    assert not a.model.training
    assert not any(math.isnan(v) for values in a.history.values() for v in values)


@pytest.mark.parametrize("name", RESUMED)
def test_a_repair_goes_on_to_the_same_bits_from_each_epoch(name, tiny, clean):
    """Also twice from one state, and although the epochs after it went on before it was written."""
    few = clean[0][::25], clean[1][::25]
    config, repair = short(name, 3), DEFENSES[name].repair  # with two, no rate would be left to restore
    states, figures = [], []

    def callback(now, state_of):
        figures.append(now)
        states.append(state_of())

    whole = repair(tiny, *few, config, 1, callback=callback)
    kept, told = list(states), list(figures)
    assert len(kept) >= 3
    # what the callback was told is the history, epoch by epoch
    for key, values in whole.history.items():
        assert [now[key] for now in told if key in now] == values
    files = []
    for state in kept:
        files.append(io.BytesIO())
        torch.save(state, files[-1])
        files[-1].seek(0)
    loaded = [torch.load(file, weights_only=True) for file in files]  # plain values and tensors alone
    steps = list(enumerate(loaded, 1))
    if len(steps) > 6:  # NC's searches of ten classes are alike
        steps = [*steps[:7:3], *steps[9:]]
    for done, state in (steps[0], *steps):
        figures.clear()
        part = repair(tiny, *few, config, 1, callback=callback, state=state)
        assert figures == told[done:]  # no epoch is done twice
        assert part.history == whole.history
        assert part.findings == whole.findings
        end = part.model.state_dict()
        assert all(torch.equal(v, end[k]) for k, v in whole.model.state_dict().items())


def test_fine_tuning_is_sgd_whose_rate_falls_along_a_cosine(tiny, clean, monkeypatch):
    """Three epochs of one batch, without augmentation: rates .01, .0075 and .0025."""
    monkeypatch.setattr(data, "augment", lambda x, generator, flip: x)
    x, y = clean[0][::5], clean[1][::5]
    end = finetune.repair(tiny, x, y, finetune.Config(epochs=3)).model.state_dict()
    net = copy.deepcopy(tiny).train()
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    for rate in (0.01, 0.0075, 0.0025):
        slopes = torch.autograd.grad(F.cross_entropy(net(data.to_float(x)), y), list(net.parameters()))
        with torch.no_grad():
            for p, v, slope in zip(net.parameters(), velocity, slopes, strict=True):
                v.mul_(0.9).add_(slope + 5e-4 * p)
                p -= rate * v
    for name, value in net.state_dict().items():
        torch.testing.assert_close(end[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_fine_tuning_fits_the_clean_images(tiny, clean):
    few = clean[0][::6], clean[1][::6]
    history = finetune.repair(tiny, *few, finetune.Config(epochs=3, batch_size=32)).history
    assert history["loss"][-1] < history["loss"][0]


# --- BCU ------------------------------------------------------------------------------------------------------------


def test_the_share_drawn_anew_is_p_and_batch_norm_stays(tiny):
    config = bcu.Config()
    counts = {start: [0, 0] for start, _ in config.p}
    for seed in range(30):  # the stem has 216 weights, of which two are replaced
        student = bcu.partly_fresh(tiny, config.p, seed)
        for name, old in tiny.named_parameters():
            new = student.get_parameter(name)
            if ".bn" in name or name.startswith("bn") or ".shortcut.1" in name:
                assert torch.equal(old, new)
                continue
            start = next(s for s in counts if name.startswith(s))
            counts[start][0] += (old != new).sum().item()
            counts[start][1] += old.numel()
        assert all(torch.equal(a, b) for a, b in zip(tiny.buffers(), student.buffers(), strict=True))
    for start, p in config.p:
        replaced, n = counts[start]
        assert abs(replaced - n * p) <= 4 * math.sqrt(n * p * (1 - p)) < n * p, start


def test_all_or_nothing_can_be_drawn_anew(tiny):
    layers = [name for name, m in tiny.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    same = bcu.partly_fresh(tiny, [(name, 0.0) for name in layers], seed=0)
    fresh = bcu.partly_fresh(tiny, [(name, 1.0) for name in layers], seed=0)
    for name in layers:
        assert torch.equal(same.get_parameter(f"{name}.weight"), tiny.get_parameter(f"{name}.weight"))
        assert not (fresh.get_parameter(f"{name}.weight") == tiny.get_parameter(f"{name}.weight")).any()
    assert not (fresh.linear.bias == tiny.linear.bias).any()
    limit = 1 / math.sqrt(tiny.linear.in_features)  # of torch's own initialization
    assert 0.8 * limit < fresh.linear.weight.abs().max() <= limit
    assert 0.5 * limit < fresh.linear.bias.abs().max() <= limit


def test_fresh_convolutions_are_kaiming_normal_by_fan_out(tiny):
    fresh = bcu.partly_fresh(tiny, [("", 1.0)], seed=0)
    convolutions = [m.weight for m in fresh.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 20
    for weight in convolutions:
        c_out, _, k, _ = weight.shape
        n, std = weight.numel(), math.sqrt(2 / (c_out * k * k))
        assert abs(weight.std().item() / std - 1) < 4 / math.sqrt(2 * n)
        assert abs(weight.mean().item()) < 4 * std / math.sqrt(n)
    # a normal distribution has 4.55 % of its mass beyond two standard deviations, a uniform one none
    beyond = (convolutions[-1].abs() > 2 * convolutions[-1].std()).float().mean().item()
    assert beyond == pytest.approx(0.0455, abs=0.006)


def test_a_shortcut_has_the_share_of_its_stage(tiny):
    name = "layer4.0.shortcut.0.weight"
    replaced = bcu.partly_fresh(tiny, bcu.Config().p, seed=0).get_parameter(name) != tiny.get_parameter(name)
    n = replaced.numel()
    assert abs(replaced.sum().item() - 0.27 * n) < 4 * math.sqrt(n * 0.27 * 0.73)


def test_a_layer_without_a_share_is_named(tiny):
    with pytest.raises(ValueError, match="conv1"):
        bcu.partly_fresh(tiny, [("layer", 0.1), ("linear", 0.1)], seed=0)


def test_drawing_anew_leaves_the_global_generator(tiny):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    bcu.partly_fresh(tiny, bcu.Config().p, seed=0)
    assert torch.equal(torch.rand(3), want)


def test_distillation_loss_is_kl_of_teacher_and_student():
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(7, 10, generator=g, dtype=torch.float64) * 3 for _ in range(2))
    for temperature in (1.0, 2.5):
        p, q = (torch.softmax(t / temperature, 1) for t in (teacher, student))
        slow = sum(p[i, c] * (p[i, c] / q[i, c]).log() for i in range(7) for c in range(10)) / 7
        torch.testing.assert_close(bcu.distillation_loss(student, teacher, temperature), slow)
    assert bcu.distillation_loss(teacher, teacher, 2.0).abs() < 1e-12


def test_distillation_brings_the_student_to_the_teacher(tiny, clean):
    """KL at temperature 1 on the training images, before and after, both networks in eval mode."""
    few = clean[0][::4]
    x, config = data.to_float(few), bcu.Config(epochs=5, batch_size=32)
    start = bcu.partly_fresh(tiny, config.p, seed=0).eval()
    end = bcu.repair(tiny, few, None, config, seed=0).model
    with torch.no_grad():
        before, after = (bcu.distillation_loss(net(x), tiny(x), 1.0).item() for net in (start, end))
    assert after < 0.5 * before


def test_the_temperature_rises_by_the_published_steps():
    seen = [bcu.temperature_of(epoch, bcu.Config()) for epoch in range(100)]
    assert seen == pytest.approx([1.03 + 0.03 * epoch for epoch in range(100)])
    assert seen[-1] == pytest.approx(4.0)


def test_the_temperature_rises_from_first_to_last_epoch(tiny, clean, monkeypatch):
    seen = []
    loss = bcu.distillation_loss
    monkeypatch.setattr(
        bcu, "distillation_loss", lambda s, t, temperature: (seen.append(temperature), loss(s, t, 1))[1]
    )
    bcu.repair(tiny, clean[0][:100], None, bcu.Config(epochs=3))
    assert seen == [2.0, 3.0, 4.0]


def test_no_label_is_looked_at(tiny, clean):
    a = bcu.repair(tiny, clean[0][:100], None, bcu.Config(epochs=1)).model.state_dict()
    b = bcu.repair(tiny, clean[0][:100], torch.zeros(100, dtype=torch.int64), bcu.Config(epochs=1)).model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


# --- ULRL -----------------------------------------------------------------------------------------------------------


def test_a_row_that_changed_much_more_is_suspicious():
    change = torch.tensor([9.0, 1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.1, 0.9, 1.0])
    rows, z = ulrl.suspicious_rows(change)
    assert rows == [0]
    # median 1.0, distances sorted 0 0 0 .1 .1 .1 .1 .2 .2 8: their median is 0.1
    assert z[0] == pytest.approx(8 / (1.4826 * 0.1), rel=1e-4)


def test_rows_that_changed_less_are_not_suspicious_and_there_are_two_at_most():
    change = torch.tensor([-9.0, 1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.1, 0.9, 1.0])
    assert ulrl.suspicious_rows(change)[0] == []
    change[[0, 2, 5, 7]] = torch.tensor([1.0, 7.0, 8.0, 9.0])
    rows, z = ulrl.suspicious_rows(change)
    assert rows == [2, 5]  # the first two by class
    assert 3.5 < z[2] < z[5] < z[7]


# each time the value of row 3 stands out from the lower of the two middle values, but not from their mean
MEDIANS = [
    # lower median 1.4 (mean 1.6), MAD 0.4 by both: z = 2.2 / 0.593 = 3.71, and 2.0 / 0.593 = 3.37
    ([1.0, 1.1, 1.2, 3.6, 1.3, 1.4, 1.8, 1.9, 2.0, 2.1], 2.2 / (1.4826 * 0.4)),
    # lower median 1.0, distances sorted 0 0 0 .1 .1 .3 .3 .3 .3 .6: lower median 0.1 (mean 0.2, so z = 2.02)
    ([0.9, 0.9, 1.0, 1.6, 1.0, 1.0, 1.3, 1.3, 1.3, 1.3], 0.6 / (1.4826 * 0.1)),
]


@pytest.mark.parametrize(("change", "want"), MEDIANS)
def test_the_median_is_the_lower_of_the_two_in_the_middle(change, want):
    rows, z = ulrl.suspicious_rows(torch.tensor(change))
    assert rows == [3]
    assert z[3] == pytest.approx(want, rel=1e-5)
    middle = np.median(change)
    assert abs(change[3] - middle) / (1.4826 * np.median(np.abs(change - middle))) < 3.5


def test_the_bias_does_not_count(tiny, clean, monkeypatch):
    unlearned = copy.deepcopy(tiny)
    with torch.no_grad():
        unlearned.linear.weight += 1e-3 * torch.arange(1, 11)[:, None]
        unlearned.linear.weight[6] -= 0.1
        unlearned.linear.bias[4] += 100
    monkeypatch.setattr(ulrl, "unlearn", lambda *_: (unlearned, {"unlearn_accuracy": [0.1]}))
    few = clean[0][:40], clean[1][:40]
    assert ulrl.repair(tiny, *few, ulrl.Config(relearn_epochs=1)).findings["suspicious_rows"] == [6]


def test_unlearning_stops_at_its_accuracy_and_drops_its_rate(tiny, clean, monkeypatch):
    rates, clips = [], []

    def epoch(images, config, optimizer, generator, loss_of, clip_norm):
        rates.append(optimizer.param_groups[0]["lr"])
        clips.append(clip_norm)
        optimizer.step()  # of no gradient; the schedule wants to see it
        return -1.0, 0.9 if len(rates) < 13 else 0.2

    monkeypatch.setattr(ulrl, "train_epoch", epoch)
    _, history = ulrl.unlearn(tiny, *clean, ulrl.Config(), torch.Generator())
    assert len(rates) == 13
    assert rates == pytest.approx([0.01] * 10 + [0.001] * 3)
    assert set(clips) == {20.0}
    assert history["unlearn_loss"] == [1.0] * 13


def test_weights_that_are_no_numbers_are_said():
    with pytest.raises(ValueError, match="NaN or infinite"):
        ulrl.suspicious_rows(torch.tensor([1.0, float("nan"), 1.0]))


def test_the_gradient_is_clipped(tiny, clean):
    """One step of plain descent moves the weights by the rate times the bound."""
    before = [p.detach().clone() for p in tiny.parameters()]
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.001)

    def loss_of(x, index):
        logits = tiny(x)
        return 1000 * logits.square().sum(), logits[:, 0] > 0

    train_epoch(clean[0][:20], finetune.Config(batch_size=20), optimizer, torch.Generator(), loss_of, clip_norm=20.0)
    moved = sum((p - b).double().square().sum() for p, b in zip(tiny.parameters(), before, strict=True)).sqrt()
    assert moved.item() == pytest.approx(0.02, rel=1e-3)


def test_without_a_spread_no_row_is_suspicious():
    change = torch.ones(10)
    change[4] = 5
    assert ulrl.suspicious_rows(change) == ([], [0.0] * 10)


def test_unlearning_finds_the_target_of_a_victim(tiny, clean):
    few = clean[0][::2], clean[1][::2]
    findings = ulrl.repair(tiny, *few, ulrl.Config(relearn_epochs=1), seed=0).findings
    assert findings["unlearned"]
    assert 0 in findings["suspicious_rows"]
    assert findings["z"][0] == max(findings["z"])


def test_rows_are_drawn_in_their_range(tiny):
    linear = tiny.linear
    before = linear.weight.detach().clone()
    ulrl.redraw_rows(linear, [3, 5], torch.Generator().manual_seed(0))
    limit = math.sqrt(2 / linear.in_features)
    assert linear.weight[[3, 5]].abs().max() <= limit
    assert linear.weight[[3, 5]].abs().max() > 0.8 * limit
    assert (linear.bias[[3, 5]] == 0).all()
    others = [0, 1, 2, 4, 6, 7, 8, 9]
    assert torch.equal(linear.weight[others], before[others])


def test_the_cosine_term_drives_the_row_away_from_where_it_was(tiny, clean):
    likeness, few = [], (clean[0][::8], clean[1][::8])
    for weight in (0.0, 5.0):
        config = ulrl.Config(relearn_epochs=4, dissimilarity=weight, batch_size=16)
        net, _ = ulrl.relearn(tiny, [0], *few, config, torch.Generator().manual_seed(0))
        likeness.append(torch.cosine_similarity(net.linear.weight[0], tiny.linear.weight[0], dim=0).item())
    assert likeness[1] < likeness[0] - 0.2


def test_relearning_without_a_suspicious_row_is_fine_tuning(tiny, clean):
    few = clean[0][::3], clean[1][::3]

    def relearned(weight):
        config = ulrl.Config(relearn_epochs=1, dissimilarity=weight)
        return ulrl.relearn(tiny, [], *few, config, torch.Generator().manual_seed(0))[0].state_dict()

    a, b = relearned(0.0), relearned(5.0)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert a["linear.weight"].isfinite().all()
    assert not torch.equal(a["linear.weight"], tiny.linear.weight)


# --- the command ------------------------------------------------------------------------------------------------------


def the_record(tmp_path):
    """The only record under the folder, and its place there."""
    (path,) = (tmp_path / "results").rglob("*.json")
    return json.loads(path.read_text()), path.relative_to(tmp_path / "results").as_posix()


@pytest.mark.parametrize(("name", "given"), [(n, ["--epochs", "1"] if n == "ft" else []) for n in RESUMED])
def test_the_command_saves_what_it_measured(victim_file, tmp_path, capsys, name, given, monkeypatch):
    few = short(name, 1)
    monkeypatch.setattr(DEFENSES[name], "Config", lambda: few)
    run_defend(victim_file, tmp_path, "--defense", name, "--data_rate", "0.1", *given)
    record, place = the_record(tmp_path)
    assert place == f"victim/{name},data_rate=0.1,dataset=cifar10_sample{',epochs=1' if given else ''}.json"
    assert record["defense"] == name
    assert (record["data"], record["labels"]) == (50, name != "bcu")
    n_target = (data.load_dataset("cifar10_sample", None, train=False)[1] == 0).sum()
    assert [record["before"][n] for n in ("n_clean", "n_triggered", "n_target")] == [100, 100 - n_target, n_target]
    assert record["victim"] == records.victim_of(victim_file, utils.load_checkpoint(victim_file))
    assert (record["victim"]["file"], record["victim"]["sha256"]) == ("victim.pt", utils.sha256(victim_file))
    out = capsys.readouterr().out
    assert f"after   BA {100 * record['after']['BA']:.2f} %  ASR {100 * record['after']['ASR']:.2f} %  RA" in out
    evaluate_main([*SMALL, "--ckpt", str(tmp_path / "d.pt"), "--outdir", str(tmp_path)])
    after = out[out.index("after ") :].splitlines()[0].removeprefix("after   ")
    assert after in capsys.readouterr().out  # the saved model gives the same figures again
    saved = utils.load_checkpoint(tmp_path / "d.pt")
    assert saved["defense"]["name"] == name
    assert {k: saved[k] for k in record["after"]} == record["after"]
    assert not (tmp_path / "d.partial.pt").exists()
    with pytest.raises(InputError, match="defended model"):
        run_defend(tmp_path / "d.pt", tmp_path, "--defense", "ft")


def test_no_defense_measures_alone(victim_file, tmp_path):
    run_defend(victim_file, tmp_path, "--defense", "none", "--out", str(tmp_path))  # which is not written
    record, place = the_record(tmp_path)
    assert place == "victim/none,dataset=cifar10_sample.json"
    assert record["before"] == record["after"]
    assert record["data"] == 0
    assert not (tmp_path / "d.pt").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["ulrl", "--epochs", "3"], "no number for --epochs"),
        (["ft", "--epochs", "3", "4"], "one number for --epochs"),
        (["none", "--epochs", "3"], "--epochs"),
        (["none", "--data_rate", "0.5"], "--data_rate"),
        (["ft", "--width", "0.5"], "dbd's"),
        (["bcu", "--poison_rate", "0.5"], "dbd's"),
        (["ulrl", "--overwrite"], "dbd's"),
    ],
)
def test_flags_of_no_use_are_refused(victim_file, tmp_path, given, said):
    with pytest.raises(InputError, match=said):
        run_defend(victim_file, tmp_path, "--defense", *given)
    assert [p.name for p in tmp_path.iterdir()] == ["victim.pt"]


def test_the_victim_is_not_written_over(victim_file, tmp_path):
    before = victim_file.read_bytes()
    with pytest.raises(InputError, match="the victim"):
        run_defend(victim_file, tmp_path, "--defense", "ft", "--out", str(victim_file))
    other = tmp_path / "other.pt"  # whose trigger is that of the victim
    other.write_bytes(before)
    with pytest.raises(InputError, match="the trigger's file"):
        run_defend(other, tmp_path, "--defense", "ft", "--trigger_of", str(victim_file), "--out", str(victim_file))
    assert victim_file.read_bytes() == before


def test_a_place_that_cannot_be_written_is_said_before_the_repair(victim_file, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "repair", lambda *_args: pytest.fail("the repair began"))
    (tmp_path / "file").write_text("")
    for flag, bad in (("--out", tmp_path), ("--results", tmp_path / "file")):
        with pytest.raises(InputError, match="cannot write"):
            run_defend(victim_file, tmp_path, "--defense", "ft", flag, str(bad))
