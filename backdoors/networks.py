"""Networks that trained triggers share."""

from torch import nn


def _block(a, b, activate=True):
    return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b, momentum=0.05), *([nn.ReLU()] if activate else [])]


def encoder_decoder(width, out):
    """Return the encoder-decoder of Input-aware: (N, 3, H, W) to (N, out, H, W), H and W multiples of 8.

    Channels are width, 2 width, 4 width and back; the last layer has no activation.
    """
    a, b, c = width, 2 * width, 4 * width
    layers, last = [], 3
    for channels in (a, b, c):
        layers += [*_block(last, channels), *_block(channels, channels), nn.MaxPool2d(2)]
        last = channels
    layers += _block(c, c)
    for first, second, third in ((c, c, b), (b, b, a), (a, a, out)):
        layers += [nn.Upsample(scale_factor=2, mode="bilinear"), *_block(first, second)]
        layers += _block(second, third, activate=third != out)
    return nn.Sequential(*layers)
