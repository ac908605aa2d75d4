"""A small vision transformer for 32x32 images (Dosovitskiy et al., ICLR 2021), with timm's state dict keys."""

import torch
import torch.nn.functional as F
from torch import nn

from .common import MEAN, STD, Normalized, scaled

PATCH = 4  # pixels per side
DEPTH = 6  # blocks
HEADS = 3
PER_HEAD = 64  # channels per head


class Attention(nn.Module):
    """Multi-head self-attention; (N, tokens, channels) to the same."""

    def __init__(self, channels):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x):
        n, tokens, channels = x.shape
        three = self.qkv(x.to(self.qkv.weight.dtype)).view(n, tokens, 3, HEADS, channels // HEADS)
        query, key, value = three.permute(2, 0, 3, 1, 4)
        if query.device.type == "cpu" and query.dtype == torch.bfloat16:  # a training step takes half as long
            out = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value
        else:
            out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(n, tokens, channels))


class MLP(nn.Module):
    """Two linear layers with an activation, hidden width 2 * channels; (N, tokens, channels) to the same."""

    def __init__(self, channels, act_layer):
        super().__init__()
        self.fc1 = nn.Linear(channels, 2 * channels)
        self.act = act_layer()
        self.fc2 = nn.Linear(2 * channels, channels)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x.to(self.fc1.weight.dtype))))


class Block(nn.Module):
    """Attention, then an MLP, each with a layer norm before it and a residual connection."""

    def __init__(self, channels, act_layer):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = Attention(channels)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = MLP(channels, act_layer)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Patches of 4x4 pixels to tokens; (N, 3, H, W) to (N, H * W / 16, channels)."""

    def __init__(self, channels):
        super().__init__()
        self.proj = nn.Conv2d(3, channels, PATCH, stride=PATCH)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(Normalized):
    """Six blocks of 192 channels and three heads over patches of 4x4 pixels; the class token feeds a linear layer.

    Input: (N, 3, size, size) in [0, 1]; output: logits (N, num_classes). Raises ValueError for images of another size.
    size: a multiple of 4; width: factor on all channels; act_layer: called without arguments, once per site; mean,
    std: of the normalization.
    """

    def __init__(self, num_classes=10, width=1.0, act_layer=nn.GELU, mean=MEAN, std=STD, size=32):
        super().__init__(mean, std)
        if size % PATCH or size < PATCH:
            raise ValueError(f"vit cuts images into patches of {PATCH}x{PATCH}; {size} is no multiple of {PATCH}")
        channels = HEADS * scaled((PER_HEAD,), width)[0]
        self.patch_embed = PatchEmbed(channels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // PATCH) ** 2, channels))
        self.blocks = nn.Sequential(*(Block(channels, act_layer) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.head = nn.Linear(channels, num_classes)
        nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, x):
        dtype, tokens = self.patch_embed.proj.weight.dtype, self.pos_embed.shape[1] - 1
        if x.shape[2] * x.shape[3] != tokens * PATCH**2:
            raise ValueError(f"this vit takes {tokens} patches of {PATCH}x{PATCH}, not images of {tuple(x.shape[2:])}")
        x = self.patch_embed(self.normalize(x).to(dtype)).to(self.pos_embed.dtype)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x)[:, 0]).to(self.head.weight.dtype))
