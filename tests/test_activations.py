"""Activations found by their calls, in any network, and the network that clips them there."""

import copy
import io
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models

INF = float("inf")


class Calls(nn.Module):
    """Applies `function` to 3-channel images, then a linear layer."""

    def __init__(self, function):
        super().__init__()
        self.function, self.linear = function, nn.Linear(3, 10)

    def forward(self, x):
        return self.linear(self.function(4 * x - 2).mean((2, 3)))


def in_place(function):
    """Return a function that calls an in-place one and ignores its return value."""

    def call(x):
        x = x + 0
        function(x)
        return x

    return call


SEEN = [
    torch.relu, torch.Tensor.relu, F.relu, nn.ReLU(), nn.ReLU(inplace=True), F.relu6, nn.ReLU6(), nn.Hardtanh(0, 0.5),
    F.gelu, nn.GELU("tanh"), F.silu, nn.SiLU(inplace=True), F.hardswish, nn.Hardswish(inplace=True), nn.Mish(),
    F.leaky_relu, nn.LeakyReLU(0.2, True), F.elu, nn.ELU(inplace=True), nn.CELU(), nn.SELU(inplace=True), nn.PReLU(3),
    nn.Softplus(), nn.Threshold(0, 0), nn.RReLU(), lambda x: x.clamp(min=0), lambda x: torch.clamp(x, 0),
    lambda x: x.clamp_min(0.0), in_place(F.relu_), in_place(torch.relu_), in_place(torch.Tensor.relu_),
    in_place(lambda x: F.silu(x, inplace=True)), in_place(lambda x: F.hardtanh(x, 0.0, 1.0, True)),
    in_place(F.elu_), in_place(F.leaky_relu_), in_place(lambda x: x.clamp_(min=0)),
]  # fmt: skip


@pytest.mark.parametrize("function", SEEN)
def test_an_activation_is_clipped_whichever_way_it_is_called(function):
    """The output is min(a, c), and its gradients are those of a written-out minimum."""
    torch.manual_seed(0)
    model, x = Calls(function).eval(), torch.rand(5, 3, 6, 6)
    ((site, shape),) = models.activation_sites(model, x).items()
    assert site == ("function" if isinstance(function, nn.Module) else "root")
    assert shape == (3, 6, 6)
    bound = 0.4 * torch.rand(shape)

    x.requires_grad_()
    clipped = models.clipped(model, {site: bound})
    out = clipped(x)
    out.square().sum().backward()
    (mine, theirs), x.grad = (clipped.sites()[site].bound.grad, x.grad), None

    level = bound.clone().requires_grad_()
    want = model.linear(torch.minimum(function(4 * x - 2), level).mean((2, 3)))
    want.square().sum().backward()
    assert torch.equal(out, want)
    assert not torch.equal(out, model(x))
    torch.testing.assert_close(mine, level.grad)
    torch.testing.assert_close(theirs, x.grad)
    with torch.no_grad():
        assert torch.equal(models.clipped(model, {site: torch.full(shape, INF)})(x), model(x))
        assert torch.equal(clipped(x), want)


@pytest.mark.parametrize("function", [lambda x: x.clamp(0, 1), lambda x: x.clamp_min(0.1), torch.sigmoid, torch.tanh])
def test_what_is_no_activation_gets_no_bound(function):
    """Functions with an upper limit of 1, and clamps at another value than 0."""
    with pytest.raises(ValueError, match="no activation"):
        models.activation_sites(Calls(function).eval(), torch.rand(2, 3, 6, 6))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.linear = nn.ReLU(), nn.Linear(3, 3)

    def forward(self, x):
        x = self.act(self.linear(self.act(x)))
        return F.gelu(F.gelu(x))


def test_a_site_is_named_by_its_module_and_the_number_of_the_call_there():
    block = Block()
    shared = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), block, nn.Sequential(block), nn.Linear(3, 2)).eval()
    sites = models.activation_sites(shared, torch.rand(2, 3, 2, 2))
    names = ["2.act", "2.act#2", "2", "2#2", "2.act#3", "2.act#4", "2#3", "2#4"]
    assert sites == dict.fromkeys(names, (3,))


class Transformer(nn.Module):
    """torch's own encoder layers, whose fast path would compute an activation unseen."""

    def __init__(self, batch_first=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.batch_first = nn.Linear(8, 10), batch_first

    def forward(self, x):
        tokens = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)[..., :8]
        if not self.batch_first:
            tokens = tokens.transpose(0, 1)
        return types.SimpleNamespace(logits=self.head(self.encoder(tokens).mean(1 if self.batch_first else 0)))


def test_tokens_have_a_bound_each_and_output_objects_are_taken():
    torch.manual_seed(0)
    model, x = Transformer().eval(), torch.rand(4, 3, 8, 8)
    sites = models.activation_sites(model, x)
    assert sites == {"encoder.layers.0": (16, 16), "encoder.layers.1": (16, 16)}
    with torch.no_grad():
        free = models.clipped(model, {k: torch.full(s, INF) for k, s in sites.items()})(x)
        torch.testing.assert_close(free, model(x).logits)
        assert not torch.allclose(models.clipped(model, {k: torch.zeros(s) for k, s in sites.items()})(x), free)
    with pytest.raises(ValueError, match="images first"):
        models.activation_sites(Transformer(batch_first=False).eval(), x)


class Odd(nn.Module):
    """A network whose forward pass is `how`."""

    def __init__(self, how):
        super().__init__()
        self.how, self.act, self.turn = how, nn.ReLU(), 0
        self.linear = nn.Linear(3, 10)

    def forward(self, x):
        self.turn += 1
        return self.how(self, x)


def by_turns(net, x):
    return net.linear(net.act(x).mean((2, 3)) if net.turn % 2 else F.gelu(F.gelu(x)).mean((2, 3)))


def test_another_path_from_call_to_call_is_refused():
    with pytest.raises(ValueError, match="another path"):
        models.activation_sites(Odd(by_turns).eval(), torch.rand(2, 3, 4, 4))


def test_bounds_that_do_not_fit_are_refused_when_the_network_runs(tiny):
    sites = models.activation_sites(tiny.eval(), torch.rand(2, 3, 32, 32))
    bounds = {k: torch.ones(s) for k, s in sites.items()}
    clipped = models.clipped(tiny, bounds)
    for n in (1, 4):
        with pytest.raises(ValueError, match="images of another size"):
            clipped(torch.rand(n, 3, 24, 24))
    for changed in (dict(list(bounds.items())[1:]), {**bounds, "more": torch.ones(7)}):
        with pytest.raises(ValueError, match="another path"):
            models.clipped(tiny, changed)(torch.rand(4, 3, 32, 32))
    assert clipped(torch.rand(1, 3, 32, 32)).shape == (1, 10)


def test_a_call_without_images_gets_no_bound():
    """Such as that of a small network that computes a position bias."""

    def how(net, x):
        bias = F.relu(torch.linspace(-1, 1, 3))
        return net.linear((net.act(4 * x - 2) + bias.view(1, 3, 1, 1)).mean((2, 3)))

    model, x = Odd(how).eval(), torch.rand(5, 3, 4, 4)
    sites = models.activation_sites(model, x)
    assert sites == {"act": (3, 4, 4)}
    with torch.no_grad():
        for images in (x, x[:1]):
            assert torch.equal(models.clipped(model, {"act": torch.full((3, 4, 4), INF)})(images), model(images))


class HandWritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.relu()

    @staticmethod
    def backward(ctx, grad):
        return grad


def deprecated(function, *args):
    """Call a function without the warnings that torch deprecates it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


def plain_gelu(x):
    return torch.nn.functional.gelu(x)


HIDDEN = {
    "swish": (lambda x: x * torch.sigmoid(x), "a product with a sigmoid"),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), "a product with a sigmoid"),
    "tanh gelu": (lambda x: 0.5 * x * (1 + torch.tanh(0.8 * x)), "a product with a sigmoid"),
    "script": (deprecated(torch.jit.script, plain_gelu), "gelu in root"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_activations_that_no_bound_reaches_are_named(name):
    function, said = HIDDEN[name]
    model = Odd(lambda net, x: net.linear(function(net.act(x - 0.2) - 0.3).mean((2, 3)))).eval()
    with pytest.warns(UserWarning, match=said):
        assert list(models.activation_sites(model, torch.rand(2, 3, 4, 4))) == ["act"]


@pytest.mark.parametrize("function", [HandWritten.apply, torch.no_grad()(F.relu)])
def test_activations_that_no_gradient_passes_are_refused(function):
    model = Odd(lambda net, x: net.linear(function(net.act(x - 0.2) - 0.3).mean((2, 3)))).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="no gradient passes the activation of root"):
        models.activation_sites(model, torch.rand(2, 3, 4, 4))


def test_gates_and_our_networks_are_no_cause_to_warn(tiny):
    def squeeze(net, x):
        return net.linear((net.act(x) * torch.sigmoid(x.mean((2, 3), keepdim=True))).mean((2, 3)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for side in (4, 1):
            models.activation_sites(Odd(squeeze).eval(), torch.rand(2, 3, side, side))
        models.activation_sites(tiny, torch.rand(2, 3, 32, 32))


@pytest.fixture
def defended(tiny):
    torch.manual_seed(0)
    sites = models.activation_sites(tiny.eval(), torch.rand(2, 3, 32, 32))
    return models.clipped(tiny, {k: torch.rand(s) for k, s in sites.items()})


def test_a_clipped_network_is_saved_and_loaded_by_its_state_dict(tiny, defended):
    file = io.BytesIO()
    torch.save(defended.state_dict(), file)
    file.seek(0)
    bounds = {k: torch.zeros_like(clip.bound) for k, clip in models.clips_of(defended).items()}
    again = models.clipped(copy.deepcopy(tiny), bounds)
    again.load_state_dict(torch.load(file, weights_only=True))
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(again(x), defended(x))
    assert models.unclipped(again) is again.model


@pytest.mark.parametrize("gradients", [True, False])
def test_a_network_that_works_in_place_can_be_traced(gradients):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.SiLU(inplace=True)).eval()
    model.append(nn.Linear(64, 10))
    x = torch.rand(5, 3, 6, 6)
    bounds = {k: 0.3 * torch.rand(s) for k, s in models.activation_sites(model, x).items()}
    clipped = models.clipped(model, bounds)
    with torch.set_grad_enabled(gradients):
        traced = deprecated(torch.jit.trace, clipped, x)
    torch.testing.assert_close(traced(x[:2]), clipped(x[:2]))


def test_a_clipped_network_can_be_traced_and_exported(defended):
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        want = defended(x)
        traced = deprecated(torch.jit.trace, defended, x)
        shapes = ({0: torch.export.Dim("n")},)
        exported = torch.export.export(defended, (x,), dynamic_shapes=shapes).module()
        for n in (1, 2, 3):
            torch.testing.assert_close(traced(x[:n]), want[:n], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(exported(x[:n]), want[:n], rtol=1e-4, atol=1e-5)
