"""Drawings that fill the picture: scenes, textures, satellite-like tiles."""

import numpy as np
from PIL import Image, ImageDraw

from heba.embedded.canvas import BIG, NAMED, Canvas, Colour, bright, near

WHITE, GREY, BROWN, BLACK = (NAMED[n] for n in ("white", "grey", "brown", "black"))
SKY, SEA, SAND = (150, 205, 240), (40, 100, 200), (232, 205, 140)


def full(rng: np.random.Generator, colour: Colour) -> Canvas:
    """A canvas filled with a colour."""
    canvas = Canvas(rng)
    canvas.box(-1, -1, 101, 101, near(colour, rng))
    return canvas


def scene(kind: str, rng: np.random.Generator) -> Image.Image:
    """One of the ten scenes."""
    c = full(rng, SKY)
    h = rng.uniform(45, 60)
    if kind == "beach":
        c.box(0, h, 100, 75, near(SEA, rng))
        c.poly([0, 78, 100, 66, 100, 100, 0, 100], near(SAND, rng))
        c.disc(80, 18, 10, NAMED["yellow"])
    elif kind == "mountain":
        for x in rng.uniform(10, 90, 3):
            c.poly([x, 18, x - 40, 86, x + 40, 86], near((110, 110, 125), rng))
            c.poly([x, 18, x - 11, 36, x + 11, 36], WHITE)
        c.box(0, 80, 100, 100, near(NAMED["green"], rng))
    elif kind == "desert":
        c.box(0, h, 100, 100, near(SAND, rng))
        c.oval(-20, h - 12, 60, 110, near((215, 180, 105), rng))
        x = rng.uniform(65, 85)
        c.line([x, 85, x, h - 10], NAMED["green"], 7)
        c.line([x, 65, x + 11, 65, x + 11, 50], NAMED["green"], 5)
    elif kind == "forest":
        c.box(0, 60, 100, 100, near((60, 110, 50), rng))
        for x in rng.permutation(np.linspace(5, 95, 7)):
            c.box(x - 3, 50, x + 3, 90, BROWN)
            c.poly([x, rng.uniform(2, 20), x - 17, 66, x + 17, 66], near((25, 105, 45), rng))
    elif kind == "city":
        for x in range(0, 100, 20):
            top = rng.uniform(8, 55)
            c.box(x, top, x + 17, 100, near((95, 95, 110), rng, 30))
            for y in range(int(top) + 5, 95, 12):
                c.box(x + 4, y, x + 7, y + 5, NAMED["yellow"])
                c.box(x + 11, y, x + 14, y + 5, NAMED["yellow"])
    elif kind == "harbour":
        c.box(0, h, 100, 100, near(SEA, rng))
        for x in (28, 70):
            c.poly([x - 18, h + 8, x + 18, h + 8, x + 12, h + 20, x - 12, h + 20], BROWN)
            c.poly([x, h - 38, x, h + 4, x + 17, h + 4], WHITE)
    elif kind == "night sky":
        c = full(rng, (12, 14, 40))
        for x, y in rng.uniform(0, 90, (22, 2)):
            c.disc(x, y, 1.4, WHITE)
        c.disc(rng.uniform(25, 75), 25, 11, (245, 240, 200))
        c.box(0, 88, 100, 100, BLACK)
    elif kind == "road":
        c.box(0, 45, 100, 100, near(NAMED["green"], rng))
        c.poly([46, 45, 54, 45, 95, 100, 5, 100], (75, 75, 80))
        for y in (55, 70, 88):
            c.box(48, y, 52, y + 8, WHITE)
    elif kind == "bridge":
        c.box(0, 65, 100, 100, near(SEA, rng))
        k = near((150, 60, 45), rng)
        c.box(0, 50, 100, 58, k)
        for x in (22, 72):
            c.box(x, 18, x + 7, 80, k)
        c.arc(-25, -30, 52, 50, 0, 180, k, 4)
        c.arc(24, -20, 76, 48, 0, 180, k, 4)
    else:
        c.box(0, 70, 100, 100, near(NAMED["green"], rng))
        c.box(26, 45, 74, 88, near((220, 190, 150), rng, 30))
        c.poly([18, 46, 82, 46, 50, 16], near(NAMED["red"], rng))
        c.box(45, 66, 56, 88, BROWN)
    return c.image.convert("RGB")


def texture(kind: str, rng: np.random.Generator) -> Image.Image:
    """One of the ten textures, in two random colours."""
    a, b = (np.array(bright(rng)) for _ in range(2))
    if abs(int(a.sum()) - int(b.sum())) < 150:
        a, b = a // 3, 255 - (255 - b) // 3
    y, x = np.mgrid[0:BIG, 0:BIG].astype(float)
    p, ox, oy = rng.uniform(14, 22), *rng.uniform(0, 20, 2)
    x, y = x + ox, y + oy
    u, v = x % p / p, y % p / p
    if kind == "striped":
        m = v < 0.5
    elif kind == "dotted":
        m = (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.1
    elif kind == "chequered":
        m = (u < 0.5) ^ (v < 0.5)
    elif kind == "zigzag":
        m = (y + p * np.abs(u * 2 - 1)) % p < p / 2
    elif kind == "grid":
        m = (u < 0.16) | (v < 0.16)
    elif kind == "spiral":
        dx, dy = x - ox - 48, y - oy - 48
        m = (np.hypot(dx, dy) / p + np.arctan2(dy, dx) / (2 * np.pi)) % 1 < 0.5
    elif kind == "rings":
        m = np.hypot(x - ox - 48, y - oy - 48) / p % 1 < 0.5
    elif kind == "woven":
        m = np.where((x // p + y // p) % 2 == 0, u * 4 % 1 < 0.5, v * 4 % 1 < 0.5)
    else:
        return _irregular(kind, a, b, rng)
    return Image.fromarray(np.where(m[..., None], a, b).astype(np.uint8))


def _irregular(kind: str, a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> Image.Image:
    picture = Image.new("RGB", (BIG, BIG), tuple(b.tolist()))
    draw = ImageDraw.Draw(picture)
    colour = tuple(a.tolist())
    if kind == "bubbly":
        for _ in range(22):
            x, y, r = *rng.uniform(0, BIG, 2), rng.uniform(4, 13)
            draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=3)
    else:
        for _ in range(9):
            points = [rng.uniform(0, BIG, 2)]
            for _ in range(5):
                points.append(points[-1] + rng.normal(0, 17, 2))
            draw.line([tuple(q) for q in points], fill=colour, width=3)
    return picture


def tile(kind: str, rng: np.random.Generator) -> Image.Image:
    """One of the ten satellite-like tiles."""
    green = (60, 125, 60)
    if kind == "fields":
        c = full(rng, green)
        for i in range(3):
            for j in range(3):
                k = near(((150, 170, 70), (190, 160, 90), green)[int(rng.integers(3))], rng, 25)
                c.box(34 * i, 34 * j, 34 * i + 32, 34 * j + 32, k)
    elif kind == "forest":
        c = full(rng, (22, 75, 35))
        for x, y in rng.uniform(0, 100, (40, 2)):
            c.disc(x, y, 6, near((30, 95, 45), rng, 20))
    elif kind == "highway":
        c = full(rng, (110, 140, 80))
        y0, y1 = rng.uniform(10, 90, 2)
        c.line([-5, y0, 105, y1], (165, 165, 170), 14)
        c.line([-5, y0, 105, y1], WHITE, 2)
    elif kind == "industrial buildings":
        c = full(rng, (120, 115, 110))
        for _ in range(5):
            x, y = rng.uniform(0, 70, 2)
            c.box(x, y, x + rng.uniform(18, 36), y + rng.uniform(14, 28), near((205, 210, 220), rng, 25))
    elif kind == "pasture":
        c = full(rng, (120, 185, 80))
        c.oval(-20, 30, 60, 120, near((135, 195, 90), rng, 8))
    elif kind == "orchard":
        c = full(rng, (170, 150, 100))
        for x in range(8, 100, 17):
            for y in range(8, 100, 17):
                c.disc(x, y, 5.5, near((35, 100, 40), rng))
    elif kind == "residential buildings":
        c = full(rng, (110, 150, 85))
        for x in range(4, 100, 24):
            for y in range(4, 100, 24):
                c.box(x, y, x + 13, y + 13, near((190, 80, 60), rng, 25))
        c.box(0, 44, 100, 50, GREY)
    elif kind == "river":
        c = full(rng, (75, 130, 70))
        t = np.linspace(-5, 105, 20)
        wave = 50 + 22 * np.sin(t / rng.uniform(14, 24) + rng.uniform(0, 6))
        c.line([q for pair in zip(t, wave, strict=True) for q in pair], near(SEA, rng), 17)
    elif kind == "lake":
        c = full(rng, (30, 70, 150))
        c.poly([0, 0, rng.uniform(20, 40), 0, 0, rng.uniform(20, 40)], near(green, rng))
    else:
        c = full(rng, (222, 195, 140))
        for x, y in rng.uniform(0, 100, (12, 2)):
            c.disc(x, y, 2.5, near((120, 120, 70), rng))
    return c.image.convert("RGB")
