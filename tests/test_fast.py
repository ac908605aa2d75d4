"""The code of fast/: each piece computes what the plain code computes, up to rounding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast
import models
import unit
import utils
from fast import clip, kernels
from fast.clip import FastClippedReLU, clip_layer
from fast.folding import fold_batch_norm
from fast.graphs import record_passes
from fast.products import small_maps_by_products
from models import ClippedReLU

CPU = torch.device("cpu")


# --- folding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_folding_batch_norm_changes_nothing_but_rounding(name, defense):
    torch.manual_seed(0)
    model = models.get_model(name, width=0.125)
    model(defense[2])  # batch norm with a mean and a variance
    plain = model.eval()(defense[2])
    folded = fold_batch_norm(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(defense[2]), plain, rtol=1e-4, atol=1e-4)


def test_folding_wants_eval_mode(tiny):
    with pytest.raises(ValueError, match="eval"):
        fold_batch_norm(tiny.train())


# --- products -------------------------------------------------------------------------------------------------------


# without bf16 in oneDNN torch adds the gradient of a strided convolution in bf16, over windows, and rounds at each
DTYPES = [torch.float32, torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("size", "stride", "k"), [(8, 2, 3), (8, 2, 1), (4, 1, 3), (6, 2, 3), (3, 1, 1), (3, 1, 2)])
def test_small_maps_by_products_are_the_convolution(size, stride, k, bias, dtype):
    conv = nn.Conv2d(256, 320, k, stride, k // 2, bias=bias)
    by_products = small_maps_by_products(nn.Sequential(conv), dtype)
    assert by_products[0].weight is conv.weight
    assert by_products[0].bias is conv.bias
    if bias:
        conv.bias.data.copy_(conv.bias.data.bfloat16())
    # inputs that bf16 represents exactly
    weight, x = conv.weight.detach().bfloat16().float(), torch.randn(5, 256, size, size).bfloat16().float()
    conv.weight.data.copy_(weight)
    weight, exact_x, x = weight.double().requires_grad_(), x.double().requires_grad_(), x.requires_grad_()
    exact_bias = conv.bias.detach().double().requires_grad_() if bias else None
    exact = F.conv2d(exact_x, weight, exact_bias, stride, k // 2)
    out = by_products(x)
    assert out.dtype == dtype
    grad = torch.randn_like(out)
    exact.backward(grad.double())
    out.backward(grad)
    pairs = [(out, exact), (x.grad, exact_x.grad), (conv.weight.grad, weight.grad)]
    for got, want in [*pairs, (conv.bias.grad, exact_bias.grad)] if bias else pairs:
        assert (got - want).abs().max() <= (2**-8 if dtype == torch.bfloat16 else 1e-6) * want.abs().max()
    by_products.eval()
    assert torch.equal(by_products(x), conv(x))


def test_small_maps_by_products_in_eval_mode_and_in_fp32():
    conv = nn.Conv2d(256, 320, 3, 1, 1).eval()
    by_products = small_maps_by_products(nn.Sequential(conv), torch.float32, in_eval=True)
    x = torch.randn(5, 256, 4, 4)
    out, exact = by_products(x), conv.double()(x.double())
    assert out.dtype == torch.float32
    assert (out - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_maps_that_are_no_square_do_not_become_products():
    conv = nn.Conv2d(256, 256, 3, 1, 1)
    x = torch.randn(2, 256, 4, 2)
    assert torch.equal(small_maps_by_products(nn.Sequential(conv), torch.float32)(x), conv(x))


def test_the_kernels_get_flat_rows():
    """Of maps channels last, of tokens (N, T, C) and of vectors."""
    for shape in ((2, 3, 4, 5), (2, 6, 4), (2, 7)):
        t = torch.randn(shape)
        rows = clip._rows(t)
        assert rows.shape == (2, t[0].numel())
        assert torch.equal(clip._unrows(rows, t), t)


@pytest.mark.parametrize(
    "what",
    [
        {"groups": 2},
        {"dilation": 2},
        {"padding_mode": "reflect"},
        {"stride": (1, 2)},
        {"padding": "same"},
    ],
)
def test_other_convolutions_do_not_become_products(what):
    conv = nn.Conv2d(256, 256, 3, **({"bias": False, "padding": 1} | what))
    assert small_maps_by_products(nn.Sequential(conv), torch.bfloat16)[0] is conv


def test_only_wide_convolutions_over_small_maps_become_products():
    torch.manual_seed(1)
    model = models.get_model("resnet18")
    drawn = torch.get_rng_state()
    parameters = dict(model.named_parameters())
    small_maps_by_products(model, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    changed = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and type(m) is not nn.Conv2d]
    assert all(name.startswith(("layer3.", "layer4.")) for name in changed)
    assert {f"layer4.{block}.conv{i}" for block in (0, 1) for i in (1, 2)} <= set(changed)
    x = torch.randn(2, 256, 16, 16)  # an 8x8 map comes out
    conv = model.layer4[0].conv1
    assert torch.equal(conv.train()(x), F.conv2d(x, conv.weight, None, 2, 1))


# --- the clip -------------------------------------------------------------------------------------------------------


def passes(site, x, grad):
    """Output of a clip and its gradients by x and by the bound."""
    site, x = copy.deepcopy(site), x.clone().requires_grad_()
    out = site(x)
    out.backward(grad)
    return out.detach(), x.grad, site.bound.grad


def check_clip(dtype, compiled, shapes, sizes):
    """Hold the fast clip to the plain one."""
    g = torch.Generator().manual_seed(0)
    for shape in shapes:
        bound = torch.randn(shape, generator=g).to(dtype)
        for n in sizes:
            x, grad = (torch.randn(n, *shape, generator=g).to(dtype) for _ in range(2))
            x[0] = bound  # ties, and dead neurons at 0
            x[1, ..., 0] = 0
            if len(shape) == 3:  # as the networks have them
                x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
            plain, ours = passes(ClippedReLU(bound), x, grad), passes(FastClippedReLU(bound, compiled), x, grad)
            assert torch.equal(ours[0], plain[0])
            assert ours[0].dtype == dtype
            torch.testing.assert_close(ours[1], plain[1], rtol=0, atol=0)
            assert ours[2].dtype == torch.float32
            rounding = 1e-6 if dtype == torch.float32 else 2**-6
            torch.testing.assert_close(ours[2], plain[2], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_clip_is_the_plain_one(dtype):
    check_clip(dtype, False, [(8, 4, 4), (16, 2, 3), (6, 4), (5,)], (7, 3))


@pytest.mark.skipif(not clip.can_compile(), reason="no C++ compiler here")
def test_the_compiled_clip_is_the_plain_one():
    check_clip(torch.bfloat16, True, [(8, 4, 4), (16, 2, 3), (6, 4)], (7, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_are_shared_but_for_a_dead_neuron(dtype):
    # dead: activation 0, bound 0; an activation exactly at its bound, one under it, one over it
    x = torch.tensor([0.0, 2.0, 1.0, 3.0], dtype=dtype).view(1, 4, 1, 1)
    site = FastClippedReLU(torch.tensor([0.0, 2.0, 2.0, 2.0]).view(4, 1, 1))
    out, grad_x, grad_bound = passes(site, x, torch.ones_like(x))
    assert out.flatten().tolist() == [0, 2, 1, 2]
    assert grad_bound.flatten().tolist() == [0, 0.5, 0, 1]
    assert grad_x.flatten().tolist() == [0, 0.5, 1, 0]


@pytest.mark.parametrize("layer", [ClippedReLU, FastClippedReLU])
def test_bf16_gradients_are_added_in_fp32(layer):
    """Added in bf16, ones would stop counting at 256."""
    site = layer(torch.full((2, 3, 3), 0.5))
    site(torch.ones(1000, 2, 3, 3, dtype=torch.bfloat16)).sum().backward()
    assert (site.bound.grad == 1000).all()


@pytest.mark.parametrize("shape", [(2, 3, 3), (4,)])
def test_the_clip_of_no_image_is_none_and_moves_no_bound(shape):
    """A process may get no image of a small step."""
    for layer in (ClippedReLU, FastClippedReLU):
        site = layer(torch.ones(shape))
        out = site(torch.ones(0, *shape))
        assert out.shape == (0, *shape)
        out.sum().backward()
        assert (site.bound.grad == 0).all()


def test_a_nan_stays_one():
    for layer in (ClippedReLU, FastClippedReLU):
        assert layer(torch.ones(2))(torch.tensor([[torch.nan, 2]])).isnan().tolist() == [[True, False]]


def test_the_first_sites_input_needs_no_gradient():
    x = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    plain, ours = ClippedReLU(torch.full((2, 3, 3), 0.5)), FastClippedReLU(torch.full((2, 3, 3), 0.5))
    for site in (plain, ours):
        site(x).sum().backward()
    assert torch.equal(ours.bound.grad, plain.bound.grad)


def test_clips_are_compiled_in_long_searches_alone_and_on_a_cpu_in_bf16_alone(monkeypatch):
    def compiled(device, dtype, n_images):
        return clip_layer(torch.device(device), dtype, n_images)(torch.ones(2)).compiled

    monkeypatch.setattr(clip, "can_compile", lambda: True)
    assert compiled("cpu", torch.bfloat16, 10**6)
    assert not compiled("cpu", torch.bfloat16, 20_000)
    assert not compiled("cpu", torch.float32, 10**6)
    assert not compiled("cuda", torch.bfloat16, 10**6)
    monkeypatch.setattr(clip, "can_compile", lambda: False)
    assert not compiled("cpu", torch.bfloat16, 10**6)
    assert not kernels.available(CPU)


# --- the search's network -------------------------------------------------------------------------------------------


def step_of(net, _, layer, x, y, bounds):
    """Loss and gradients of a step on the given bounds."""
    sites = models.clips_of(models.set_bounds(net, bounds, layer))
    parameters = [site.bound for site in sites.values()]
    ce = unit.cross_entropy_backward(net, parameters, x, y, 30)
    return ce.item(), dict(zip(sites, (p.grad for p in parameters), strict=True))


@pytest.mark.parametrize(("dtype", "rtol", "off"), [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 0.02, 0.1)])
def test_the_fast_network_is_the_plain_one(tiny, defense, dtype, rtol, off):
    x, y = defense[0][::8], defense[1][::8]
    bounds = unit.initial_bounds(tiny, models.activation_sites(tiny, x), x, 50, 1.0)
    nets = [fast.search_network(tiny, x, dtype, 0, plain=plain) for plain in (True, False)]
    (plain, fast_) = (step_of(*found, x, y, bounds) for found in nets)
    assert fast_[0] == pytest.approx(plain[0], rel=rtol)
    together = [torch.cat([g.flatten() for g in found[1].values()]) for found in (plain, fast_)]
    assert (together[1] - together[0]).norm() < off * together[0].norm()
    for net, *_ in nets:
        weights = [p for site in net.modules() if not isinstance(site, ClippedReLU) for p in site.parameters(False)]
        assert not any(p.requires_grad for p in weights)
        assert not any(m.training for m in net.modules())
    assert [m for m in nets[0][0].modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool([m for m in nets[1][0].modules() if isinstance(m, nn.BatchNorm2d)]) == (dtype == torch.float32)
    assert not any(isinstance(m, ClippedReLU) for m in tiny.modules())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in tiny.parameters())


def test_on_amx_the_last_stage_goes_through_products(monkeypatch, defense):
    torch.manual_seed(0)
    model = models.get_model("resnet18").eval()
    x, y = defense[0][::40], defense[1][::40]
    bounds = unit.initial_bounds(model, models.activation_sites(model, x), x, 50, 1.0)
    plain = step_of(*fast.search_network(model, x, torch.bfloat16, 0, plain=True), x, y, bounds)
    for amx in (True, False):
        monkeypatch.setattr(utils, "has_amx", lambda _, amx=amx: amx)
        net, sites, layer = fast.search_network(model, x, torch.bfloat16, 0)
        changed = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and type(m) is not nn.Conv2d]
        assert bool(changed) == amx
        ce, grads = step_of(net, sites, layer, x, y, bounds)
        assert ce == pytest.approx(plain[0], rel=0.02)
        for name in ("layer4.0.act2", "layer4.1.act1"):
            assert (grads[name] - plain[1][name]).norm() < 0.25 * plain[1][name].norm()  # the weights are random


class Odd(nn.Module):
    """Registers a batch norm after a convolution whose output it does not take, although the 3 channels would fit."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.act = nn.ReLU()
        self.linear = nn.Linear(channels, 10)
        nn.init.uniform_(self.bn.running_mean)

    def forward(self, x):
        return self.linear(self.act(self.conv(self.bn(x).to(self.conv.weight.dtype))).mean((2, 3)))


@pytest.mark.parametrize("channels", [3, 4])
def test_a_network_in_which_batch_norm_cannot_be_folded_is_left_as_it_is(defense, channels):
    model = Odd(channels).eval()
    net, *_ = fast.search_network(model, defense[2], torch.bfloat16, 0)
    torch.testing.assert_close(net(defense[2]).float(), model(defense[2]), rtol=0.05, atol=0.02)
    result = unit.tighten(model, *defense, unit.UnitConfig(n_steps=1, precision="bf16"))
    assert result.bounds["act"].shape == (channels, 32, 32)


# --- recorded passes ------------------------------------------------------------------------------------------------


@pytest.fixture
def recordings(monkeypatch):
    """A stand-in for torch.cuda.make_graphed_callables on the CPU; it lists its calls: [(shape, training)].

    Like the original it runs warm-up passes, which move batch norm's statistics, keeps no gradient of them, and returns
    a function for inputs of one shape.
    """
    made = []

    def stand_in(module, args):
        (x,), parameters = args, [p for p in module.parameters() if p.requires_grad]
        assert torch.is_grad_enabled()
        made.append((tuple(x.shape), module.training))
        for _ in range(3):
            torch.autograd.grad(module(x).sum(), parameters, allow_unused=True)
        forward = module.forward

        def replay(now):
            assert now.shape == x.shape
            return forward(now)

        module.forward = replay
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    return made


def train(net, x):
    """Train in place for three steps, the last batch smaller."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for some in (x, x, x[:5]):
        optimizer.zero_grad()
        net(some).logsumexp(1).sum().backward()
        optimizer.step()


def test_a_recorded_training_is_the_training_batch_norms_statistics_too(tiny, defense, recordings):
    x, plain = defense[0][:8], copy.deepcopy(tiny).train()
    train(plain, x)
    parameters, buffers = dict(tiny.named_parameters()), dict(tiny.named_buffers())
    recorded = record_passes(tiny.train())
    assert recorded is tiny
    train(recorded, x)
    assert recordings == [((8, 3, 32, 32), True), ((5, 3, 32, 32), True)]  # one a shape
    for name, value in plain.state_dict().items():
        assert torch.equal(tiny.state_dict()[name], value), name
    assert all(p is parameters[name] for name, p in tiny.named_parameters())
    assert all(b is buffers[name] for name, b in tiny.named_buffers())
    # in eval mode the passes are others: recorded anew, with the statistics as they are
    with torch.no_grad():
        assert torch.equal(recorded.eval()(x), plain.eval()(x))
    assert recordings[2:] == [((8, 3, 32, 32), False)]
    assert all(torch.equal(tiny.state_dict()[name], value) for name, value in plain.state_dict().items())


def test_nothing_is_recorded_while_nothing_is_trained(tiny, defense, recordings):
    net = record_passes(models.frozen_copy(tiny))
    x = defense[2][:4]
    assert torch.equal(net(x), models.frozen_copy(tiny)(x))
    assert recordings == []
    # what looks at the sites is not recorded either
    bounds = unit.initial_bounds(net, models.activation_sites(net, x), x, 4, 1.0)
    assert recordings == []
    models.set_bounds(net, bounds)  # a network frozen so far may still be changed
    assert torch.equal(net(x), models.set_bounds(models.frozen_copy(tiny), bounds)(x))
    assert len(recordings) == 1


def test_a_recorded_search_is_the_search(tiny, defense, recordings, monkeypatch):
    data = [t[::4] for t in defense]
    config = unit.UnitConfig(n_steps=3, lr=0.01, micro_batch=30)
    plain = unit.tighten(tiny, *data, config)
    assert recordings == []
    search_network = fast.search_network

    def recorded(*args):
        net, *rest = search_network(*args)
        return record_passes(net), *rest

    monkeypatch.setattr(fast, "search_network", recorded)
    ours = unit.tighten(tiny, *data, config)
    # 100 images by 30, and 25 to validate
    assert sorted(shape[0] for shape, training in recordings if not training) == [10, 25, 30]
    assert len(recordings) == 3
    assert ours.history == plain.history
    assert all(torch.equal(ours.bounds[k], plain.bounds[k]) for k in plain.bounds)
