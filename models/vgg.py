"""VGG-11/13/16/19 with batch norm and one linear layer for 32x32 images (Simonyan and Zisserman, ICLR 2015)."""

import torch.nn.functional as F
from torch import nn

from .common import MEAN, STD, Normalized, scaled


class VGG(Normalized):
    """Five stages of 3x3 convolutions, each with batch norm and an activation; a 2x2 max-pool after every stage.

    Input: (N, 3, 32, 32) in [0, 1], or another size that is a multiple of 32; output: logits (N, num_classes).
    depths: convolutions per stage; width: factor on all channels; act_layer: called without arguments, once per site;
    mean, std: of the normalization.
    """

    def __init__(self, depths, num_classes=10, width=1.0, act_layer=nn.ReLU, mean=MEAN, std=STD):
        super().__init__(mean, std)
        layers, c_in = [], 3
        for depth, c in zip(depths, scaled((64, 128, 256, 512, 512), width), strict=True):
            for _ in range(depth):
                layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.BatchNorm2d(c), act_layer()]
                c_in = c
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(c_in, num_classes)

    def forward(self, x):
        out = self.features(self.normalize(x).to(self.classifier.weight.dtype))
        return self.classifier(F.avg_pool2d(out, out.shape[2:]).flatten(1))  # global, 1x1 for 32x32 images
