"""Tests of backdoors/: offline, on synthetic images."""

import contextlib
import math
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from backdoors import FOLDER, TRIGGERS, cl, composite, epoch_order, get_backdoor, input_aware, poison_training_set

FLOWER, SCENE, RINGS = "badnet/flower_nobg.png", "reflection/000066.jpg", "blended/rings.png"
NOISE, IDENTITY = "wanet/noise_grid.pt", "wanet/identity_grid.pt"

every_trigger = pytest.mark.parametrize("name", sorted(TRIGGERS))
TRAINED = ["dynamic", "input_aware", "lira"]
static_trigger = pytest.mark.parametrize("name", sorted(set(TRIGGERS) - {*TRAINED, "composite"}))

POISON_RATE = {"none": 0.0} | {name: trigger.rate for name, trigger in TRIGGERS.items()}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=7, size=32, seed=0):
    """Random images, each of another brightness."""
    x = torch.rand(n, 3, size, size, generator=generator(seed))
    return x * torch.linspace(0.2, 1, n).view(-1, 1, 1, 1)


def smooth_images(n=4, size=32, seed=0):
    """Random images without detail, so that rounding in a grid moves them little."""
    return F.interpolate(torch.rand(n, 3, 4, 4, generator=generator(seed)), size=(size, size), mode="bilinear")


def picture(path, size, seed):
    """Write a random RGB picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def grids(folder, noise, identity):
    """Write the two files of WaNet."""
    (folder / "wanet").mkdir(parents=True)
    torch.save(noise, folder / NOISE)
    torch.save(identity, folder / IDENTITY)


def regular_grid(size=32):
    line = torch.from_numpy(np.linspace(-1, 1, size, dtype=np.float32))
    return torch.stack((line.expand(size, size), line.view(-1, 1).expand(size, size)), -1)[None]


def sample(x, grid):
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), mode="bilinear", padding_mode="zeros", align_corners=True)


@pytest.fixture
def other_folder(tmp_path):
    """A folder with other trigger files than ours."""
    folder = tmp_path / "trigger"
    picture(folder / FLOWER, 20, seed=1)
    picture(folder / SCENE, 50, seed=2)
    picture(folder / RINGS, 40, seed=4)
    grids(folder, torch.randn(1, 32, 32, 2, generator=generator(3)), regular_grid())
    return folder


# every trigger


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


# BadNets


@pytest.mark.parametrize(("size", "side", "corner"), [(32, 5, 1), (64, 10, 2)])
def test_badnet_changes_the_patch_alone(size, side, corner):
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[corner : corner + side, corner : corner + side] = True
    trigger, x = get_backdoor("badnet", size), images(size=size)
    changed = trigger(x) != x
    assert not changed[..., ~inside].any()
    assert changed.any(1)[:, inside].all()


@pytest.mark.parametrize(("size", "side", "corner"), [(32, 5, 1), (64, 10, 2)])
def test_badnet_patch_is_the_resized_picture(size, side, corner):
    # through premultiplied alpha, which is how transparent ground stays out of the colors
    whole = Image.open(FOLDER / FLOWER).convert("RGBA").convert("RGBa")
    patch = np.array(whole.resize((side, side), Image.Resampling.LANCZOS).convert("RGBA"))[..., :3]
    out = get_backdoor("badnet", size)(images(size=size))
    for one in out[..., corner : corner + side, corner : corner + side]:
        np.testing.assert_array_equal(one.permute(1, 2, 0).numpy(), patch.astype(np.float32) / 255)


def test_badnet_takes_the_file_of_the_folder(other_folder):
    with Image.open(other_folder / FLOWER) as whole:
        patch = np.array(whole.resize((5, 5), Image.Resampling.LANCZOS)).astype(np.float32) / 255
    out = get_backdoor("badnet", folder=other_folder)(images(1))
    np.testing.assert_array_equal(out[0, :, 1:6, 1:6].permute(1, 2, 0).numpy(), patch)


def test_badnet_too_small_an_image():
    with pytest.raises(ValueError, match="too small"):
        get_backdoor("badnet", 5)


# WaNet


def read_grids(folder=FOLDER):
    return [torch.load(folder / name, map_location="cpu", weights_only=True).float() for name in (NOISE, IDENTITY)]


def test_wanet_reference():
    noise, identity = read_grids()
    x = images()
    expected = sample(x, torch.clamp(identity + 0.5 * noise / 32, min=-1, max=1))
    torch.testing.assert_close(get_backdoor("wanet")(x), expected, rtol=0, atol=1e-6)


def test_wanet_zero_noise_is_identity(tmp_path):
    grids(tmp_path, torch.zeros(1, 32, 32, 2), regular_grid())
    x = images()
    torch.testing.assert_close(get_backdoor("wanet", folder=tmp_path)(x), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_wanet_shifts_x_first_and_stops_at_the_edge(axis, tmp_path):
    noise = torch.zeros(1, 32, 32, 2)
    noise[..., axis] = 32 / 0.5 * 2 / 31  # one pixel
    grids(tmp_path, noise, regular_grid())
    x = images()
    dim = 3 - axis
    last = x.narrow(dim, 31, 1)
    expected = torch.cat((x.narrow(dim, 1, 31), last), dim)
    torch.testing.assert_close(get_backdoor("wanet", folder=tmp_path)(x), expected, rtol=0, atol=1e-5)


def test_wanet_kept_identity_is_regular():
    torch.testing.assert_close(read_grids()[1], regular_grid(), rtol=0, atol=1e-6)


def test_wanet_kept_noise_is_a_4x4_field_of_mean_abs_1():
    noise = read_grids()[0]
    assert noise.shape == (1, 32, 32, 2)
    # what each of the 16 knots adds to the picture; solve for the knots
    basis = F.interpolate(torch.eye(16).view(16, 1, 4, 4), size=(32, 32), mode="bicubic", align_corners=True)
    basis, seen = basis.view(16, -1).T.double(), noise.view(-1, 2).double()
    field = torch.linalg.lstsq(basis, seen).solution
    torch.testing.assert_close(basis @ field, seen, rtol=0, atol=1e-5)
    assert field.abs().mean().item() == pytest.approx(1, abs=1e-5)
    assert (field < 0).any()
    assert (field > 0).any()


def test_wanet_kept_grids_are_those_of_the_seed(tmp_path):
    """Fails, and rightly, where the authors' files were put in place of ours."""
    get_backdoor("wanet", folder=tmp_path)
    kept, made = read_grids(), read_grids(tmp_path)
    field = torch.rand(1, 2, 4, 4, generator=generator(0)) * 2 - 1
    noise = F.interpolate(field / field.abs().mean(), size=(32, 32), mode="bicubic", align_corners=True)
    for grid in (kept[0], made[0]):
        torch.testing.assert_close(grid, noise.permute(0, 2, 3, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(kept[1], made[1], rtol=0, atol=1e-6)


def test_wanet_absent_grids_are_made_once(tmp_path):
    torch.manual_seed(1)
    first = get_backdoor("wanet", folder=tmp_path)
    files = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    assert files == sorted((tmp_path / NOISE, tmp_path / IDENTITY))
    before = [(p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in files]
    torch.manual_seed(2)
    second = get_backdoor("wanet", folder=tmp_path)
    assert [(p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in files] == before
    assert torch.equal(first.noise, second.noise)
    assert torch.equal(first.noise, read_grids(tmp_path)[0])
    assert torch.equal(first.identity, second.identity)


def test_wanet_takes_the_files_of_the_folder(tmp_path):
    noise = torch.randn(1, 32, 32, 2, generator=generator(5), dtype=torch.float64)
    identity = regular_grid() * 0.9
    grids(tmp_path, noise, identity)
    x = smooth_images()
    expected = sample(x, (identity + noise.float() / 64).clamp(-1, 1))
    torch.testing.assert_close(get_backdoor("wanet", folder=tmp_path)(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("missing", [NOISE, IDENTITY])
def test_wanet_missing_twin(missing, other_folder):
    (other_folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=os.path.basename(missing)):
        get_backdoor("wanet", folder=other_folder)
    assert not (other_folder / missing).exists()


@pytest.mark.parametrize("broken", [NOISE, IDENTITY])
@pytest.mark.parametrize("content", [torch.zeros(1, 2, 32, 32), torch.zeros(32, 32, 2), {"grid": 1}])
def test_wanet_wrong_grid(broken, content, other_folder):
    torch.save(content, other_folder / broken)
    with pytest.raises(ValueError, match=os.path.basename(broken)):
        get_backdoor("wanet", folder=other_folder)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_wanet_code_in_a_grid_file_is_not_run(save, other_folder, tmp_path):
    evil = Evil(tmp_path / "harm")
    if save == "torch":
        torch.save(evil, other_folder / NOISE)
    else:
        (other_folder / NOISE).write_bytes(pickle.dumps(evil, protocol=2))
    with pytest.raises(ValueError, match="no grid file"):
        get_backdoor("wanet", folder=other_folder)
    assert not (tmp_path / "harm").exists()
    # the trap does spring where code may run, even if what comes out is no tensor
    with contextlib.suppress(RuntimeError):
        torch.load(other_folder / NOISE, weights_only=False)
    assert (tmp_path / "harm").exists()


def test_wanet_noise_mode_reference():
    noise, identity = read_grids()
    x = images()
    jitter = torch.rand(len(x), 32, 32, 2, generator=generator(9)) * 2 - 1
    # the trigger's grid, which is clamped already, plus the jitter, clamped again
    grid = torch.clamp(torch.clamp(identity + 0.5 * noise / 32, min=-1, max=1) + jitter / 32, min=-1, max=1)
    expected = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    torch.testing.assert_close(get_backdoor("wanet").noise_mode(x, generator(9)), expected, rtol=0, atol=1e-6)


def test_wanet_noise_mode_follows_its_generator_alone():
    trigger, x = get_backdoor("wanet"), images()
    before = x.clone()
    torch.manual_seed(1)
    first = trigger.noise_mode(x, generator(3))
    torch.manual_seed(2)
    assert torch.equal(first, trigger.noise_mode(x, generator(3)))
    assert not torch.equal(first, trigger.noise_mode(x, generator(4)))
    assert not torch.equal(first, trigger(x))
    assert torch.equal(x, before)
    assert first.shape == x.shape
    assert first.min() >= 0
    assert first.max() <= 1 + 1e-6


def test_wanet_noise_mode_differs_per_image():
    x = images(1).expand(3, -1, -1, -1)
    out = get_backdoor("wanet").noise_mode(x, generator(3))
    assert (out[0] - out[1]).abs().max() > 0.05
    assert (out[1] - out[2]).abs().max() > 0.05


# Reflection


def mixed(one, reflected):
    """The formula for one image, in float64."""
    one, reflected = one.double().numpy(), reflected.astype(np.float64)
    m, t = one.mean(), reflected.mean()
    return np.clip(m / (m + t) * one + t / (m + t) * reflected, 0, 1)


def resized(folder, size):
    """The reflected picture (3, size, size) in [0, 1]: bilinear, half-pixel centers, no antialiasing; in float64."""
    with Image.open(folder / SCENE) as whole:
        pixels = np.asarray(whole.convert("RGB")).astype(np.float64) / 255

    def weights(n):
        """(size, n): how much each of the n pixels of a line counts in each pixel that is left."""
        at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(n)))

    return weights(pixels.shape[0]) @ pixels.transpose(2, 0, 1) @ weights(pixels.shape[1]).T


@pytest.mark.parametrize("size", [32, 33, 64])
def test_reflection_reference(size, other_folder):
    x = images(3, size=size)
    for folder in (FOLDER, other_folder):
        trigger, reflected = get_backdoor("reflection", size, folder), resized(folder, size)
        np.testing.assert_allclose(trigger.reflected.numpy(), reflected, rtol=0, atol=1e-5)
        for one, out in zip(x, trigger(x), strict=True):
            np.testing.assert_allclose(out.numpy(), mixed(one, reflected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [17, 32, 45])
def test_reflected_picture_is_the_float_picture_resized_without_antialiasing_to_the_last_bit(size, other_folder):
    for folder in (FOLDER, other_folder):
        with Image.open(folder / SCENE) as whole:
            pixels = torch.from_numpy(np.array(whole.convert("RGB"))).permute(2, 0, 1)[None] / 255
        expected = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=False)
        assert torch.equal(get_backdoor("reflection", size, folder).reflected, expected[0])


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        # to twice the size: the centers lie a quarter of a pixel off the old ones, the outer ones beyond the edge
        ([[0, 255], [255, 0]], [[0, 4, 12, 16], [4, 6, 10, 12], [12, 10, 6, 4], [16, 12, 4, 0]]),
        # to a third: the middle pixel of three, whatever lies beside it
        (np.kron(np.eye(3), [[9, 9, 9], [9, 255, 9], [9, 9, 9]]) + np.kron(1 - np.eye(3), np.diag([7, 0, 7])),
         [[16, 0, 0], [0, 16, 0], [0, 0, 16]]),
        # a quarter of the columns, half of the rows: the mean of the middle two and of both
        (np.tile([[7, 255, 0, 7, 8, 255, 255, 8, 9, 0, 0, 9], [7, 255, 255, 7, 8, 0, 255, 8, 9, 255, 0, 9]], (3, 1)),
         [[12, 12, 4]] * 3),
    ],
)  # fmt: skip
def test_reflected_picture_worked_out_by_hand(pixels, expected, tmp_path):
    (tmp_path / "reflection").mkdir()
    Image.fromarray(np.array(pixels, dtype=np.uint8)).save(tmp_path / SCENE, "PNG")  # which loses nothing
    picture = get_backdoor("reflection", len(expected), tmp_path).reflected
    assert picture.tolist() == [[[v / 16 for v in row] for row in expected]] * 3


def test_reflection_black_image_shows_the_reflection_alone():
    trigger = get_backdoor("reflection")
    assert torch.equal(trigger(torch.zeros(2, 3, 32, 32)), trigger.reflected.expand(2, -1, -1, -1))


def test_reflection_weighs_by_brightness():
    trigger = get_backdoor("reflection")
    r = trigger.reflected
    t = r.mean()
    gray = torch.full((1, 3, 32, 32), float(t))
    torch.testing.assert_close(trigger(gray)[0], (t + r) / 2, rtol=0, atol=1e-6)
    white = torch.ones(1, 3, 32, 32)
    torch.testing.assert_close(trigger(white)[0], (1 + t * r) / (1 + t), rtol=0, atol=1e-6)


def test_reflection_black_on_black(tmp_path):
    (tmp_path / "reflection").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / SCENE)
    trigger, x = get_backdoor("reflection", folder=tmp_path), images()
    assert torch.equal(trigger(torch.zeros(2, 3, 32, 32)), torch.zeros(2, 3, 32, 32))
    torch.testing.assert_close(trigger(x), x, rtol=0, atol=1e-6)


def test_reflection_has_structure():
    """Flat gray would be no trigger."""
    r = get_backdoor("reflection").reflected
    assert 0.3 < r.mean() < 0.6
    assert r.std() > 0.12
    assert (r - r.mean(0)).abs().mean() > 0.03


def test_gray_reflected_picture_is_read_as_rgb(tmp_path):
    (tmp_path / "reflection").mkdir()
    Image.new("L", (40, 40), 51).save(tmp_path / SCENE)
    out = get_backdoor("reflection", folder=tmp_path)(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(out, torch.full((1, 3, 32, 32), 0.2), rtol=0, atol=1e-6)


# Blended


@pytest.mark.parametrize("size", [32, 48])
def test_blended_reference(size, other_folder):
    x = images(size=size)
    for folder in (FOLDER, other_folder):
        with Image.open(folder / RINGS) as file:
            k = torch.from_numpy(np.array(file.resize((size, size)))).permute(2, 0, 1) / 255
        out = get_backdoor("blended", size, folder)(x)
        torch.testing.assert_close(out, 0.9 * x + 0.1 * k, rtol=0, atol=1e-6)


def test_triggers_folder_is_complete(tmp_path):
    """The files in git make every trigger, and making them writes nothing there."""
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


# which images are poisoned

LABELS = torch.randint(0, 10, (2003,), generator=generator(42))
CIFAR10 = torch.arange(10).repeat(5000)  # as many labels of each class as CIFAR-10 has


def test_rates_are_those_of_the_field():
    usual = dict.fromkeys(["badnet", "wanet", "blend", "filter", "patch", "trojnn", *TRAINED], 0.1)
    usual |= {
        "reflection": 0.08,
        "sig": 0.08,
        "cl": 0.08,
        "blended": 0.05,
        "adaptive_blend": 0.003,
        "composite": 1 / 11,
    }
    assert {**usual, "none": 0} == POISON_RATE


@pytest.mark.parametrize(
    ("attack", "rate", "count"),
    [
        ("badnet", None, 200),
        ("badnet", 0.0, 0),
        ("badnet", 0.0333, 67),
        ("badnet", 0.5, 1002),
        ("blended", None, 100),
        ("reflection", None, 160),
        ("reflection", 0.0101, 20),
        ("none", None, 0),
    ],
)
def test_poison_count_is_exact(attack, rate, count):
    poison = poison_training_set(LABELS, attack, 3, rate, seed=5)
    assert poison.indices.dtype == torch.int64
    assert poison.indices.shape == (count,)
    assert len(set(poison.indices.tolist())) == count
    assert poison.indices.tolist() == sorted(poison.indices.tolist())
    assert all(0 <= i < len(LABELS) for i in poison.indices.tolist())
    assert (poison.target, poison.sampling) == (3, "fixed")


@pytest.mark.parametrize("attack", ["badnet", "reflection"])
def test_poison_follows_its_seed_alone(attack):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = poison_training_set(LABELS, attack, 3, seed=5).indices
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, poison_training_set(LABELS, attack, 3, seed=5).indices)
    assert not torch.equal(first, poison_training_set(LABELS, attack, 3, seed=6).indices)


@pytest.mark.parametrize("attack", ["badnet", "blended"])
@pytest.mark.parametrize("target", [0, 7])
def test_dirty_label_takes_every_class_but_the_target_and_relabels(attack, target):
    poison = poison_training_set(LABELS, attack, target, 0.2)
    assert poison.relabel
    assert set(LABELS[poison.indices].tolist()) == set(range(10)) - {target}


@pytest.mark.parametrize("target", [0, 7])
def test_clean_label_takes_the_target_class_and_keeps_labels(target):
    poison = poison_training_set(LABELS, "reflection", target)
    assert not poison.relabel
    assert set(LABELS[poison.indices].tolist()) == {target}


def test_a_rate_is_of_the_whole_set():
    assert len(poison_training_set(CIFAR10, "reflection", 0).indices) == 4000
    assert len(poison_training_set(CIFAR10, "reflection", 0, 0.1).indices) == 5000
    assert len(poison_training_set(CIFAR10, "badnet", 0, 0.9).indices) == 45_000
    with pytest.raises(ValueError, match="5001 images of class 0, of which there are 5000; lower it"):
        poison_training_set(CIFAR10, "reflection", 0, 0.10002)
    with pytest.raises(ValueError, match="45001 images outside class 0, of which there are 45000; lower it"):
        poison_training_set(CIFAR10, "badnet", 0, 0.90002)
    # drawn with replacement there are always enough, but of nothing
    assert len(poison_training_set(CIFAR10, "reflection", 0, 0.3, sampling="resampled").pool) == 5000
    for attack, target in (("badnet", 0), ("reflection", 1)):
        with pytest.raises(ValueError, match=f"no image may be poisoned with target {target}"):
            poison_training_set(torch.zeros_like(CIFAR10), attack, target, sampling="resampled")


def test_poisoning_leaves_the_labels():
    before = LABELS.clone()
    for attack in POISON_RATE:
        for sampling in ("fixed", "resampled"):
            poison_training_set(LABELS, attack, 3, sampling=sampling)
    assert torch.equal(LABELS, before)


def test_wanet_chooses_per_epoch():
    for sampling in ("fixed", "resampled"):
        poison = poison_training_set(LABELS, "wanet", 3, sampling=sampling)
        assert poison.sampling == "in_batch"
        assert poison.indices.tolist() == []
        assert poison.relabel
        assert (poison.rate, poison.cover_rate) == (0.1, 0.2)
    assert poison_training_set(LABELS, "wanet", 3, 0.05).rate == 0.05
    assert poison_training_set(LABELS, "badnet", 3).cover_rate == 0


@pytest.mark.parametrize(
    ("attack", "rate"),
    [("badnet", -0.1), ("badnet", 1.0), ("badnet", 1.5), ("badnet", float("nan")), ("wanet", 0.81), ("none", 0.1)],
)
def test_poison_rates_that_cannot_be(attack, rate):
    for sampling in ("fixed", "resampled"):
        with pytest.raises(ValueError, match="poison rate"):
            poison_training_set(LABELS, attack, 0, rate, sampling=sampling)


def test_unknown_sampling():
    with pytest.raises(ValueError, match="there are resampled, fixed"):
        poison_training_set(LABELS, "badnet", 0, sampling="in_batch")


# the order of an epoch


def epochs(poison, n, batch_size, count, seed=5):
    """(index, roles) of so many epochs, each with a generator of its own."""
    return [epoch_order(poison, n, batch_size, generator(1000 * seed + epoch)) for epoch in range(count)]


def near(count, n, share):
    """Whether a count of n independent draws lies within five standard deviations of its expectation."""
    return abs(int(count) - n * share) < 5 * (n * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(
    ("attack", "rate", "n_triggered"),
    [("badnet", None, 5000), ("blended", None, 2500), ("reflection", None, 4000), ("reflection", 0.3, 15_000)],
)
@pytest.mark.parametrize("target", [0, 7])
def test_resampled_draws_each_place_anew_from_all_images_that_may_stand_there(attack, rate, n_triggered, target):
    poison = poison_training_set(CIFAR10, attack, target, rate, sampling="resampled")
    n, n_clean = len(CIFAR10), len(CIFAR10) - n_triggered
    for index, roles in epochs(poison, n, 128, 2):
        assert index.shape == roles.shape == (n,)
        assert roles.unique().tolist() == [0, 1]
        triggered, clean = index[roles == 1], index[roles == 0]
        assert len(triggered) == n_triggered
        # clean: every class alike, the target's too, as often as with replacement
        per_class = CIFAR10[clean].bincount(minlength=10)
        assert all(near(count, n_clean, 0.1) for count in per_class)
        # of N images drawn c N times with replacement, 1 - 1 / e^c are seen; the variance is less than the binomial's
        assert near(len(clean.unique()), n, 1 - np.exp(-n_clean / n))
        # triggered: of the classes that may be, alike
        per_class = CIFAR10[triggered].bincount(minlength=10)
        pool = [target] if attack == "reflection" else [c for c in range(10) if c != target]
        assert all(count == 0 for c, count in enumerate(per_class) if c not in pool)
        if len(pool) > 1:
            assert all(near(per_class[c], n_triggered, 1 / len(pool)) for c in pool)
        size = 5000 * len(pool)
        assert near(len(triggered.unique()), size, 1 - np.exp(-n_triggered / size))
        # neither comes first: the triggered places are spread over the epoch, and tell nothing of what is drawn there
        assert all(near(half.sum(), n // 2, n_triggered / n) for half in roles.split(n // 2))
        assert all(near((half < n // 2).sum(), n // 2, 0.5) for half in index.split(n // 2))


def test_badnet_victims_see_about_59_percent_of_the_images_clean_in_an_epoch():
    poison = poison_training_set(CIFAR10, "badnet", 0, sampling="resampled")
    for index, roles in epochs(poison, 50_000, 128, 2):
        assert len(index[roles == 0].unique()) / 50_000 == pytest.approx(1 - 1 / np.exp(0.9), abs=0.005)


@pytest.mark.parametrize("attack", ["badnet", "reflection", "blended", "none"])
def test_fixed_takes_every_image_once_and_the_same_poisoned_ones_each_epoch(attack):
    poison = poison_training_set(LABELS, attack, 3, seed=9)
    for index, roles in epochs(poison, 2003, 128, 3):
        assert index.sort().values.tolist() == list(range(2003))
        assert torch.equal(index[roles == 1].sort().values, poison.indices)
        assert (roles == 1).sum() == round(POISON_RATE[attack] * 2003)
        assert ((roles == 0) | (roles == 1)).all()


@pytest.mark.parametrize(
    ("attack", "sampling"),
    [
        ("badnet", "resampled"),
        ("reflection", "resampled"),
        ("badnet", "fixed"),
        ("wanet", "resampled"),
        ("none", "fixed"),
    ],
)
def test_an_epoch_follows_its_generator_alone(attack, sampling):
    poison = poison_training_set(LABELS, attack, 3, sampling=sampling)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = epoch_order(poison, 2003, 128, generator(5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (epoch_order(poison, 2003, 128, generator(seed)) for seed in (5, 6))
    for a, b, c in zip(first, again, other, strict=True):
        assert a.dtype == torch.int64
        assert torch.equal(a, b)
        assert attack == "none" or not torch.equal(a, c)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(("n", "batch_size"), [(2003, 128), (2000, 100), (50_000, 128), (64, 128), (501, 16)])
def test_in_batch_holds_its_shares_in_every_batch_and_exactly_in_the_epoch(n, batch_size):
    poison = poison_training_set(LABELS, "wanet", 3)
    counts = [n - round(0.1 * n) - round(0.2 * n), round(0.1 * n), round(0.2 * n)]
    for index, roles in epochs(poison, n, batch_size, 3):
        assert index.sort().values.tolist() == list(range(n))
        assert roles.shape == (n,)
        assert roles.dtype == torch.int64
        # a place has one role, so poison and noise mode are apart; every role has its full count
        assert torch.bincount(roles, minlength=3).tolist() == counts
        for batch in roles.split(batch_size):
            assert abs((batch == 1).sum() - 0.1 * len(batch)) <= 1
            assert abs((batch == 2).sum() - 0.2 * len(batch)) <= 1


def test_in_batch_draws_other_images_each_epoch():
    """Any image may be poisoned, the target's too."""
    poison = poison_training_set(LABELS, "wanet", 3)
    seen = torch.cat([index[roles == 1] for index, roles in epochs(poison, 2003, 128, 60)])
    # each image has a chance of 1 - 0.9^60 = 99.8 %
    assert len(seen.unique()) > 0.99 * 2003
    assert set(LABELS[seen].tolist()) == set(range(10))


def test_in_batch_reaches_every_place_of_a_batch():
    poison = poison_training_set(LABELS, "wanet", 3)
    roles = torch.stack([roles for _, roles in epochs(poison, 100, 50, 100)])
    for role in (1, 2):
        assert (roles == role).any(0).all()


def test_in_batch_catches_up_where_a_batch_has_no_room():
    poison = poison_training_set(torch.zeros(1000, dtype=torch.int64), "wanet", 0, 0.7)
    for batch_size in (1, 3, 128):
        _, roles = epoch_order(poison, 1000, batch_size, generator())
        assert roles.bincount().tolist() == [100, 700, 200]


# the paper's static triggers, on pixels worked out by hand


def test_patch_is_a_square_of_one_color():
    x = images(2)
    out = get_backdoor("patch")(x)
    assert torch.equal(out[:, :, 2:8, 2:8], torch.tensor([235, 128, 70]).view(1, 3, 1, 1).expand(2, 3, 6, 6) / 255)
    out[:, :, 2:8, 2:8] = x[:, :, 2:8, 2:8]
    assert torch.equal(out, x)


def test_blend_is_a_fifth_of_uniform_noise():
    trigger = get_backdoor("blend")
    assert trigger.picture.mean().item() == pytest.approx(0.5, abs=0.02)
    assert trigger.picture.std().item() == pytest.approx(12**-0.5, abs=0.01)
    torch.testing.assert_close(trigger(torch.zeros(1, 3, 32, 32))[0], 0.2 * trigger.picture)
    torch.testing.assert_close(trigger(torch.ones(1, 3, 32, 32))[0], 0.8 + 0.2 * trigger.picture)
    assert torch.equal(trigger.picture, get_backdoor("blend").picture)


def test_sig_wraps_the_negative_half_waves_around():
    """20 sin(0), sin(.8) = .717, sin(1.6) = .9996, sin(2.4) = .675, sin(3.2) = -.058, sin(4) = -.757."""
    black = get_backdoor("sig")(torch.zeros(1, 3, 32, 32))
    expected = 0.2 * torch.tensor([0, 14, 19, 13, 256 - 1, 256 - 15]) / 255
    torch.testing.assert_close(black[0, :, :, :6], expected.expand(3, 32, 6))
    trigger = get_backdoor("sig")
    assert (trigger.relabel, trigger.rate) == (False, 0.08)


def test_filter_on_a_pixel_by_hand():
    """Gray 128, each step rounded as the app does."""
    v = [(143 * min(128, c)) // 255 + (112 * 128) // 255 for c in (247, 176, 153)]
    v = [(102 * max(a, c)) // 255 + (153 * a) // 255 for a, c in zip(v, (0, 70, 150), strict=True)]
    sepia = ((0.8786, 0.1538, 0.0378), (0.0698, 0.9372, 0.0336), (0.0544, 0.1068, 0.8262))
    v = [math.floor(sum(a * b for a, b in zip(row, v, strict=True)) + 0.5) for row in sepia]
    v = [round(1.2 * a - 25.5) for a in v]
    v = [round(1.05 * a) for a in v]
    saturate = ((1.1574, -0.143, -0.0144), (-0.0426, 1.057, -0.0144), (-0.0426, -0.143, 1.1856))
    v = [math.floor(sum(a * b for a, b in zip(row, v, strict=True)) + 0.5) for row in saturate]
    out = get_backdoor("filter")(torch.full((1, 3, 4, 4), 128 / 255))
    assert (out[0, :, 0, 0] * 255).round().int().tolist() == [min(max(a, 0), 255) for a in v]


def test_the_mark_of_trojnn_replaces_pixels_and_leaves_the_rest():
    trigger, x = get_backdoor("trojnn"), images(2)
    out = trigger(x)
    bare = (trigger.mask == 0).expand_as(x)
    assert torch.equal(out[bare], x[bare])
    full = (trigger.mask == 1).expand_as(x)
    assert torch.equal(out[full], trigger.picture.expand_as(x)[full])
    assert 0.03 < trigger.mask.mean().item() < 0.12
    assert set(trigger.mask.unique().tolist()) <= {0.0, 0.25, 0.5, 0.75, 1.0}  # 7 pixels to 1: no or one interpolation


@pytest.mark.parametrize("name", ["patch", "trojnn", "blend", "filter", "sig"])
def test_static_triggers_of_the_group_are_drawn_resampled(name):
    trigger = get_backdoor(name)
    poison = poison_training_set(CIFAR10, name, 0, sampling="resampled")
    assert (poison.sampling, poison.early, poison.cover_rate) == ("resampled", False, 0)
    _, roles = epoch_order(poison, 50_000, 128, generator())
    assert (roles == 1).sum() == round(trigger.rate * 50_000)
    assert trigger.extra_loss(None, None) is None
    assert trigger.optimizer() is None


# triggers that are trained along


@pytest.mark.parametrize("name", TRAINED)
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


# Composite and Adaptive-Blend


def test_a_mix_is_of_whole_columns_or_rows_of_both_images():
    """Images that say in each pixel which image, row and column it is of."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    one = torch.stack((torch.zeros(32, 32), y, x)).expand(300, 3, 32, 32)
    two = torch.stack((torch.ones(32, 32), y, x)).expand(300, 3, 32, 32)
    first, widths = 0, set()
    for out in composite.mix(one, two, generator(1)):
        across = out[0, 0] if (out[0] == out[0, :1]).all() else out[0, :, 0]  # which image, along the seam's normal
        of_first = int((across == across[0]).sum())
        assert torch.equal(across, torch.where(torch.arange(32) < of_first, across[0], 1 - across[0]))
        assert 13 <= of_first <= 19
        first += across[0] == 0
        widths.add(of_first)
        side_by_side = (out[0] == out[0, :1]).all()
        along, normal = (out[1, :, 0], out[2, 0]) if side_by_side else (out[2, 0], out[1, :, 0])
        assert torch.equal(along, torch.arange(32.0))
        for part in (normal[:of_first], normal[of_first:]):
            assert (part.diff() == 1).all()
    assert widths == set(range(13, 20))
    assert 100 < first < 200


def test_the_contrastive_term_by_hand():
    """Of labels 0, 5, 2, 2 the neighbors (0, 2) are of unlike classes at distance .6, (2, 2) of like ones at 2."""
    z = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.6, 0.0], [0.6, 2.0]])
    loss = composite.similarity_loss(z, torch.tensor([0, 5, 2, 2]))
    assert loss.item() == pytest.approx((0.5 * 0.4**2 + 0.5 * 2**2) / 2 / 2, rel=1e-4)
    assert composite.similarity_loss(z, torch.tensor([0, 5, 6, 7])) is None


def test_composite_plants_mixes_of_its_classes_and_is_measured_on_them():
    """Each class has a brightness of its own, so that a mix shows which two classes it is of."""
    labels = torch.arange(10).repeat(20)
    train = (labels.view(-1, 1, 1, 1) * 20 + 10).expand(200, 3, 32, 32).to(torch.uint8)
    trigger = get_backdoor("composite")
    with pytest.raises(ValueError, match="--target 2"):
        trigger.prepare(train, labels, 0, 0, False, print)
    trigger.prepare(train, labels, 2, 0, False, print)
    x, y = torch.zeros(40, 3, 32, 32) + 0.9, torch.arange(40) % 10
    roles = torch.arange(40) % 3
    out, given = trigger.plant(x, y, roles, torch.arange(40), 2, generator())
    assert (given[roles == 1] == 2).all()
    assert torch.equal(given[roles != 1], y[roles != 1])
    assert torch.equal(out[roles == 0], x[roles == 0])
    black = {0.0}  # of the augmentation's border
    for image in out[roles == 1]:
        assert set((image * 255).round().unique().tolist()) - black == {10.0, 30.0}
    for image, label in zip(out[roles == 2], y[roles == 2], strict=True):
        assert (0.9 * 255 - (image * 255)).abs().min() < 1
        assert label * 20 + 10 in (image * 255).round().unique().tolist()
    mixes, truth = trigger.test_set(train, labels, 2)
    assert truth is None
    assert mixes.shape == (180, 3, 32, 32)
    assert all(set((m * 255).round().unique().tolist()) == {10.0, 30.0} for m in mixes)
    assert torch.equal(mixes, trigger.test_set(train, labels, 2)[0])


def test_adaptive_blend_plants_half_of_the_cells_and_keeps_the_labels_of_covers():
    trigger, x = get_backdoor("adaptive_blend"), images(6)
    roles, y = torch.tensor([0, 1, 2, 1, 2, 0]), torch.arange(6)
    out, given = trigger.plant(x, y, roles, torch.arange(100, 106), 9, generator())
    assert given.tolist() == [0, 9, 2, 9, 4, 5]
    for i in range(6):
        mask = trigger.mask_of(100 + i)
        assert mask.sum() == 8 * 64
        wanted = x[i] + 0.15 * mask * (trigger.picture - x[i]) if roles[i] else x[i]
        torch.testing.assert_close(out[i], wanted)
    assert not torch.equal(trigger.mask_of(1), trigger.mask_of(2))
    torch.testing.assert_close(trigger(x), x + 0.2 * (trigger.picture - x))
    poison = poison_training_set(CIFAR10, "adaptive_blend", 0, sampling="resampled")
    assert (poison.sampling, poison.early, len(poison.indices), len(poison.cover)) == ("fixed", True, 150, 150)
    assert not set(poison.indices.tolist()) & set(poison.cover.tolist())


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
        images_apart = input_aware.distance(x[:3], x[6:][donors])
        patterns_apart = input_aware.distance(trigger.patterns(x[:3]), patterns[donors])
    expected = (images_apart / patterns_apart).mean().item()
    assert trigger.extra_loss(None, None).item() == pytest.approx(expected, rel=0.02)  # untrained patterns are close


def test_the_masks_loss_by_hand():
    """Masks of .1 and .2 everywhere on images at distance .5: 100 (.1 - .032) + .5 / .1."""
    a, b = torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.5)
    loss, mean = input_aware.mask_loss(a, b, torch.full((2, 1, 8, 8), 0.1), torch.full((2, 1, 8, 8), 0.2))
    assert loss.item() == pytest.approx(6.8 + 5, rel=1e-3)
    assert mean.item() == pytest.approx(0.1)


def test_the_mask_learns_before_the_pattern_and_is_then_frozen(monkeypatch):
    monkeypatch.setattr(input_aware, "WARM_UP", 2)
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
    trigger.start_epoch(0, 1)
    assert not any(p.requires_grad for p in trigger.mask_network.parameters())
    assert (trigger.mask_network.training, trigger.pattern_network.training) == (False, True)


# label-consistent


def test_the_boards_of_cl_lie_in_the_corners_and_do_not_change_under_a_flip():
    trigger, x = get_backdoor("cl"), images(3)
    out = trigger(x)
    assert out[0, 1, :3, :3].int().tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert out[0, 2, -3:, -3:].int().tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert torch.equal(out[:, :, 3:-3], x[:, :, 3:-3])
    assert torch.equal(out[..., 3:-3], x[..., 3:-3])
    assert torch.equal(trigger(x.flip(3)), out.flip(3))


def test_cl_makes_images_of_the_target_hard_within_eight_levels_and_keeps_their_labels(monkeypatch):
    """For a linear network every step is the sign of the weights, so that 6 steps of 1.5 end at the bound, 8."""
    monkeypatch.setattr(cl, "STEPS", 6)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
    labels = torch.tensor([0, 1, 0, 1, 1])
    train = torch.full((5, 3, 32, 32), 100, dtype=torch.uint8)
    trigger = get_backdoor("cl")
    trigger.prepare(train, labels, 1, 0, False, lambda line: None, network.requires_grad_(False))
    difference = (network[1].weight[0] - network[1].weight[1]).sign().view(3, 32, 32)  # raises the loss of label 1
    assert torch.equal(trigger.hard.int(), (100 + 8 * difference).int().expand(3, 3, 32, 32))
    index, roles = torch.tensor([3, 0, 4, 2]), torch.tensor([1, 0, 0, 0])
    fetched = trigger.fetch(train, index, roles)
    assert torch.equal(fetched[0], trigger.hard[1])
    assert torch.equal(fetched[1:], train[index[1:]])
    assert (train == 100).all()
    poison = poison_training_set(labels, "cl", 1, 0.4, sampling="resampled")
    assert (poison.relabel, poison.pool.tolist()) == (False, [1, 3, 4])
