"""A result as BackdoorBench saves it: `record/NAME/attack_result.pt`, and its triggered test images as PNG files.

    python -m tests.backdoorbench ckpt/cifar10_preactresnet18-w0.25_badnet.pt FOLDER

writes FOLDER/record/badnet/, made of this victim, its trigger and the test set.
"""

from flags import ROOT, InputError, run

import sys
from pathlib import Path

import numpy as np
import PIL.Image
import torch

import data
import utils
from support import inputs

BATCH = 1000


def attack_result(
    state, images, labels, indices, n_test, name="mine", folder=None, number=np.int64, target=0, **changes
):
    """Return what BackdoorBench saves; the PNG files lie in folder/record/name/, or, without folder, in memory.

    state: the weights; images: uint8 (N, 3, H, W) with the trigger; labels: their true classes, int64 (N,);
    indices: their places in the test set of n_test images; number: the type of the numbers in it; target: of the
    trigger; changes: to its fields.
    """
    place, entries = f"./record/{name}/bd_test_dataset", {}
    for i, image, label in zip(indices, images, labels.tolist(), strict=True):
        picture = PIL.Image.fromarray(image.permute(1, 2, 0).numpy())
        if folder is None:
            entries[number(i)] = (picture, number(target), number(label))
            continue
        path = f"{place}/{label}/{i}.png"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / path)
        entries[number(i)] = {"path": path, "other_info": [number(target), number(label)]}
    indicator = np.zeros(n_test)
    indicator[list(indices)] = 1
    where = None if folder is None else place
    bd_test = {
        "bd_data_container": {"save_folder_path": where, "data_dict": entries, "save_file_format": ".png"},
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": np.where(indicator == 1)[0],
        "poison_indicator": indicator,
        "save_folder_path": where,
    }
    return {
        "model_name": "preactresnet18",
        "num_classes": 10,
        "model": state,
        "data_path": "./data/cifar10",
        "img_size": (32, 32, 3),
        "clean_data": "cifar10",
        "bd_train": None,
        "bd_test": bd_test,
    } | changes


def main(victim, folder):
    """Write the result and say where it lies."""
    model, about = utils.load_model(victim)
    if about["bounds"] is not None:
        raise InputError(f"{victim} has bounds, which BackdoorBench's file cannot hold; give the victim")
    backdoor = inputs.load_trigger(about["attack"] or "none", utils.load_checkpoint(victim), torch.device("cpu"))
    images, labels = data.load_dataset(about["dataset"], ROOT / "data", train=False)
    target = about["target"]
    if backdoor is None or backdoor.test_set(images[:BATCH], labels[:BATCH], target)[1] is None or target == "all":
        raise InputError(f"{victim} has no trigger, one on mixes of images, or no single target; give another victim")
    name, folder = about["attack"], Path(folder)
    path = folder / "record" / name / "attack_result.pt"
    utils.check_place(path)
    indices = (labels != target).nonzero()[:, 0]
    with torch.no_grad():
        triggered = [(backdoor(data.to_float(x)) * 255).round().byte() for x in images[indices].split(BATCH)]
    result = attack_result(
        model.state_dict(), torch.cat(triggered), labels[indices], indices.tolist(), len(labels), name, folder,
        target=target, model_name=about["network"], num_classes=about["num_classes"], clean_data=about["dataset"],
    )  # fmt: skip
    torch.save(result, path)
    print(f"wrote {path} and {len(indices):,} pictures beside it")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    run(lambda: main(*sys.argv[1:]))
