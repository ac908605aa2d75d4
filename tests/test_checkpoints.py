"""Checkpoints are data: what is saved comes back, what is foreign is read or refused, and no code ever runs."""

from flags import ATTACKS, NORMALIZATIONS, ROOT, InputError

import os
import pickle
import re
import subprocess
import sys
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import evaluate
import models
import models.custom_modules
import unit
import utils
from backdoors import get_backdoor
from data import cifar10
from support import inputs

AUTHORS = NORMALIZATIONS["authors"]
ATTACK_ENDS = tuple(f"_{attack}{sampling}" for attack in ("none", *ATTACKS) for sampling in ("", "-fixed"))


def random_bounds(model, scale):
    """Bounds of every site's own shape, uniform in [0, scale)."""
    g = torch.Generator().manual_seed(0)
    shapes = models.activation_sites(model.eval(), torch.rand(2, 3, 32, 32))
    return {name: scale * torch.rand(shape, generator=g) for name, shape in shapes.items()}


def same(model, other):
    """Whether both give the same logits to the last bit, in one memory layout, on which the rounding depends."""
    x = torch.rand(4, 3, 32, 32)
    a, b = (m.to(memory_format=torch.channels_last)(x) for m in (model, other))
    return torch.equal(a, b)


class SequentialWithArgs(nn.Sequential):
    """As the authors' checkpoints have it: a Sequential under another name."""


@pytest.fixture
def authors_model(tiny, monkeypatch):
    """A whole network whose classes carry the names that occur in the authors' pickles."""
    SequentialWithArgs.__module__ = "models.custom_modules"
    monkeypatch.setattr(models.custom_modules, "SequentialWithArgs", SequentialWithArgs, raising=False)
    for i in range(1, 5):
        tiny.set_submodule(f"layer{i}", SequentialWithArgs(*tiny.get_submodule(f"layer{i}")))
    return tiny


class Evil:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_saved_and_loaded_gives_the_same_logits(tiny, tmp_path):
    path = tmp_path / "m.pt"
    utils.save_checkpoint(
        {"network": "resnet18", "width": 0.125, "num_classes": 10, "state_dict": tiny.state_dict()}, path
    )
    model, metadata = utils.load_model(path)
    assert same(model, tiny)
    assert metadata["network"] == "resnet18"
    assert "state_dict" not in metadata
    assert not model.training


def test_a_defended_model_comes_back_clipped(tiny, tmp_path):
    path = tmp_path / "m_unit.pt"
    bounds = random_bounds(tiny, 0.5)
    utils.save_checkpoint({"state_dict": tiny.state_dict(), "bounds": bounds}, path)
    model, _ = utils.load_model(path)
    models.set_bounds(tiny, bounds)
    assert same(model, tiny)
    assert isinstance(model.act, models.ClippedReLU)


def test_an_older_file_loads_under_the_names_of_today(tiny, tmp_path):
    """It has the key `defence`, and no sampling or machine."""
    path = tmp_path / "old.pt"
    made = {"name": "bcu", "epochs": 30, "findings": {"outcome": "repaired"}}
    old = {"network": "resnet18", "width": 0.125, "num_classes": 10, "attack": "badnet", "target": 0, "BA": 0.9}
    torch.save({"format": 1, **old, "state_dict": tiny.state_dict(), "bounds": None, "defence": made}, path)
    checkpoint = utils.load_checkpoint(path)
    assert checkpoint["defense"] == made
    assert "defence" not in checkpoint
    assert {k: checkpoint[k] for k in old} == old
    model, metadata = utils.load_model(path)
    assert metadata["defense"] == made
    assert same(model, tiny)
    # a new one has its key kept, a victim none
    utils.save_checkpoint({**checkpoint, "defense": {"name": "ft"}}, path)
    assert utils.load_checkpoint(path)["defense"] == {"name": "ft"}
    torch.save(tiny.state_dict(), path)
    assert utils.load_checkpoint(path)["defense"] is None


def test_half_precision_halves_the_weights_and_spares_batch_norm(tiny):
    half = utils.half_weights(tiny.state_dict())
    assert half["conv1.weight"].dtype == half["linear.weight"].dtype == torch.float16
    assert half["bn1.running_var"].dtype == torch.float32
    for k, v in tiny.state_dict().items():
        torch.testing.assert_close(half[k].to(v.dtype), v, rtol=1e-3, atol=1e-4)


def test_a_plain_state_dict_is_taken(tiny, tmp_path):
    path = tmp_path / "public.pt"
    torch.save(OrderedDict(tiny.state_dict()), path)
    with pytest.warns(UserWarning, match="does not say how its images are normalized"):
        model, metadata = utils.load_model(path)
    assert same(model, tiny)
    assert (metadata["network"], metadata["width"], metadata["num_classes"]) == ("resnet18", 0.125, 10)
    assert metadata["mean"] is metadata["std"] is None
    assert metadata["attack"] is None


@pytest.mark.parametrize("wrap", [
    lambda state: {"net": state, "acc": 95.1, "epoch": 199},
    lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
    lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
])  # fmt: skip
def test_a_state_dict_is_taken_as_it_is_often_wrapped(tiny, tmp_path, wrap):
    torch.save(wrap(tiny.state_dict()), tmp_path / "net.pt")
    model, checkpoint = utils.load_model(tmp_path / "net.pt", normalization=AUTHORS)
    assert same(model, tiny)
    assert (checkpoint["network"], checkpoint["width"], checkpoint["attack"]) == ("resnet18", 0.125, None)


def test_the_authors_pickled_objects_are_taken(authors_model, tmp_path, monkeypatch):
    path = tmp_path / "authors.pt"
    torch.save(authors_model, path)

    def forbidden(*_args):
        raise AssertionError("a class named in the file was touched")

    # reading must not need the classes, nor call them
    monkeypatch.setattr(models.resnet.ResNet, "__setstate__", forbidden, raising=False)
    monkeypatch.setattr(nn.Conv2d, "__setstate__", forbidden)
    monkeypatch.delattr(models.custom_modules, "SequentialWithArgs")
    state = utils.load_checkpoint(path)["state_dict"]
    monkeypatch.undo()
    assert set(state) == set(models.get_model("resnet18").state_dict())
    model, metadata = utils.load_model(path, normalization=AUTHORS)
    assert same(model, authors_model)
    assert metadata["width"] == 0.125


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    for name, content in {"evil.pt": Evil(mark), "inside.pt": {"state_dict": {"conv1.weight": Evil(mark)}}}.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(InputError, match="is refused.*system") as caught:
            utils.load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)  # no advice to load it unsafely
    plain = tmp_path / "plain.pkl"
    plain.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(InputError, match="is refused"):
        utils.load_checkpoint(plain)
    assert not mark.exists()


def test_evil_inside_an_authors_object_is_refused(authors_model, tmp_path):
    mark = tmp_path / "ran"
    authors_model.extra = Evil(mark)
    torch.save(authors_model, tmp_path / "authors.pt")
    with pytest.raises(InputError, match="is refused"):
        utils.load_checkpoint(tmp_path / "authors.pt")
    assert not mark.exists()


class OtherModule(nn.Module):
    """A class on no list."""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (OtherModule(), "more than tensors"),
        ([1, 2], "holds a list"),
        ({"a": 1, "b": "two"}, "no weights, but a, b"),
        ({"a": torch.zeros(1)}, "fits no network here.* a is none of its keys"),
        (
            {"conv1.weight": torch.zeros(8, 3, 3, 3), "linear.weight": torch.zeros(10, 64)},
            "closest is vgg11: it lacks classifier.bias|closest is preactresnet18: it lacks layer1.0.bn1.bias",
        ),
        ({"state_dict": {}, "format": 99}, "format 99"),
    ],
)
def test_other_content_is_refused_in_one_line(tmp_path, content, reason):
    path = tmp_path / "x.pt"
    torch.save(content, path)
    with pytest.raises(InputError, match=reason) as caught:
        utils.load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused(victim_file):
    whole = victim_file.read_bytes()
    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        victim_file.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged") as caught:
            utils.load_checkpoint(victim_file)
        assert "\n" not in str(caught.value)


def test_a_folder_is_no_checkpoint(tmp_path):
    for command in (evaluate, unit):
        for given in (str(tmp_path), ""):  # as of a variable of the shell that is not set
            with pytest.raises(InputError, match="is a folder; give the checkpoint, a file"):
                command.main(["--dataset", "cifar10_sample", "--ckpt", given])


@pytest.mark.parametrize("content", [b"<html>", b"version https://git-lfs", pickle.dumps({"conv1.weight": 1})])
def test_what_torch_did_not_write_is_told_so(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError, match="is refused: it is no checkpoint as torch.save, in its own protocol"):
        utils.load_checkpoint(tmp_path / "x.pt")


def test_weights_that_do_not_fit_the_named_network(tiny, tmp_path):
    path = tmp_path / "x.pt"
    utils.save_checkpoint(
        {"network": "resnet34", "width": 0.125, "num_classes": 10, "state_dict": tiny.state_dict()}, path
    )
    with pytest.raises(InputError, match="does not fit") as caught:
        utils.load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attack", ["badnet", "wanet", "reflection", "blended", "none"])
def test_a_missing_checkpoint_says_what_makes_it(attack):
    path = utils.checkpoint_path("cifar10", "resnet50", attack)
    with pytest.raises(InputError, match=f"python train.py --network resnet50 --attack {attack}"):
        utils.load_checkpoint(path)
    for dataset in ("cifar10", "cifar10_sample"):
        with pytest.raises(InputError, match=f"unit.py --dataset {dataset} --network resnet50 --attack {attack}"):
            utils.load_checkpoint(utils.checkpoint_path(dataset, "resnet50", attack, suffix="_unit"))


def test_a_missing_checkpoint_names_a_victim_of_another_width(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "CKPT", tmp_path)
    for name in ("cifar10_resnet18-w0.25_adaptive_blend.pt", "cifar10_resnet18-w0.25_composite.pt"):
        (tmp_path / name).write_bytes(b"")
    for attack, hint in (
        ("blend", "; make it with: "),
        ("composite", "w0.25_composite.pt, or make it with: .*--target 2"),
    ):
        with pytest.raises(InputError, match=hint):
            utils.load_checkpoint(utils.checkpoint_path("cifar10", "resnet18", attack))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.json"
    utils.save_json({"a": 1}, path)

    def half(part):
        part.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        utils.write_whole(path, half)
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
def test_a_full_disk_is_bad_luck_not_a_traceback(victim_file, tmp_path):
    """A disk that takes only 64 KiB of a file: one line, status 2, and no half-written file."""
    code = f"""if True:
        import resource, signal
        import flags, utils
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        checkpoint = utils.load_checkpoint({str(victim_file)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
        flags.run(lambda: utils.save_checkpoint(checkpoint, {str(tmp_path / "new" / "x.pt")!r}))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert re.fullmatch(r"error: cannot write .*: the disk takes no more; make room .*\n", done.stderr)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("place", ["folder", "file/x.pt", "file/deep/x.pt"])
def test_a_place_that_cannot_be_written_is_known_beforehand(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=rf"cannot write {tmp_path / place}: [^/]*(; make room|; give the name).*"):
        utils.check_place(tmp_path / place)
    utils.check_place(tmp_path / "new" / "x.pt")
    assert list((tmp_path / "new").iterdir()) == []


def test_packed_weights_are_the_same_to_the_last_bit():
    state = {"whole": torch.tensor([[1 / 3, 2.0]]), "half": torch.tensor([[0.5, 2.0]]), "n": torch.tensor(3)}
    packed = utils.packed_weights(state)
    assert [t.dtype for t in packed.values()] == [torch.float32, torch.float16, torch.int64]
    assert all(torch.equal(packed[k].to(v.dtype), v) for k, v in state.items())


def bent(path, **changes):
    """The same checkpoint with changes."""
    checkpoint = utils.load_checkpoint(path)
    utils.save_checkpoint({**checkpoint, **changes}, path)


@pytest.mark.parametrize("shape", [(8, 1, 1), (3, 3, 3), ()])
def test_bounds_of_another_shape_are_refused(victim_file, tiny, shape):
    bounds = random_bounds(tiny, 0)
    bent(victim_file, bounds=bounds | {"act": torch.ones(shape)})
    with pytest.raises(InputError, match="does not fit: bounds of other sites or shapes"):
        utils.load_model(victim_file)


@pytest.mark.parametrize("value", [torch.tensor(-0.1), torch.tensor(1), torch.tensor(1j)])
def test_bounds_that_cannot_be_are_refused(victim_file, tiny, value):
    bounds = random_bounds(tiny, 0)
    bent(victim_file, bounds=bounds | {"act": value.expand(bounds["act"].shape).contiguous()})
    with pytest.raises(InputError, match="the bound act"):
        utils.load_model(victim_file)


@pytest.mark.parametrize(
    "changes", [{"width": 1e6}, {"width": -1}, {"num_classes": 10**12}, {"width": 16.0}, {"num_classes": 100_000}]
)
def test_a_network_out_of_bounds_is_refused_before_it_is_built(victim_file, changes, monkeypatch):
    bent(victim_file, **changes)
    monkeypatch.setattr(models, "get_model", lambda *_, **__: pytest.fail("it is built"))
    with pytest.raises(InputError, match="does not fit"):
        utils.load_model(victim_file)


@pytest.mark.parametrize("change", [
    {"width": "wide"}, {"bounds": [1]}, {"trigger": 7}, {"format": torch.zeros(3)}, {"size": torch.zeros(3)},
    {"target": [1]}, {"dataset": [1]}, {"mean": 5}, {"bd_test": 5}, {"bd_test": [1]},
    {"bd_test": [(1, None, 0, 1, None)]}, {"bd_test": [(1, "1.png", 0, 1, None)]},
    {"bd_test": [(1, None, 0, 1, torch.zeros(3, 32, 32))]},
    {"bd_test": [(1, None, 0, 1, torch.zeros(1, 32, 32, dtype=torch.uint8))]},
    {"seed": torch.tensor(1)}, {"lr": torch.tensor(0.1)}, {"flip": torch.tensor(True)}, {"poison_rate": b"1"},
    {"attack": "badnet\nnote: all is well"}, {"dataset": "\x1b[31m"},
])  # fmt: skip
def test_what_a_file_of_ours_says_has_to_be_of_its_kind(victim_file, change):
    bent(victim_file, **change)
    (name,) = change
    with pytest.raises(InputError, match=f"is refused: its {name} is ") as caught:
        utils.load_checkpoint(victim_file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"mean": (0.5, 0.5, "x")}, {"mean": None}, {"std": None}])
def test_a_normalization_that_is_none_is_refused(victim_file, change):
    bent(victim_file, **change)
    with pytest.raises(InputError, match="is refused: its mean and std are not three numbers each"):
        utils.load_checkpoint(victim_file)


def test_a_normalization_of_images_up_to_255_is_refused(victim_file):
    bent(victim_file, mean=(125.3, 123.0, 113.9), std=(51.6, 50.8, 51.2))
    with pytest.raises(InputError, match=r"mean and std are of images in \[0, 255\]; divide them by 255"):
        utils.load_model(victim_file)


@pytest.mark.parametrize("change", [{"state_dict": {}}, {"state_dict": {"conv1.weight": "x"}}])
def test_weights_that_are_no_tensors_are_refused(victim_file, change):
    bent(victim_file, **change)
    with pytest.raises(InputError, match="has no weights"):
        utils.load_checkpoint(victim_file)


def test_a_trigger_of_no_attack_is_refused(victim_file):
    bent(victim_file, attack=None)
    with pytest.raises(InputError, match="holds a trigger, but does not say of which attack"):
        utils.load_checkpoint(victim_file)


def test_a_file_of_ours_without_a_normalization_has_the_authors(victim_file):
    bent(victim_file, mean=None, std=None)
    checkpoint = utils.load_checkpoint(victim_file)
    assert (checkpoint["mean"], checkpoint["std"]) == AUTHORS


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_weights_that_are_not_in_floating_point_are_refused(tiny, tmp_path, dtype):
    torch.save(tiny.state_dict() | {"linear.bias": torch.ones(10, dtype=dtype)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=f"linear.bias holds {dtype}"):
        utils.load_model(tmp_path / "x.pt", normalization=AUTHORS)


def test_a_victims_own_trigger_goes_before_the_files(victim_file):
    patch = torch.rand(3, 5, 5)
    bent(victim_file, trigger={"patch": patch})
    checkpoint, cpu = utils.load_checkpoint(victim_file), torch.device("cpu")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(inputs.load_trigger("badnet", checkpoint, cpu)(x)[:, :, 1:6, 1:6], patch.expand(2, -1, -1, -1))
    # measured with another attack, or from elsewhere, it is the files' trigger
    for name, known in (("blended", checkpoint), ("badnet", {"trigger": None, "attack": None})):
        assert torch.equal(inputs.load_trigger(name, known, cpu)(x), get_backdoor(name)(x))
    assert inputs.load_trigger("none", checkpoint, cpu) is None


@pytest.mark.parametrize(
    "trigger", [{"patch": "x"}, {}, {"patch": torch.zeros(1)}, {"patch": torch.full((3, 5, 5), torch.nan)}]
)
def test_a_trigger_that_is_none_is_refused(victim_file, trigger):
    bent(victim_file, trigger=trigger, attack="badnet")
    with pytest.raises(InputError, match="no trigger for badnet on images of 32x32: .*; give another --size") as caught:
        inputs.load_trigger("badnet", utils.load_checkpoint(victim_file), torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_odd_state_dicts_are_refused(tmp_path):
    odd = [
        {"conv1.weight": torch.tensor(1.0), "linear.weight": torch.tensor(1.0)},
        {"conv1.weight": torch.zeros(1).expand(10**9, 3, 3, 3), "linear.weight": torch.zeros(10, 64)},
        {"conv1.weight": 1, "linear.weight": [2]},
    ]
    for content in odd:
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(InputError, match="is refused"):
            utils.load_checkpoint(tmp_path / "x.pt")


def test_an_authors_object_that_contains_itself_is_refused(authors_model, tmp_path):
    authors_model._modules["layer1"]._modules["again"] = authors_model
    torch.save(authors_model, tmp_path / "x.pt")
    with pytest.raises(InputError, match="is refused: .*(RecursionError|more than 10,000 modules)"):
        utils.load_checkpoint(tmp_path / "x.pt")


def test_an_authors_object_that_holds_a_module_many_times_is_refused(authors_model, tmp_path):
    """Twice at each of 40 levels: a small file with 2 ** 40 paths to the innermost module."""
    module = nn.BatchNorm2d(1)
    for _ in range(40):
        module = nn.Sequential(module, module)
    authors_model.extra = module
    torch.save(authors_model, tmp_path / "x.pt")
    with pytest.raises(InputError, match="more than 10,000 modules"):
        utils.load_checkpoint(tmp_path / "x.pt")


def test_a_foreign_file_is_one_line_on_standard_error(tmp_path):
    """In a process of its own, which shows what libraries print."""
    plain, code, script = (tmp_path / name for name in ("plain.pt", "code.pt", "script.pt"))
    plain.write_bytes(pickle.dumps({"conv1.weight": 1}))
    torch.save(Evil(tmp_path / "ran"), code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), script)
    program = f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import flags, evaluate
        for path in sys.argv[1:]:
            try:
                flags.run(lambda: evaluate.main(["--dataset", "cifar10_sample", "--ckpt", path]))
            except SystemExit as end:
                print(end.code, flush=True)
    """
    command = [sys.executable, "-c", program, str(plain), str(code), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["2", "2", "2"]
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    for line, path in zip(lines, (plain, code, script), strict=True):
        assert re.fullmatch(rf"error: {re.escape(str(path))} is refused: .*", line)
    assert not (tmp_path / "ran").exists()


# files that are damaged in a way that torch does not notice


def test_weights_that_are_no_numbers_are_refused(tmp_path, tiny):
    for value in (float("nan"), float("inf"), -1.0):
        state = {k: v.clone() for k, v in tiny.state_dict().items()}
        state["bn1.running_var"][0] = value
        torch.save(state, tmp_path / "m.pt")
        with pytest.raises(InputError, match="in bn1.running_var"):
            utils.load_model(tmp_path / "m.pt", normalization=AUTHORS)


def test_a_file_whose_bytes_were_changed_is_refused(tmp_path, tiny):
    path = tmp_path / "m.pt"
    torch.save(tiny.state_dict(), path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 100] = bytes(b ^ 255 for b in content[middle : middle + 100])
    path.write_bytes(content)
    with pytest.raises(InputError, match="refused"):
        utils.load_model(path)


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (utils.check_place, lambda p: utils.write_whole(p, lambda part: part.write_text("x"))):
        with pytest.raises(InputError, match="no regular file"):
            write(pipe)
    assert pipe.is_fifo()
    with pytest.raises(InputError, match="it is a folder"):
        utils.check_place("/")


# --- the victims in ckpt/ --------------------------------------------------------------------------------------------


def victims():
    """The victims of CIFAR-10 in ckpt/, without what was made of them."""
    stems = [path.stem for path in sorted(utils.CKPT.glob("cifar10_*.pt"))]
    return [stem for stem in stems if stem.endswith(ATTACK_ENDS)]


@pytest.mark.slow
@pytest.mark.parametrize("stem", victims())
def test_a_victim_measures_as_its_file_says(stem, tmp_path, capsys, monkeypatch):
    """By its name alone, on 500 images, up to the error of so few."""
    path, whole = utils.CKPT / f"{stem}.pt", cifar10.load_sample
    monkeypatch.setattr(cifar10, "load_sample", lambda train: [t[::4].clone() for t in whole(train)])
    evaluate.main(["--ckpt", str(path), "--dataset", "cifar10_sample", "--outdir", str(tmp_path)])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("BA "))
    victim, shown = utils.load_checkpoint(path), dict(re.findall(r"(BA|ASR|RA) ([0-9.]+) %", line))
    said = {key: victim[key] for key in ("BA", "ASR", "RA") if victim.get(key) is not None}
    assert set(said) <= set(shown)
    for key, share in said.items():
        error = (share * (1 - share) / 400) ** 0.5
        assert abs(float(shown[key]) / 100 - share) < 0.01 + 4 * error, (key, line)
