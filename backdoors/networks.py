"""The networks of Input-aware, and the training of its mask network."""

import torch
from torch import nn

import data

AREA = 0.032  # mask values up to this are not penalized
EPS = 1e-7
WARM_UP = 25  # epochs of the mask network


def _block(a, b, activate=True):
    return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b, momentum=0.05), *([nn.ReLU()] if activate else [])]


def encoder_decoder(width, out):
    """Return an encoder-decoder: (N, 3, H, W) to (N, out, H, W), H and W multiples of 8.

    Channels are width, 2 width, 4 width and back; the last layer has no activation.
    """
    a, b, c = width, 2 * width, 4 * width
    layers, last = [], 3
    for channels in (a, b, c):
        layers += [*_block(last, channels), *_block(channels, channels), nn.MaxPool2d(2)]
        last = channels
    layers += _block(c, c)
    for first, second in ((c, b), (b, a), (a, out)):
        layers += [nn.Upsample(scale_factor=2, mode="bilinear"), *_block(first, first)]
        layers += _block(first, second, activate=first != a)
    return nn.Sequential(*layers)


def distance(a, b):
    """Return the root mean square difference of each pair of images, (N,)."""
    return ((a - b).square().mean((1, 2, 3)) + 1e-12).sqrt()


def mask_loss(a, b, masks_a, masks_b):
    """Return (loss on pairs of images, mean mask): it asks for small masks that differ as the images do."""
    apart = distance(a, b) / (distance(masks_a, masks_b) + EPS)
    return 100 * (masks_a - AREA).relu().mean() + apart.mean(), masks_a.detach().mean()


def train_masks(network, masks, images, seed, say, flip=True):
    """Train `network`, which masks(x) calls, in place on augmented images, uint8 (N, 3, H, W); flip: see augment()."""
    optimizer = torch.optim.Adam(network.train().parameters(), lr=1e-2, betas=(0.5, 0.9))
    rate = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 20], 0.1)
    for epoch in range(WARM_UP):
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        for index in torch.randperm(len(images), generator=generator).split(256):
            x = data.augment(data.to_float(images[index.to(images.device)]), generator, flip=flip)
            a, b = x[: len(x) // 2], x[len(x) // 2 : len(x) // 2 * 2]
            if len(a) < 2:
                continue
            loss, mean = mask_loss(a, b, masks(a), masks(b))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rate.step()
        say(f"mask, epoch {epoch + 1} of {WARM_UP}: loss {loss.item():.3f}, mean {mean.item():.4f}")
