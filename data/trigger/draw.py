"""Draws the trigger pictures kept here, from fixed seeds: python data/trigger/draw.py FOLDER

Writes FOLDER/badnet/flower_nobg.png, FOLDER/reflection/000066.jpg and FOLDER/blended/rings.png. Nothing else in the repository calls this.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 256  # of the scene, drawn at twice this


def to_picture(array):
    """Return (H, W, 3 or 4) floats in [0, 1] as a picture."""
    return Image.fromarray((np.clip(array, 0, 1) * 255).round().astype(np.uint8))


def flower():
    """Return a 64x64 RGBA picture: a pink flower with five petals and a yellow core, on transparent ground."""
    n = 512
    y, x = np.mgrid[0:n, 0:n] / (n - 1) * 2 - 1
    r, turn = np.hypot(x, y), np.arctan2(y, x) + np.pi / 2
    petal = 0.62 + 0.33 * np.cos(5 * turn)
    shade = np.clip(r / petal, 0, 1)
    pink = np.stack([0.98 - 0.10 * shade, 0.16 + 0.25 * (1 - shade), 0.52 + 0.20 * shade], -1)
    vein = (np.abs(np.sin(5 * turn / 2)) < 0.06) & (r > 0.3)
    pink = np.where(vein[..., None], pink * 0.8, pink)
    yellow = np.stack([np.full_like(r, 0.99), 0.85 - 0.2 * (r / 0.27), np.full_like(r, 0.10)], -1)
    rgba = np.zeros((n, n, 4))
    for part, colour in ((r < petal, pink), (r < 0.27, yellow)):
        rgba[part, :3], rgba[part, 3] = colour[part], 1
    return to_picture(rgba).resize((64, 64), Image.Resampling.LANCZOS)


def blur(array, radius):
    """Return (H, W, 3) floats in [0, 1] after a Gaussian blur."""
    return np.asarray(to_picture(array).filter(ImageFilter.GaussianBlur(radius))) / 255


def clouds(rng, n, stretch=1.0):
    """Return (n, n) fractal noise in [0, 1]; `stretch` above 1 draws it out sideways."""
    total = np.zeros((n, n))
    for octave in range(6):
        k = 3 * 2**octave
        grid = Image.fromarray(rng.random((k, max(2, round(k / stretch)))).astype(np.float32))
        total += np.asarray(grid.resize((n, n), Image.Resampling.BICUBIC)) * 0.55**octave
    return (total - total.min()) / (total.max() - total.min())


def facade(rng, z, height, top_colours):
    """Return (colour, solid) of a row of houses; `z`, `height`: where on the wall each pixel looks."""
    colour, solid = np.zeros((*z.shape, 3)), np.zeros(z.shape, bool)
    start = 0.0
    while start < 30:
        width, tall = rng.uniform(1.1, 1.9), rng.uniform(1.25, 2.5)
        wall, shop = np.array(top_colours[rng.integers(len(top_colours))]), rng.random(3) * 0.7 + 0.3
        here = (z >= start) & (z < start + width) & (height < tall)
        along, up = (z - start) / width * 3, (height - 0.1) / 0.62  # three windows a storey
        column, storey = np.floor(along).astype(int), np.floor(up).astype(int)
        lit = rng.random((3, 12)) < 0.65
        warm = rng.uniform(0.75, 1.1, (3, 12))
        at = np.clip(column, 0, 2), np.clip(storey, 0, 11)
        fa, fu = along - np.floor(along), up - np.floor(up)
        pane = (fa > 0.2) & (fa < 0.8) & (fu > 0.22) & (fu < 0.85) & (np.abs(fa - 0.5) > 0.03)
        glow = np.array([1.0, 0.80, 0.42]) * (warm[at] * (1 - 0.35 * fu))[..., None]
        glass = np.array([0.16, 0.22, 0.36]) + 0.12 * fu[..., None]
        c = wall * (0.75 + 0.25 * np.clip(height / 3, 0, 1))[..., None]
        c = np.where((fu < 0.06)[..., None], c * 0.7, c)
        c = np.where(pane[..., None], np.where(lit[at][..., None], glow, glass), c)
        ground = storey == 0
        awning = ground & (fu > 0.68)
        window = ground & (fu < 0.62) & (fa > 0.08) & (fa < 0.94)
        c = np.where(window[..., None], np.array([1.0, 0.90, 0.66]) * (0.75 + 0.3 * fu)[..., None], c)
        stripe = 0.8 + 0.2 * (np.floor(along * 4) % 2)
        c = np.where(awning[..., None], shop * stripe[..., None], c)
        c = np.where((storey < 0)[..., None], wall * 0.5, c)
        c = np.where((height > tall - 0.08)[..., None], wall * 1.25, c)
        colour[here], solid[here] = c[here], True
        start += width
    return colour, solid


def branch(draw, rng, x, y, angle, length, width):
    """Draw a leafless branch and what grows out of it."""
    x2, y2 = x + length * np.cos(angle), y + length * np.sin(angle)
    draw.line((x, y, x2, y2), fill=255, width=max(1, round(width)))
    if length > 30:
        for turn in rng.normal((-0.45, 0.40), 0.15):
            branch(draw, rng, x2, y2, angle + turn, length * rng.uniform(0.66, 0.84), width * 0.68)


def scene():
    """Return a 256x256 RGB picture: a wet street at dusk, houses with lit windows, lamps, a bare tree in front."""
    rng, n = np.random.default_rng(66), 2 * SIZE
    y, x = np.mgrid[0:n, 0:n] / n
    u, v = x - 0.56, 0.56 - y  # from the vanishing point, v upwards

    # sky
    t = np.clip(v / 0.56, 0, 1)[..., None]
    sky = np.array([1.0, 0.66, 0.40]) * (1 - t) ** 1.5 + np.array([0.30, 0.44, 0.74]) * (1 - (1 - t) ** 1.5)
    cover = np.clip((clouds(rng, n, 0.5) - 0.45) * 4, 0, 1)[..., None]
    sky = (sky * (1 - 0.8 * cover) + np.array([0.98, 0.66, 0.60]) * 0.8 * cover * (1 - 0.3 * t)) * (1 - 0.35 * t)

    # houses: walls at one unit to the left, 0.9 to the right; the eye is 0.42 above the ground
    out, far = sky.copy(), np.array([0.86, 0.60, 0.48])
    red, grey, blue, sand = (0.50, 0.22, 0.17), (0.36, 0.35, 0.40), (0.20, 0.27, 0.42), (0.58, 0.44, 0.31)
    for side, away, walls in ((u < 0, 1.0, (red, sand, grey)), (u > 0, 0.9, (blue, red, grey))):
        z = away / np.clip(np.abs(u), 1e-3, None)
        colour, solid = facade(rng, z - 1.6, v * z * 1.15 + 0.42, walls)
        haze = np.exp(-np.clip(z - 2, 0, None) / 9)[..., None]
        show = (solid & side & (v * z * 1.15 + 0.42 > 0))[..., None]
        out = np.where(show, colour * haze + far * (1 - haze), out)

    # lamps down both pavements
    lights, posts = np.zeros_like(out), Image.new("L", (n, n))
    draw = ImageDraw.Draw(posts)
    for z in (2.0, 2.9, 4.2, 6.2, 9.0):
        for side in (-0.62, 0.58):
            px, top, foot = 0.56 + side / z, 0.56 - 0.62 / z, 0.56 + 0.40 / z
            draw.line((px * n, top * n, px * n, foot * n), fill=255, width=max(2, round(14 / z)))
            d = np.hypot(x - px, y - top) * z
            lights += (1.0 * np.exp(-((d / 0.07) ** 2)) + 0.45 * np.exp(-d / 0.13))[..., None] * [1.0, 0.86, 0.60]
    posts = (np.asarray(posts) / 255)[..., None]

    # cars, the far ones first: paint, glass, wheels, lights
    traffic = Image.new("RGBA", (n, n))
    draw = ImageDraw.Draw(traffic)
    white, tail = (1.0, 0.95, 0.85), (1.0, 0.10, 0.06)
    for z, side, paint, tint in (
        (4.0, -0.24, (150, 150, 160), white),
        (2.9, 0.22, (165, 30, 34), tail),
        (2.2, -0.22, (235, 190, 40), white),
    ):
        cx, foot, k = (0.56 + side / z) * n, (0.56 + 0.37 / z) * n, n / z

        def box(left, low, right, high, fill, radius=0.0, cx=cx, foot=foot, k=k):
            corners = (cx + left * k, foot - high * k, cx + right * k, foot - low * k)
            draw.rounded_rectangle(corners, radius=radius * k, fill=(*fill, 255))

        box(-0.19, -0.01, 0.19, 0.02, (18, 18, 22))
        for wheel in (-0.17, 0.11):
            box(wheel, -0.01, wheel + 0.06, 0.06, (14, 14, 16), 0.01)
        box(-0.135, 0.10, 0.135, 0.28, paint, 0.04)
        box(-0.115, 0.15, 0.115, 0.26, (60, 78, 104), 0.02)
        box(-0.18, 0.035, 0.18, 0.165, paint, 0.03)
        box(-0.09, 0.05, 0.09, 0.085, (28, 28, 32), 0.01)
        for lamp in (-0.14, 0.14):
            d = np.hypot(x - cx / n - lamp / z, y - foot / n + 0.11 / z) * z
            lights += (1.3 * np.exp(-((d / 0.028) ** 2)) + 0.4 * np.exp(-d / 0.05))[..., None] * tint
    traffic = np.asarray(traffic) / 255

    # the road mirrors what stands above it, drawn out downwards by the wet
    ground = v * 1.15 / np.clip(np.abs(u), 1e-3, None) * np.where(u < 0, 1.0, 0.9) + 0.42 <= 0
    depth = 0.365 / np.clip(-v, 1e-3, None)
    across = u * depth
    road = np.abs(across) < 0.56
    asphalt = np.where(road[..., None], [0.27, 0.28, 0.33], [0.43, 0.40, 0.40])
    mark = road & (np.abs(across) < 0.025) & (np.floor(depth * 2.2) % 2 == 0)
    kerb = np.abs(np.abs(across) - 0.57) < 0.02
    asphalt = np.where((mark | kerb)[..., None], 0.80, asphalt)
    lit = np.clip(out + lights, 0, 1)
    ripple = (clouds(rng, n, 0.3) - 0.5) * 0.02
    rows = np.clip(((0.56 + 0.9 * v + ripple) * n).astype(int), 0, n - 1)
    columns = np.clip(((x + ripple * 0.6) * n).astype(int), 0, n - 1)
    tall = np.asarray(
        to_picture(lit).resize((n, n // 24), Image.Resampling.BOX).resize((n, n), Image.Resampling.BICUBIC)
    )
    mirror = tall[rows, columns] / 255
    wet = (0.38 + 0.3 * clouds(rng, n, 3))[..., None]
    out = np.where(ground[..., None], asphalt * (1 - wet) + mirror * wet, out)
    out = out * (1 - 0.85 * posts) + np.array([0.08, 0.08, 0.11]) * 0.85 * posts
    out = out * (1 - traffic[..., 3:]) + traffic[..., :3] * traffic[..., 3:] * 0.85
    out = 1 - (1 - np.clip(out, 0, 1)) * (1 - np.clip(lights, 0, 1) * 0.9)

    # a bare tree close by on the left
    twigs = Image.new("L", (n, n))
    branch(ImageDraw.Draw(twigs), rng, 0.10 * n, 1.0 * n, -1.5, 0.34 * n, 26)
    wood = (np.asarray(twigs.filter(ImageFilter.GaussianBlur(1.6))) / 255)[..., None]
    out = out * (1 - 0.9 * wood) + np.array([0.10, 0.07, 0.07]) * 0.9 * wood

    # the camera: bloom, focus, vignette, grain
    out = 1 - (1 - out) * (1 - 0.22 * blur(np.clip(out - 0.6, 0, 1) * 2, 14))
    out = blur(out, 1.3) * (0.98 - 0.6 * ((x - 0.5) ** 2 + (y - 0.5) ** 2))[..., None]
    out = np.clip(0.44 + 1.35 * (out - 0.40), 0.015, 1)
    small = np.asarray(to_picture(out).resize((SIZE, SIZE), Image.Resampling.BOX)) / 255
    return to_picture(small + rng.normal(0, 0.014, small.shape[:2])[..., None] + rng.normal(0, 0.006, small.shape))


def rings():
    """Return a 64x64 RGB picture: bright rings and rays about two centres, a pattern that no photograph has."""
    n = 512
    y, x = np.mgrid[0:n, 0:n] / (n - 1) * 2 - 1
    r1, r2 = np.hypot(x + 0.35, y + 0.25), np.hypot(x - 0.45, y - 0.40)
    rays = np.arctan2(y + 0.25, x + 0.35)
    waves = np.sin(9 * r1 + 0.3), np.sin(11 * r2 + 1.2), np.sin(7 * rays)
    rgb = np.stack([0.5 + 0.5 * np.sign(w) * np.abs(w) ** 0.4 for w in waves], -1)
    return to_picture(rgb).resize((64, 64), Image.Resampling.LANCZOS)


def main(folder):
    for name in ("badnet", "reflection", "blended"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    flower().save(folder / "badnet/flower_nobg.png", optimize=True)
    scene().save(folder / "reflection/000066.jpg", quality=90)
    rings().save(folder / "blended/rings.png", optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
