"""The networks: their state dict keys, and each against an independent implementation from its description."""

from flags import NETWORKS, NORMALIZATIONS, InputError

import math
import sys

import pytest
import torch
import torch.nn.functional as F

import fast
import models
from models import libraries

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def randomized(name, **kwargs):
    """A network in eval mode with non-trivial batch norm, and its state dict."""
    torch.manual_seed(0)
    model = models.get_model(name, **kwargs).eval()
    for key, value in model.state_dict().items():
        if value.dim() == 1 and key.endswith(("running_var", "weight")):
            value.uniform_(0.5, 1.5)
        elif value.dim() == 4:
            torch.nn.init.kaiming_normal_(value)  # so that a deep network still hears its input
        elif value.dim() == 1:
            value.normal_(std=0.1)
    return model, model.state_dict()


def bn(x, w, at):
    """Batch norm in eval mode, written out."""
    mean, var, weight, bias = (w[f"{at}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias


def conv(x, w, at, stride=1):
    """A convolution with padding that keeps the size, up to the stride."""
    weight = w[f"{at}.weight"]
    return F.conv2d(x, weight, w.get(f"{at}.bias"), stride, weight.shape[-1] // 2)


def normalized(x, name="authors"):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in NORMALIZATIONS[name])
    return (x - mean) / std


def test_the_flags_name_the_networks():
    assert tuple(models.NETWORKS) == NETWORKS


def test_the_102_keys_of_backdoorbenchs_preactresnet18():
    want = {"conv1.weight", "linear.weight", "linear.bias"}
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at = f"layer{stage}.{block}"
            want |= {f"{at}.conv1.weight", f"{at}.conv2.weight"}
            want |= {f"{at}.{norm}.{k}" for norm in ("bn1", "bn2") for k in BN}
        if stage > 1:
            want.add(f"layer{stage}.0.shortcut.0.weight")
    assert len(want) == 102
    state = models.get_model("preactresnet18").state_dict()
    assert set(state) == want
    assert state["conv1.weight"].shape == (64, 3, 3, 3)
    assert state["layer2.0.shortcut.0.weight"].shape == (128, 64, 1, 1)
    assert state["linear.weight"].shape == (10, 512)


@pytest.mark.parametrize("size", [32, 64])
def test_preactresnet18_computes_what_its_description_says(size):
    model, w = randomized("preactresnet18", width=1 / 8, mean=(0, 0, 0), std=(1, 1, 1))
    x = torch.rand(3, 3, size, size)
    out = conv(x, w, "conv1")
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            first = bn(out, w, f"{at}.bn1").relu()
            shortcut = conv(first, w, f"{at}.shortcut.0", stride) if f"{at}.shortcut.0.weight" in w else out
            inner = bn(conv(first, w, f"{at}.conv1", stride), w, f"{at}.bn2").relu()
            out = conv(inner, w, f"{at}.conv2") + shortcut
    want = out.mean((2, 3)) @ w["linear.weight"].T + w["linear.bias"]
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "channels"), [("vgg11", "64 M 128 M 256 256 M 512 512 M 512 512 M"),
    ("vgg13", "64 64 M 128 128 M 256 256 M 512 512 M 512 512 M"),
    ("vgg16", "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M"),
    ("vgg19", "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M")],
)  # fmt: skip
def test_vgg_computes_what_its_list_of_layers_says(name, channels):
    model, w = randomized(name, width=1 / 8, num_classes=7)
    x, seen, place = torch.rand(2, 3, 32, 32), set(), 0
    out = normalized(x)
    for word in channels.split():
        if word == "M":
            out, place = F.max_pool2d(out, 2), place + 1
            continue
        assert w[f"features.{place}.weight"].shape[0] == int(word) / 8
        out = bn(conv(out, w, f"features.{place}"), w, f"features.{place + 1}").relu()
        seen |= {f"features.{place}.{k}" for k in ("weight", "bias")} | {f"features.{place + 1}.{k}" for k in BN}
        place += 3
    torch.testing.assert_close(
        model(x), F.linear(out.flatten(1), w["classifier.weight"], w["classifier.bias"]), rtol=1e-4, atol=1e-5
    )
    assert set(w) == seen | {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(("name", "blocks"), [("wideresnet16", 2), ("wideresnet28", 4)])
@pytest.mark.parametrize("k", [1, 2])
def test_wide_resnets_compute_what_their_paper_says(name, blocks, k):
    model, w = randomized(name, width=k)
    x, c_in = torch.rand(2, 3, 32, 32), 16
    out, seen = conv(normalized(x), w, "conv1"), {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{k}" for k in BN}
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        for i in range(blocks):
            at, c = f"block{stage}.layer.{i}", 16 * k * 2 ** (stage - 1)
            first = bn(out, w, f"{at}.bn1").relu()
            s = stride if i == 0 else 1
            shortcut = out if c_in == c else conv(first, w, f"{at}.convShortcut", s)
            seen |= {f"{at}.{n}.{k}" for n in ("bn1", "bn2") for k in BN}
            seen |= {f"{at}.conv{n}.weight" for n in (1, 2)} | ({f"{at}.convShortcut.weight"} if c_in != c else set())
            inner = bn(conv(first, w, f"{at}.conv1", s), w, f"{at}.bn2").relu()
            out, c_in = conv(inner, w, f"{at}.conv2") + shortcut, c
    out = bn(out, w, "bn1").relu().mean((2, 3))
    torch.testing.assert_close(model(x), F.linear(out, w["fc.weight"], w["fc.bias"]), rtol=1e-4, atol=1e-5)
    assert set(w) == seen


@pytest.mark.parametrize("size", [32, 48])
def test_vit_computes_what_its_paper_says(size):
    model, w = randomized("vit", width=0.25, size=size)
    x, side = torch.rand(2, 3, size, size), size // 4
    # a patch is 3 x 4 x 4 numbers
    patches = normalized(x).unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, side * side, 48)
    tokens = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    tokens = torch.cat((w["cls_token"].expand(2, -1, -1), tokens), 1) + w["pos_embed"]

    def norm(t, at):
        t = (t - t.mean(-1, keepdim=True)) / torch.sqrt(t.var(-1, keepdim=True, unbiased=False) + 1e-6)
        return t * w[f"{at}.weight"] + w[f"{at}.bias"]

    def linear(t, at):
        return t @ w[f"{at}.weight"].T + w[f"{at}.bias"]

    for i in range(6):
        q, k, v = linear(norm(tokens, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, -1)
        heads = []
        for one, two, three in zip(q.chunk(3, -1), k.chunk(3, -1), v.chunk(3, -1), strict=True):
            heads.append((one @ two.transpose(1, 2) / math.sqrt(one.shape[-1])).softmax(-1) @ three)
        tokens = tokens + linear(torch.cat(heads, -1), f"blocks.{i}.attn.proj")
        inner = linear(norm(tokens, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        tokens = tokens + linear(inner, f"blocks.{i}.mlp.fc2")
    want = linear(norm(tokens[:, 0], "norm"), "head")
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # attention is computed in another way there
        torch.testing.assert_close(model(x).float(), want, rtol=0, atol=0.02 * want.abs().max().item())
    with pytest.raises(ValueError, match="patches"):
        model(torch.rand(1, 3, size + 4, size))


@pytest.mark.parametrize("name", models.NETWORKS)
def test_every_network_normalizes_with_what_it_is_given(name):
    raw, w = randomized(name, width=0.25, mean=(0, 0, 0), std=(1, 1, 1))
    other = models.get_model(name, width=0.25, mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2)).eval()
    other.load_state_dict(w)
    x = torch.rand(2, 3, 32, 32)
    inner = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 1, 2]).view(3, 1, 1)
    torch.testing.assert_close(other(x), raw(inner), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other(x), raw(x), rtol=1e-3, atol=1e-3)
    other.set_normalization((0, 0, 0), (1, 1, 1))
    assert torch.equal(other(x), raw(x))
    assert not {"mean", "std"} & set(raw.state_dict())


@pytest.mark.parametrize(
    ("mean", "std"), [((0, 0), (1, 1)), ((0, 0, 0), (1, 0, 1)), ((0, 0, math.nan), (1, 1, 1)), ((0, 0, 0), (1, 1, -1))]
)
def test_a_normalization_that_cannot_be_is_refused(mean, std):
    with pytest.raises(ValueError, match="three"):
        models.get_model("resnet18", width=1 / 16, mean=mean, std=std)


@pytest.mark.parametrize("name", models.NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_copy_for_a_search_computes_the_same(name, dtype):
    model, _ = randomized(name, width=0.25)
    x = torch.rand(4, 3, 32, 32)
    net, *_ = fast.search_network(model, x[:2], dtype, 100)
    with torch.no_grad():
        want, got = model(x), net(x)
    assert got.dtype == dtype
    scale = want.abs().max().item()
    torch.testing.assert_close(got.float(), want, rtol=0, atol=scale * (1e-4 if dtype == torch.float32 else 0.05))


@pytest.mark.parametrize("name", models.NETWORKS)
def test_every_network_learns_in_a_few_steps(name):
    torch.manual_seed(0)
    model = models.get_model(name, 2, 0.25)
    step = fast.training_step(model, 0.25, 1000, 32, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    y = torch.arange(32) % 2
    x = 0.5 * torch.rand(32, 3, 32, 32) + 0.5 * y[:, None, None, None]
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(step(x, y, 32)[0].item())
        optimizer.step()
    assert losses[-1] < losses[0] / 2


# --- networks of the libraries ----------------------------------------------------------------------------------------


def there(name):
    try:
        libraries.library(name)
    except InputError:
        return False
    return True


needs_torchvision = pytest.mark.skipif(not there("torchvision"), reason="no torchvision here")
needs_timm = pytest.mark.skipif(not there("timm"), reason="no timm here")


@needs_torchvision
def test_a_network_of_torchvision_normalizes_and_has_its_own_keys():
    torchvision = libraries.library("torchvision")
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    ours = models.get_model("torchvision:resnet18", 7, mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2)).eval()
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.rand(2, 3, 32, 32)
    inner = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 1, 2]).view(3, 1, 1)
    torch.testing.assert_close(ours(x), theirs(inner), rtol=1e-4, atol=1e-5)
    assert models.describe_state_dict(theirs.state_dict(), "torchvision:resnet18") == {
        "network": "torchvision:resnet18", "width": 1.0, "num_classes": 7
    }  # fmt: skip
    with pytest.raises(ValueError, match="closest is resnet18.*--network torchvision:NAME"):
        models.describe_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match="it is no torchvision:resnet34: it lacks layer1.2"):
        models.describe_state_dict(theirs.state_dict(), "torchvision:resnet34")


@needs_torchvision
def test_a_transformer_of_one_size_is_given_its_size():
    """As BackdoorBench's vit_b_16 has it: Resize(224), then the network; here a small one by torchvision's class."""
    torchvision = libraries.library("torchvision")
    theirs = torchvision.models.VisionTransformer(64, 16, 1, 2, 32, 64, num_classes=5).eval()
    torch.nn.init.normal_(theirs.heads.head.weight)
    ours = models.get_model("torchvision:resnet18", 5, mean=(0, 0, 0), std=(1, 1, 1)).eval()
    ours.network, ours.side = theirs, theirs.image_size
    x = torch.rand(2, 3, 32, 32)
    want = theirs(torchvision.transforms.Resize((64, 64))(x))
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5)
    assert models.shown_size(theirs.state_dict()) == 64
    assert models.shown_size(models.get_model("vit", size=48).state_dict()) == 48
    assert models.shown_size(models.get_model("resnet18", width=1 / 16).state_dict()) is None


def test_an_output_object_is_unwrapped():
    class Theirs(torch.nn.Linear):
        def forward(self, x):
            return type("Output", (), {"logits": super().forward(x.flatten(1))})

    ours = models.get_model("torchvision:resnet18") if there("torchvision") else None
    if ours is None:
        pytest.skip("no torchvision here")
    ours.network = Theirs(12, 2)
    assert ours(torch.rand(3, 3, 2, 2)).shape == (3, 2)


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "reason"), [("torchvision:resnet19", "no network"), ("torchvision:fcn_resnet50", "no")]
)
def test_torchvisions_other_names_are_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        models.get_model(name)
    with pytest.raises(ValueError, match="no width"):
        models.get_model("torchvision:resnet18", width=0.5)


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_a_library_that_is_not_there_is_a_line(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=f"{name} does not import here .*pip install {name}") as caught:
        models.get_model(f"{name}:resnet18")
    assert "\n" not in str(caught.value)


@needs_timm
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnet18"])
def test_a_network_of_timm(name):
    theirs = libraries.library("timm").create_model(name, num_classes=4).eval()
    ours = models.get_model(f"timm:{name}", 4, mean=(0, 0, 0), std=(1, 1, 1)).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 224, 224)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert ours(torch.rand(1, 3, 32, 32)).shape == (1, 4)
    assert models.describe_state_dict(theirs.state_dict(), f"timm:{name}")["num_classes"] == 4
