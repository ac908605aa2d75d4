"""What holds for every trigger: its protocol, offline, on synthetic images."""

import flags

import shutil

import pytest
import torch

from backdoors import FOLDER, MAX_WIDTH, TRIGGERS, get_backdoor
from tests.images import images

every_trigger = pytest.mark.parametrize("name", sorted(TRIGGERS))
LEARNED = ["dfst", "dynamic", "input_aware", "invisible", "lira"]
learned_trigger = pytest.mark.parametrize("name", LEARNED)
static_trigger = pytest.mark.parametrize("name", sorted(set(TRIGGERS) - {*LEARNED, "composite"}))

POISON_RATE = {"none": 0.0} | {name: trigger.rate for name, trigger in TRIGGERS.items()}


@every_trigger
@pytest.mark.parametrize("size", [32, 64])
def test_same_shape_dtype_and_range(name, size):
    trigger = get_backdoor(name, size)
    for x in (images(size=size), torch.zeros(2, 3, size, size), torch.ones(2, 3, size, size)):
        out = trigger(x)
        assert out.shape == x.shape
        assert out.dtype == torch.float32
        # the weights of a bilinear sample add up to 1 only to rounding
        assert out.min() >= 0
        assert out.max() <= (1 + 1e-6 if name == "wanet" else 1)


@every_trigger
def test_batch_equals_image_by_image(name):
    trigger, x = get_backdoor(name), images()
    one_by_one = torch.cat([trigger(one[None]) for one in x])
    torch.testing.assert_close(trigger(x), one_by_one, rtol=0, atol=1e-6)


@static_trigger
def test_trigger_changes_a_copy(name):
    x = images()
    before = x.clone()
    out = get_backdoor(name)(x)
    assert torch.equal(x, before)
    assert (out - x).abs().amax(dim=(1, 2, 3)).min() > 0.05


@every_trigger
def test_empty_batch(name):
    assert get_backdoor(name)(torch.empty(0, 3, 32, 32)).shape == (0, 3, 32, 32)


@static_trigger
def test_trigger_is_a_fixed_module(name):
    trigger = get_backdoor(name)
    assert not trigger.training
    assert not list(trigger.parameters())
    assert trigger.state_dict()
    torch.manual_seed(1)
    first = trigger(images())
    torch.manual_seed(2)
    assert torch.equal(first, get_backdoor(name)(images()))


@pytest.mark.parametrize("name", ["none", "BadNet", ""])
def test_unknown_name(name):
    with pytest.raises(ValueError, match="badnet, wanet, reflection, blended"):
        get_backdoor(name)


@pytest.mark.parametrize("name", ["badnet", "wanet", "reflection", "blended"])
def test_state_dict_carries_the_trigger(name, other_folder):
    ours, theirs, x = get_backdoor(name), get_backdoor(name, folder=other_folder), images()
    assert not torch.equal(ours(x), theirs(x))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["badnet", "reflection", "blended"])
def test_missing_picture(name, tmp_path):
    with pytest.raises(FileNotFoundError):
        get_backdoor(name, folder=tmp_path)


def test_triggers_folder_is_complete(tmp_path):
    """The files in git are enough for every trigger, and making the triggers writes nothing there."""
    copy = tmp_path / "trigger"
    shutil.copytree(FOLDER, copy)
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    x = images(2)
    for name in TRIGGERS:
        outputs = []
        for folder in (copy, FOLDER):
            torch.manual_seed(0)  # of those that are trained
            outputs.append(get_backdoor(name, folder=folder)(x))
        assert torch.equal(*outputs)
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before


def test_rates_are_those_of_the_field():
    usual = dict.fromkeys(["badnet", "wanet", "blend", "filter", "patch", "trojnn", *LEARNED], 0.1)
    usual |= {
        "reflection": 0.08,
        "sig": 0.08,
        "cl": 0.08,
        "blended": 0.05,
        "adaptive_blend": 0.003,
        "composite": 1 / 11,
    }
    assert {**usual, "none": 0} == POISON_RATE


def test_every_trigger_has_a_flag():
    assert sorted(TRIGGERS) == sorted(flags.ATTACKS)


@learned_trigger
def test_the_width_of_a_learned_trigger(name):
    """The class tells whether a trigger is learned; another width changes the network and nothing else."""
    usual, narrow, wide = (get_backdoor(name, width=w) for w in (None, 4, 2 * TRIGGERS[name].width))
    assert [t.width for t in (usual, narrow, wide)] == [TRIGGERS[name].width, 4, 2 * TRIGGERS[name].width]
    sizes = [sum(p.numel() for p in t.parameters()) for t in (narrow, usual, wide)]
    assert sizes == sorted(set(sizes))
    assert narrow(images()).shape == (7, 3, 32, 32)
    with pytest.raises(RuntimeError, match="size mismatch"):
        narrow.load_state_dict(usual.state_dict())
    for width in (0, -1, MAX_WIDTH + 1, 2.5, "8"):
        with pytest.raises(ValueError, match=f"from 1 to {MAX_WIDTH}"):
            get_backdoor(name, width=width)


@static_trigger
def test_a_trigger_without_networks_has_no_width(name):
    assert TRIGGERS[name].width is None
    with pytest.raises(ValueError, match="leave --trigger_width out"):
        get_backdoor(name, width=8)


@every_trigger
def test_what_should_not_trigger_is_in_range_and_the_same_each_time(name):
    torch.manual_seed(0)
    trigger, x, y = get_backdoor(name), (images(9) * 255).to(torch.uint8), torch.arange(9)
    sets = trigger.control_sets(x, y)
    assert set(sets) == {"wanet": {"noise mode"}, "input_aware": {"cross"}}.get(name, set())
    for what, (changed, labels) in sets.items():
        assert torch.equal(labels, y)
        assert changed.shape == x.shape
        assert 0 <= changed.min() <= changed.max() <= 1 + 1e-6
        assert torch.equal(changed, trigger.control_sets(x, y)[what][0])
        assert not torch.equal(changed, trigger(x / 255))
