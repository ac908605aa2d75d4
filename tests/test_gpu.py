"""What only a CUDA device can show: every part runs there, and agrees with the CPU. python -m pytest -m gpu"""

import dataclasses
import functools

import pytest
import torch

import dbd
import defenses.dbd
import train
import unit
import utils
from backdoors import TRIGGERS, get_backdoor
from defenses import DEFENSES, bcu, simclr, ulrl
from evaluate import evaluate
from models import ClippedReLU, activation_sites, set_bounds

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", TRIGGERS)
def test_triggers_agree_with_the_cpu(name):
    x = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(get_backdoor(name).to(CUDA)(x.to(CUDA)).cpu(), get_backdoor(name)(x))


@pytest.mark.parametrize("attack", ["none", *TRIGGERS])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_attack_trains(tmp_path, attack, precision):
    out = tmp_path / "v.pt"
    flags = ["--dataset", "cifar10_sample", "--width", "0.125", "--epochs", "12", "--batch_size", "25", "--lr", "0.05"]
    flags += ["--poison_rate", "0.04"] if attack == "reflection" else []
    train.main([*flags, "--device", "cuda", "--precision", precision, "--attack", attack, "--ckpt", str(out)])
    history = utils.load_checkpoint(out)["history"]
    assert history[-1]["loss"] < history[0]["loss"] - 0.3


def test_training_again_gives_the_same_bits(tmp_path):
    flags = ["--dataset", "cifar10_sample", "--width", "0.125", "--epochs", "2", "--device", "cuda"]
    for name in ("a", "b"):
        train.main([*flags, "--attack", "wanet", "--ckpt", str(tmp_path / f"{name}.pt")])
    a, b = (utils.load_checkpoint(tmp_path / f"{name}.pt")["state_dict"] for name in ("a", "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_training_batch_is_that_of_the_cpu():
    images, labels = utils.load_dataset("cifar10_sample", None, train=True)
    poison = train.poison_training_set(labels, "wanet", 0)
    order, roles = train.epoch_batches(len(images), 100, poison, seed=0, epoch=0)
    batches = []
    for device in (torch.device("cpu"), CUDA):
        backdoor = get_backdoor("wanet").to(device)
        generator = torch.Generator().manual_seed(0)
        data = images.to(device), labels.to(device)
        batches.append(train.poisoned_batch(*data, order[:100], roles[:100], poison, backdoor, generator))
    (x, y), (x_cuda, y_cuda) = batches
    torch.testing.assert_close(x_cuda.cpu(), x)
    assert torch.equal(y_cuda.cpu(), y)


def test_the_search_agrees_with_the_cpu(tiny, defence):
    """Five steps, as single bounds part later on; the first step of bf16."""
    config = unit.UnitConfig(n_steps=5, lr=0.01)
    cpu = unit.tighten(tiny, *defence, config)
    gpu = unit.tighten(tiny.to(CUDA), *defence, config)
    assert gpu.history["alpha"] == cpu.history["alpha"]
    assert gpu.history["reg"] == pytest.approx(cpu.history["reg"], rel=1e-4)
    assert gpu.history["ce"] == pytest.approx(cpu.history["ce"], abs=5e-3)
    half = unit.tighten(tiny, *defence, unit.UnitConfig(n_steps=1, lr=0.01, precision="bf16"))
    assert half.history["reg"] == pytest.approx(cpu.history["reg"][:1], rel=1e-2)
    assert half.history["ce"] == pytest.approx(cpu.history["ce"][:1], rel=5e-2)


def test_same_input_same_bits(tiny, defence):
    config = unit.UnitConfig(n_steps=5, precision="bf16")
    first, second = (unit.tighten(tiny.to(CUDA), *defence, config) for _ in range(2))
    assert first.history == second.history
    assert all(torch.equal(first.bounds[k], second.bounds[k]) for k in first.bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shifted", [True, False])
def test_the_clips_kernels_are_the_clip(dtype, shifted):
    g = torch.Generator().manual_seed(0)
    for shape, n in (((64, 8, 8), 37), ((24, 5, 3), 9), ((512, 4, 4), 700), ((7,), 5)):
        x, grad = (torch.randn(n, *shape, generator=g).to(dtype).to(CUDA) for _ in range(2))
        if len(shape) == 3:
            x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
        shift = torch.randn(shape[0], generator=g).to(CUDA) if shifted and len(shape) == 3 else None
        pre = x.double() + (0 if shift is None else shift.double().view(-1, 1, 1))
        bound = torch.randn(shape, generator=g).to(CUDA)
        bound[0] = x[0, 0].float() + (0 if shift is None else shift[0])  # ties, but for rounding
        site = ClippedReLU(bound, fused=True, shift=shift)
        a, b, c = x.clone().requires_grad_(), pre.requires_grad_(), bound.double().requires_grad_()
        out, exact = site(a), torch.minimum(b.relu(), c.relu())
        out.backward(grad)
        exact.backward(grad.double())
        rounding = {"rtol": 2**-7 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-5}
        torch.testing.assert_close(out, exact.to(dtype), **rounding)
        sure = (pre.detach() - bound).abs() > 1e-6  # where fp32 sees what double precision sees
        torch.testing.assert_close(a.grad[sure], b.grad.to(dtype)[sure], **rounding)
        sure = sure.all(0)
        torch.testing.assert_close(site.bound.grad[sure], c.grad.float()[sure], rtol=1e-4, atol=1e-4)
    tie = ClippedReLU(torch.tensor([0.0, 2.0]), fused=True).to(CUDA)
    x = torch.tensor([[0.0, 2.0]], device=CUDA, requires_grad=True)
    tie(x).sum().backward()
    assert x.grad.tolist() == [[0.0, 0.5]]
    assert tie.bound.grad.tolist() == [0.0, 0.5]
    assert tie(torch.full((1, 2), torch.nan, device=CUDA)).isnan().all()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("until", ["steps", "budget"])
def test_a_recorded_search_is_the_search(tiny, defence, monkeypatch, precision, fused, until):
    """To the bit, also after a part of it."""
    config = unit.UnitConfig(n_steps=20, until=until, lr=0.1, precision=precision, compile=fused, micro_batch=64)
    states = []
    recorded = unit.tighten(tiny.to(CUDA), *defence, config, keep=lambda state, _last: states.append(state()))
    again = unit.tighten(tiny, *defence, config, state=states[7])
    monkeypatch.setattr(utils, "recorded", lambda work, _device: work)
    plain = unit.tighten(tiny, *defence, config)
    for other in (again, recorded):
        assert other.history == plain.history
        assert all(torch.equal(other.bounds[k], plain.bounds[k]) for k in plain.bounds)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_recorded_training_is_the_training(tmp_path, monkeypatch, precision):
    """To the bit, batch norm's buffers too, with a last batch that is smaller and first epochs on small images."""
    flags = [
        "--dataset",
        "cifar10_sample",
        "--width",
        "0.125",
        "--epochs",
        "3",
        "--small_epochs",
        "1",
        "--average",
        "1",
    ]
    flags += ["--batch_size", "64", "--attack", "wanet", "--device", "cuda", "--precision", precision]
    train.main([*flags, "--ckpt", str(tmp_path / "a.pt")])
    plain = functools.partial(functools.partial, train.forward_backward)
    monkeypatch.setattr(train, "RecordedStep", lambda model, _size, dtype: plain(model, dtype=dtype))
    train.main([*flags, "--ckpt", str(tmp_path / "b.pt")])
    a, b = (utils.load_checkpoint(tmp_path / f"{name}.pt") for name in ("a", "b"))
    assert a["history"] == b["history"]
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DEFENSES)
def test_every_defence_runs(tiny, name, dtype):
    images, labels = (t.to(CUDA) for t in utils.load_dataset("cifar10_sample", None, train=True))
    config = DEFENSES[name].Config()
    config = dataclasses.replace(config, **{k: 2 for k in vars(config) if k.endswith("epochs")})
    repaired = DEFENSES[name].repair(tiny.to(CUDA), images, labels, config, 0, None, dtype)
    assert all(p.is_cuda and p.isfinite().all() for p in repaired.model.parameters())


def test_relearning_without_a_suspicious_row_runs(tiny):
    images, labels = (t.to(CUDA) for t in utils.load_dataset("cifar10_sample", None, train=True))
    config = ulrl.Config(relearn_epochs=1)
    net, _ = ulrl.relearn(tiny.to(CUDA), [], images, labels, config, torch.Generator().manual_seed(0))
    assert net.linear.weight.isfinite().all()


def test_views_and_fresh_weights_are_those_of_the_cpu(tiny):
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    views = [simclr.view(t, torch.Generator().manual_seed(1)).cpu() for t in (x, x.to(CUDA))]
    torch.testing.assert_close(*views, rtol=0, atol=1e-4)
    fresh = [bcu.partly_fresh(tiny.to(d), bcu.Config().p, 0).cpu().state_dict() for d in (CUDA, torch.device("cpu"))]
    assert all(torch.equal(fresh[0][k], fresh[1][k]) for k in fresh[0])


def test_dbd_runs_and_goes_on(tmp_path, monkeypatch):
    init = defenses.dbd.Config.__init__
    few = {"mixmatch_steps": 3, "simclr_batch": 100}
    monkeypatch.setattr(defenses.dbd.Config, "__init__", lambda self, **k: init(self, **{**few, **k}))
    flags = ["--dataset", "cifar10_sample", "--device", "cuda", "--width", "0.125", "--attack", "blended"]
    flags += ["--out", str(tmp_path / "d.pt"), "--results", str(tmp_path), "--epochs", "1", "1", "2"]
    save = utils.save_checkpoint

    def save_and_stop(checkpoint, path):
        save(checkpoint, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "save_checkpoint", save_and_stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            dbd.main(flags)
    monkeypatch.setattr(utils, "save_checkpoint", save)
    dbd.main(flags)
    assert utils.load_checkpoint(tmp_path / "d.pt")["ASR"] is not None


def test_the_evaluator_agrees_with_the_cpu(tiny):
    images, labels = utils.load_dataset("cifar10_sample", None, train=False)
    set_bounds(tiny, unit.initial_bounds(tiny, utils.to_float(images[:200]).split(100), 4.0))
    cpu = evaluate(tiny, images[:500], labels[:500], get_backdoor("wanet"), 0)
    gpu = evaluate(tiny.to(CUDA), images[:500], labels[:500], get_backdoor("wanet"), 0)
    assert abs(gpu.BA - cpu.BA) < 0.003
    assert abs(gpu.ASR - cpu.ASR) < 0.003
    assert all(site.bound.is_cuda for site in activation_sites(tiny).values())
