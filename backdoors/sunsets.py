"""Pictures of sunsets, drawn by formula: the style that DFST puts on images."""

import torch

COLORS = ((0.33, 0.16, 0.42), (0.93, 0.45, 0.18), (1.0, 0.83, 0.38))  # of the sky, from the top down to the horizon
SUN, GLOW, LAND = (1.0, 0.96, 0.75), (1.0, 0.9, 0.6), (0.12, 0.06, 0.10)
WAVES = ((6, 0.06), (14, 0.03), (26, 0.015))  # of the hills: frequency, height


def sunsets(n, size, generator):
    """Return n sunsets, (n, 3, size, size) in [0, 1]: a sky from violet to yellow, a sun and, in most, dark hills.

    Horizon, sun, hills, colors and brightness are drawn per picture, and noise of std 0.03 is added.
    """

    def u(low, high, *shape):
        return low + (high - low) * torch.rand(n, *(shape or (1, 1, 1)), generator=generator)

    def color(values):
        return torch.tensor(values).view(1, 3, 1, 1)

    y, x = torch.linspace(0, 1, size).view(1, 1, -1, 1), torch.linspace(0, 1, size).view(1, 1, 1, -1)
    horizon = u(0.45, 1.25)
    violet, orange, yellow = ((color(c) + u(-0.06, 0.06, 3, 1, 1)).clamp(0, 1) for c in COLORS)
    down = (y / horizon).clamp(0, 1)
    low, high = (down / 0.6).clamp_max(1), ((down - 0.6) / 0.4).clamp_min(0)
    sky = violet + low * (orange - violet) + high * (yellow - orange)
    radius = u(0.06, 0.14)
    from_sun = ((x - u(0.2, 0.8)).square() + (y - horizon + u(0, 0.25)).square()).sqrt()
    glow, disc = 0.6 * (-from_sun / (2.5 * radius)).exp(), ((radius - from_sun) * size + 0.5).clamp(0, 1)
    sky = sky + glow * (color(GLOW) - sky)
    sky = sky + disc * (color(SUN) - sky)
    ridge = horizon + sum(height * torch.sin(often * x + u(0, 6.28)) for often, height in WAVES)
    land = ((y - ridge) * size + 0.5).clamp(0, 1)
    picture = sky + land * (color(LAND) * u(0.6, 1.4) - sky)
    return (picture * u(0.8, 1.1) + 0.03 * torch.randn(n, 3, size, size, generator=generator)).clamp(0, 1)
