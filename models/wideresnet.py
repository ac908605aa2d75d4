"""Wide ResNets for 32x32 images (Zagoruyko and Komodakis, BMVC 2016), with NAD's state dict keys."""

import torch.nn.functional as F
from torch import nn

from .common import MEAN, STD, Normalized, scaled
from .resnet import _conv3x3


class WideBlock(nn.Module):
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
        # at width 1 the first stage has the stem's 16 channels, and no such layer
        changes = stride != 1 or c_in != channels
        self.convShortcut = nn.Conv2d(c_in, channels, 1, stride=stride, bias=False) if changes else None

    def forward(self, x):
        out = self.act1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        return self.conv2(self.act2(self.bn2(self.conv1(out)))) + shortcut


class Stage(nn.Module):
    """`depth` blocks one after another, the first with the stride."""

    def __init__(self, depth, c_in, channels, stride, act_layer):
        super().__init__()
        first = WideBlock(c_in, channels, stride, act_layer)
        self.layer = nn.Sequential(first, *(WideBlock(channels, channels, 1, act_layer) for _ in range(depth - 1)))

    def forward(self, x):
        return self.layer(x)


class WideResNet(Normalized):
    """A stem of 16 channels, three stages, batch norm and activation, average pool, one linear layer.

    Input: (N, 3, 32, 32) in [0, 1], or another size that is a multiple of 4; output: logits (N, num_classes).
    depth: 6 n + 4 layers, for n blocks per stage; width: the widening factor k (10 in WRN-28-10);
    act_layer: called without arguments, once per site; mean, std: of the normalization.
    """

    def __init__(self, depth, num_classes=10, width=1.0, act_layer=nn.ReLU, mean=MEAN, std=STD):
        super().__init__(mean, std)
        n = (depth - 4) // 6
        channels = (16, *scaled((16, 32, 64), width))
        self.conv1 = _conv3x3(3, channels[0])
        for i, stride in enumerate((1, 2, 2)):
            self.add_module(f"block{i + 1}", Stage(n, channels[i], channels[i + 1], stride, act_layer))
        self.bn1 = nn.BatchNorm2d(channels[-1])
        self.act = act_layer()
        self.fc = nn.Linear(channels[-1], num_classes)

    def forward(self, x):
        out = self.conv1(self.normalize(x).to(self.conv1.weight.dtype))
        out = self.act(self.bn1(self.block3(self.block2(self.block1(out)))))
        return self.fc(F.avg_pool2d(out, out.shape[2:]).flatten(1))
