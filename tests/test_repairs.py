"""NAD, SEAM, I-BAU, FT-SAM and FST, each against its definition; what holds for every defense: test_defenses.py."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
from defenses import fst, ft_sam, i_bau, nad, seam
from defenses.common import linear_layer
from models import activation_sites, get_model


@pytest.fixture(scope="module")
def clean():
    """A quarter of the embedded clean images: uint8 (125, 3, 32, 32), labels."""
    images, labels = data.load_dataset("cifar10_sample", None, train=True)
    return images[::4], labels[::4]


class Plain(nn.Module):
    """A network without a ResNet's layer names: two convolutions, a pool, and `head` as its last layer."""

    def __init__(self, head=True):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(4))
        self.more = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2))
        self.last = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.ReLU())
        self.head = nn.Linear(8, 10) if head else nn.Conv2d(8, 10, 1)

    def forward(self, x):
        x = self.last(self.more(self.body(x)))
        return self.head(x.flatten(1) if isinstance(self.head, nn.Linear) else x).flatten(1)


@pytest.mark.parametrize("module", [nad, seam, i_bau, ft_sam, fst])
def test_any_network_will_do(module, clean):
    torch.manual_seed(0)
    net = Plain().eval()
    short = {k: 1 for k in vars(module.Config()) if k.endswith("epochs")}
    repaired = module.repair(net, *clean, module.Config(**short), seed=0).model
    assert isinstance(repaired, Plain)
    assert all(p.isfinite().all() for p in repaired.parameters())
    assert not torch.equal(repaired.head.weight, net.head.weight)


# --- NAD ------------------------------------------------------------------------------------------------------------


def test_the_attention_map_by_hand():
    # two channels of 1 x 2: squares 1, 4 and 9, 0; sums 10, 4; norm sqrt(116)
    a = torch.tensor([[[[1.0, -2.0]], [[3.0, 0.0]]]])
    want = torch.tensor([[[10.0, 4.0]]]) / (math.sqrt(116) + 1e-6)
    torch.testing.assert_close(nad.attention_map(a), want)
    assert (nad.attention_map(torch.zeros(2, 3, 4, 4)) == 0).all()
    x = torch.rand(5, 7, 4, 4, dtype=torch.bfloat16)
    maps = nad.attention_map(100 * x)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.flatten(1).norm(dim=1), torch.ones(5))  # whatever the scale


def sites_of(net, clean):
    return activation_sites(copy.deepcopy(net).eval(), data.to_float(clean[0][:2]))


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("resnet18", ["layer2.1.act2", "layer3.1.act2", "layer4.1.act2"]),
        ("resnet50", ["layer2.3.act3", "layer3.5.act3", "layer4.2.act3"]),
    ],
)
def test_the_stages_of_a_resnet_end_where_its_layers_end(name, sites, clean):
    net = get_model(name, width=1 / 64).eval()
    assert nad.stage_ends(sites_of(net, clean), 3) == sites


def test_maps_of_one_pixel_are_no_stage_and_too_few_stages_are_said(clean):
    sites = sites_of(Plain().eval(), clean)
    assert nad.stage_ends(sites, 2) == ["more.2", "last.1"]  # not last.3
    with pytest.raises(ValueError, match="maps of 4 sizes, this network has 3"):
        nad.stage_ends(sites, 4)


def test_the_maps_are_those_of_the_layers_outputs(tiny, clean):
    x, out = data.to_float(clean[0][:6]), {}
    for name in ("layer2", "layer4"):
        getattr(tiny, name).register_forward_hook(lambda _m, _i, a, name=name: out.update({name: a}))
    logits, maps = nad.with_maps(tiny, sites_of(tiny, clean), ["layer2.1.act2", "layer4.1.act2"], x, torch.float32)
    torch.testing.assert_close(logits, tiny(x))
    for a, got in zip(out.values(), maps, strict=True):
        n, _, h, w = a.shape
        slow = np.array([[[sum(v**2 for v in a[i, :, r, c].tolist()) for c in range(w)] for r in range(h)]
                         for i in range(n)])  # fmt: skip
        slow /= np.sqrt((slow**2).sum((1, 2), keepdims=True))
        torch.testing.assert_close(got.double(), torch.from_numpy(slow), rtol=1e-4, atol=1e-5)


def test_the_first_loss_of_the_student_is_ce_and_the_weighted_distance_to_the_teacher(tiny, clean):
    """With rate 0 the teacher is the victim but for its running averages, and the student the victim in train mode."""
    config = nad.Config(teacher_epochs=1, epochs=1, batch_size=len(clean[0]), lr=0.0, beta=(30.0, 50.0, 70.0))
    history = nad.repair(tiny, *clean, config, seed=0).history
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # the teacher's epoch, then the student's
        order = torch.randperm(len(clean[0]), generator=generator)
        x = data.augment(data.to_float(clean[0][order]), generator)
    sites, ends = sites_of(tiny, clean), ["layer2.1.act2", "layer3.1.act2", "layer4.1.act2"]
    teacher, student = copy.deepcopy(tiny).train(), copy.deepcopy(tiny).train()
    with torch.no_grad():
        generator.manual_seed(0)
        first = torch.randperm(len(clean[0]), generator=generator)
        teacher(data.augment(data.to_float(clean[0][first]), generator))  # for its running averages
        logits, own = nad.with_maps(student, sites, ends, x, torch.float32)
        _, its = nad.with_maps(teacher.eval(), sites, ends, x, torch.float32)
    want = F.cross_entropy(logits, clean[1][order]).item()
    want += sum(b * (a - t).square().mean().item() for b, a, t in zip((30, 50, 70), own, its, strict=True))
    assert history["loss"] == [pytest.approx(want, rel=1e-4)]
    assert want > F.cross_entropy(logits, clean[1][order]).item() + 0.01


def test_distillation_brings_the_maps_nearer_to_the_teachers(tiny, clean):
    """To those of a teacher with other maps, given as the state of a run interrupted after the teacher's training."""
    few, distances = (clean[0][::3], clean[1][::3]), []
    x, sites, teacher = data.to_float(few[0]), sites_of(tiny, few), copy.deepcopy(tiny)
    ends = nad.stage_ends(sites, 3)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in (teacher.layer2, teacher.layer3, teacher.layer4):
            layer[1].bn2.weight *= 4 * torch.rand(len(layer[1].bn2.weight))
    for beta in (0.0, 200.0):
        config = nad.Config(epochs=4, batch_size=14, beta=(beta,) * 3)
        net = nad.repair(tiny, *few, config, 0, state={"taught": teacher.state_dict(), "before": {}}).model
        with torch.no_grad():
            own, its = (nad.with_maps(n, sites, ends, x, torch.float32)[1] for n in (net, teacher))
        distances.append(sum(F.mse_loss(a, b).item() for a, b in zip(own, its, strict=True)))
    assert distances[1] < 0.75 * distances[0]


# --- SEAM -----------------------------------------------------------------------------------------------------------


def test_seam_forgets_then_recovers(tiny, clean):
    few = clean[0][::2], clean[1][::2]
    repaired = seam.repair(tiny, *few, seam.Config(epochs=3, batch_size=16), seed=0)
    history, steps = repaired.history, len(repaired.history["forget_accuracy"])
    assert all(a >= 0.2 for a in history["forget_accuracy"][:-1])
    assert history["forget_accuracy"][-1] < 0.2
    assert 2 < steps < 100
    assert repaired.findings == {"outcome": f"forgotten in {steps} steps", "forgotten": True}
    assert history["loss"][-1] < history["loss"][0]
    assert history["accuracy"][-1] > 0.5


def test_seam_says_that_it_did_not_forget(tiny, clean):
    found = seam.repair(tiny, *clean, seam.Config(epochs=1, forget_epochs=2), seed=0).findings
    assert found == {"outcome": "not forgotten in 2 steps", "forgotten": False}


def test_seam_draws_labels_from_all_classes_for_five_images_of_each(tiny, clean, monkeypatch):
    """The labels of the cross-entropy: uniform for every image, then the true ones at falling rates."""
    given, rates = [], []
    entropy, epoch = F.cross_entropy, seam.train_epoch
    monkeypatch.setattr(seam.F, "cross_entropy", lambda logits, y: (given.append(y), entropy(logits, y))[1])

    def watched(images, config, optimizer, *rest):
        rates.append((len(images), config.batch_size, optimizer.param_groups[0]["lr"]))
        return epoch(images, config, optimizer, *rest)

    monkeypatch.setattr(seam, "train_epoch", watched)
    config = seam.Config(forget_epochs=12, stop_accuracy=-1.0, epochs=3, batch_size=125)
    seam.repair(tiny, *clean, config, seed=0)
    assert rates[:12] == [(50, 50, 0.01)] * 12
    assert [lr for *_, lr in rates[12:]] == pytest.approx([0.01, 0.01, 0.001])
    counts = torch.cat(given[:12]).bincount(minlength=10)
    assert counts.sum() == 600
    assert (counts - 60).abs().max() < 4 * math.sqrt(600 * 0.1 * 0.9)  # four standard deviations
    assert all(torch.equal(y.sort().values, clean[1].sort().values) for y in given[12:])


def test_what_is_forgotten_is_judged_by_the_true_labels(tiny, clean):
    """Before the first step, in train mode, on the first five images of each class."""
    few = torch.cat([(clean[1] == c).nonzero()[:5, 0] for c in range(10)])
    history = seam.repair(tiny, *clean, seam.Config(forget_epochs=1, epochs=1), seed=3).history
    generator = torch.Generator().manual_seed(3)
    order = few[torch.randperm(50, generator=generator)]
    with torch.no_grad():
        classes = tiny.train()(data.augment(data.to_float(clean[0][order]), generator)).argmax(1)
    assert history["forget_accuracy"] == [pytest.approx((classes == clean[1][order]).float().mean().item())]


# --- I-BAU ----------------------------------------------------------------------------------------------------------


def quadratic(seed=0, n=6, m=4):
    """A minimax whose inner loss is quadratic in delta: (inner, outer, weights, delta), float64."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    root, cross, target = draw(n, n), draw(n, m), draw(n)
    weights = [draw(m).requires_grad_(), draw(2).requires_grad_()]
    curvature = root @ root.T / n + torch.eye(n, dtype=torch.float64)

    def inner(delta):
        return delta @ curvature @ delta / 2 - delta @ cross @ weights[0].sin()

    def outer(delta):
        return (delta - target).square().sum() + (weights[0] ** 3).sum() * delta.sum() + weights[1].square().sum()

    return inner, outer, weights, draw(n)


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_the_hypergradient_is_that_through_an_unrolled_loop(terms):
    """Where Phi is linear in delta, `terms` steps from anywhere have the same derivative by the weights, truncated."""
    inner, outer, weights, start = quadratic()
    unrolled = start.clone().requires_grad_()
    for _ in range(terms):
        (slope,) = torch.autograd.grad(inner(unrolled), unrolled, create_graph=True)
        unrolled = unrolled - 0.1 * slope
    want = torch.autograd.grad(outer(unrolled), weights)
    loss, got = i_bau.hypergradient(outer, inner, unrolled, weights, 0.1, terms)
    assert loss == outer(unrolled).detach()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_with_many_terms_it_is_the_derivative_at_the_inner_minimum():
    """Against finite differences of outer(argmin inner) by the first weights."""
    inner, outer, weights, start = quadratic(1)

    def minimum():
        delta = start.clone().requires_grad_()
        (hessian,) = [torch.autograd.functional.hessian(inner, delta)]
        (slope,) = torch.autograd.grad(inner(delta), delta)
        return (delta - torch.linalg.solve(hessian, slope)).detach()  # Newton's step, exact here

    _, got = i_bau.hypergradient(outer, inner, minimum(), weights, 0.1, 2000)
    slow, step = [], 1e-6
    for i in range(len(weights[0])):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weights[0][i] += sign * step
            ends.append(outer(minimum()).item())
            with torch.no_grad():
                weights[0][i] -= sign * step
        slow.append((ends[0] - ends[1]) / (2 * step))
    torch.testing.assert_close(got[0], torch.tensor(slow, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_a_network_s_hypergradient_by_whole_jacobians(clean):
    """v and dPhi / d weights written out as matrices, in float64, for a small network without kinks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    weights = list(net.parameters())
    x, y = torch.rand(4, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    delta = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    sizes = [w.numel() for w in weights]

    def at(flat):
        parts = [p.view_as(w) for p, w in zip(flat.split(sizes), weights, strict=True)]
        return dict(zip([n for n, _ in net.named_parameters()], parts, strict=True))

    def inner_at(d, flat):
        logits = torch.func.functional_call(net, at(flat), (x + d,))
        return 0.001 * d.square().sum() - F.cross_entropy(logits, y)

    def outer_at(d, flat):
        return F.cross_entropy(torch.func.functional_call(net, at(flat), (x + 2 * d,)), y)

    def phi(d, flat):
        return (d - 0.1 * torch.func.grad(inner_at)(d, flat)).flatten()

    flat = torch.cat([w.detach().flatten() for w in weights])
    by_delta = torch.func.jacrev(phi, 0)(delta, flat).view(12, 12)
    by_weights = torch.func.jacrev(phi, 1)(delta, flat)
    slope = torch.func.grad(outer_at, 0)(delta, flat).flatten()
    v = sum(slope @ torch.linalg.matrix_power(by_delta, j) for j in range(5))
    want = torch.func.grad(outer_at, 1)(delta, flat) + v @ by_weights

    def inner(d):
        return 0.001 * d.square().sum() - F.cross_entropy(net(x + d), y)

    _, got = i_bau.hypergradient(lambda d: F.cross_entropy(net(x + 2 * d), y), inner, delta, weights, 0.1, 5)
    torch.testing.assert_close(torch.cat([g.flatten() for g in got]), want)


def test_the_perturbation_takes_a_step_from_zero_on_each_batch(tiny, clean):
    """Against plain autograd on the network's own predictions; and the inner loss falls."""
    config = i_bau.Config(delta_lr=2.0)
    batches = [(data.to_float(clean[0][i : i + 40]), None) for i in (0, 40, 80)]
    delta = torch.zeros(1, 3, 32, 32)
    for x, _ in batches:
        delta.requires_grad_()
        own = tiny(x).argmax(1)
        loss = F.cross_entropy(tiny(x + delta), own) - 0.001 * (delta**2).sum()
        loss.backward()
        delta = (delta + 2.0 * delta.grad).detach()
    found = i_bau.perturbation(tiny, batches, config)
    torch.testing.assert_close(found, delta, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        x, own = batches[0][0], tiny(batches[0][0]).argmax(1)
        losses = [i_bau.inner_loss(tiny, d, x, own, 0.001).item() for d in (torch.zeros_like(delta), found)]
    assert losses[1] < losses[0] - 0.5


def test_i_bau_keeps_the_statistics_of_batch_norm(tiny, clean):
    kept = {k: v.clone() for k, v in tiny.named_buffers()}
    net = i_bau.repair(tiny, clean[0][:30], clean[1][:30], i_bau.Config(epochs=1)).model
    assert all(torch.equal(v, kept[k]) for k, v in net.named_buffers())
    assert not torch.equal(net.bn1.weight, tiny.bn1.weight)


def test_one_percent_of_a_batch_carries_delta_but_one_image_at_least(tiny, clean, monkeypatch):
    seen = []

    def watched(outer, inner, delta, weights, *_):
        with torch.no_grad(), monkeypatch.context() as patch:
            x = []
            patch.setattr(
                i_bau, "forward", lambda net, images, dtype: (x.append(images), torch.zeros(len(images), 10))[1]
            )
            outer(torch.ones_like(delta))
            outer(torch.zeros_like(delta))
            inner(torch.ones_like(delta))
        added = (x[0] - x[1]).flatten(1)
        seen.append((len(added), added.amax(1).round().sum().item(), added.amin(1).round().sum().item()))
        assert (x[2].amin((1, 2, 3)) >= 1).all()  # all of the first batch, in the inner loss
        return torch.zeros(()), [torch.zeros_like(w) for w in weights]

    monkeypatch.setattr(i_bau, "hypergradient", watched)
    images, labels = clean[0].repeat(4, 1, 1, 1), clean[1].repeat(4)
    i_bau.repair(tiny, images, labels, i_bau.Config(epochs=1, batch_size=300))
    assert seen == [(300, 3, 3), (200, 2, 2)]
    seen.clear()
    i_bau.repair(tiny, *clean, i_bau.Config(epochs=1))
    assert seen == [(100, 1, 1), (25, 1, 1)]


def test_i_bau_computes_in_fp32_whatever_it_is_told(tiny, clean):
    few = clean[0][::6], clean[1][::6]
    a, b = (i_bau.repair(tiny, *few, i_bau.Config(epochs=1), 0, d).model for d in (torch.float32, torch.bfloat16))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# --- FT-SAM ---------------------------------------------------------------------------------------------------------


def test_a_step_on_a_quadratic_by_hand():
    """L = (a u^2 + b v^2) / 2 at u = 3, v = -1 with a = 1, b = 4.

    g = (3, -4); |w| g = (9, -4), norm sqrt(97). e = rho w^2 g / norm = rho (27, -4) / sqrt(97). The step from w takes
    the gradient at w + e: (3 + 27 r, 4 (-1 - 4 r)) with r = rho / sqrt(97), weight decay at w.
    """
    u, v = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, -1.0))
    optimizer = ft_sam.AdaptiveSAM([u, v], rho=0.5, lr=0.1, momentum=0.9, weight_decay=0.01)

    def gradient():
        optimizer.zero_grad()
        ((u**2 + 4 * v**2) / 2).backward()

    r = 0.5 / math.sqrt(97)
    gradient()
    optimizer.climb()
    assert (u.item(), v.item()) == pytest.approx((3 + 27 * r, -1 - 4 * r))
    gradient()
    optimizer.step()
    first = (3 + 27 * r + 0.01 * 3, 4 * (-1 - 4 * r) - 0.01)
    assert (u.item(), v.item()) == pytest.approx((3 - 0.1 * first[0], -1 - 0.1 * first[1]))
    gradient()  # without a climb it is SGD: its momentum is that of the step above
    before, second = (u.item(), v.item()), (u.item() * 1.01, v.item() * 4.01)
    optimizer.step()
    want = [w - 0.1 * (0.9 * m + g) for w, m, g in zip(before, first, second, strict=True)]
    assert [u.item(), v.item()] == pytest.approx(want)


def test_the_weights_come_back_to_the_bit(tiny, clean):
    optimizer = ft_sam.AdaptiveSAM(tiny.parameters(), rho=2.0, lr=0.0)
    before = [p.detach().clone() for p in tiny.parameters()]
    F.cross_entropy(tiny(data.to_float(clean[0][:20])), clean[1][:20]).backward()
    optimizer.climb()
    norm = sum(
        (p.detach() / b - 1).nan_to_num(0, 0, 0).square().sum() for p, b in zip(tiny.parameters(), before, strict=True)
    )
    assert norm.sqrt().item() == pytest.approx(2.0, rel=0.02)  # of e / |w|: the radius
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(tiny.parameters(), before, strict=True))


def test_running_averages_follow_the_first_pass_alone(tiny, clean):
    """One epoch of one batch at rate 0: the averages are those of a single pass in train mode."""
    config = ft_sam.Config(epochs=1, batch_size=len(clean[0]), lr=0.0)
    net = ft_sam.repair(tiny, *clean, config, seed=0).model
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(clean[0]), generator=generator)
    once = copy.deepcopy(tiny).train()
    with torch.no_grad():
        once(data.augment(data.to_float(clean[0][order]), generator))
    for name in ("bn1", "layer3.0.bn2", "layer4.1.bn1"):
        a, b = net.get_submodule(name), once.get_submodule(name)
        torch.testing.assert_close(a.running_mean, b.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.running_var, b.running_var, rtol=1e-4, atol=1e-5)
        assert a.momentum == b.momentum == 0.1


def test_the_smooth_labels_are_nine_tenths_and_a_ninetieth():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 10, generator=g, dtype=torch.float64), torch.arange(6)
    soft = torch.full((6, 10), 0.1 / 9, dtype=torch.float64)
    soft[torch.arange(6), labels] = 0.9
    want = -(soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(ft_sam.smooth_loss(logits, labels, 0.1), want)


def test_the_rate_swings_once_in_200_steps_and_goes_on_where_it_was(tiny, clean, monkeypatch):
    config = ft_sam.Config()
    assert [ft_sam.rate_at(s, config) for s in (0, 50, 100, 150, 200, 1000)] == pytest.approx(
        [0.01, 0.005, 0, 0.005, 0.01, 0.01]
    )
    rates, states, step = [], [], ft_sam.AdaptiveSAM.step
    monkeypatch.setattr(
        ft_sam.AdaptiveSAM, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    few, config = (clean[0][:50], clean[1][:50]), ft_sam.Config(epochs=2, batch_size=20, lr_period=12)
    ft_sam.repair(tiny, *few, config, callback=lambda _now, state_of: states.append(state_of()))
    want = [0.005 * (1 + math.cos(math.pi * s / 6)) for s in range(6)]
    assert rates == pytest.approx(want)
    rates.clear()
    ft_sam.repair(tiny, *few, config, state=states[0])
    assert rates == pytest.approx(want[3:])


# --- FST ------------------------------------------------------------------------------------------------------------


def test_the_last_linear_layer_is_found_by_its_type():
    net = nn.ModuleDict({"head": nn.Linear(4, 10), "neck": nn.Conv2d(1, 1, 1)})
    assert linear_layer(net) is net["head"]


@pytest.mark.parametrize("module", [fst])
def test_a_network_without_a_linear_layer_is_refused(module, clean):
    with pytest.raises(ValueError, match="no linear layer"):
        module.repair(Plain(head=False).eval(), *clean)


def test_the_fresh_layer_is_drawn_in_its_range():
    linear = nn.Linear(400, 300)
    fst.redraw_linear(linear, torch.Generator().manual_seed(0))
    for p in (linear.weight, linear.bias):
        assert p.abs().max() <= 0.05
        assert p.abs().mean().item() == pytest.approx(0.025, rel=0.1)  # of a uniform one in +-0.05
    old = linear.weight.clone()
    fst.redraw_linear(linear, torch.Generator().manual_seed(1))
    assert not torch.equal(linear.weight, old)


def test_the_penalty_and_the_scale_by_hand(tiny, clean, monkeypatch):
    """One step on all images: the loss is CE + 0.2 * sum of W * W_old, and the step ends on the old norm."""
    norms = []
    monkeypatch.setattr(fst, "rescale", lambda w, norm, f=fst.rescale: (f(w, norm), norms.append(w.norm().item()))[0])
    config = fst.Config(epochs=1, batch_size=len(clean[0]))
    repaired = fst.repair(tiny, *clean, config, seed=0)
    generator = torch.Generator().manual_seed(0)
    net = copy.deepcopy(tiny).train()
    fst.redraw_linear(net.linear, generator)
    order = torch.randperm(len(clean[0]), generator=generator)
    x = data.augment(data.to_float(clean[0][order]), generator)
    ce = F.cross_entropy(net(x), clean[1][order])
    rows = zip(net.linear.weight.tolist(), tiny.linear.weight.tolist(), strict=True)
    penalty = 0.2 * sum(a * b for new, old in rows for a, b in zip(new, old, strict=True))
    assert abs(penalty) > 1e-3
    assert repaired.history["loss"] == [pytest.approx(ce.item() + penalty, rel=1e-4)]
    old = tiny.linear.weight.norm().item()
    assert norms == [pytest.approx(old, rel=1e-5)]
    # the step itself: plain descent from the fresh weights, then scaled
    ce.backward()
    want = (net.linear.weight - 0.01 * (net.linear.weight.grad + 0.2 * tiny.linear.weight)).detach()
    torch.testing.assert_close(repaired.model.linear.weight, want * old / want.norm(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(repaired.model.linear.bias, (net.linear.bias - 0.01 * net.linear.bias.grad).detach())


def test_the_new_layer_turns_away_from_the_old_one(tiny, clean):
    likeness = []
    for alpha in (0.0, 5.0):
        net = fst.repair(tiny, *clean, fst.Config(alpha=alpha, epochs=3, batch_size=32)).model
        likeness.append(F.cosine_similarity(net.linear.weight.flatten(), tiny.linear.weight.flatten(), dim=0).item())
    assert likeness[1] < likeness[0] - 0.2
