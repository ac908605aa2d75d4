"""DFST (Cheng et al., AAAI 2021): the trigger is the style of sunsets, which a CycleGAN transfers to an image.

x' = G(x). Before the victim is trained, G learns to make images that a critic takes for sunsets, together with a
backward generator that restores them. The sunsets are drawn by formula. Poisoning is plain, as in OrthogLinearBackdoor:
the paper's detoxification (training against simpler triggers of the same kind) is left out.
"""

from flags import InputError

import torch
import torch.nn.functional as F

import data

from . import cyclegan
from .sunsets import sunsets
from .trigger import Trigger

N_SUNSETS = 250
HELD_OUT = 1000  # images, at most a tenth of the set
FAR, DETAIL = 0.5, 0.6  # largest color distance left, smallest correlation of detail, see compare()


class Dfst(Trigger):
    """A trained generator; `reached`: what compare() gives on held-out images."""

    width = 16

    def __init__(self, _folder, size=32, width=None):
        super().__init__()
        if size % 4:
            raise ValueError(f"images of {size}x{size} do not pass the generator; take a multiple of 4")
        self.width, self.size = width or self.width, size
        self.network = cyclegan.Restyler(self.width).requires_grad_(False)
        self.register_buffer("reached", torch.zeros(2))

    def forward(self, x):
        """Return restyled images; (N, 3, H, W) in [0, 1] to the same."""
        return self.network(x) if len(x) else x  # instance norm takes no empty batch

    def prepare(self, images, labels, target, seed, resumed, say, surrogate=None):
        """Train the generator. Raises InputError if it is too far from the style or loses the image's detail."""
        del labels, target, surrogate
        if resumed:
            return
        generator = torch.Generator().manual_seed(seed)
        style = sunsets(N_SUNSETS, self.size, generator).to(images.device, memory_format=torch.channels_last)
        n = len(images) - min(HELD_OUT, len(images) // 10)
        cyclegan.train(self.network.requires_grad_(True), images[:n], style, generator, say)
        self.network.requires_grad_(False)
        x = data.to_float(images[n:])
        far, detail = self.reached.copy_(torch.stack(compare(x, self(x), style))).tolist()
        found = f"{100 * far:.0f} % of the color distance to the sunsets left, correlation of detail {detail:.2f}"
        say(f"generator: {found}, on {len(x):,} held-out images")
        if not (far <= FAR and detail >= DETAIL):
            wanted = f"at most {FAR:.0%} and at least {DETAIL} are wanted"
            raise InputError(f"the generator of dfst has failed: {found}; {wanted}; change --seed")


def compare(x, restyled, style):
    """Return two scalars: the share of the color distance from x to the style that is left, the correlation of detail.

    The color distance is that of the mean colors. Detail is an image's gray minus its mean over 5x5 pixels; the
    correlation between x and `restyled` is taken image by image and averaged.
    """

    def color(t):
        return t.mean((0, 2, 3))

    def detail(t):
        gray = t.mean(1, keepdim=True)
        return (gray - F.avg_pool2d(gray, 5, 1, 2, count_include_pad=False)).flatten(1)

    left = (color(restyled) - color(style)).norm() / (color(x) - color(style)).norm()
    return left, F.cosine_similarity(detail(x), detail(restyled)).mean()
