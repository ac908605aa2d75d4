"""What the tests share: the small real victim of the golden trajectory, and files made from it."""

import flags  # first, as in the commands

import copy
import functools
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import compare
import models
import utils
from backdoors import get_backdoor
from data import cifar10
from support import foreign, plots
from tests.house import House
from tests.images import FLOWER, RINGS, SCENE, generator, grids, picture, regular_grid

flags.keep_freed_memory()  # as the commands do
signal.signal(signal.SIGINT, signal.default_int_handler)  # as they do: a shell ignores it for what runs behind it
if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n: processes share the cores, and their threads would only wait
    torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden" / "unit_tiny.npz"


def pytest_collection_modifyitems(items):
    """The longest test comes first: at the end, one process would wait for the other."""
    items.sort(key=lambda item: not item.name.startswith("test_golden_trajectory"))


@pytest.fixture(scope="session")
def golden():
    """The recorded trajectory: {key: array}."""
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="session")
def untouched(golden):
    """A ResNet-18 of width 0.125 with real trained weights, which no test changes."""
    model = models.get_model("resnet18", width=0.125)
    model.load_state_dict({k[2:]: torch.from_numpy(v) for k, v in golden.items() if k.startswith("w.")}, strict=True)
    return model.eval()


@pytest.fixture
def tiny(untouched):
    """A copy of that victim, which the test may change."""
    return copy.deepcopy(untouched)


@pytest.fixture(scope="session")
def defense(golden):
    """The recorded defense images: x_train, y_train, x_valid, y_valid."""
    images = (torch.from_numpy(golden[k]).permute(0, 3, 1, 2).float() / 255 for k in ("x_train", "x_valid"))
    labels = (torch.from_numpy(golden[k]).long() for k in ("y_train", "y_valid"))
    (x_train, x_valid), (y_train, y_valid) = images, labels
    return x_train, y_train, x_valid, y_valid


@pytest.fixture(scope="session", autouse=True)
def decoded_once():
    """The sample is decoded once a process, to save time."""
    whole = functools.cache(cifar10.load_sample)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10, "load_sample", lambda train: [t.clone() for t in whole(bool(train))])
        yield


@pytest.fixture(scope="module")
def few_test_images():
    """Measure on 100 of the sample's 2,000 test images, to save time where the figures do not matter."""
    whole = cifar10.load_sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10, "load_sample", lambda train: [t if train else t[::20].clone() for t in whole(train)])
        yield


@pytest.fixture(scope="session")
def few_images(tmp_path_factory):
    """The flags of the sample with 250 training and 100 test images, for commands in a process of their own."""
    path = tmp_path_factory.mktemp("few") / "few.npz"
    (x_train, y_train), (x_test, y_test) = (cifar10.load_sample(train) for train in (True, False))
    arrays = {"x_train": x_train[::2], "y_train": y_train[::2], "x_test": x_test[::20], "y_test": y_test[::20]}
    np.savez(path, **{k: v.numpy() for k, v in arrays.items()})
    return ["--dataset", str(path), "--flip"]


@pytest.fixture
def undrawn(monkeypatch):
    """The pictures of evaluate.py and unit.py are empty files, to save time where nobody looks at them."""
    for name in ("draw_demo", "draw_history", "draw_moved"):
        monkeypatch.setattr(plots, name, lambda *what: what[-1].touch())


@pytest.fixture
def few_tries(monkeypatch):
    """Normalizations are tried on 60 images at most: to save time."""
    monkeypatch.setattr(foreign, "ROUNDS", (60,))


@pytest.fixture
def victim_file(tiny, tmp_path):
    """A checkpoint of the small victim in our own format."""
    path = tmp_path / "victim.pt"
    utils.save_checkpoint(
        {
            "network": "resnet18",
            "width": 0.125,
            "num_classes": 10,
            "attack": "badnet",
            "target": 0,
            "trigger": get_backdoor("badnet").state_dict(),
            "state_dict": utils.half_weights(tiny.state_dict()),
            "bounds": None,
        },
        path,
    )
    return path


@pytest.fixture
def one_thread():
    """The number of threads of command(), because sums are rounded differently with another."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def other_folder(tmp_path):
    """A folder with other trigger files than ours."""
    folder = tmp_path / "trigger"
    picture(folder / FLOWER, 20, seed=1)
    picture(folder / SCENE, 50, seed=2)
    picture(folder / RINGS, 40, seed=4)
    grids(folder, torch.randn(1, 32, 32, 2, generator=generator(3)), regular_grid())
    return folder


@pytest.fixture
def house(tmp_path, untouched, monkeypatch):
    """A House without victims, whose pictures are not drawn."""
    (tmp_path / "ckpt").mkdir()
    monkeypatch.setattr(utils, "CKPT", tmp_path / "ckpt")
    monkeypatch.setattr(compare, "draw", lambda *_: None)
    monkeypatch.setattr(compare, "POLL", 0.01)
    return House(tmp_path, utils.half_weights(untouched.state_dict()))
