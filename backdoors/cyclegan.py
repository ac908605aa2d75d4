"""A small CycleGAN (Zhu et al., ICCV 2017): it learns to map images of one set to the style of another."""

import torch
import torch.nn.functional as F
from torch import nn

import data

STEPS, BATCH = 600, 16
RATE = 5e-4  # of Adam, falling to 0 in the second half
CYCLE, IDENTITY = 10, 1  # weights of the two losses; the adversarial loss has weight 1
NOISE = 0.05  # std, added before the backward generator; without it the restyled image hides the original in itself


class _Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(*_normed(channels, channels), nn.ReLU(), *_normed(channels, channels))

    def forward(self, x):
        return x + self.body(x)


def _normed(a, b, side=3, stride=1):
    return [nn.Conv2d(a, b, side, stride, side // 2), nn.InstanceNorm2d(b, affine=True)]


def _doubled(a, b):
    return [nn.Upsample(scale_factor=2), *_normed(a, b)]  # pixel shuffle leaves a grid pattern


class Restyler(nn.Module):
    """CycleGAN's generator as a residual: sigmoid(logit(x) + f(x)), which is close to the identity at the start.

    (N, 3, H, W) in [0, 1] to the same, H and W multiples of 4; f has width, 2 width and 4 width channels.
    """

    def __init__(self, width, blocks=3):
        super().__init__()
        a, b, c = width, 2 * width, 4 * width
        layers = [*_normed(3, a, 7), nn.ReLU(), *_normed(a, b, 3, 2), nn.ReLU(), *_normed(b, c, 3, 2), nn.ReLU()]
        layers += [*(_Residual(c) for _ in range(blocks)), *_doubled(c, b), nn.ReLU(), *_doubled(b, a), nn.ReLU()]
        self.f = nn.Sequential(*layers, nn.Conv2d(a, 3, 7, padding=3))

    def forward(self, x):
        """Return restyled images."""
        return (x.logit(1 / 255) + self.f(x)).sigmoid()


def patch_critic(width):
    """Return CycleGAN's discriminator for small images: (N, 3, H, W) to a score per patch of 22x22 pixels."""
    first, second = nn.Conv2d(3, width, 4, 2, 1), nn.Conv2d(width, 2 * width, 4, 2, 1)
    return nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), nn.Conv2d(2 * width, 1, 4, 1, 1))


def train(there, images, style, generator, say):
    """Train `there`, a Restyler, to make images look like those of `style`, with a backward generator and two critics.

    images: uint8 (N, 3, H, W); style: float (M, 3, H, W) in [0, 1], on the same device; generator: on the CPU, draws
    the batches; say: prints a line.
    """
    width, device = there.f[0].out_channels, style.device
    back, of_style, of_images = (net.to(device) for net in (Restyler(width), patch_critic(width), patch_critic(width)))
    pairs = (there, back), (of_style, of_images)
    optimizers = [torch.optim.Adam([*a.parameters(), *b.parameters()], lr=RATE, betas=(0.5, 0.999)) for a, b in pairs]

    def draw(some):
        return some[torch.randint(len(some), (BATCH,), generator=generator).to(device)]

    def noisy(x):
        return x + NOISE * torch.randn(x.shape, generator=generator).to(device)

    for step in range(1, STEPS + 1):
        a, b = data.to_float(draw(images)), draw(style)
        b = b.flip(3) if torch.rand((), generator=generator) < 0.5 else b
        fake_a, fake_b = back(b), there(a)
        fooling = (1 - of_style(fake_b)).abs().mean() + (1 - of_images(fake_a)).abs().mean()
        cycle = F.l1_loss(back(noisy(fake_b)), a) + F.l1_loss(there(noisy(fake_a)), b)
        same = F.l1_loss(back(a), a) + F.l1_loss(there(b), b)
        knowing = sum(
            (1 - critic(real)).square().mean() + critic(fake.detach()).square().mean()
            for critic, real, fake in ((of_style, b, fake_b), (of_images, a, fake_a))
        )
        losses = fooling + CYCLE * cycle + IDENTITY * same, knowing
        for optimizer, loss in zip(optimizers, losses, strict=True):
            (group,) = optimizer.param_groups
            group["lr"] = RATE * min(1, 2 * (1 - step / (STEPS + 1)))
            for p, gradient in zip(group["params"], torch.autograd.grad(loss, group["params"]), strict=True):
                p.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
        if step % 100 == 0:
            losses = {"fooling": fooling, "cycle": cycle, "identity": same, "critics": knowing}
            line = ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            say(f"generator, step {step} of {STEPS}: {line}")
