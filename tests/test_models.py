"""Properties of the networks, the clipping activation and the folding of batch norm."""

import copy

import pytest
import torch
from torch import nn

import models
from models.custom_modules import ClippedReLU
from models.folding import fold_batch_norm, move_biases


def random_bounds(model, scale, seed=0):
    """Bounds of every site's own shape, uniform in [0, scale)."""
    shapes = {}
    handles = [
        m.register_forward_hook(lambda _m, _i, out, name=name: shapes.update({name: out.shape[1:]}))
        for name, m in models.activation_sites(model).items()
    ]
    model(torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    g = torch.Generator().manual_seed(seed)
    return {name: scale * torch.rand(shape, generator=g) for name, shape in shapes.items()}


@pytest.mark.parametrize(("name", "sites"), [("resnet18", 17), ("resnet34", 33), ("resnet50", 49)])
def test_sites_are_one_after_every_relu_in_forward_order(name, sites):
    model = models.get_model(name, width=1 / 16).eval()
    order = []
    for path, m in model.named_modules():
        if isinstance(m, nn.ReLU):
            m.register_forward_hook(lambda _m, _i, _o, path=path: order.append(path))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert order == list(models.activation_sites(model))
    assert len(order) == sites


def test_state_dict_has_the_keys_of_public_checkpoints():
    want = {"conv1.weight", "linear.weight", "linear.bias"}
    bn = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    want |= {f"bn1.{k}" for k in bn}
    for stage in range(1, 5):
        for block in range(2):
            for i in (1, 2):
                want.add(f"layer{stage}.{block}.conv{i}.weight")
                want |= {f"layer{stage}.{block}.bn{i}.{k}" for k in bn}
        if stage > 1:
            want.add(f"layer{stage}.0.shortcut.0.weight")
            want |= {f"layer{stage}.0.shortcut.1.{k}" for k in bn}
    state = models.get_model("resnet18").state_dict()
    assert set(state) == want
    assert state["conv1.weight"].shape == (64, 3, 3, 3)
    assert state["linear.weight"].shape == (10, 512)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("width", [1 / 16, 0.25])
def test_a_state_dict_tells_its_network(name, width):
    state = models.get_model(name, 7, width).state_dict()
    assert models.describe_state_dict(state) == {"network": name, "width": width, "num_classes": 7}


def test_the_network_normalises_at_its_own_door(tiny):
    seen = []
    tiny.conv1.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    x = torch.rand(2, 3, 32, 32)
    tiny(x)
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    std = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
    torch.testing.assert_close(seen[0], (x - mean) / std)


def test_unknown_network_and_vanishing_width():
    with pytest.raises(ValueError, match="resnet18, resnet34, resnet50"):
        models.get_model("resnet19")
    with pytest.raises(ValueError, match="width"):
        models.get_model("resnet18", width=0.001)


def test_the_activation_is_a_constructor_argument():
    model = models.get_model("resnet18", width=1 / 16, act_layer=nn.Tanh)
    assert sum(isinstance(m, nn.Tanh) for m in model.modules()) == 17
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())


def test_infinite_bounds_equal_the_plain_network(tiny, defence):
    x = defence[2]
    plain = tiny(x)
    bounds = {k: torch.full_like(v, torch.inf) for k, v in random_bounds(tiny, 1).items()}
    models.set_bounds(tiny, bounds)
    assert sum(isinstance(m, ClippedReLU) for m in tiny.modules()) == 17
    assert torch.equal(tiny(x), plain)
    models.set_bounds(tiny, None)
    assert torch.equal(tiny(x), plain)
    assert not any(isinstance(m, ClippedReLU) for m in tiny.modules())


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_bounds_of_zero_or_less_leave_the_bias_alone(tiny, value):
    models.set_bounds(tiny, {k: torch.full_like(v, value) for k, v in random_bounds(tiny, 1).items()})
    assert torch.equal(tiny(torch.rand(3, 3, 32, 32)), tiny.linear.bias.expand(3, 10))


def test_clipped_activations_stay_under_their_bounds(tiny, defence):
    bounds = random_bounds(tiny, 0.5)
    models.set_bounds(tiny, bounds)
    touched = 0
    for name, site in models.activation_sites(tiny).items():

        def check(_m, _i, out, bound=bounds[name]):
            nonlocal touched
            assert (out >= 0).all()
            assert (out <= bound).all()
            touched += (out == bound).sum()

        site.register_forward_hook(check)
    tiny(defence[2][:8])
    assert touched > 0


def test_bounds_have_to_fit_the_sites(tiny):
    bounds = random_bounds(tiny, 1)
    bounds["elsewhere"] = bounds.pop("act")
    with pytest.raises(ValueError, match="elsewhere"):
        models.set_bounds(tiny, bounds)


def test_gradients_are_those_of_the_definition():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 4, 4, generator=g, requires_grad=True)
    site = ClippedReLU(torch.randn(3, 4, 4, generator=g))
    weight = torch.randn(5, 3, 4, 4, generator=g)
    (site(x) * weight).sum().backward()
    x2, b2 = x.detach().clone().requires_grad_(), site.bound.detach().clone().requires_grad_()
    (torch.minimum(x2.relu(), b2.relu()) * weight).sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(site.bound.grad, b2.grad)


def test_bf16_gradients_are_added_in_fp32():
    """Added in bf16, ones would stop counting at 256."""
    clip = models.ClippedReLU(torch.full((2, 3, 3), 0.5))
    clip(torch.ones(1000, 2, 3, 3, dtype=torch.bfloat16)).sum().backward()
    assert (clip.bound.grad == 1000).all()


def test_activations_after_a_linear_layer_are_clipped_too():
    clip = models.ClippedReLU(torch.tensor([1.0, -1.0, 2.0]))
    x = torch.tensor([[3.0, 3.0, 1.0], [-1.0, 1.0, 5.0]])
    assert clip(x).tolist() == [[1, 0, 1], [0, 0, 2]]
    clip(x).sum().backward()
    assert clip.bound.grad.tolist() == [1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_are_shared_but_for_a_dead_neuron(dtype):
    # dead: activation 0, bound 0; an activation exactly at its bound, one under it, one over it
    x = torch.tensor([0.0, 2.0, 1.0, 3.0], dtype=dtype).view(1, 4, 1, 1).requires_grad_()
    site = ClippedReLU(torch.tensor([0.0, 2.0, 2.0, 2.0]).view(4, 1, 1))
    site(x).sum().backward()
    assert site.bound.grad.flatten().tolist() == [0, 0.5, 0, 1]
    assert x.grad.flatten().tolist() == [0, 0.5, 1, 0]


@pytest.mark.parametrize("sizes", [(37, 16, 3, 1, 300, 43), (400,), (1,) * 40])
def test_images_that_come_a_few_at_a_time_add_up_as_all_at_once(sizes):
    a = torch.randn(sum(sizes), 8, 6, 6, generator=torch.Generator().manual_seed(0))
    total = models.ImageSum()
    for some in a.split(sizes):
        total.add(some)
    assert total.n == len(a)
    assert torch.equal(total.result(), a.sum(0))
    assert not torch.equal(sum(some.sum(0) for some in a.split(7)), a.sum(0))  # the order does show


@pytest.mark.parametrize("size", [400, 64, 7])
def test_as_one_batch_gives_the_gradients_of_one_pass_to_the_bit(size):
    """As autograd gives them for the definition; outside the context passes add up as ever."""
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(400, 8, 6, 6, generator=g) for _ in range(2))
    b = torch.randn(8, 6, 6, generator=g).requires_grad_()
    (torch.minimum(x.relu(), b.relu()) * weight).sum().backward()
    net = nn.Sequential(ClippedReLU(b))
    with models.as_one_batch(net):
        for some, w in zip(x.split(size), weight.split(size), strict=True):
            (net(some) * w).sum().backward()
    assert torch.equal(net[0].bound.grad, b.grad)
    net.zero_grad()
    for some, w in zip(x.split(size), weight.split(size), strict=True):
        (net(some) * w).sum().backward()
    torch.testing.assert_close(net[0].bound.grad, b.grad)


def test_folding_batch_norm_changes_nothing_but_rounding(tiny, defence):
    plain = tiny(defence[2])
    folded = fold_batch_norm(tiny)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(defence[2]), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_biases_moved_into_the_sites_change_nothing_but_rounding(name, defence):
    torch.manual_seed(0)
    model = models.get_model(name, width=0.125)
    model(defence[2])  # batch norm with a mean and a variance
    model.eval()
    moved = move_biases(fold_batch_norm(copy.deepcopy(model)))
    assert not any(m.bias is not None for m in moved.modules() if isinstance(m, nn.Conv2d))
    torch.testing.assert_close(moved(defence[2]), model(defence[2]), rtol=1e-4, atol=1e-4)
    bounds = {k: v / 4 for k, v in random_bounds(model, 1).items()}
    for some in (bounds, None):  # they stay where bounds come and go
        a, b = (models.set_bounds(net, some)(defence[2]) for net in (moved, model))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_folding_wants_eval_mode(tiny):
    with pytest.raises(ValueError, match="eval"):
        fold_batch_norm(tiny.train())


# without bf16 in oneDNN torch adds the gradient of a strided convolution in bf16, over windows, and rounds at each
DTYPES = [torch.float32, torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("size", "stride", "k"), [(8, 2, 3), (8, 2, 1), (4, 1, 3), (6, 2, 3), (3, 1, 1), (3, 1, 2)])
def test_small_maps_by_products_are_the_convolution(size, stride, k, bias, dtype):
    conv = nn.Conv2d(256, 320, k, stride, k // 2, bias=bias)
    by_products = models.small_maps_by_products(nn.Sequential(conv), dtype)
    assert by_products[0].weight is conv.weight
    assert by_products[0].bias is conv.bias
    if bias:
        conv.bias.data.copy_(conv.bias.data.bfloat16())
    # both may round to bf16 alone, so let what goes in lose nothing by it
    weight, x = conv.weight.detach().bfloat16().float(), torch.randn(5, 256, size, size).bfloat16().float()
    conv.weight.data.copy_(weight)
    weight, exact_x, x = weight.double().requires_grad_(), x.double().requires_grad_(), x.requires_grad_()
    exact_bias = conv.bias.detach().double().requires_grad_() if bias else None
    exact = nn.functional.conv2d(exact_x, weight, exact_bias, stride, k // 2)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_clips_are_the_clips(dtype):
    g = torch.Generator().manual_seed(0)
    for shape in ((8, 4, 4), (16, 2, 2), (5,)):
        bound = torch.randn(shape, generator=g)
        plain, fused = ClippedReLU(bound), ClippedReLU(bound, fused=True)
        for n in (7, 3):
            x = torch.randn(n, *shape, generator=g).to(dtype)
            x[0] = bound  # ties
            grad = torch.randn(n, *shape, generator=g).to(dtype)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            out, same = plain(a), fused(b)
            out.backward(grad)
            same.backward(grad)
            assert torch.equal(out, same)
            assert torch.equal(a.grad, b.grad)
        rounding = 1e-6 if dtype == torch.float32 else 2**-6
        torch.testing.assert_close(plain.bound.grad, fused.bound.grad, rtol=rounding, atol=rounding)


def test_small_maps_by_products_in_eval_mode_and_in_fp32():
    conv = nn.Conv2d(256, 320, 3, 1, 1).eval()
    by_products = models.small_maps_by_products(nn.Sequential(conv), torch.float32, in_eval=True)
    x = torch.randn(5, 256, 4, 4)
    out, exact = by_products(x), conv.double()(x.double())
    assert out.dtype == torch.float32
    assert (out - exact).abs().max() <= 1e-5 * exact.abs().max()


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
    assert models.small_maps_by_products(nn.Sequential(conv), torch.bfloat16)[0] is conv


def test_only_wide_convolutions_over_small_maps_become_products():
    torch.manual_seed(1)
    model = models.get_model("resnet18")
    drawn = torch.get_rng_state()
    parameters = dict(model.named_parameters())
    models.small_maps_by_products(model, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    changed = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and type(m) is not nn.Conv2d]
    assert all(name.startswith(("layer3.", "layer4.")) for name in changed)
    assert {f"layer4.{block}.conv{i}" for block in (0, 1) for i in (1, 2)} <= set(changed)
    x = torch.randn(2, 256, 16, 16)  # an 8x8 map comes out
    conv = model.layer4[0].conv1
    assert torch.equal(conv.train()(x), nn.functional.conv2d(x, conv.weight, None, 2, 1))
