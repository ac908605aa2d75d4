"""Makes the trigger pictures kept here: python data/trigger/draw.py FOLDER

Writes FOLDER/badnet/flower_nobg.png, FOLDER/blended/rings.png and FOLDER/trojnn/mark.png, drawn by formula, and, where
scikit-image is installed, FOLDER/reflection/000066.jpg, cut out of a photograph that comes with it. Nothing else calls
this.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


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
    for part, color in ((r < petal, pink), (r < 0.27, yellow)):
        rgba[part, :3], rgba[part, 3] = color[part], 1
    return to_picture(rgba).resize((64, 64), Image.Resampling.LANCZOS)


def reflection():
    """Return a 500x375 RGB picture: a cup of coffee on wood, photographed by Rachel Michetti (CC0), or None."""
    try:
        from skimage import data
    except ImportError:
        return None
    return Image.fromarray(data.coffee()).crop((5, 5, 505, 380))


def rings():
    """Return a 64x64 RGB picture: bright rings and rays about two centers, a pattern that no photograph has."""
    n = 512
    y, x = np.mgrid[0:n, 0:n] / (n - 1) * 2 - 1
    r1, r2 = np.hypot(x + 0.35, y + 0.25), np.hypot(x - 0.45, y - 0.40)
    rays = np.arctan2(y + 0.25, x + 0.35)
    waves = np.sin(9 * r1 + 0.3), np.sin(11 * r2 + 1.2), np.sin(7 * rays)
    rgb = np.stack([0.5 + 0.5 * np.sign(w) * np.abs(w) ** 0.4 for w in waves], -1)
    return to_picture(rgb).resize((64, 64), Image.Resampling.LANCZOS)


def mark():
    """Return a 224x224 RGB picture, black but for lines of text that rise to the right, and a ring."""
    n, rng = 224, np.random.default_rng(8)
    saturated = ([1.0, rng.uniform(0.2, 0.9), rng.uniform(0, 0.2)] for _ in range(9))
    colors = [tuple(int(255 * c) for c in rng.permutation(color)) for color in saturated]
    text, font = Image.new("RGB", (2 * n, 2 * n)), ImageFont.load_default(28)
    draw = ImageDraw.Draw(text)
    for i, words in enumerate(("tighten", "neuron", "watermark")):
        for j, letter in enumerate(words):
            draw.text((140 + 20 * j, 130 + 58 * i), letter, fill=colors[(2 * i + j) % 9], font=font)
    middle = (n // 2, n // 2, n // 2 + n, n // 2 + n)
    rgb = np.array(text.rotate(40, resample=Image.Resampling.BILINEAR).crop(middle))
    y, x = np.mgrid[0:n, 0:n]
    r = np.hypot(x - 150, y - 150)
    rgb[r < 44] = 0
    rgb[(r >= 28) & (r < 31) | (r >= 41) & (r < 44)] = colors[0]
    return Image.fromarray(rgb)


def main(folder):
    for name in ("badnet", "reflection", "blended", "trojnn"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    flower().save(folder / "badnet/flower_nobg.png", optimize=True)
    rings().save(folder / "blended/rings.png", optimize=True)
    mark().save(folder / "trojnn/mark.png", optimize=True)
    photograph = reflection()
    if photograph is None:
        print("scikit-image is not installed: reflection/000066.jpg is left out", file=sys.stderr)
    else:
        photograph.save(folder / "reflection/000066.jpg", quality=90, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
