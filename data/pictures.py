"""Pictures in folders, one per class, as torchvision's ImageFolder reads them; and how images are resized."""

from flags import InputError

import functools
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".webp")
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "WEBP")  # the only decoders that Pillow may try
LAYOUT = "it needs train/ and test/, each with a folder of pictures per class"


def class_names(root):
    """Return the classes of a data set in folders in the order of their labels, sorted by name as in ImageFolder.

    They are the folders in root/train, or in root/test if there is no root/train. Raises InputError for fewer than two.
    """
    root = Path(root)
    splits = [root / name for name in ("train", "test") if (root / name).is_dir()]
    if not splits:
        raise InputError(f"{root} is no data set in folders: {LAYOUT}")
    names = _folders(splits[0])
    if len(names) < 2:
        raise InputError(f"{splits[0]} has {len(names)} class folders, and at least 2 are needed: {LAYOUT}")
    if all(map(str.isdecimal, names)) and names != tuple(sorted(names, key=int)):
        _note(f"the classes of {root} are sorted by name, not by number: {_some(names)} are 0, 1, 2, ...")
    return names


def load_folder(root, train, size):
    """Return (images uint8 (N, 3, size, size), labels int64 (N,)) of root/train or root/test, class by class.

    Raises InputError for a folder that is missing or empty, a class in test/ that train/ does not have, and a picture
    that cannot be read.
    """
    split, names = Path(root) / ("train" if train else "test"), class_names(root)
    if not split.is_dir():
        raise InputError(f"no folder {split}: {LAYOUT}")
    here = _folders(split)
    if strange := sorted(set(here) - set(names)):
        raise InputError(f"{split / strange[0]} is a class that train/ does not have; remove it or add it there")
    if missing := sorted(set(names) - set(here)):
        _note(f"{split} has no folder for {len(missing)} of the {len(names)} classes ({_some(missing)})")
    return _load(split, [(names.index(name), name) for name in here], size)


def load_triggered(root, classes, size):
    """Return (images uint8 (N, 3, size, size), labels int64 (N,), stems) of triggered pictures.

    root: has a folder per true class, named as in `classes` or by its index there, which is BackdoorBench's layout;
    stems: the file names without suffix. Raises InputError as load_folder() does, and for a folder with another name.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"no folder {root}; --attack folder:PATH needs triggered pictures there")
    names = _folders(root)
    if not names:
        raise InputError(f"{root} has no folders; put each triggered picture into one named after its true class")
    if set(names) <= set(classes):
        labels = [classes.index(name) for name in names]
    elif all(name.isdecimal() and int(name) < len(classes) for name in names):
        labels = [int(name) for name in names]
    else:
        strange = [n for n in names if n not in classes and not (n.isdecimal() and int(n) < len(classes))]
        known = f"all by name ({_some(classes)}) or all by number (0 to {len(classes) - 1})"
        raise InputError(f"{root / (strange or names)[0]} is no class; name the folders after the classes, {known}")
    return *_load(root, list(zip(labels, names, strict=True)), size), [p.stem for n in names for p in _files(root / n)]


def _load(split, folders, size):
    """Return the pictures of the class folders `folders`, [(label, name)], in `split`, and their labels."""
    files, labels, others = [], [], []
    for label, name in folders:
        found = _files(split / name, others)
        if not found:
            raise InputError(f"{split / name} has no pictures ({', '.join(SUFFIXES)}); remove it or add some")
        files += found
        labels += [label] * len(found)
    if others:
        _note(f"{len(others)} files in {split} are no pictures ({_some([p.name for p in others])}): left out")
    images = np.empty((len(files), 3, size, size), np.uint8)
    bar = tqdm(files, desc=f"read {split}", unit="img", delay=1, leave=False)
    for i, path in enumerate(bar):
        try:
            with Image.open(path, formats=FORMATS) as picture:
                images[i] = to_bytes(picture, size)
        except MemoryError:
            raise
        except Exception as error:  # whatever a damaged picture makes Pillow raise
            bar.close()
            reason = " ".join((str(error) or type(error).__name__).split())[:120]
            raise InputError(f"cannot read the picture {path} ({reason}): replace it or remove it") from None
    return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64)


def to_bytes(picture, size):
    """Return a Pillow picture as RGB, uint8 (3, size, size), resized if it has another size, see resize().

    Raises ValueError for more than 8 bits per channel.
    """
    if picture.mode[0] in "IF":
        raise ValueError("it has more than 8 bits per channel")
    rgb = picture.convert("RGB")
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(rgb).transpose(2, 0, 1)


def resize(images, size):
    """Return a uint8 array of images, gray (N, H, W) or (N, H, W, 3), as a uint8 tensor (N, 3, size, size).

    Resized by Pillow, bilinearly with antialiasing; images that are not square are stretched.
    """
    images = images[..., None] if images.ndim == 3 else images
    out = np.empty((len(images), 3, size, size), np.uint8)
    if images.shape[1:3] == (size, size):
        out[:] = images.transpose(0, 3, 1, 2)
    else:
        for i, image in enumerate(tqdm(images, desc="resize", unit="img", delay=1, leave=False)):
            one = np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image)
            out[i] = to_bytes(Image.fromarray(one), size)
    return torch.from_numpy(out)


def _folders(folder):
    try:
        return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from None


def _files(folder, others=None):
    """Return the pictures below a folder in ImageFolder's order; all other files are added to `others`."""
    found = []
    for place, _, names in sorted(os.walk(folder, followlinks=True)):
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                found.append(Path(place) / name)
            elif others is not None and not name.startswith("."):
                others.append(Path(place) / name)
    return found


def _some(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@functools.cache  # once per run
def _note(text):
    print(f"note: {text}", file=sys.stderr)
