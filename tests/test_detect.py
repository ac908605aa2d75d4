"""Neural Cleanse: the search for a patch, the anomaly index, unlearning; detect.py."""

from flags import InputError

import dataclasses

import pytest
import torch
from torch import nn

import data
import detect
from defenses import inversion, nc
from tests.running import SMALL


@pytest.fixture(scope="module")
def clean():
    return data.load_dataset("cifar10_sample", None, train=True)


# --- the anomaly index ------------------------------------------------------------------------------------------------


def test_the_anomaly_index_by_hand():
    # sorted 2 10 12 14 16 18 20 22 24 26: median 17; distances sorted 1 1 3 3 5 5 7 7 9 15: MAD 5
    suspicious, index = inversion.anomalies([10, 12, 14, 16, 18, 20, 22, 24, 26, 2])
    assert suspicious == [9]
    assert index == pytest.approx([d / (1.4826 * 5) for d in (7, 5, 3, 1, 1, 3, 5, 7, 9, 15)])


def test_a_patch_that_is_large_is_not_suspicious():
    suspicious, index = inversion.anomalies([10, 12, 14, 16, 18, 20, 22, 24, 26, 90])
    assert index[9] > 2
    assert suspicious == []


def test_without_a_spread_no_class_is_suspicious():
    assert inversion.anomalies([5.0] * 9 + [1.0]) == ([], [0.0] * 10)


# --- the search -------------------------------------------------------------------------------------------------------


def test_lambda_doubles_after_five_successes_and_falls_after_five_failures():
    pressure = inversion.Pressure(inversion.Config())
    seen = []
    for success in [1.0] * 5 + [0.99] * 4 + [0.98] * 5 + [0.5, 1.0, 0.5]:
        pressure.update(success, 10.0)
        seen.append(pressure.lam / 1e-3)
    assert seen == pytest.approx([1] * 4 + [2] * 9 + [2**-0.5] * 4)


def test_the_best_is_the_smallest_that_succeeds_and_the_search_ends_when_none_follows():
    pressure = inversion.Pressure(inversion.Config(stop_after=7))
    best = [pressure.update(*step) for step in [(0.5, 1.0), (1.0, 8.0), (1.0, 9.0), (0.98, 2.0), (1.0, 7.0)]]
    assert best == [False, True, False, False, True]
    assert pressure.smallest == 7.0
    for _ in range(10):
        pressure.update(0.0, 6.0)
        assert not pressure.over  # lambda has not risen yet
    for step in range(5):  # a little better each time, but by less than one in a hundred
        assert pressure.update(1.0, 6.99 - step / 1000)
        assert pressure.over == (step == 4)
    assert pressure.lam == pytest.approx(1e-3 / 8 * 2)


class Corner(nn.Module):
    """Two classes; an image is of the second if its corner of 3 x 3 pixels is bright in the first color."""

    def forward(self, x):
        bright = 30 * (x[:, 0, :3, :3].mean((1, 2)) - 0.8)
        return torch.stack((-bright, bright), 1)


def test_the_search_finds_the_pixels_that_a_class_hangs_on(clean):
    config = inversion.Config(search_batch=100, search_steps=400)
    patch, norm = inversion.invert(Corner(), clean[0], 1, config, torch.Generator().manual_seed(0))
    mask, pattern = patch[0], patch[1:]
    assert norm == pytest.approx(mask.sum().item(), rel=1e-5)
    assert norm < 9.5
    assert mask[:3, :3].mean() > 0.5
    assert mask[3:].sum() + mask[:3, 3:].sum() < 1
    assert pattern[0, :3, :3].mean() > 0.9
    assert 0 <= patch.min() <= patch.max() <= 1
    assert not patch.requires_grad
    stamped = inversion.stamp(data.to_float(clean[0]), patch[:1], patch[1:])
    assert (Corner()(stamped).argmax(1) == 1).float().mean() > 0.95


def test_a_class_that_is_never_reached_has_the_last_patch(clean):
    class Never(nn.Module):
        def forward(self, x):
            return torch.stack((x.mean((1, 2, 3)) + 9, -x.mean((1, 2, 3))), 1)

    config = inversion.Config(search_batch=5, search_steps=7)
    patch, norm = inversion.invert(Never(), clean[0], 1, config, torch.Generator().manual_seed(0))
    assert norm == pytest.approx(patch[0].sum().item(), rel=1e-5)


def test_the_target_of_a_victim_has_the_smallest_patch(tiny, clean):
    config = inversion.Config(search_batch=30, search_steps=50)
    net = tiny.requires_grad_(False)
    norms = [inversion.invert(net, clean[0], c, config, torch.Generator().manual_seed(c))[1] for c in (0, 4)]
    assert norms[0] < norms[1] / 2


def test_stamped_images_keep_their_labels(clean):
    images, labels = clean[0][:40], clean[1][:40]
    patches = torch.zeros(2, 4, 32, 32)
    patches[0, :, 0, 0] = 1  # a white pixel
    patches[1, 0, :, 31], patches[1, 1, :, 31] = 0.5, 0.8  # a column, half of it of a red
    x, y = nc.stamped_set(images, labels, patches, 0.25, 3)
    assert (x.dtype, len(x), len(y)) == (torch.uint8, 30 + 2 * 10, 50)
    white, red = images.clone(), images.clone()
    white[:, :, 0, 0] = 255
    red[:, :, :, 31] = (images[:, :, :, 31].float() / 2 + torch.tensor([0.4 * 255, 0, 0])[:, None]).round().byte()
    came_from = []
    for part, source in ((x[:30], images), (x[30:40], white), (x[40:], red)):
        near = (part[:, None].float() - source).abs().flatten(2).amax(2) <= 1  # of rounding
        assert (near.sum(1) == 1).all()
        came_from.append(near.float().argmax(1))
    assert torch.equal(y, labels[torch.cat(came_from)])
    assert torch.equal(came_from[1], came_from[2])  # the same images, once per patch
    assert torch.equal(torch.cat(came_from[:2]).sort()[0], torch.arange(40))


def test_nc_unlearns_what_is_suspicious_and_changes_nothing_else(tiny, clean, monkeypatch):
    images, labels = clean[0][::5], clean[1][::5]
    patches, seen = torch.rand(10, 4, 32, 32), []
    norms = [40.0, 41, 42, 43, 44, 45, 46, 47, 48, 5]
    monkeypatch.setattr(inversion, "search", lambda *_: {"patches": patches, "norms": norms})
    monkeypatch.setattr(nc.finetune, "tune", lambda net, x, y, *_: seen.append((len(x), len(y))) or {"loss": [1.0]})
    repaired = nc.repair(tiny, images, labels)
    assert repaired.findings["suspicious"] == [9]
    assert seen == [(100, 100)]
    assert repaired.history == {"norm": norms, "loss": [1.0]}
    norms[9] = 49.0
    repaired = nc.repair(tiny, images, labels)
    assert "no class is suspicious" in repaired.findings["outcome"]
    assert len(seen) == 1
    assert all(torch.equal(v, repaired.model.state_dict()[k]) for k, v in tiny.state_dict().items())


# --- the command ------------------------------------------------------------------------------------------------------


def test_detect_says_which_class_and_draws_the_patches(victim_file, tmp_path, capsys, monkeypatch):
    few = dataclasses.replace(inversion.Config(), search_steps=2, search_batch=5)
    monkeypatch.setattr(inversion, "Config", lambda: few)
    draw, drawn = detect.plots.draw_patches, []
    monkeypatch.setattr(detect.plots, "draw_patches", lambda *what: (drawn.append(what), draw(*what)))
    detect.main([*SMALL, "--ckpt", str(victim_file), "--outdir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert "500 clean images" in lines[0]
    assert len([line for line in lines if line.lstrip()[:1].isdigit() and line.endswith(tuple("0123456789d"))]) >= 10
    ((_, norms, index, _),) = drawn
    said = [line.split()[:3] for line in lines if line.lstrip()[:1].isdigit()][:10]
    assert said == [[str(c), f"{norms[c]:.2f}", f"{index[c]:.2f}"] for c in range(10)]
    assert detect.verdict(norms) in lines
    picture = tmp_path / "detect_victim.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["detect_victim.png", "victim.pt"]  # nothing else is left


def test_a_search_that_was_cut_off_goes_on(victim_file, tmp_path, capsys, monkeypatch):
    few = dataclasses.replace(inversion.Config(), search_steps=2, search_batch=5)
    monkeypatch.setattr(inversion, "Config", lambda: few)
    monkeypatch.setattr("support.resume.KEEP_EVERY", 0)
    words = [*SMALL, "--ckpt", str(victim_file), "--outdir", str(tmp_path)]
    invert, asked = inversion.invert, []

    def cut_off(net, images, target, *rest):
        if target == 6:
            raise KeyboardInterrupt
        return invert(net, images, target, *rest)

    monkeypatch.setattr(inversion, "invert", cut_off)
    with pytest.raises(KeyboardInterrupt):
        detect.main(words)
    with pytest.raises(InputError, match="another mean, std;"):
        detect.main([*words, "--mean", "none"])
    monkeypatch.setattr(inversion, "invert", lambda net, x, c, *rest: asked.append(c) or invert(net, x, c, *rest))
    detect.main(words)
    assert asked == [6, 7, 8, 9]
    again = capsys.readouterr().out.splitlines()
    assert any("going on after 6" in line for line in again)
    detect.main([*words, "--no-resume"])
    whole = [line for line in capsys.readouterr().out.splitlines() if not line.endswith(" s")]
    assert whole[1:] == [line for line in again[2:] if not line.endswith(" s")][-len(whole[1:]) :]


def test_the_verdict_names_the_class_or_the_limit():
    norms = [40.0, 41, 42, 43, 44, 45, 46, 47, 48, 5]
    assert "class 9 (index" in detect.verdict(norms)
    norms[9] = 39.0
    assert "no class stands out" in detect.verdict(norms)
    assert "covers the whole image" in detect.verdict(norms)
    assert "class 2 (index" in detect.verdict([50.0, 52.0, 1.0])  # of three classes one can stand out


@pytest.mark.parametrize("norms", [[1.0, 60.0], [60.0, 1.0], [1.0]])
def test_of_two_classes_none_can_stand_out_and_the_verdict_says_so(norms):
    said = detect.verdict(norms)
    assert said.startswith("no verdict: ")
    assert said.endswith(f"class {norms.index(1)}")
