"""Filter: the Nashville filter of a photo app as trigger (ABS: Liu et al., CCS 2019; filter as in pilgram 1.2.1).

Six steps on v = round(255 x), clipped to 0..255 after each: darken with (247, 176, 153) by 143 / 255, lighten with
(0, 70, 150) by 102 / 255, sepia, contrast 1.2, brightness 1.05, saturation 1.2, with each step's own rounding.
"""

import torch

from .trigger import Trigger

DARKEN, DARKEN_BY = (247, 176, 153), 143
LIGHTEN, LIGHTEN_BY = (0, 70, 150), 102
SEPIA = ((0.8786, 0.1538, 0.0378), (0.0698, 0.9372, 0.0336), (0.0544, 0.1068, 0.8262))
SATURATION = ((1.1574, -0.143, -0.0144), (-0.0426, 1.057, -0.0144), (-0.0426, -0.143, 1.1856))


class Filter(Trigger):
    """A warm, faded look over the whole image."""

    times = 3

    def __init__(self, _folder, size=32):
        super().__init__()
        for name, values in (("darken", DARKEN), ("lighten", LIGHTEN)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64).view(3, 1, 1))
        for name, values in (("sepia", SEPIA), ("saturation", SATURATION)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64))

    def forward(self, x):
        """Return triggered images; (N, 3, H, W) in [0, 1] to the same."""

        def mix(v, layer, by):
            return (by * layer / 255).floor() + ((255 - by) * v / 255).floor()

        def colors(v, matrix):
            return (torch.einsum("ij,njhw->nihw", matrix, v) + 0.5).floor()

        v = (255 * x.double()).round()
        v = mix(v, torch.minimum(v, self.darken), DARKEN_BY).clamp(0, 255)
        v = mix(v, torch.maximum(v, self.lighten), LIGHTEN_BY).clamp(0, 255)
        v = colors(v, self.sepia).clamp(0, 255)
        v = (1.2 * v - 25.5).round().clamp(0, 255)  # torch rounds half to even, as this step does
        v = (1.05 * v).round().clamp(0, 255)
        return (colors(v, self.saturation).clamp(0, 255) / 255).to(x.dtype)
