"""BackdoorBench's `attack_result.pt`: what its fields say, and the triggered test images that come with it.

The images lie in PNG files whose paths are relative to the folder that contains `record`, or in the file itself.
"""

from flags import MAX_SIZE, NORMALIZATIONS, InputError

from pathlib import Path

import numpy as np
import torch
from PIL import Image

# what it normalizes the images of its data sets with
NORMALIZATION = dict(zip(("cifar10", "cifar100", "tiny"), ("backdoorbench", "cifar100", "tiny"), strict=True))
NORMALIZATION |= dict.fromkeys(("gtsrb", "celeba"), "none")
LARGEST = 4096  # pixels a side, of an image that is read


def is_result(content):
    """Return whether `content`, a dictionary, has the fields of an attack_result.pt or a defense_result.pt."""
    return isinstance(content.get("model_name"), str) and {"num_classes", "model"} <= set(content)


def fields(content):
    """Return what such a file says: network_name, and dataset, size, mean, std and bd_test, where it does.

    content: plain values, as models.read_pickle() returns them; mean and std are BackdoorBench's for the data set;
    bd_test: see triggered_entries(). Raises ValueError for values that cannot be.
    """
    said = {"network_name": content["model_name"]}
    if isinstance(dataset := content.get("clean_data"), str):
        said["dataset"] = dataset
        if dataset in NORMALIZATION:
            said["mean"], said["std"] = NORMALIZATIONS[NORMALIZATION[dataset]]
    if content.get("img_size") is not None:
        said["size"] = _side(content["img_size"])
    if isinstance(content.get("bd_test"), dict):
        said["bd_test"] = triggered_entries(content["bd_test"])
    return said


def _side(size):
    sides = list(size)[:2] if isinstance(size, (tuple, list)) else [size]
    if len(sides) < 2 or not all(type(side) is int and 0 < side <= MAX_SIZE for side in sides):
        raise ValueError(f"its img_size is {str(size)[:60]}, not height, width and channels")
    if sides[0] != sides[1]:
        raise ValueError(f"its images are {sides[0]}x{sides[1]}; only square ones are taken")
    return sides[0]


def triggered_entries(bd_test):
    """Return a list of (index, path or None, label under attack, original label, image or None), in order of index.

    bd_test: the dictionary of that name. image: uint8 (3, H, W), where the file has the pixels themselves.
    Raises ValueError where it is not as BackdoorBench writes it.
    """
    try:
        entries = bd_test["bd_data_container"]["data_dict"]
        chosen = _chosen(bd_test, entries)
        found = []
        for index, entry in sorted(entries.items()):
            if isinstance(entry, dict):
                inside = next((v for v in entry.values() if isinstance(v, dict)), None)
                image, under_attack, original = entry.get("path", inside), *entry["other_info"][:2]
            else:  # without a folder the images themselves
                image, under_attack, original = entry[:3]
            if min(original, under_attack) < 0 or (int(original), int(under_attack)) != (original, under_attack):
                raise ValueError(f"the labels of {index} are {under_attack} and {original}")
            if index in chosen:
                path, image = (image, None) if isinstance(image, str) else (None, pixels(image))
                found.append((int(index), path, int(under_attack), int(original), image))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise ValueError(f"its bd_test is not as BackdoorBench writes it ({reason})") from None
    if not found:
        raise ValueError("its bd_test selects no image; take a whole result")
    return found


def are_entries(values):
    """Return whether a list is of such entries as triggered_entries() returns."""
    return all(
        isinstance(entry, tuple)
        and len(entry) == 5
        and all(type(entry[i]) is int for i in (0, 2, 3))
        and (type(entry[1]) is str if entry[4] is None else _is_image(entry[4]))
        for entry in values
    )


def _is_image(value):
    return isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.dim() == 3 and value.shape[0] == 3


def _chosen(bd_test, entries):
    """Return which of the entries' indices the test set has and are poisoned: all where nothing says so."""
    chosen = set(entries)
    if isinstance(indices := bd_test.get("original_index_array"), torch.Tensor):
        chosen &= set(indices.tolist())
    indicator = bd_test.get("poison_indicator")
    if isinstance(indicator, torch.Tensor) and len(indicator) > max(entries, default=0):
        chosen &= set(indicator.nonzero()[:, 0].tolist())
    return chosen


def pixels(picture):
    """Return a PIL image's pixels, uint8 (3, H, W); picture: {"mode", "size", "palette", "data"}, RGB or gray.

    Raises ValueError for another mode, and where the bytes are not as many as its size asks for.
    """
    (width, height), mode, content = picture["size"], picture["mode"], picture["data"]
    channels = {"RGB": 3, "L": 1}.get(mode)
    if channels is None or len(content) != width * height * channels or not 0 < max(width, height) <= LARGEST:
        raise ValueError(f"an image of mode {mode} and size {width}x{height} is not as it should be")
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(height, width, channels)
    return values.permute(2, 0, 1).expand(3, -1, -1).contiguous()


def triggered_images(bd_test, folder):
    """Return (images uint8 (N, 3, H, W), true labels, labels under attack), int64 (N,), of an attack_result.pt.

    bd_test: what triggered_entries() returns; folder: that of the file. The PNG files are looked for at their paths
    relative to `folder` and to each folder around it (`record/NAME/...` beside its own), and at the ends of these paths
    within `folder` (`bd_test_dataset/...` beside the file).
    Raises InputError where there are none, or some are missing, unreadable or of another size.
    """
    if not bd_test:
        raise InputError("the file brings no triggered images; give --attack a trigger, or folder:PATH")
    paths = [entry[1] for entry in bd_test if entry[4] is None]
    place = _place(paths[0], Path(folder).resolve()) if paths else None
    images = [entry[4] if entry[4] is not None else _read(place(entry[1])) for entry in bd_test]
    if len(sizes := {tuple(image.shape) for image in images}) > 1:
        raise InputError(f"the triggered images have several sizes, {sorted(sizes)[:3]}; they should have one")
    under_attack, original = (torch.tensor([entry[i] for entry in bd_test]) for i in (2, 3))
    return torch.stack(images), original, under_attack


def _place(path, folder):
    """Return a function from an entry's path to where its file lies, by where that of the first one does."""
    parts = Path(path).parts
    for base in (folder, *folder.parents):
        if (base / path).is_file():
            return lambda p: base / p
    for n in range(1, len(parts)):
        if folder.joinpath(*parts[n:]).is_file():
            return lambda p: folder.joinpath(*Path(p).parts[n:])
    raise InputError(f"no triggered images: {path} lies neither beside {folder} nor around it; put the folder there")


def _read(path):
    try:
        with Image.open(path, formats=("PNG", "JPEG", "BMP")) as picture:
            if max(picture.size) > LARGEST:
                raise ValueError(f"it is {picture.width}x{picture.height}")
            if picture.mode.startswith("I"):
                raise ValueError("it has 16 bits per pixel")
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged picture makes Pillow raise
        reason = " ".join((str(error) or type(error).__name__).split())[:100]
        raise InputError(f"cannot read the triggered image {path} ({reason})") from None
