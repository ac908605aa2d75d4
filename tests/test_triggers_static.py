"""Triggers without networks: pixels computed by hand, other trigger files, the poisoned batches."""

import contextlib
import math
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from backdoors import FOLDER, cl, composite, get_backdoor, poison_training_set
from tests.images import (
    FLOWER,
    IDENTITY,
    NOISE,
    RINGS,
    SCENE,
    generator,
    grids,
    images,
    regular_grid,
    sample,
    smooth_images,
)

CIFAR10 = torch.arange(10).repeat(5000)  # as many labels of each class as CIFAR-10 has

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
    """Fails, as it should, with the authors' files in place of ours."""
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
        """(size, n): the weight of each of the n pixels of a line in each pixel of the resized line."""
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


# Composite and Adaptive-Blend


def test_a_mix_is_of_whole_columns_or_rows_of_both_images():
    """Each pixel of the images codes its image, row and column."""
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
    """Labels 0, 5, 2, 2: the neighbors (0, 2) differ in class at distance .6, (2, 2) are of one class at distance 2."""
    z = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.6, 0.0], [0.6, 2.0]])
    loss = composite.similarity_loss(z, torch.tensor([0, 5, 2, 2]))
    assert loss.item() == pytest.approx((0.5 * 0.4**2 + 0.5 * 2**2) / 2 / 2, rel=1e-4)
    assert composite.similarity_loss(z, torch.tensor([0, 5, 6, 7])) is None


def test_composite_plants_mixes_of_its_classes_and_is_measured_on_them():
    """Each class has its own brightness, so that a mix shows its two classes."""
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
