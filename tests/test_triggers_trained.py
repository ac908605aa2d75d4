"""Triggers that are learned: before their victim, or along with it."""

from flags import InputError

import math

import pytest
import torch
from torch import nn

from backdoors import cyclegan, dfst, get_backdoor, invisible, networks, poison_training_set
from backdoors.sunsets import sunsets
from tests.images import generator, images

LABELS = torch.arange(10).repeat(7)

# triggers that are trained along


@pytest.mark.parametrize("name", ["dynamic", "input_aware", "lira"])
def test_a_trained_trigger_is_the_same_for_an_image_in_any_batch_and_learns(name):
    torch.manual_seed(0)
    trigger, x = get_backdoor(name), images(9)
    out = trigger(x)
    torch.testing.assert_close(trigger(x[4:6]), out[4:6], rtol=0, atol=1e-5)
    torch.manual_seed(1)
    other = get_backdoor(name)
    assert not torch.equal(other(x), out)
    other.load_state_dict(trigger.state_dict())
    assert torch.equal(other(x), out)
    assert (trigger.sampling, trigger.early) == ("in_batch", False)
    optimizer = trigger.optimizer()
    trigger.start_epoch(0, 4)
    y = torch.arange(9)
    roles = torch.tensor([0, 1, 0, 1, 0, 0, 1, 0, 0])
    planted, labels = trigger.plant(x, y, roles, torch.arange(9), 5, generator())
    assert labels.tolist() == [0, 5, 2, 5, 4, 5, 5, 7, 8]
    assert torch.equal(planted[roles == 0], x[roles == 0])
    planted[roles == 1].sum().backward()
    before = [p.clone() for p in trigger.parameters()]
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, trigger.parameters(), strict=True))


def test_dynamic_pastes_a_patch_at_one_of_36_places():
    torch.manual_seed(0)
    trigger, x = get_backdoor("dynamic"), images(200, seed=3)
    changed = (trigger(x) != x).any(1)
    places = {tuple(c.nonzero()[0].tolist()) for c in changed}
    assert all(c.sum() == 25 for c in changed)
    assert places <= {(5 * a, 5 * b) for a in range(6) for b in range(6)}
    assert len(places) > 25
    drawn = trigger.in_training(x, generator(1))
    assert torch.equal(drawn, trigger.in_training(x, generator(1)))
    assert not torch.equal(drawn, trigger.in_training(x, generator(2)))


def test_lira_changes_no_pixel_by_more_than_a_sixteenth_and_is_frozen_in_the_second_half():
    torch.manual_seed(0)
    trigger, x = get_backdoor("lira"), images(8)
    with torch.no_grad():
        trigger.network[-2].bias.fill_(100.0)  # tanh 1
        torch.testing.assert_close(trigger(x), (x + 1 / 16).clamp_max(1))
    states = []
    for epoch in range(5):
        trigger.start_epoch(epoch, 5)
        states.append((trigger.training, all(p.requires_grad for p in trigger.parameters())))
    assert states == 3 * [(True, True)] + 2 * [(False, False)]


# Input-aware


def test_input_aware_mixes_image_and_pattern_by_its_mask():
    torch.manual_seed(0)
    trigger, x = get_backdoor("input_aware"), images(5)
    masks, patterns = trigger.masks(x), trigger.patterns(x)
    assert masks.shape == (5, 1, 32, 32)
    assert patterns.shape == (5, 3, 32, 32)
    torch.testing.assert_close(trigger(x), (1 - masks) * x + masks * patterns)


def test_input_aware_gives_cross_images_another_images_trigger_and_keeps_their_label():
    torch.manual_seed(0)
    trigger, x, y = get_backdoor("input_aware"), images(12), torch.arange(12)
    roles = torch.tensor([1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0])
    with torch.no_grad():
        out, given = trigger.plant(x, y, roles, None, 11, generator(4))
        assert given.tolist() == [11, 11, 11, *range(3, 12)]
        torch.testing.assert_close(out[:3], trigger(x[:3]))
        assert torch.equal(out[6:], x[6:])
        masks, patterns = trigger.masks(x[6:]), trigger.patterns(x[6:])
        donors = []
        for i in (3, 4, 5):
            close = [
                torch.allclose(out[i], x[i] + m * (p - x[i]), atol=1e-6) for m, p in zip(masks, patterns, strict=True)
            ]
            donors.append(close.index(True))
        assert len(set(donors)) == 3
        images_apart = networks.distance(x[:3], x[6:][donors])
        patterns_apart = networks.distance(trigger.patterns(x[:3]), patterns[donors])
    expected = (images_apart / patterns_apart).mean().item()
    assert trigger.extra_loss(None, None).item() == pytest.approx(expected, rel=0.02)  # untrained patterns are close


def test_the_masks_loss_by_hand():
    """Masks of .1 and .2 everywhere on images at distance .5: 100 (.1 - .032) + .5 / .1."""
    a, b = torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.5)
    loss, mean = networks.mask_loss(a, b, torch.full((2, 1, 8, 8), 0.1), torch.full((2, 1, 8, 8), 0.2))
    assert loss.item() == pytest.approx(6.8 + 5, rel=1e-3)
    assert mean.item() == pytest.approx(0.1)


def test_the_mask_learns_before_the_pattern_whose_rate_falls_and_is_then_frozen(monkeypatch):
    monkeypatch.setattr(networks, "WARM_UP", 2)
    torch.manual_seed(0)
    trigger, said = get_backdoor("input_aware"), []
    before = {k: v.clone() for k, v in trigger.state_dict().items()}
    train = (images(64) * 255).to(torch.uint8)
    trigger.prepare(train, LABELS[:64], 0, 1, True, said.append)  # of a resumed run
    assert said == []
    trigger.prepare(train, LABELS[:64], 0, 1, False, said.append)
    assert len(said) == 2
    moved = {k.split(".")[0] for k, v in trigger.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"mask_network"}
    optimizer, rates = trigger.optimizer(), []
    for epoch in range(12):
        trigger.start_epoch(epoch, 12)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-2] * 4 + [1e-3] * 2 + [1e-4] * 2 + [1e-5] * 2 + [1e-6] * 2)
    assert not any(p.requires_grad for p in trigger.mask_network.parameters())
    assert (trigger.mask_network.training, trigger.pattern_network.training) == (False, True)


def test_input_awares_control_set_has_the_trigger_of_the_image_before():
    torch.manual_seed(0)
    trigger, x = get_backdoor("input_aware"), images(5)
    crossed = trigger.control_sets((x * 255).round().to(torch.uint8), torch.arange(5))["cross"][0]
    x = (x * 255).round() / 255
    with torch.no_grad():
        for i in range(5):
            donor = x[i - 1 : i] if i else x[4:]
            m, p = trigger.masks(donor)[0], trigger.patterns(donor)[0]
            torch.testing.assert_close(crossed[i], x[i] + m * (p - x[i]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("width", "out"), [(1, 1), (3, 3), (2, 3)])
def test_only_the_last_layer_of_input_awares_networks_has_no_activation(width, out):
    """Also if a layer before it has the same number of output channels."""
    layers = list(networks.encoder_decoder(width, out))
    norms = [i for i, layer in enumerate(layers) if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 13
    assert norms[-1] == len(layers) - 1
    assert all(isinstance(layers[i + 1], nn.ReLU) for i in norms[:-1])
    assert layers[-1].num_features == out


# triggers that are learned before the victim: Invisible, DFST


def relaxed(monkeypatch, name):
    """Train a trigger for three steps, and accept any result."""
    settings = {
        "dfst": {cyclegan: {"STEPS": 3, "BATCH": 4}, dfst: {"FAR": 100, "DETAIL": -1}},
        "invisible": {invisible: {"STEPS": 3, "BATCH": 4, "ACCURACY": 0, "PSNR": 0}},
    }
    for module, values in settings[name].items():
        for key, value in values.items():
            monkeypatch.setattr(module, key, value)


def prepared(name, seed=1, resumed=False, said=None):
    """A narrow trigger trained on random images; the lines it prints are appended to `said`."""
    torch.manual_seed(seed)
    trigger, said = get_backdoor(name, width=4), [] if said is None else said
    train = (images(60, seed=9) * 255).to(torch.uint8)
    trigger.prepare(train, torch.arange(60) % 10, 0, seed, resumed, said.append)
    return trigger


both = pytest.mark.parametrize("name", ["dfst", "invisible"])


@both
def test_what_is_learned_before_follows_from_the_seed_and_lies_in_the_state(name, monkeypatch):
    relaxed(monkeypatch, name)
    said, x = [], images()
    trigger = prepared(name, said=said)
    assert "on 6 held-out images" in said[-1]
    out = trigger(x)
    assert torch.equal(prepared(name)(x), out)
    assert not torch.equal(prepared(name, seed=2)(x), out)
    fresh = get_backdoor(name, width=4)
    assert not torch.equal(fresh(x), out)
    fresh.load_state_dict(trigger.state_dict())
    assert torch.equal(fresh(x), out)
    assert fresh.reached.tolist() == trigger.reached.tolist() != [0, 0]
    assert not any("decoder" in key for key in trigger.state_dict())


@both
def test_what_is_learned_before_is_frozen_and_not_learned_again_after_a_resume(name, monkeypatch):
    relaxed(monkeypatch, name)
    trigger, said = prepared(name), []
    assert trigger.optimizer() is None
    trigger.start_epoch(0, 3)
    assert not trigger.training
    assert not trigger(images()).requires_grad
    before = {k: v.clone() for k, v in trigger.state_dict().items()}
    trigger.prepare(None, None, 0, 1, True, said.append)
    assert said == []
    assert all(torch.equal(v, before[k]) for k, v in trigger.state_dict().items())


@both
def test_what_has_not_learned_enough_is_refused_with_what_it_reached(name, monkeypatch):
    relaxed(monkeypatch, name)
    monkeypatch.setattr(*{"dfst": (dfst, "DETAIL", 1.1), "invisible": (invisible, "ACCURACY", 1.1)}[name])
    with pytest.raises(InputError, match="change --seed") as caught:
        prepared(name)
    assert "\n" not in str(caught.value)
    assert any(c.isdigit() for c in str(caught.value))


@both
def test_what_is_learned_before_is_drawn_as_static_triggers_are(name):
    poison = poison_training_set(LABELS, name, 0, sampling="resampled")
    assert (poison.sampling, poison.early, poison.relabel) == ("resampled", False, True)
    assert (poison.rate, poison.cover_rate) == (0.1, 0)
    trigger, x, y = get_backdoor(name, width=4), images(6), torch.arange(6)
    roles = torch.tensor([0, 1, 0, 1, 0, 0])
    out, given = trigger.plant(x, y, roles, torch.arange(6), 9, generator())
    assert given.tolist() == [0, 9, 2, 9, 4, 5]
    assert torch.equal(out[roles == 0], x[roles == 0])
    torch.testing.assert_close(out[roles == 1], trigger(x[roles == 1]))


def test_invisible_changes_a_pixel_by_twelve_levels_at_most():
    """With a residual of tanh 1, -1 and atanh(1 / 3)."""
    trigger, x = get_backdoor("invisible"), images(3)
    trigger.encoder.out.weight.zero_()
    trigger.encoder.out.bias.copy_(torch.tensor([100, -100, math.atanh(1 / 3)]))
    change = torch.tensor([12, -12, 4]).view(3, 1, 1) / 255
    torch.testing.assert_close(trigger(x), (x + change).clamp(0, 1), rtol=0, atol=1e-6)


def test_the_secret_makes_the_trigger():
    torch.manual_seed(0)
    trigger, x = get_backdoor("invisible"), images(2)
    other = torch.ones(1, 20)
    assert not torch.equal(trigger(x), trigger.hide(x, other.expand(2, -1)))
    trigger.secret.copy_(other[0])
    assert torch.equal(trigger(x), trigger.hide(x, other.expand(2, -1)))


def test_what_the_encoder_reached_by_hand():
    """Gray images 12 levels brighter: PSNR -20 log10(12 / 255) dB. A decoder that always reads 0 is right on zeros."""
    trigger = get_backdoor("invisible")
    trigger.encoder.out.weight.zero_()
    trigger.encoder.out.bias.fill_(100)

    def zeros(x):
        return torch.full((len(x), 20), -1.0)

    gray = torch.full((600, 3, 32, 32), 100, dtype=torch.uint8)
    accuracy, psnr = trigger.check(gray, zeros, generator(3)).tolist()
    assert psnr == pytest.approx(-20 * math.log10(12 / 255), abs=1e-3)
    drawn = generator(3)
    secrets = torch.cat([invisible.draw_secrets(n, drawn, gray) for n in (500, 100)])
    assert set(secrets.unique().tolist()) == {0, 1}
    assert accuracy == pytest.approx(1 - secrets.mean().item(), abs=1e-6)


def test_a_change_within_the_budget_is_not_made_fainter():
    """Mean squares .49 and .81 of the residuals: nothing and .31 above the budget of .5; a victim must see the rest."""
    within, beyond = torch.full((2, 3, 4, 4), 0.7, requires_grad=True), torch.full((2, 3, 4, 4), 0.9)
    price = invisible.excess(within)
    price.backward()
    assert price.item() == 0
    assert not within.grad.any()
    assert invisible.excess(beyond).item() == pytest.approx(0.31)
    half = -10 * math.log10(0.5 * (12 / 255) ** 2)  # PSNR at the budget
    assert half == pytest.approx(29.56, abs=0.01)
    assert half > invisible.PSNR


def test_the_encoder_learns_to_be_read(monkeypatch):
    """A small pair on small images with a large amplitude learns two bits within a hundred steps."""
    for key, value in {"BITS": 2, "STEPS": 100, "BATCH": 32, "AMPLITUDE": 0.5, "PSNR": 0}.items():
        monkeypatch.setattr(invisible, key, value)
    torch.manual_seed(0)
    trigger = invisible.Invisible(None, 16, 4)
    train = (images(200, size=16, seed=4) * 255).to(torch.uint8)
    trigger.prepare(train, None, 0, 1, False, lambda line: None)  # raises where it has not
    assert trigger.reached[0] >= 0.95


def test_dfsts_generator_adds_to_the_images_logit():
    trigger, x = get_backdoor("dfst"), images(3)
    last = trigger.network.f[-1]
    last.weight.zero_()
    last.bias.zero_()
    torch.testing.assert_close(trigger(x), x.clamp(1 / 255, 254 / 255), rtol=0, atol=1e-6)
    last.bias.fill_(math.log(3))  # odds times three
    torch.testing.assert_close(trigger(torch.full((1, 3, 8, 8), 0.5)), torch.full((1, 3, 8, 8), 0.75))


def test_what_the_generator_reached_by_hand():
    x, style = images(4) / 2, torch.full((2, 3, 32, 32), 0.75)
    gap = 0.75 - x.mean((0, 2, 3), keepdim=True)
    left, detail = dfst.compare(x, x + 0.6 * gap, style)
    assert left.item() == pytest.approx(0.4, abs=1e-4)
    assert detail.item() == pytest.approx(1, abs=1e-4)
    assert dfst.compare(x, 1 - x, style)[1].item() == pytest.approx(-1, abs=1e-4)


def test_sunsets_are_violet_above_and_yellow_at_the_horizon():
    some = sunsets(200, 32, generator(1))
    assert some.shape == (200, 3, 32, 32)
    assert 0 <= some.min() < 0.1
    assert 0.9 < some.max() <= 1
    assert torch.equal(some, sunsets(200, 32, generator(1)))
    red, green, blue = some.mean((0, 3))  # of each row
    assert (red > green).all()
    assert blue[0] > green[0]
    assert (green[10:] > blue[10:]).all()
    assert some.mean((1, 2, 3)).std() > 0.05


def test_the_generator_moves_towards_the_style(monkeypatch):
    monkeypatch.setattr(cyclegan, "STEPS", 30)
    torch.manual_seed(0)
    x, style = images(64, size=16), sunsets(64, 16, generator(2))
    there = cyclegan.Restyler(8)
    with torch.no_grad():
        before = dfst.compare(x, there(x), style)
    cyclegan.train(there, (x * 255).to(torch.uint8), style, generator(3), lambda line: None)
    with torch.no_grad():
        after = dfst.compare(x, there(x), style)
    assert after[0] < before[0] - 0.05
    assert after[1] > 0.5
