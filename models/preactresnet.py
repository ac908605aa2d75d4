"""PreActResNet-18 for 32x32 images (He et al., ECCV 2016), with BackdoorBench's state dict keys."""

import torch.nn.functional as F
from torch import nn

from .common import MEAN, STD, Normalized, scaled
from .resnet import _conv3x3


class PreActBlock(nn.Module):
    """Batch norm and activation before each of two convolutions; (N, C, H, W) to (N, C', H / stride, W / stride).

    The shortcut is the input, or, where the shape changes, a 1x1 convolution of the first activation.
    """

    def __init__(self, c_in, channels, stride, act_layer):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.act1 = act_layer()
        self.conv1 = _conv3x3(c_in, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = act_layer()
        self.conv2 = _conv3x3(channels, channels)
        if stride != 1 or c_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, channels, 1, stride=stride, bias=False))

    def forward(self, x):
        out = self.act1(self.bn1(x))
        if hasattr(self, "shortcut"):
            x = self.shortcut(out)
        return self.conv2(self.act2(self.bn2(self.conv1(out)))) + x


class PreActResNet18(Normalized):
    """3x3 stem without batch norm, four stages of two blocks, average pool, one linear layer; no final batch norm.

    Input: (N, 3, 32, 32) in [0, 1], or another size that is a multiple of 8; output: logits (N, num_classes).
    width: factor on all channels; act_layer: called without arguments, once per site; mean, std: of the normalization.
    """

    def __init__(self, num_classes=10, width=1.0, act_layer=nn.ReLU, mean=MEAN, std=STD):
        super().__init__(mean, std)
        channels = scaled((64, 128, 256, 512), width)
        self.conv1 = _conv3x3(3, channels[0])
        c_in = channels[0]
        for stage, c in enumerate(channels, start=1):
            first = PreActBlock(c_in, c, 2 if stage > 1 else 1, act_layer)
            self.add_module(f"layer{stage}", nn.Sequential(first, PreActBlock(c, c, 1, act_layer)))
            c_in = c
        self.linear = nn.Linear(c_in, num_classes)

    def forward(self, x):
        out = self.conv1(self.normalize(x).to(self.conv1.weight.dtype))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(F.avg_pool2d(out, out.shape[2:]).flatten(1))  # global, 4x4 for 32x32 images
