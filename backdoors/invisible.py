"""Invisible, SSBA or ISSBA (Li et al., ICCV 2021): an encoder hides the same secret in every image.

x' = clip(x + 12/255 tanh(E(x, secret))). The encoder E is trained before the victim, together with a decoder that reads
random secrets of 20 bits back. The mean square of tanh(E) is penalized above 1/2 alone, which is a PSNR of 29.6 dB: a
change much fainter than that is read by the decoder but learned late by a victim. E is frozen while the victim is
trained.
"""

from flags import InputError

import torch
import torch.nn.functional as F

import data

from .steganography import SecretEncoder, secret_decoder
from .trigger import Trigger

BITS, AMPLITUDE = 20, 12 / 255
STEPS, BATCH = 700, 128  # BATCH: images per step
STRENGTH, PRICE = 0.5, 1.0  # largest mean square of tanh(E) without a penalty; weight of what exceeds it
HELD_OUT = 2000  # images, at most a tenth of the set
ACCURACY, PSNR = 0.95, 28.0  # smallest share of bits read back, smallest PSNR in dB


class Invisible(Trigger):
    """A trained encoder and a secret; `reached`: (share of bits read back, PSNR in dB) on held-out images."""

    width = 16
    times = 5

    def __init__(self, _folder, size=32, width=None):
        super().__init__()
        if size % 16:
            raise ValueError(f"images of {size}x{size} do not pass the encoder; take a multiple of 16")
        self.width, self.size = width or self.width, size
        self.encoder = SecretEncoder(self.width, BITS, size).requires_grad_(False)
        self.register_buffer("secret", torch.zeros(BITS))
        self.register_buffer("reached", torch.zeros(2))

    def hide(self, x, secrets):
        """Return images (N, 3, H, W) with secrets (N, BITS) of 0 and 1 in them."""
        return (x + AMPLITUDE * self.encoder(x, secrets).tanh()).clamp(0, 1)

    def forward(self, x):
        """Return images with the trigger's secret; (N, 3, H, W) in [0, 1] to the same."""
        return self.hide(x, self.secret.expand(len(x), -1))

    def prepare(self, images, labels, target, seed, resumed, say, surrogate=None):
        """Train the encoder and draw the secret. Raises InputError below ACCURACY or PSNR on held-out images."""
        del labels, target, surrogate
        if resumed:
            return
        generator = torch.Generator().manual_seed(seed)
        self.secret.copy_(draw_secrets(1, generator, images)[0])
        n = len(images) - min(HELD_OUT, len(images) // 10)
        decoder = secret_decoder(self.width, BITS, self.size).to(images.device)
        self.encoder.requires_grad_(True)
        optimizer = torch.optim.Adam([*self.encoder.parameters(), *decoder.parameters()], lr=1e-3)
        for step in range(1, STEPS + 1):
            index = torch.randint(n, (BATCH,), generator=generator)
            x, secrets = data.to_float(images[index.to(images.device)]), draw_secrets(BATCH, generator, images)
            residuals = self.encoder(x, secrets).tanh()
            read = decoder((x + AMPLITUDE * residuals).clamp(0, 1) - 0.5)
            loss = F.binary_cross_entropy_with_logits(read, secrets) + PRICE * excess(residuals)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 100 == 0:
                right = ((read > 0) == (secrets > 0.5)).float().mean().item()
                say(f"encoder, step {step} of {STEPS}: loss {loss.item():.3f}, {100 * right:.1f} % of the bits read")
        self.encoder.requires_grad_(False)
        accuracy, psnr = self.reached.copy_(self.check(images[n:], decoder, generator)).tolist()
        found = f"{100 * accuracy:.2f} % of the bits read back, PSNR {psnr:.1f} dB"
        say(f"encoder: {found}, on {len(images) - n:,} held-out images")
        if not (accuracy >= ACCURACY and psnr >= PSNR):
            raise InputError(
                f"the encoder of invisible reached {found}, below {ACCURACY:.0%} or {PSNR:g} dB; change --seed"
            )

    @torch.no_grad()
    def check(self, images, decoder, generator):
        """Return (share of random bits read back, mean PSNR in dB), (2,), of images rounded to bytes."""
        right, psnr = [], []
        for part in images.split(500):
            x, secrets = data.to_float(part), draw_secrets(len(part), generator, images)
            hidden = (self.hide(x, secrets) * 255).round() / 255
            right.append(((decoder(hidden - 0.5) > 0) == (secrets > 0.5)).float().mean(1))
            psnr.append(-10 * (hidden - x).square().mean((1, 2, 3)).clamp_min(1e-10).log10())
        return torch.stack((torch.cat(right).mean(), torch.cat(psnr).mean()))


def excess(residuals):
    """Return how far the mean square of `residuals`, in [-1, 1], exceeds STRENGTH; a scalar, 0 for weaker ones."""
    return (residuals.square().mean() - STRENGTH).relu()


def draw_secrets(n, generator, like):
    """Return n random secrets, (n, BITS) of 0 and 1, on the device of `like`."""
    return torch.randint(2, (n, BITS), generator=generator).float().to(like.device)
