"""Files from elsewhere, as the projects of the field write them: weights and triggered images."""

from flags import NORMALIZATIONS, InputError

import argparse
import functools
import os
import pickle
import struct
import sys
import types
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

import data
import evaluate
import models
import unit
import utils
from backdoors import get_backdoor
from data import backdoorbench
from models import libraries
from support import foreign
from tests import backdoorbench as written
from tests.running import SMALL
from tests.test_checkpoints import Evil

AUTHORS = NORMALIZATIONS["authors"]
N = 30  # triggered images in a result


@pytest.fixture(scope="module")
def preact():
    """A narrow PreActResNet-18 for raw images in [0, 1]."""
    torch.manual_seed(0)
    return models.get_model("preactresnet18", width=1 / 16, mean=(0, 0, 0), std=(1, 1, 1)).eval()


@pytest.fixture
def images():
    """Triggered images, uint8 (N, 3, 32, 32), and their true labels; none is of class 0, which they are labeled as."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (N, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return x, torch.arange(N) % 9 + 1


def attack_result(state, images, labels, folder=None, number=np.int64, n=N, **changes):
    """What BackdoorBench saves; image i of `images` is number 2 i + 1 of a test set of 2 n + 2 images."""
    indices = range(1, 2 * len(images), 2)
    return written.attack_result(state, images, labels, indices, 2 * n + 2, "mine", folder, number, **changes)


# --- BackdoorBench ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.int64, int])
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_result_of_backdoorbench(preact, images, tmp_path, number, in_memory, monkeypatch):
    path = tmp_path / "record" / "mine" / "attack_result.pt"
    path.parent.mkdir(parents=True)
    torch.save(attack_result(preact.state_dict(), *images, None if in_memory else tmp_path, number), path)
    monkeypatch.setattr(PIL.Image.Image, "__setstate__", lambda *_: pytest.fail("a class in the file was touched"))
    checkpoint = utils.load_checkpoint(path)
    monkeypatch.undo()
    want = {"network": "preactresnet18", "width": 1 / 16, "num_classes": 10, "dataset": "cifar10", "size": 32}
    assert {k: checkpoint[k] for k in want} == want
    assert (checkpoint["mean"], checkpoint["std"]) == NORMALIZATIONS["backdoorbench"]
    assert checkpoint["attack"] is checkpoint["trigger"] is checkpoint["bounds"] is None
    for i, (index, place, under_attack, original, image) in enumerate(checkpoint["bd_test"]):
        assert (index, under_attack, original) == (2 * i + 1, 0, images[1][i])
        assert (place is None, image is None) == (in_memory, not in_memory)
        assert type(index) is type(under_attack) is type(original) is int
    x, truth, under_attack = backdoorbench.triggered_images(checkpoint["bd_test"], path.parent)
    assert torch.equal(x, images[0])
    assert torch.equal(truth, images[1])
    assert (under_attack == 0).all()
    assert foreign.target_of(checkpoint) == 0
    # a defended model is saved with all of it, and finds the images from another folder
    (tmp_path / "elsewhere").mkdir()
    utils.save_checkpoint(checkpoint, tmp_path / "elsewhere" / "d.pt")
    again = utils.load_checkpoint(tmp_path / "elsewhere" / "d.pt")
    x, truth, indices = foreign.triggered_images(again, 32)
    assert torch.equal(x, images[0])
    assert torch.equal(truth, images[1])
    assert indices == [str(i) for i in range(1, 2 * N, 2)]
    model = utils.build_model(path, checkpoint)
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)))
    torch.testing.assert_close(model(x), preact((x - mean) / std))


def test_the_pictures_may_lie_beside_the_file(preact, images, tmp_path):
    torch.save(attack_result(preact.state_dict(), *images, tmp_path), tmp_path / "r.pt")
    beside = tmp_path / "moved"
    (tmp_path / "record" / "mine").rename(beside)
    entries = utils.load_checkpoint(tmp_path / "r.pt")["bd_test"]
    assert torch.equal(backdoorbench.triggered_images(entries, beside)[0], images[0])
    with pytest.raises(InputError, match="./record/mine/bd_test_dataset/1/1.png lies neither"):
        backdoorbench.triggered_images(entries, tmp_path)
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)  # from where Pillow speaks of an attack
    huge = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    for content in (b"no picture", huge):
        next(beside.rglob("7.png")).write_bytes(content)
        with pytest.raises(InputError, match="cannot read the triggered image .*7.png"):
            backdoorbench.triggered_images(entries, beside)
    PIL.Image.new("RGB", (16, 16)).save(next(beside.rglob("7.png")))
    with pytest.raises(InputError, match="several sizes"):
        backdoorbench.triggered_images(entries, beside)


def test_only_the_poisoned_images_of_the_test_set_are_taken(preact, images, tmp_path):
    content = attack_result(preact.state_dict(), *images)
    content["bd_test"]["poison_indicator"][3] = 0
    content["bd_test"]["original_index_array"] = np.arange(9)
    torch.save(content, tmp_path / "r.pt")
    assert [entry[0] for entry in utils.load_checkpoint(tmp_path / "r.pt")["bd_test"]] == [1, 5, 7]


def test_the_target_of_triggered_images():
    def checkpoint(*pairs):
        return {"bd_test": [(i, None, a, b, None) for i, (a, b) in enumerate(pairs)], "num_classes": 4}

    assert foreign.target_of(checkpoint((2, 0), (2, 1), (2, 2))) == 2
    assert foreign.target_of(checkpoint((1, 0), (2, 1), (0, 3))) == "all"
    for odd in (checkpoint((1, 0), (3, 1)), checkpoint()):
        with pytest.raises(InputError):
            foreign.target_of(odd)


def test_images_of_the_target_class_do_not_count():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    entries = [(i, None, 2, i, image + i) for i in range(5)]
    x, truth, indices = foreign.triggered_images({"bd_test": entries, "folder": "."}, 8)
    assert truth.tolist() == [int(i) for i in indices] == x[:, 0, 0, 0].tolist() == [0, 1, 3, 4]
    with pytest.raises(InputError, match="are 8x8, its network takes 32x32; give --attack another"):
        foreign.triggered_images({"bd_test": entries, "folder": "."}, 32)


@pytest.mark.parametrize("change", [
    {"bd_data_container": {}},
    {"bd_data_container": {"data_dict": {0: {"path": "x.png", "other_info": [0]}}}},
    {"bd_data_container": {"data_dict": {0: {"path": 7, "other_info": [0, 1]}}}},
    {"bd_data_container": {"data_dict": {0: {"path": "x.png", "other_info": [0, -1]}}}},
    {"bd_data_container": {"data_dict": {0: {"path": "x.png", "other_info": [0.7, 1]}}}},
    {"bd_data_container": {"data_dict": {0: (PIL.Image.new("CMYK", (4, 4)), 0, 1)}}},
    {"bd_data_container": {"data_dict": {"a": {"path": "x.png", "other_info": [0, 1]}, 1: 2}}},
])  # fmt: skip
def test_triggered_images_in_another_form_are_refused(preact, images, tmp_path, change):
    torch.save(attack_result(preact.state_dict(), *images, bd_test=change), tmp_path / "r.pt")
    with pytest.raises(InputError, match="is refused: its bd_test is not as BackdoorBench writes it") as caught:
        utils.load_checkpoint(tmp_path / "r.pt")
    assert "\n" not in str(caught.value)


def test_triggered_images_of_which_none_is_selected_are_refused():
    entry = {0: {"path": "x.png", "other_info": [0, 1]}}
    for odd in ({"data_dict": {}}, {"data_dict": entry}):
        with pytest.raises(ValueError, match="its bd_test selects no image"):
            backdoorbench.triggered_entries({"bd_data_container": odd, "poison_indicator": torch.zeros(1)})


@pytest.mark.parametrize(
    ("dataset", "name"),
    [("cifar10", "backdoorbench"), ("cifar100", "cifar100"), ("tiny", "tiny"), ("gtsrb", "none"), ("celeba", "none")],
)
def test_the_normalization_of_each_of_its_data_sets(dataset, name):
    said = backdoorbench.fields({"model_name": "x", "clean_data": dataset, "img_size": (64, 64, 3)})
    assert (said["mean"], said["std"]) == NORMALIZATIONS[name]
    assert (said["dataset"], said["size"]) == (dataset, 64)
    with pytest.raises(ValueError, match="square"):
        backdoorbench.fields({"model_name": "x", "img_size": (32, 64, 3)})


@pytest.mark.parametrize("size", [32, (32,), "32", (0, 0, 3), (-4, -4, 3), (10**9, 10**9, 3), (32.5, 32.5), {32: 32}])
def test_sizes_of_images_that_cannot_be_are_refused(preact, images, tmp_path, size):
    torch.save(attack_result(preact.state_dict(), *images, img_size=size), tmp_path / "r.pt")
    with pytest.raises(InputError, match="r.pt is refused: its img_size is "):
        utils.load_checkpoint(tmp_path / "r.pt")


def test_a_defense_result_says_no_normalization(preact, tmp_path):
    torch.save({"model_name": "preactresnet18", "num_classes": 10, "model": preact.state_dict()}, tmp_path / "d.pt")
    checkpoint = utils.load_checkpoint(tmp_path / "d.pt")
    assert checkpoint["network"] == "preactresnet18"
    assert checkpoint["mean"] is checkpoint["dataset"] is checkpoint["bd_test"] is None


def test_a_name_that_its_weights_belie_is_refused(preact, tmp_path):
    torch.save({"model_name": "vgg16", "num_classes": 10, "model": preact.state_dict()}, tmp_path / "d.pt")
    with pytest.raises(InputError, match="says that it is a vgg16, but it is no vgg16: it lacks classifier.bias"):
        utils.load_checkpoint(tmp_path / "d.pt")


def test_its_resnet18_is_torchvisions(tmp_path):
    try:
        theirs = libraries.library("torchvision").models.resnet18(num_classes=10)
    except InputError:
        pytest.skip("no torchvision here")
    torch.save({"model_name": "resnet18", "num_classes": 10, "model": theirs.state_dict()}, tmp_path / "d.pt")
    assert utils.load_checkpoint(tmp_path / "d.pt")["network"] == "torchvision:resnet18"
    torch.save(theirs, tmp_path / "whole.pt")  # the object itself
    model, _ = utils.load_model(tmp_path / "whole.pt", normalization=AUTHORS, network="torchvision:resnet18")
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(x), theirs.eval()(model.normalize(x)))
    with pytest.raises(InputError, match="is refused: it fits no network here.*--network torchvision:NAME"):
        utils.load_checkpoint(tmp_path / "whole.pt")


@pytest.mark.usefixtures("few_test_images", "few_tries")
@pytest.mark.parametrize("in_memory", [False, True])
def test_the_commands_measure_on_the_pictures_of_a_result(tiny, tmp_path, in_memory, capsys):
    """The same figures as by the trigger that made the pictures, and again from the defended model."""
    images, labels = data.load_dataset("cifar10_sample", None, train=False)
    trigger = get_backdoor("badnet")
    others = labels != 0
    triggered = (trigger(data.to_float(images[others])) * 255).round().to(torch.uint8)
    n = len(triggered)
    result = attack_result(tiny.state_dict(), triggered, labels[others], None if in_memory else tmp_path, n=n)
    path, out = tmp_path / "attack_result.pt", tmp_path / "away" / "d.pt"
    torch.save(result | {"model_name": "resnet18"}, path)
    given = [*SMALL, "--ckpt", str(path), "--outdir", str(tmp_path), "--mean", "authors"]
    evaluate.main(given)
    said = capsys.readouterr().out
    want = evaluate.evaluate(tiny, images, labels, trigger, 0)
    assert str(want) in said
    assert f"{n:,} triggered images of the checkpoint's own" in said
    assert (tmp_path / "demo_file.png").exists()
    if in_memory:
        return

    more = ["--out", str(out), "--results", str(tmp_path), "--n_steps", "1", "--data_rate", "0.2"]
    unit.main([*given, *more, "--target", "3"])  # the file knows better
    said = capsys.readouterr().out
    assert f"note: the target of the triggered images of {path} is 0, and taken for --target 3" in said
    assert f"before  {want}" in said
    after = said.split("after   ")[1].splitlines()[0]
    saved = utils.load_checkpoint(out)
    assert (saved["mean"], saved["std"]) == AUTHORS
    evaluate.main([*SMALL, "--ckpt", str(out), "--outdir", str(tmp_path)])
    assert after in capsys.readouterr().out
    # a trigger of one's own is planted where one asks for it
    evaluate.main([*given, "--attack", "badnet"])
    assert "brings no trigger" in capsys.readouterr().out
    with pytest.raises(InputError, match="--activations"):
        evaluate.main([*given, "--activations"])


@pytest.mark.usefixtures("few_tries")
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--attack", "file"], "give it by --ckpt"),
        (["--attack", "file", "--ckpt", "bare.pt"], "brings no triggered images"),
        (["--ckpt", "bare.pt", "--network", "resnet34"], "it is no resnet34"),
        (["--ckpt", "bare.pt", "--mean", "0.5"], "three numbers each"),
        (["--ckpt", "eight.pt"], "eight.pt has 8 classes, cifar10_sample has 10"),
        (["--ckpt", "vit.pt", "--size", "32"], "vit.pt is for images of 48x48; give --size 48"),
        (["--ckpt", "nan.pt"], "in conv1.weight"),
    ],
)
def test_what_does_not_fit_the_flags_is_a_line(tiny, tmp_path, words, reason, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(tiny.state_dict(), "bare.pt")
    torch.save(models.get_model("resnet18", 8, 1 / 16).state_dict(), "eight.pt")
    torch.save(models.get_model("vit", 10, 1 / 16, size=48).state_dict(), "vit.pt")
    torch.save(tiny.state_dict() | {"conv1.weight": torch.full((8, 3, 3, 3), torch.nan)}, "nan.pt")
    for command in (evaluate, unit):
        with pytest.raises(InputError, match=reason) as caught:
            command.main([*SMALL, *words])
        assert "\n" not in str(caught.value)


def test_labels_that_are_no_classes_are_refused():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    for labels in ((12, 3), (-1, 3), (0, 10)):
        with pytest.raises(InputError, match="none of its 10 classes"):
            foreign.target_of({"bd_test": [(1, None, 0, 3, image), (2, None, *labels, image)], "num_classes": 10})
    assert foreign.target_of({"bd_test": [(1, None, 0, 3, image)], "num_classes": 10}) == 0


# --- other projects' files --------------------------------------------------------------------------------------------

WRAPPED = {
    "bare": lambda s: s,
    "ANP, NAD": lambda s: {"net": s, "acc": np.float64(93.5), "epoch": 12, "best": np.float32(1), "k": np.int64(3)},
    "state_dict": lambda s: {"state_dict": s, "args": {"lr": np.float64(0.1), "dataset": "cifar10"}, "loss": [1.0]},
    "IAD, Blind": lambda s: {"model": s},
    "LIRA": lambda s: {"atkmodel": {"a.weight": torch.zeros(3)}, "clsmodel": s, "best": np.bool_(True)},
    "timm": lambda s: {"epoch": 3, "arch": "x", "state_dict": s, "args": argparse.Namespace(lr=0.1), "metric": 93.5},
    "WaNet": lambda s: {"netC": s, "identity_grid": torch.zeros(1, 32, 32, 2), "best_clean_acc": torch.tensor(0.9)},
    "several GPUs": lambda s: {"model_state_dict": {f"module.{k}": v for k, v in s.items()}},
    "Lightning": lambda s: {
        "epoch": 3, "pytorch-lightning_version": "2.4", "callbacks": {}, "hyper_parameters": {"lr": 0.1},
        "state_dict": {f"model.{k}": v for k, v in s.items()},
    },
    "compiled": lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "nested": lambda s: {"state_dict": {"net": {"model": s, "n": 1}}},
    "behind a layer without weights": lambda s: {f"1.{k}": v for k, v in s.items()},
    "parameters": lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()},
    "half": lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    "numpy": lambda s: {k: v.numpy() for k, v in s.items()},
    "columns first": lambda s: {k: np.asfortranarray(v.numpy()) if v.dim() else v for k, v in s.items()},
    "other bytes": lambda s: {k: v.numpy().astype(v.numpy().dtype.newbyteorder(">")) for k, v in s.items()},
}  # fmt: skip


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("old_format", [False, True])
def test_weights_as_projects_save_them(preact, tmp_path, how, old_format):
    state = preact.state_dict()
    torch.save(WRAPPED[how](state), tmp_path / "x.pt", _use_new_zipfile_serialization=not old_format)
    checkpoint = utils.load_checkpoint(tmp_path / "x.pt")
    assert (checkpoint["network"], checkpoint["width"], checkpoint["num_classes"]) == ("preactresnet18", 1 / 16, 10)
    assert checkpoint["mean"] is None
    taken = checkpoint["state_dict"]
    assert set(taken) == set(state)
    for key, value in state.items():
        want = value.half().float() if how == "half" and value.is_floating_point() else value
        assert torch.equal(taken[key].to(value.dtype), want)
    utils.build_model("x", checkpoint)


def test_a_file_of_safetensors(preact, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        patch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(InputError, match="format of safetensors; pip install safetensors"):
            utils.load_checkpoint(path)
    save_file = pytest.importorskip("safetensors.torch").save_file
    with pytest.raises(InputError, match="a is none of its keys"):
        utils.load_checkpoint(path)
    save_file(preact.state_dict(), path)
    assert utils.load_checkpoint(path)["network"] == "preactresnet18"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="is refused: it is damaged"):
        utils.load_checkpoint(path)


# --- what is refused, and the line that says why ----------------------------------------------------------------------


def refusal(content, tmp_path, **kwargs):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match="x.pt (is refused|does not fit): ") as caught:
        utils.load_model(tmp_path / "x.pt", normalization=AUTHORS, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Call:
    """Pickles to a call of a name."""

    def __init__(self, function, *args):
        self.what = function, args

    def __reduce__(self):
        return self.what


def test_the_reason_is_the_name_that_is_not_known(preact, tmp_path):
    beside = {"net": preact.state_dict(), "optimizer": types.SimpleNamespace(lr=1), "acc": np.float64(3)}
    assert "it asks for types.SimpleNamespace)" in refusal(beside, tmp_path)
    torch.save({"net": Call(os.system, "x")}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="plain values .*posix.system"):
        utils.load_checkpoint(tmp_path / "old.pt")


@pytest.mark.parametrize("put", [
    lambda evil, result: result["bd_test"]["bd_data_container"]["data_dict"].update({1: evil}),
    lambda evil, result: result["bd_test"].update(poison_indicator=np.array([evil], dtype=object)),
    lambda evil, result: result.update(img_size=(Call(np.dtype, evil), 1)),
    lambda evil, result: result.update(clean_data=Call(PIL.Image.Image, evil)),
    lambda evil, result: result["model"].update({"conv1.weight": evil}),
])  # fmt: skip
def test_code_within_a_result_of_backdoorbench_does_not_run(preact, images, tmp_path, put):
    mark, result = tmp_path / "ran", attack_result(dict(preact.state_dict()), *images)
    put(Evil(mark), result)
    assert "it asks for posix.system" in refusal(result, tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, __import__, pickle.loads, torch.load, np.load,
                                      libraries.importlib.import_module, PIL.Image.open])  # fmt: skip
def test_no_function_is_called(tmp_path, function):
    said = refusal({"net": Call(function, "touch x")}, tmp_path)
    assert "it asks for " in said
    assert function.__name__ in said


def test_stand_ins_call_nothing(tmp_path):
    """Names on the list, called in ways that no weights need: read without effect, or refused."""
    scalar, rebuild = np.float64(1).__reduce__()[0], np.zeros(1).__reduce__()[0]
    odd = [Call(np.dtype, "O"), Call(np.dtype, "V99"), np.array([None]), np.zeros(2, "datetime64[s]")]
    odd += [Call(scalar, np.dtype("O"), b"12345678"), Call(functools.partial, rebuild), np.ndarray]
    content = models.read_pickle(_saved({"a": odd, "text": np.str_("t"), "n": np.arange(3)}, tmp_path))
    names = {type(v).__module__ if not isinstance(v, type) else v.__module__ for v in content["a"]}
    assert names == {"models.safe_pickle"}
    assert content["text"] == "t"
    assert content["n"].tolist() == [0, 1, 2]
    for shape in ((5,), (-1,), (10**9, 10**9)):
        array = np.zeros(3)
        broken = Call(rebuild, np.ndarray, (0,), b"b"), (1, shape, array.dtype, False, array.tobytes())
        with pytest.raises(ValueError, match="shape"):
            models.read_pickle(_saved({"a": Build(*broken)}, tmp_path))


class Build:
    """Pickles to a call, and a state for what it returns."""

    def __init__(self, call, state):
        self.what = *call.what, state

    def __reduce__(self):
        return self.what


def _saved(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def test_what_contains_itself_is_refused(tmp_path):
    own = {"a": 1}
    own["net"] = own
    assert "contains itself" in refusal(own, tmp_path)
    deep = []
    for _ in range(50):  # 2 to the 50 paths, in a small file
        deep = [deep, deep]
    assert "no weights, but a" in refusal({"a": deep}, tmp_path)


def test_weights_of_no_network_are_refused_with_the_closest_and_what_differs(preact, tmp_path):
    state = preact.state_dict()
    lacking = {k: v for k, v in state.items() if k != "layer1.0.conv2.weight"}
    assert "closest is preactresnet18: it lacks layer1.0.conv2.weight (" in refusal(lacking, tmp_path)
    assert "closest is preactresnet18: fc.weight is none of its keys" in refusal(
        state | {"fc.weight": torch.zeros(1)}, tmp_path
    )
    gray = state | {"conv1.weight": torch.zeros(4, 1, 3, 3)}
    assert "closest is preactresnet18: conv1.weight is (4, 1, 3, 3), not (4, 3, 3, 3)" in refusal(gray, tmp_path)
    assert "it is no resnet18: it lacks" in refusal(state, tmp_path, network="resnet18")
    assert "no weights, but epoch, net" in refusal({"epoch": 3, "net": "resnet18"}, tmp_path)


def test_a_file_of_ours_is_of_the_network_that_it_names(preact, tmp_path):
    own = {"network": "preactresnet18", "width": 1 / 16, "num_classes": 10, "state_dict": preact.state_dict()}
    utils.save_checkpoint(own, tmp_path / "x.pt")
    utils.load_checkpoint(tmp_path / "x.pt", "preactresnet18")
    with pytest.raises(InputError, match="it holds a preactresnet18, no resnet18"):
        utils.load_checkpoint(tmp_path / "x.pt", "resnet18")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_statistics_that_cannot_be_are_refused(preact, tmp_path, value):
    state = {k: v.clone() for k, v in preact.state_dict().items()}
    state["layer1.0.bn1.running_var"][0] = value
    assert "in layer1.0.bn1.running_var" in refusal({"net": state}, tmp_path)


def test_sizes_that_cannot_be_are_refused_before_anything_is_built(preact, tmp_path):
    state = preact.state_dict()
    many = {"linear.weight": torch.zeros(1).expand(10**6, 32), "linear.bias": torch.zeros(1).expand(10**6)}
    assert "1e+06 classes is out of bounds" in refusal(state | many, tmp_path)
    wide = models.get_model("vit", width=1 / 64).state_dict()
    wide["pos_embed"] = torch.zeros(1).expand(1, 10**10 + 1, 3)
    assert "parameters" in refusal(wide, tmp_path)
