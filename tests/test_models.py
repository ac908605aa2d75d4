"""Properties of the networks and of the clipping activation."""

import copy

import pytest
import torch
from torch import nn

import models
from models import ClippedReLU


def random_bounds(model, scale, seed=0):
    """Bounds of every site's own shape, uniform in [0, scale)."""
    g = torch.Generator().manual_seed(seed)
    shapes = models.activation_sites(model.eval(), torch.rand(2, 3, 32, 32))
    return {name: scale * torch.rand(shape, generator=g) for name, shape in shapes.items()}


@pytest.mark.parametrize(("name", "n_sites"), [("resnet18", 17), ("resnet34", 33), ("resnet50", 49)])
def test_sites_are_one_after_every_relu_in_forward_order(name, n_sites):
    model = models.get_model(name, width=1 / 16).eval()
    order = []
    for path, m in model.named_modules():
        if isinstance(m, nn.ReLU):
            m.register_forward_hook(lambda _m, _i, _o, path=path: order.append(path))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    order.clear()
    sites = list(models.activation_sites(model, torch.rand(2, 3, 32, 32)))
    assert order[: len(sites)] == sites
    assert len(sites) == n_sites


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


def test_the_network_normalizes_at_its_own_door(tiny):
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


@pytest.mark.parametrize("name", models.NETWORKS)
def test_a_frozen_copy_is_the_network_in_eval_mode_without_gradients_for_weights(name):
    model = models.get_model(name, width=1 / 16).train()
    before = copy.deepcopy(model.state_dict())
    half, whole = (models.frozen_copy(model, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert not any(m.training for m in half.modules())
    assert not any(p.requires_grad for p in half.parameters())
    x = torch.rand(2, 3, 32, 32)
    assert half(x).dtype == torch.bfloat16  # the images are cast to the weights' type
    torch.testing.assert_close(half(x).float(), whole(x), rtol=0.05, atol=0.05)
    # the network itself is as it was
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(whole(x), model.eval()(x))


# --- bounds on the whole network ------------------------------------------------------------------------------------


def test_bounds_have_the_shapes_of_the_activations():
    model = models.get_model("resnet18", width=1 / 16).eval()
    shapes = list(models.activation_sites(model, torch.rand(2, 3, 32, 32)).values())
    assert shapes[:5] == [(4, 32, 32)] * 5
    assert shapes[5:] == [(8, 16, 16)] * 4 + [(16, 8, 8)] * 4 + [(32, 4, 4)] * 4
    assert list(models.activation_sites(model, torch.rand(2, 3, 24, 24)).values())[-1] == (32, 3, 3)


def test_infinite_bounds_equal_the_plain_network(tiny, defense):
    x = defense[2]
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


def test_clipped_activations_stay_under_their_bounds(tiny, defense):
    bounds = random_bounds(tiny, 0.5)
    models.set_bounds(tiny, bounds)
    touched = []

    def check(name):
        def look(_module, _inputs, a):
            assert (a >= 0).all()
            assert (a <= bounds[name]).all()
            touched.append((a == bounds[name]).any())

        return look

    for name in bounds:
        tiny.get_submodule(name).register_forward_hook(check(name))
    tiny(defense[2][:8])
    assert len(touched) == 17
    assert all(touched)


def test_bounds_have_to_fit_the_sites(tiny):
    bounds = random_bounds(tiny, 1)
    bounds["elsewhere"] = bounds.pop("act")
    with pytest.raises(ValueError, match="elsewhere"):
        models.set_bounds(tiny, bounds)


# --- the clipping activation ----------------------------------------------------------------------------------------


def test_activations_after_a_linear_layer_are_clipped_too():
    clip = ClippedReLU(torch.tensor([1.0, -1.0, 2.0]))
    x = torch.tensor([[3.0, 3.0, 1.0], [-1.0, 1.0, 5.0]])
    assert clip(x).tolist() == [[1, 0, 1], [0, 0, 2]]
    clip(x).sum().backward()
    assert clip.bound.grad.tolist() == [1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_are_shared_but_for_a_dead_neuron(dtype):
    # dead: activation 0, bound 0; an activation exactly at its bound, one under it, one over it
    x = torch.tensor([0.0, 2.0, 1.0, 3.0], dtype=dtype).view(1, 4, 1, 1).requires_grad_()
    site = ClippedReLU(torch.tensor([0.0, 2.0, 2.0, 2.0]).view(4, 1, 1))
    out = site(x)
    out.sum().backward()
    assert out.dtype == dtype
    assert out.flatten().tolist() == [0, 2, 1, 2]
    assert site.bound.grad.flatten().tolist() == [0, 0.5, 0, 1]
    assert x.grad.flatten().tolist() == [0, 0.5, 1, 0]


def test_a_bound_is_a_number_of_its_own_in_fp32_whatever_it_is_made_of():
    given = torch.ones(2, 3, 3, dtype=torch.bfloat16)
    site = ClippedReLU(given)
    given.zero_()
    assert site.bound.dtype == torch.float32
    assert (site.bound == 1).all()
    assert site.bound.shape == (2, 3, 3)
    assert (site.clip_level() == 1).all()
