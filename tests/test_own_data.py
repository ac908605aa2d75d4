"""Data sets of the user's own: folders of pictures, .npz and IDX files, what torchvision fetches; end to end."""

import flags
from flags import InputError

import gzip
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import data
import defend
import evaluate
import train
import unit
import utils
from data import arrays
from defenses import dbd, ulrl
from support import inputs, records
from tests.running import SMALL

CPU = ["--device", "cpu", "--precision", "fp32"]
SPLITS = pytest.mark.parametrize("train", [True, False])


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(path, array, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **how)


def folders(root, classes, n_train=2, n_test=1, size=32):
    """Write a data set in folders; return {(split, class): [arrays in the order of the files' names]}."""
    written = {}
    for s, (split, n) in enumerate({"train": n_train, "test": n_test}.items()):
        for c, name in enumerate(classes):
            written[split, name] = [pixels(1000 * c + 10 * s + i, size, size, 3) for i in range(n)]
            for i, array in enumerate(written[split, name]):
                picture(root / split / name / f"{i}.png", array)
    return written


def refused(act, *said):
    with pytest.raises(InputError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(word) in message for word in said), message


# --- folders ----------------------------------------------------------------------------------------------------------


@SPLITS
def test_folders_are_classes_by_name_and_pixels_are_what_was_written(tmp_path, train):
    written = folders(tmp_path, ["dog", "Cat", "ant"], 3, 2)
    images, labels = data.load_dataset(f"folder:{tmp_path}", None, train)
    assert data.class_names(f"folder:{tmp_path}") == ("Cat", "ant", "dog")  # as ImageFolder sorts
    n, split = (3, "train") if train else (2, "test")
    assert labels.tolist() == [0] * n + [1] * n + [2] * n
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    want = np.stack([a for name in ("Cat", "ant", "dog") for a in written[split, name]]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(images.numpy(), want)


@pytest.mark.parametrize(("ending", "how"), [("png", {}), ("BMP", {}), ("ppm", {}), ("webp", {"lossless": True})])
def test_formats_that_lose_nothing(tmp_path, ending, how):
    folders(tmp_path, ["a", "b"])
    array = pixels(5, 32, 32, 3)
    picture(tmp_path / "test" / "b" / "deeper" / f"x.{ending}", array, **how)
    images, labels = data.load_dataset(f"folder:{tmp_path}", None, False)
    assert labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(images[2].permute(1, 2, 0).numpy(), array)


def test_jpeg_gray_and_alpha(tmp_path):
    folders(tmp_path, ["a", "b"], n_test=0)
    gray, rgba = pixels(1, 32, 32), pixels(2, 32, 32, 4)
    picture(tmp_path / "test" / "a" / "0.jpeg", np.full((32, 32, 3), (200, 90, 30), np.uint8), quality=95)
    picture(tmp_path / "test" / "a" / "1.png", gray)
    picture(tmp_path / "test" / "b" / "2.png", rgba)
    images = data.load_dataset(f"folder:{tmp_path}", None, False)[0].numpy()
    assert abs(images[0].mean((1, 2)) - (200, 90, 30)).max() < 3
    assert (images[1] == gray).all()  # in each channel
    np.testing.assert_array_equal(images[2], rgba[..., :3].transpose(2, 0, 1))


def test_resizing_takes_all_pixels_into_account(tmp_path):
    """A fine chessboard becomes gray, where a resize without antialiasing makes it all black, all white or coarser."""
    board = (np.indices((96, 96)).sum(0) % 2 * 255).astype(np.uint8)
    picture(tmp_path / "train" / "a" / "x.png", board)
    picture(tmp_path / "train" / "b" / "x.png", np.full((48, 96, 3), (10, 20, 30), np.uint8))  # no square
    images, _ = data.load_dataset(f"folder:{tmp_path}", None, True, size=24)
    assert images.shape == (2, 3, 24, 24)
    assert (images[0].float() - 127.5).abs().max() < 3
    assert images[1].flatten(1).float().std(1).tolist() == [0, 0, 0]
    assert images[1, :, 0, 0].tolist() == [10, 20, 30]


def test_a_set_of_arrays_is_resized_likewise():
    small, labels = data.load_dataset("cifar10_sample", None, True, size=16)
    images, _ = data.load_dataset("cifar10_sample", None, True)
    assert (small.shape, len(labels)) == ((500, 3, 16, 16), 500)
    assert abs(small.float().mean() - images.float().mean()) < 0.5
    one = Image.fromarray(images[7].permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(small[7].permute(1, 2, 0).numpy(), np.asarray(one))


@pytest.mark.parametrize("harm", ["no folder", "no splits", "one class", "strange class", "empty class", "no test"])
def test_a_folder_that_is_no_data_set_is_refused(tmp_path, harm):
    root = tmp_path / "set"
    if harm != "no folder":
        folders(root, ["a", "b"] if harm != "one class" else ["a"])
    if harm == "no splits":
        (root / "train").rename(root / "training")
        (root / "test").rename(root / "val")
    if harm == "strange class":
        picture(root / "test" / "c" / "x.png", pixels(0, 32, 32, 3))
    if harm == "empty class":
        (root / "test" / "b" / "0.png").rename(root / "test" / "b" / "0.txt")
    if harm == "no test":
        (root / "test").rename(root / "val")
    named = {"strange class": root / "test" / "c", "empty class": root / "test" / "b", "no test": root / "test"}
    refused(lambda: data.load_dataset(f"folder:{root}", None, False), named.get(harm, root))


@pytest.mark.parametrize("harm", ["text", "cut", "16 bits", "empty"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, harm):
    folders(tmp_path, ["a", "b"])
    path = tmp_path / "train" / "b" / "1.png"
    if harm == "16 bits":
        picture(path, pixels(0, 32, 32).astype(np.uint16) * 256)
    else:
        path.write_bytes({"text": b"no picture", "cut": path.read_bytes()[:1000], "empty": b""}[harm])
    refused(lambda: data.load_dataset(f"folder:{tmp_path}", None, True), path)
    data.load_dataset(f"folder:{tmp_path}", None, False)  # the other split is whole


def test_what_is_left_out_and_how_numbers_are_sorted_is_said(tmp_path, capsys):
    folders(tmp_path, [str(c) for c in range(11)])
    (tmp_path / "train" / "3" / "notes.csv").write_text("")
    (tmp_path / "train" / "3" / ".DS_Store").write_text("")
    (tmp_path / "test" / "10" / "0.png").unlink()
    (tmp_path / "test" / "10").rmdir()
    _, labels = data.load_dataset(f"folder:{tmp_path}", None, False)
    assert labels.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10]  # the labels of train/ stay: 10 is the third by name
    data.load_dataset(f"folder:{tmp_path}", None, True)
    out, err = capsys.readouterr()
    assert not out
    notes = err.splitlines()
    assert "sorted by name, not by number: 0, 1, 10, ..." in notes[0]
    assert "no folder for 1 of the 11 classes (10)" in notes[1]
    assert "1 files" in notes[2]
    assert "notes.csv" in notes[2]
    assert len(notes) == 3


def test_a_test_set_alone_has_the_classes_of_its_own_folders(tmp_path):
    folders(tmp_path, ["a", "b"], n_train=0, n_test=2)
    assert data.load_dataset(f"folder:{tmp_path}", None, False)[1].tolist() == [0, 0, 1, 1]
    refused(lambda: data.load_dataset(f"folder:{tmp_path}", None, True), tmp_path / "train")


# --- .npz -------------------------------------------------------------------------------------------------------------


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def four(x=None, y=None, **changes):
    """The four arrays of a data set of three classes, some replaced."""
    x = pixels(3, 6, 32, 32, 3) if x is None else x
    y = np.array([2, 1, 0, 0, 1, 2]) if y is None else y
    return {"x_train": x, "y_train": y, "x_test": x[:3], "y_test": y[:3]} | changes


@pytest.mark.parametrize("prefix", ["", "npz:"])
@pytest.mark.parametrize("shape", ["NHWC", "NCHW", "NHW", "NHW1", "N1HW"])
def test_the_layouts_of_npz(tmp_path, shape, prefix):
    x = pixels(3, 6, 32, 32, 3)
    gray = x[..., 1]
    given = {"NHWC": x, "NCHW": x.transpose(0, 3, 1, 2), "NHW": gray, "NHW1": gray[..., None], "N1HW": gray[:, None]}
    name = prefix + write_npz(tmp_path / "s.npz", **four(given[shape]))
    want = x.transpose(0, 3, 1, 2) if "C" in shape else np.repeat(gray[:, None], 3, 1)
    for split, n in ((True, 6), (False, 3)):
        images, labels = data.load_dataset(name, None, split)
        np.testing.assert_array_equal(images.numpy(), want[:n])
        assert labels.tolist() == [2, 1, 0, 0, 1, 2][:n]
    assert data.class_names(name) == ("0", "1", "2")


def test_other_labels_and_names_of_npz(tmp_path, capsys):
    y = np.array([[2], [1], [0], [0], [1], [2]], np.uint8)  # as Keras has them
    name = write_npz(tmp_path / "s.npz", **four(pixels(3, 6, 48, 40, 3), y), classes=["a", "b", "c"])
    images, labels = data.load_dataset(name, None, True)
    assert images.shape == (6, 3, 32, 32)
    assert labels.tolist() == y.ravel().tolist()
    assert data.class_names(name) == ("a", "b", "c")
    assert "40x48" in capsys.readouterr().err


def test_one_split_is_a_test_set(tmp_path):
    name = write_npz(tmp_path / "s.npz", x=pixels(0, 4, 32, 32), y=np.array([0, 1, 1, 3]))
    assert data.load_dataset(name, None, False)[1].tolist() == [0, 1, 1, 3]
    assert len(data.class_names(name)) == 4
    refused(lambda: data.load_dataset(name, None, True), "no x_train", "s.npz")


@pytest.mark.parametrize(
    ("arrays", "train", "said"),
    [
        (four(pixels(0, 6, 32, 32, 3) / 255), True, ["x_train", "float64", "uint8"]),
        (four(pixels(0, 6, 32, 32, 4)), True, ["(6, 32, 32, 4)"]),
        (four(pixels(0, 6, 3, 32, 3)), True, ["(6, 3, 32, 3)"]),  # which are the channels?
        (four(pixels(0, 6, 32)), True, ["(6, 32)"]),
        (four(y=np.eye(6)[:, :3]), True, ["y_train", "float64"]),
        (four(y=np.eye(6, dtype=int)[:, :3]), True, ["y_train", "(6, 3)"]),
        (four(y_train=np.int64(3)), True, ["y_train", "of shape ()"]),
        (four(y=np.array([-1, 0, 1, 2, 0, 1])), True, ["y_train", "-1"]),
        (four(y=np.array([0, 1, 3, 3, 1, 0])), True, ["class 2"]),
        (four(y=np.zeros(6, int)), True, ["1 classes"]),
        (four(y=np.array([0, 1, 2])), True, ["6 images and 3 labels"]),
        (four(y_test=np.array([0, 1, 3])), False, ["label 3", "3 classes"]),
        (four(classes=np.array(["a", "b"])), True, ["label 2", "2 classes"]),
        ({"images": pixels(0, 6, 32, 32, 3)}, True, ["x_train", "images"]),
        (four(x_train=np.array([{}] * 6)), True, ["x_train"]),  # pickled objects
        ({}, False, ["x_test"]),
    ],
)
def test_what_npz_may_not_hold(tmp_path, arrays, train, said):
    name = write_npz(tmp_path / "s.npz", **arrays)
    refused(lambda: data.load_dataset(name, None, train), "s.npz", *said)


@pytest.mark.parametrize("content", [None, b"", b"no archive", b"PK\x03\x04cut", "array"])
def test_what_is_no_npz(tmp_path, content):
    path = tmp_path / "s.npz"
    if content == "array":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif content is not None:
        path.write_bytes(content)
    refused(lambda: data.load_dataset(str(path), None, True), path)


# --- IDX --------------------------------------------------------------------------------------------------------------


def idx(*shape, values):
    """An IDX file by the format's definition: 0, 0, the type (8: bytes), dimensions, their sizes big-endian, data."""
    return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + bytes(values)


def write_idx(folder, zipped=False):
    """Write four small files; return {train: (images, labels)}."""
    folder.mkdir(parents=True)
    written = {}
    for of_train, (name, n) in {True: ("train", 20), False: ("t10k", 10)}.items():
        images, labels = pixels(n, n, 28, 28), np.arange(n, dtype=np.uint8) % 10
        files = {f"{name}-images-idx3-ubyte": idx(n, 28, 28, values=images.ravel())}
        files |= {f"{name}-labels-idx1-ubyte": idx(n, values=labels)}
        for file, content in files.items():
            (folder / (file + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
        written[of_train] = images, labels
    return written


@pytest.fixture
def no_debian(monkeypatch, tmp_path):
    monkeypatch.setattr(arrays, "DEBIAN", tmp_path / "usr")


@SPLITS
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["data/fashion-mnist", "data/FashionMNIST/raw", "usr"])
@pytest.mark.usefixtures("no_debian")
def test_fashion_mnist_lies_in_one_of_three_places(tmp_path, zipped, place, train):
    images, labels = write_idx(tmp_path / place, zipped)[train]
    got, given = data.load_dataset("fashion_mnist", tmp_path / "data", train, size=28)
    np.testing.assert_array_equal(got.numpy(), np.repeat(images[:, None], 3, 1))
    np.testing.assert_array_equal(given.numpy(), labels)
    wide, _ = data.load_dataset("fashion_mnist", tmp_path / "data", train)
    assert wide.shape == (len(labels), 3, 32, 32)
    assert (wide[:, 0] == wide[:, 2]).all()
    assert abs(wide.float().mean() - images.mean()) < 1  # it is the whole image, stretched


@pytest.mark.parametrize("harm", ["cut", "longer", "ints", "no gzip", "half gzip", "missing", "counts", "label"])
@pytest.mark.usefixtures("no_debian")
def test_idx_files_that_are_damaged(tmp_path, harm):
    folder = tmp_path / "fashion-mnist"
    write_idx(folder, zipped="gzip" in harm)
    images, labels = (
        folder / f"train-{kind}-ubyte{'.gz' * ('gzip' in harm)}" for kind in ("images-idx3", "labels-idx1")
    )
    content = images.read_bytes()
    if harm == "missing":
        labels.unlink()
    elif harm == "counts":
        labels.write_bytes(idx(19, values=range(19)))
    elif harm == "label":
        labels.write_bytes(idx(20, values=[10] * 20))
    else:
        changed = {"cut": content[:-1], "longer": content + b"x", "ints": content[:2] + b"\x0c" + content[3:]}
        images.write_bytes((changed | {"no gzip": b"text", "half gzip": content[: len(content) // 2]})[harm])
    named = labels if harm in ("missing", "label") else images
    refused(lambda: data.load_dataset("fashion_mnist", tmp_path, True), named)


# --- what torchvision fetches -----------------------------------------------------------------------------------------


def fake_torchvision(monkeypatch, **sets):
    module = type(sys)("torchvision")
    module.datasets = type(sys)("torchvision.datasets")
    vars(module.datasets).update(sets)
    monkeypatch.setitem(sys.modules, "torchvision", module)


@pytest.mark.parametrize(("name", "cls"), [("cifar100", "CIFAR100"), ("gtsrb", "GTSRB"), ("svhn", "SVHN")])
@SPLITS
def test_torchvisions_sets_are_pictures_of_any_size(monkeypatch, tmp_path, name, cls, train):
    asked = []

    def act(root, download, **split):
        asked.append((root, download, split))
        print("Downloading")
        return [(Image.new("RGB", (20 + i, 30), (i, 2 * i, 3 * i)), 9 - i) for i in range(10)]

    fake_torchvision(monkeypatch, **{cls: act})
    images, labels = data.load_dataset(name, tmp_path / "new", train, size=24)
    split = {"train": train} if name == "cifar100" else {"split": "train" if train else "test"}
    assert asked == [(str(tmp_path / "new"), True, split)]
    assert (images.shape, labels.tolist()) == ((10, 3, 24, 24), list(range(9, -1, -1)))
    assert images[4].flatten(1).float().mean(1).tolist() == [4, 8, 12]


@pytest.mark.parametrize("name", ["cifar100", "fashion_mnist", "gtsrb", "stl10", "svhn"])
@pytest.mark.parametrize("error", [RuntimeError("not\nfound"), ConnectionError("no host"), None])
@pytest.mark.usefixtures("no_debian")
def test_without_a_host_one_line_says_where_to_put_the_files(monkeypatch, tmp_path, name, error):
    def act(*_args, **_kwargs):
        raise error

    classes = ("CIFAR100", "FashionMNIST", "GTSRB", "STL10", "SVHN")
    fake_torchvision(monkeypatch, **({} if error is None else dict.fromkeys(classes, act)))
    refused(lambda: data.load_dataset(name, tmp_path, True), f"no {name} in {tmp_path}", "put there: ", "folder:PATH")


def test_fashion_mnist_is_fetched_where_it_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(arrays, "DEBIAN", tmp_path / "usr")
    fake_torchvision(monkeypatch, FashionMNIST=lambda root, **_: write_idx(tmp_path / "FashionMNIST" / "raw"))
    assert len(data.load_dataset("fashion_mnist", tmp_path, False)[1]) == 10


# --- by name ----------------------------------------------------------------------------------------------------------


def test_the_number_of_classes_of_each_set():
    n = {name: len(data.class_names(name)) for name in flags.DATASETS}
    assert n == dict.fromkeys(flags.DATASETS, 10) | {"cifar100": 100, "gtsrb": 43}
    assert data.class_names("cifar10_sample")[3] == "cat"


def test_unknown_names_are_refused():
    for name in ("imagenet", "folder", "zip:x"):
        refused(lambda name=name: data.load_dataset(name, None, True), "cifar10_sample", "folder:PATH")
        refused(lambda name=name: data.class_names(name), "cifar10_sample", "folder:PATH")
        with pytest.raises(flags.argparse.ArgumentTypeError, match="invalid choice"):
            flags.DATASET(name)


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("cifar10", "cifar10"),
        ("folder:/data/my signs/", "folder-my-signs"),
        ("folder:/data/cifar10", "folder-cifar10"),  # not the name of a victim of CIFAR-10
        ("npz:/data/a:b.npz", "npz-a-b"),
        ("x/set.NPZ", "npz-set"),
        ("folder:/", "folder-root"),
    ],
)
def test_a_data_set_in_the_name_of_a_file(name, tag):
    assert utils.file_tag(name) == tag
    assert utils.checkpoint_path(name, "resnet18", "badnet").name == f"{tag}_resnet18_badnet.pt"
    args = flags.parser("unit.py").parse_args(["--dataset", name, "--size", "64"])
    settings = {} if name == "cifar10" else {"dataset": tag}
    want = ",".join(f"{k}={v}" for k, v in (settings | {"size": 64}).items())
    assert records.path_of("unit", args, {"file": "v.pt", "attack": None}).name == f"unit,{want}.json"


def test_a_few_images_of_a_sorted_set_are_of_all_its_classes():
    assert data.few(torch.arange(5).repeat_interleave(100), 10).tolist() == list(range(0, 500, 50))
    assert data.few(torch.tensor([3, 1, 2, 0]), 2).tolist() == [0, 1]
    assert data.few(torch.arange(3), 10).tolist() == [0, 1, 2]


# --- end to end -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def signs(tmp_path_factory):
    """43 classes of one color each, as GTSRB names them; one has fewer images than the others."""
    root = tmp_path_factory.mktemp("signs")
    for c in range(43):
        color = np.array([c * 6, 255 - c * 6, c * 40 % 256], np.uint8)
        for split, n in (("train", 3 if c == 5 else 5), ("test", 2)):
            for i in range(n):
                picture(root / split / f"{c:05d}" / f"{i}.png", np.broadcast_to(color + i, (20, 26, 3)).copy())
    return root


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder of the checkpoints, a new one."""
    monkeypatch.setattr(utils, "CKPT", tmp_path / "ckpt")
    return tmp_path


@pytest.mark.usefixtures("undrawn")
def test_43_classes_end_to_end(signs, home, capsys, monkeypatch):
    monkeypatch.setattr(ulrl, "Config", partial(ulrl.Config, relearn_epochs=1))
    own = ["--dataset", f"folder:{signs}", *CPU]
    where = ["--outdir", str(home)]
    results = ["--results", str(home / "results")]
    tag = f"folder-{signs.name}_resnet18"
    train.main([*own, "--width", "0.0625", "--epochs", "1", "--target", "42", "--ckpt", str(home / "v.pt")])
    victim = utils.load_checkpoint(home / "v.pt")
    assert (victim["num_classes"], victim["size"], victim["flip"]) == (43, 32, False)
    assert victim["dataset"] == f"folder:{signs}"
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BA ")][-1]
    assert "(86 clean, 84 triggered, 2 of the target class)" in said

    own += ["--target", "42", "--ckpt", str(home / "v.pt")]
    evaluate.main([*own, *where])
    assert said in capsys.readouterr().out
    unit.main([*own, *where, *results, "--n_steps", "2", "--data_rate", "1"])
    out = capsys.readouterr().out
    assert "1 of 43 classes have fewer than 4 training images, 3 at least" in out
    assert "128 training and 43 validation images" in out  # 42 times 3 and 1 of 4; 2 and 1 of 3
    defended = home / "ckpt" / f"{tag}-w0.0625_badnet_unit.pt"
    assert utils.load_checkpoint(defended)["num_classes"] == 43
    record = next((home / "results" / "v").glob("unit,*.json"))
    assert record.name == f"unit,data_rate=1.0,dataset=folder-{signs.name},n_steps=2,target=42.json"
    assert str(signs) not in record.read_text()
    evaluate.main([*own[:-1], str(defended), *where])
    assert out.split("after   ")[1].splitlines()[0] in capsys.readouterr().out
    for defense, epochs in (("ft", ["1"]), ("bcu", ["1"]), ("ulrl", None)):
        flag = ["--epochs", *epochs] if epochs else []
        defend.main([*own, *results, "--defense", defense, "--data_rate", "1", *flag])
        assert utils.load_model(home / "ckpt" / f"{tag}-w0.0625_badnet_{defense}.pt")[1]["num_classes"] == 43
        assert "171 clean images" in capsys.readouterr().out


def test_dbd_with_another_number_of_classes(signs, home, monkeypatch):
    monkeypatch.setattr(dbd, "Config", partial(dbd.Config, mixmatch_steps=1, simclr_batch=64, mixmatch_batch=8))
    words = ["--dataset", f"folder:{signs}", *CPU, "--defense", "dbd", "--width", "0.0625", "--epochs", "1", "1", "1"]
    defend.main([*words, "--results", str(home / "results")])
    path = home / "ckpt" / f"folder-{signs.name}_resnet18-w0.0625_badnet_dbd.pt"
    model, about = utils.load_model(path)
    assert (about["num_classes"], model.linear.out_features, about["defense"]["flip"]) == (43, 43, False)


@pytest.mark.usefixtures("undrawn")
def test_64_pixels_end_to_end(signs, home, capsys):
    """The bounds of a defended model are for its size, and with a trigger in the file that cannot be mistaken."""
    own = ["--dataset", f"folder:{signs}", *CPU, "--ckpt", str(home / "v.pt")]
    train.main([*own, "--size", "64", "--width", "0.03125", "--epochs", "1"])
    with pytest.raises(InputError, match="64x64; give --size 64"):
        evaluate.main([*own, "--size", "32", "--outdir", str(home)])
    places = ["--outdir", str(home), "--results", str(home), "--out", str(home / "d.pt")]
    unit.main([*own, "--n_steps", "1", "--data_rate", "1", *places])
    after = capsys.readouterr().out.split("after   ")[1].splitlines()[0]
    evaluate.main([*own[:-1], str(home / "d.pt"), "--outdir", str(home)])
    assert after in capsys.readouterr().out


def test_network_and_data_set_have_to_have_the_same_classes(signs, victim_file):
    with pytest.raises(InputError, match=r"10 classes, folder:.* has 43"):
        evaluate.main(["--dataset", f"folder:{signs}", *CPU, "--ckpt", str(victim_file)])
    with pytest.raises(InputError, match="10 classes, gtsrb has 43"):
        unit.main(["--dataset", "gtsrb", *CPU, "--ckpt", str(victim_file)])
    for main, words in (
        (evaluate.main, ["--ckpt", str(victim_file)]),
        (train.main, ["--ckpt", str(victim_file) + "x"]),
    ):
        with pytest.raises(InputError, match="--target 10 is no class of cifar10_sample: it has 0 to 9"):
            main([*SMALL, *words, "--target", "10"])


def test_a_victim_that_is_not_there_says_what_makes_it(signs, home):
    with pytest.raises(InputError, match=r"train.py --dataset folder:.* --attack wanet") as caught:
        evaluate.main(["--dataset", f"folder:{signs}", "--attack", "wanet"])
    assert f"folder-{signs.name}_resnet18_wanet.pt" in str(caught.value)


@pytest.mark.parametrize("flip", [None, True, False])
@pytest.mark.parametrize("dataset", ["cifar10_sample", "folder"])
def test_images_are_mirrored_where_that_keeps_their_class(tmp_path, dataset, flip):
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (32, 32, 3)).copy()
    for name in "ab":
        for i in range(40):
            picture(tmp_path / "train" / name / f"{i:02d}.png", ramp)
    words = ["--data_rate", "1", *(["--flip"] if flip else ["--no-flip"] if flip is False else [])]
    args = flags.parser("unit.py").parse_args(["--dataset", f"folder:{tmp_path}", *words])
    images = inputs.augmented_defense_data(args)[0].int()
    falls = (images[:, 0, 16, 20] < images[:, 0, 16, 12]).tolist()
    if dataset == "folder":
        assert any(falls) == (flip is True)
    else:
        args = flags.parser("unit.py").parse_args(["--dataset", dataset, *words])
        assert inputs.flips(args) == (flip is not False)
