"""Every part runs on a CUDA device and agrees with the CPU: python -m pytest -m gpu"""

import dataclasses

import pytest
import torch

import data
import defend
import fast
import train
import unit
import utils
from backdoors import TRIGGERS, get_backdoor, poison_training_set
from defenses import DEFENSES, bcu, dbd, simclr, ulrl
from evaluate import evaluate
from fast.clip import FastClippedReLU
from models import activation_sites, clips_of, set_bounds

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
TRAIN = ["--dataset", "cifar10_sample", "--width", "0.125", "--device", "cuda"]


def sample(device=CUDA):
    """The embedded training images and labels."""
    return tuple(t.to(device) for t in data.load_dataset("cifar10_sample", None, train=True))


@pytest.fixture
def recordings(monkeypatch):
    """The batch sizes for which passes are recorded."""
    made, record = [], torch.cuda.make_graphed_callables

    def recorded(net, args):
        made.append(len(args[0]))
        return record(net, args)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorded)
    return made


@pytest.mark.parametrize("name", TRIGGERS)
def test_triggers_agree_with_the_cpu(name):
    x = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(get_backdoor(name).to(CUDA)(x.to(CUDA)).cpu(), get_backdoor(name)(x))


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["none", *TRIGGERS])
@pytest.mark.parametrize("how", [("fp32", "resampled"), ("bf16", "resampled"), ("bf16", "fixed")])
def test_every_attack_trains(tmp_path, attack, how):
    out = tmp_path / "v.pt"
    flags = [*TRAIN, "--epochs", "12", "--batch_size", "25", "--lr", "0.05", "--precision", how[0]]
    train.main([*flags, "--sampling", how[1], "--attack", attack, "--ckpt", str(out)])
    history = utils.load_checkpoint(out)["history"]
    assert history[-1]["loss"] < history[0]["loss"] - 0.3


def test_training_again_gives_the_same_bits(tmp_path):
    for name in ("a", "b"):
        train.main([*TRAIN, "--epochs", "2", "--attack", "wanet", "--ckpt", str(tmp_path / f"{name}.pt")])
    a, b = (utils.load_checkpoint(tmp_path / f"{name}.pt")["state_dict"] for name in ("a", "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("attack", ["wanet", "blended"])
def test_training_batches_are_those_of_the_cpu(attack):
    batches = []
    for device in (torch.device("cpu"), CUDA):
        images, labels = sample(device)
        poison = poison_training_set(labels, attack, 0, sampling="resampled")
        config = {"batch_size": 200, "seed": 0}
        backdoor = get_backdoor(attack).to(device)
        batches.append(list(train.training_batches((images, labels), poison, backdoor, config, 0)))
    for (x, y, n), (x_cuda, y_cuda, n_cuda) in zip(*batches, strict=True):
        torch.testing.assert_close(x_cuda.cpu(), x)
        assert torch.equal(y_cuda.cpu(), y)
        assert n == n_cuda


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_recorded_training_is_the_training(tmp_path, monkeypatch, recordings, precision):
    """To the bit, including batch norm's buffers, with a smaller last batch."""
    flags = [*TRAIN, "--epochs", "3", "--batch_size", "64", "--attack", "wanet", "--precision", precision]
    train.main([*flags, "--ckpt", str(tmp_path / "a.pt")])
    assert {64, 500 % 64} <= set(recordings)
    assert len(recordings) < 8  # not at each step
    monkeypatch.setattr(fast.training, "record_passes", lambda net: net)
    recordings.clear()
    train.main([*flags, "--ckpt", str(tmp_path / "b.pt")])
    assert recordings == []
    a, b = (utils.load_checkpoint(tmp_path / f"{name}.pt") for name in ("a", "b"))
    assert a["history"] == b["history"]
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])


# --- the search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
def test_the_search_agrees_with_the_cpu(tiny, defense, plain):
    """Five steps in fp32, because single bounds diverge later; the first step in bf16."""
    config = unit.UnitConfig(n_steps=5, lr=0.01, plain=plain)
    cpu = unit.tighten(tiny, *defense, config)
    gpu = unit.tighten(tiny.to(CUDA), *defense, config)
    assert gpu.history["alpha"] == cpu.history["alpha"]
    assert gpu.history["reg"] == pytest.approx(cpu.history["reg"], rel=1e-4)
    assert gpu.history["ce"] == pytest.approx(cpu.history["ce"], abs=5e-3)
    half = unit.tighten(tiny, *defense, dataclasses.replace(config, n_steps=1, precision="bf16"))
    assert half.history["reg"] == pytest.approx(cpu.history["reg"][:1], rel=1e-2)
    assert half.history["ce"] == pytest.approx(cpu.history["ce"][:1], rel=5e-2)


def test_same_input_same_bits_wherever_the_images_lie(tiny, defense):
    config = unit.UnitConfig(n_steps=5, precision="bf16", step_images=150)
    places = defense, [t.to(CUDA) for t in defense]
    first, second = (unit.tighten(tiny.to(CUDA), *images, config) for images in places)
    assert first.history == second.history
    assert all(torch.equal(first.bounds[k], second.bounds[k]) for k in first.bounds)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("step_images", [None, 150])
def test_a_recorded_search_is_the_search(tiny, defense, monkeypatch, recordings, precision, step_images):
    """To the bit, also after a part of it."""
    config = unit.UnitConfig(n_steps=20, lr=0.1, precision=precision, micro_batch=64, step_images=step_images)
    states = []
    recorded = unit.tighten(tiny.to(CUDA), *defense, config, lambda search: states.append(search.state_dict()))
    # 400 or 150 images by 64, 100 by 64 to validate
    assert sorted(recordings) == sorted({64, (step_images or 400) % 64, 100 % 64})
    again = unit.tighten(tiny, *defense, config, state=states[7])
    monkeypatch.setattr(fast, "record_passes", lambda net: net)
    recordings.clear()
    plain = unit.tighten(tiny, *defense, config)
    assert recordings == []
    for other in (again, recorded):
        assert other.history == plain.history
        assert all(torch.equal(other.bounds[k], plain.bounds[k]) for k in plain.bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_clips_kernels_are_the_clip(dtype):
    g = torch.Generator().manual_seed(0)
    for shape, n in (((64, 8, 8), 37), ((24, 5, 3), 9), ((512, 4, 4), 700), ((17, 12), 9), ((7,), 5)):
        x, grad = (torch.randn(n, *shape, generator=g).to(dtype).to(CUDA) for _ in range(2))
        if len(shape) == 3:
            x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
        bound = torch.randn(shape, generator=g).to(CUDA)
        bound[0] = x[0, 0].float()  # ties
        site = FastClippedReLU(bound)
        a, b, c = (t.detach().clone().requires_grad_() for t in (x, x.double(), bound.double()))
        out, exact = site(a), torch.minimum(b.relu(), c.relu())
        out.backward(grad)
        exact.backward(grad.double())
        rounding = {"rtol": 2**-7 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-5}
        torch.testing.assert_close(out, exact.to(dtype), **rounding)
        torch.testing.assert_close(a.grad, b.grad.to(dtype), **rounding)
        torch.testing.assert_close(site.bound.grad, c.grad.float(), rtol=1e-4, atol=1e-4)
    tie = FastClippedReLU(torch.tensor([0.0, 2.0])).to(CUDA)
    x = torch.tensor([[0.0, 2.0]], device=CUDA, requires_grad=True)
    tie(x).sum().backward()
    assert x.grad.tolist() == [[0.0, 0.5]]
    assert tie.bound.grad.tolist() == [0.0, 0.5]
    assert tie(torch.full((1, 2), torch.nan, device=CUDA)).isnan().all()


def test_the_evaluator_agrees_with_the_cpu(tiny):
    images, labels = data.load_dataset("cifar10_sample", None, train=False)
    set_bounds(tiny, unit.initial_bounds(tiny, activation_sites(tiny, images[:2] / 255), images[:200], 100, 4.0))
    cpu = evaluate(tiny, images[:500], labels[:500], get_backdoor("wanet"), 0)
    gpu = evaluate(tiny.to(CUDA), images[:500], labels[:500], get_backdoor("wanet"), 0)
    for figure in ("BA", "ASR", "RA"):
        assert abs(getattr(gpu, figure) - getattr(cpu, figure)) < 0.003
    assert all(site.bound.is_cuda for site in clips_of(tiny).values())


# --- other defenses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DEFENSES)
def test_every_defense_runs(tiny, name, dtype):
    config = DEFENSES[name].Config()
    config = dataclasses.replace(config, **{k: 2 for k in vars(config) if k.endswith("epochs")})
    repaired = DEFENSES[name].repair(tiny.to(CUDA), *sample(), config, 0, dtype)
    assert all(p.is_cuda and p.isfinite().all() for p in repaired.model.parameters())


def test_relearning_without_a_suspicious_row_runs(tiny):
    config = ulrl.Config(relearn_epochs=1)
    net, _ = ulrl.relearn(tiny.to(CUDA), [], *sample(), config, torch.Generator().manual_seed(0))
    assert net.linear.weight.isfinite().all()


def test_views_and_fresh_weights_are_those_of_the_cpu(tiny):
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    views = [simclr.view(t, torch.Generator().manual_seed(1)).cpu() for t in (x, x.to(CUDA))]
    torch.testing.assert_close(*views, rtol=0, atol=1e-4)
    fresh = [bcu.partly_fresh(tiny.to(d), bcu.Config().p, 0).cpu().state_dict() for d in (CUDA, torch.device("cpu"))]
    assert all(torch.equal(fresh[0][k], fresh[1][k]) for k in fresh[0])


def test_dbd_runs_and_goes_on(tmp_path, monkeypatch):
    few = dbd.Config(mixmatch_steps=3, simclr_batch=100)
    monkeypatch.setattr(dbd, "Config", lambda: few)
    flags = [*TRAIN, "--defense", "dbd", "--attack", "blended", "--epochs", "1", "1", "2"]
    flags += ["--out", str(tmp_path / "d.pt"), "--results", str(tmp_path)]
    save = utils.save_checkpoint

    def save_and_stop(checkpoint, path):
        save(checkpoint, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "save_checkpoint", save_and_stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            defend.main(flags)
    monkeypatch.setattr(utils, "save_checkpoint", save)
    defend.main(flags)
    assert utils.load_checkpoint(tmp_path / "d.pt")["ASR"] is not None
