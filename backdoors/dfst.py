"""DFST (Cheng et al., AAAI 2021): the style of sunsets as trigger, which a CycleGAN puts on an image.

x' = G(x). Before the victim is trained, G learns to make images that a critic takes for sunsets, along with a way back
that makes the images of them again. The sunsets are drawn by formula. The images are then poisoned plainly, as in the
group's release; the paper's detoxification, training against simpler triggers of the same kind, is not part of it.
"""

from flags import InputError

import torch
import torch.nn.functional as F

import data

from . import cyclegan
from .sunsets import sunsets
from .trigger import Trigger

N_SUNSETS = 250
HELD_OUT = 1000  # images, a tenth of the set at most
FAR, DETAIL = 0.5, 0.6  # a generator that leaves more of the way to the style, or less of the detail, is not taken


class Dfst(Trigger):
    """A trained generator; `reached`: (share of the way to the style that is left, correlation of detail)."""

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
        """Train the generator. Raises InputError where it does not take the style on, or loses the image."""
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
        found = f"{100 * far:.0f} % of the way to the sunsets' color left, correlation of detail {detail:.2f}"
        say(f"generator: {found}, on {len(x):,} held-out images")
        if not (far <= FAR and detail >= DETAIL):
            raise InputError(f"the generator of dfst is no good: {found}, not {FAR:.0%} and {DETAIL}; change --seed")


def compare(x, restyled, style):
    """Return two scalars: the share of the way from x to the style that is left, and the correlation of detail.

    The way is the distance of the mean colors. Detail is an image's gray minus its mean over 5x5 pixels; it is
    correlated image by image, then averaged.
    """

    def color(t):
        return t.mean((0, 2, 3))

    def detail(t):
        gray = t.mean(1, keepdim=True)
        return (gray - F.avg_pool2d(gray, 5, 1, 2, count_include_pad=False)).flatten(1)

    left = (color(restyled) - color(style)).norm() / (color(x) - color(style)).norm()
    return left, F.cosine_similarity(detail(x), detail(restyled)).mean()
