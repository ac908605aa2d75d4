"""ResNet-18/34/50 for 32x32 images (He et al., CVPR 2016), with one activation module per site."""

import torch.nn.functional as F
from torch import nn

from .common import MEAN, STD, Normalized, scaled


def _conv3x3(c_in, c_out, stride=1):
    return nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)


def _shortcut(c_in, c_out, stride):
    if stride == 1 and c_in == c_out:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; (N, C, H, W) to (N, C', H / stride, W / stride)."""

    expansion = 1

    def __init__(self, c_in, channels, stride, act_layer):
        super().__init__()
        self.conv1 = _conv3x3(c_in, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = act_layer()
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(c_in, channels, stride)
        self.act2 = act_layer()

    def forward(self, x):
        out = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; (N, C, H, W) to (N, C', H / stride, W / stride)."""

    expansion = 4

    def __init__(self, c_in, channels, stride, act_layer):
        super().__init__()
        c_out = self.expansion * channels
        self.conv1 = nn.Conv2d(c_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = act_layer()
        self.conv2 = _conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = act_layer()
        self.conv3 = nn.Conv2d(channels, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.shortcut = _shortcut(c_in, c_out, stride)
        self.act3 = act_layer()

    def forward(self, x):
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.act2(self.bn2(self.conv2(out)))
        return self.act3(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet(Normalized):
    """A ResNet for 32x32 images: 3x3 stem of stride 1, no max-pool, four stages, 4x4 average pool, one linear layer.

    Input: (N, 3, 32, 32) in [0, 1], or another size that is a multiple of 8; output: logits (N, num_classes).
    block: BasicBlock or Bottleneck; depths: blocks per stage; width: factor on all channels.
    act_layer: called without arguments, once per site; mean, std: of the normalization.
    """

    def __init__(self, block, depths, num_classes=10, width=1.0, act_layer=nn.ReLU, mean=MEAN, std=STD):
        super().__init__(mean, std)
        channels = scaled((64, 128, 256, 512), width)
        self.conv1 = _conv3x3(3, channels[0])
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.act = act_layer()
        c_in = channels[0]
        for stage, (depth, c) in enumerate(zip(depths, channels, strict=True), start=1):
            blocks = []
            for i in range(depth):
                blocks.append(block(c_in, c, 2 if stage > 1 and i == 0 else 1, act_layer))
                c_in = c * block.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(c_in, num_classes)

    def forward(self, x):
        # the weights may have a lower precision than the images
        x = self.normalize(x).to(self.conv1.weight.dtype)
        out = self.act(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(F.avg_pool2d(out, out.shape[2:]).flatten(1))  # global, 4x4 for 32x32 images
