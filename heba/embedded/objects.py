"""Drawings of single things: objects, faces of pets, cars, flowers, food, people in action, digits."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from heba.embedded.canvas import NAMED, Canvas, bright, near, place

Painter = Callable[[Canvas], None]
BLACK, WHITE, GREY, BROWN = (NAMED[n] for n in ("black", "white", "grey", "brown"))
SKIN = (222, 176, 140)


def fish(c: Canvas) -> None:
    k = bright(c.rng)
    c.poly([68, 50, 95, 25, 95, 75], k)
    c.oval(8, 28, 76, 72, k)
    c.disc(24, 44, 5, WHITE)
    c.disc(24, 44, 2.5, BLACK)


def mushroom(c: Canvas) -> None:
    c.box(40, 45, 60, 90, (236, 225, 200))
    c.draw.pieslice(c._at((12, 12, 88, 92)), 180, 360, fill=near(NAMED["red"], c.rng))
    for x, y in ((35, 38), (55, 28), (70, 42)):
        c.disc(x, y, 5, WHITE)


def balloon(c: Canvas) -> None:
    c.line([50, 62, 46, 78, 54, 96], BLACK, 2)
    c.oval(24, 5, 76, 65, bright(c.rng))
    c.oval(36, 14, 46, 28, WHITE)


def lighthouse(c: Canvas) -> None:
    c.poly([36, 95, 64, 95, 57, 28, 43, 28], WHITE)
    k = near(NAMED["red"], c.rng)
    for y in (35, 57, 79):
        c.box(40, y, 60, y + 10, k)
    c.box(43, 16, 57, 28, NAMED["yellow"])
    c.poly([40, 16, 60, 16, 50, 4], k)


def clock(c: Canvas) -> None:
    c.disc(50, 50, 42, bright(c.rng))
    c.disc(50, 50, 35, WHITE)
    a = c.rng.uniform(0, 2 * np.pi, 2)
    for angle, r in zip(a, (20, 30), strict=True):
        c.line([50, 50, 50 + r * np.cos(angle), 50 + r * np.sin(angle)], BLACK, 4)


def snail(c: Canvas) -> None:
    c.oval(8, 68, 92, 88, (205, 170, 120))
    c.line([84, 76, 90, 50], (205, 170, 120), 5)
    k = bright(c.rng)
    c.disc(48, 52, 28, k)
    for r in (20, 12, 5):
        c.ring(48, 52, r, BLACK, 3)


def web(c: Canvas) -> None:
    k = GREY if c.rng.random() < 0.5 else (70, 70, 75)
    for a in np.arange(8) * np.pi / 4:
        c.line([50, 50, 50 + 46 * np.cos(a), 50 + 46 * np.sin(a)], k, 2)
    for r in (14, 28, 42):
        c.line([v for a in np.arange(9) * np.pi / 4 for v in (50 + r * np.cos(a), 50 + r * np.sin(a))], k, 2)


def traffic_light(c: Canvas) -> None:
    c.box(32, 5, 68, 90, BLACK)
    for y, n in ((20, "red"), (47, "yellow"), (74, "green")):
        c.disc(50, y, 11, near(NAMED[n], c.rng))


def snowman(c: Canvas) -> None:
    c.disc(50, 74, 23, WHITE)
    c.disc(50, 42, 16, WHITE)
    c.disc(50, 21, 11, WHITE)
    c.box(40, 3, 60, 13, BLACK)
    c.poly([50, 22, 68, 25, 50, 27], NAMED["orange"])


def butterfly(c: Canvas) -> None:
    k, m = bright(c.rng), bright(c.rng)
    for x0, x1 in ((8, 48), (52, 92)):
        c.oval(x0, 12, x1, 52, k)
        c.oval(x0 + 5, 50, x1 - 5, 86, m)
    c.oval(46, 20, 54, 84, BLACK)


def star(c: Canvas) -> None:
    points = []
    for i in range(10):
        r, a = (44, 18)[i % 2], -np.pi / 2 + i * np.pi / 5
        points += [50 + r * np.cos(a), 50 + r * np.sin(a)]
    c.poly(points, bright(c.rng))


def anchor(c: Canvas) -> None:
    k = near((60, 66, 80), c.rng)
    c.ring(50, 14, 9, k, 5)
    c.line([50, 22, 50, 88], k, 7)
    c.line([30, 34, 70, 34], k, 6)
    c.arc(14, 30, 86, 90, 15, 165, k, 7)


def chair(c: Canvas) -> None:
    k = near(BROWN, c.rng, 40)
    c.box(26, 8, 36, 92, k)
    c.box(26, 50, 76, 60, k)
    c.box(68, 58, 76, 92, k)
    c.box(26, 18, 34, 26, k)


def mug(c: Canvas) -> None:
    k = bright(c.rng)
    c.ring(70, 52, 20, k, 7)
    c.box(18, 22, 70, 86, k)
    c.oval(18, 14, 70, 30, near(WHITE, c.rng, 8))


def umbrella(c: Canvas) -> None:
    c.line([50, 40, 50, 88], BLACK, 4)
    c.arc(38, 76, 51, 96, 0, 180, BLACK, 4)
    k = bright(c.rng)
    c.draw.pieslice(c._at((8, 10, 92, 90)), 180, 360, fill=k)


def lamp(c: Canvas) -> None:
    c.box(47, 45, 53, 86, GREY)
    c.oval(28, 82, 72, 96, GREY)
    c.poly([35, 10, 65, 10, 82, 50, 18, 50], bright(c.rng))


def pyramid(c: Canvas) -> None:
    c.poly([50, 14, 5, 86, 62, 92], near((222, 184, 110), c.rng))
    c.poly([50, 14, 62, 92, 95, 80], near((160, 122, 60), c.rng))


def scissors(c: Canvas) -> None:
    k = bright(c.rng)
    c.line([25, 8, 62, 70], GREY, 7)
    c.line([75, 8, 38, 70], GREY, 7)
    c.ring(32, 80, 13, k, 6)
    c.ring(68, 80, 13, k, 6)


def stop_sign(c: Canvas) -> None:
    c.box(46, 60, 54, 98, GREY)
    for r, k in ((40, WHITE), (36, near(NAMED["red"], c.rng))):
        angles = np.pi / 8 + np.arange(8) * np.pi / 4
        c.poly([v for a in angles for v in (50 + r * np.cos(a), 42 + r * np.sin(a))], k)
    c.box(26, 37, 74, 47, WHITE)


def soccer_ball(c: Canvas) -> None:
    c.disc(50, 50, 42, BLACK)
    c.disc(50, 50, 40, WHITE)
    c.disc(50, 50, 12, BLACK)
    for a in np.arange(5) * 2 * np.pi / 5 + c.rng.uniform(0, 1):
        c.disc(50 + 31 * np.cos(a), 50 + 31 * np.sin(a), 7, BLACK)


def face(fur: str, dog: bool, marks: str) -> Painter:
    def paint(c: Canvas) -> None:
        k = near(NAMED[fur] if fur != "cream" else (235, 215, 175), c.rng)
        dark = (70, 45, 30) if fur != "black" else (105, 80, 60)
        if dog:
            for x in (10, 70):
                c.oval(x, 22, x + 20, 74, dark)
        else:
            for x0, x1, tip in ((16, 42, 16), (58, 84, 84)):
                c.poly([x0, 40, x1, 24, tip, 2], k)
        c.disc(50, 54, 36, k)
        if marks == "stripes":
            for x in (38, 50, 62):
                c.line([x, 20, x, 36], BLACK, 4)
        elif marks == "spots":
            for _ in range(7):
                c.disc(c.rng.uniform(25, 75), c.rng.uniform(28, 80), 5, BLACK if fur != "black" else WHITE)
        elif marks == "mask":
            c.oval(28, 46, 72, 90, BROWN if fur != "brown" else WHITE)
        for x in (37, 63):
            c.disc(x, 48, 5, NAMED["green"] if not dog else BLACK)
        c.oval(43, 60, 57, 70, BLACK if dog else NAMED["pink"])
        if dog:
            c.oval(45, 74, 55, 90, NAMED["red"])
        else:
            for y in (62, 70):
                c.line([8, y, 36, 66], WHITE if fur != "white" else GREY, 2)
                c.line([92, y, 64, 66], WHITE if fur != "white" else GREY, 2)

    return paint


def car(colour: str, body: str) -> Painter:
    def paint(c: Canvas) -> None:
        k = near(NAMED[colour], c.rng)
        glass = (175, 215, 235)
        if body == "convertible":
            c.line([40, 50, 48, 38], BLACK, 3)
        elif body == "hatchback":
            c.poly([22, 52, 30, 28, 70, 28, 82, 52], k)
            c.poly([34, 50, 38, 34, 64, 34, 72, 50], glass)
        elif body == "van":
            c.box(10, 18, 86, 60, k)
            c.box(64, 26, 80, 44, glass)
        elif body == "truck":
            c.poly([56, 54, 60, 26, 82, 26, 88, 54], k)
            c.box(64, 32, 78, 46, glass)
        else:
            c.poly([26, 54, 38, 34, 62, 34, 76, 54], k)
            c.poly([36, 52, 42, 39, 58, 39, 66, 52], glass)
        c.box(6, 50, 94, 70, k)
        for x in (26, 74):
            c.disc(x, 72, 11, BLACK)
            c.disc(x, 72, 4, GREY)

    return paint


def flower(colour: str, petals: int, centre: str) -> Painter:
    def paint(c: Canvas) -> None:
        k, turn = near(NAMED[colour], c.rng), c.rng.uniform(0, 2)
        c.line([50, 50, 52, 98], NAMED["green"], 5)
        size = {4: 19, 5: 17, 6: 15}.get(petals, 8)
        for a in turn + np.arange(petals) * 2 * np.pi / petals:
            c.disc(50 + 25 * np.cos(a), 44 + 25 * np.sin(a), size, k)
            if petals > 6:
                c.line([50, 44, 50 + 36 * np.cos(a), 44 + 36 * np.sin(a)], k, 8)
        c.disc(50, 44, 13, NAMED[centre])

    return paint


def pizza(c: Canvas) -> None:
    c.disc(50, 50, 44, (190, 130, 60))
    c.disc(50, 50, 38, (240, 200, 90))
    for _ in range(7):
        a, r = c.rng.uniform(0, 6.3), c.rng.uniform(5, 28)
        c.disc(50 + r * np.cos(a), 50 + r * np.sin(a), 6, NAMED["red"])


def doughnut(c: Canvas) -> None:
    c.disc(50, 50, 42, (200, 150, 90))
    c.ring(50, 50, 38, near(NAMED["pink"], c.rng), 20)
    c.disc(50, 50, 13, WHITE)


def sushi(c: Canvas) -> None:
    for x, y in ((28, 30), (72, 30), (28, 72), (72, 72)):
        c.disc(x, y, 20, BLACK)
        c.disc(x, y, 14, WHITE)
        c.disc(x, y, 6, NAMED["orange"])


def pancakes(c: Canvas) -> None:
    for y in (66, 52, 38):
        c.oval(10, y, 90, y + 26, (150, 95, 40))
        c.oval(10, y - 5, 90, y + 19, (215, 160, 85))
    c.box(42, 36, 58, 46, NAMED["yellow"])


def fried_egg(c: Canvas) -> None:
    for a in np.arange(7) * 0.9 + c.rng.uniform(0, 1):
        c.disc(50 + 20 * np.cos(a), 50 + 20 * np.sin(a), 22, WHITE)
    c.disc(50, 50, 15, NAMED["yellow"])


def ice_cream(c: Canvas) -> None:
    c.poly([30, 46, 70, 46, 50, 98], (215, 165, 95))
    for x in (38, 62):
        c.disc(x, 36, 17, bright(c.rng))
    c.disc(50, 20, 15, bright(c.rng))


def hamburger(c: Canvas) -> None:
    bun = (215, 150, 70)
    c.draw.pieslice(c._at((10, 12, 90, 84)), 180, 360, fill=bun)
    c.box(8, 48, 92, 55, NAMED["green"])
    c.box(10, 55, 90, 67, (95, 55, 30))
    c.box(10, 67, 90, 82, bun)


def salad(c: Canvas) -> None:
    c.disc(50, 50, 44, WHITE)
    for _ in range(14):
        a, r = c.rng.uniform(0, 6.3), c.rng.uniform(0, 26)
        k = NAMED["red"] if c.rng.random() < 0.25 else near(NAMED["green"], c.rng, 40)
        c.disc(50 + r * np.cos(a), 50 + r * np.sin(a), 8, k)


def cake(c: Canvas) -> None:
    c.poly([8, 50, 70, 30, 92, 50], WHITE)
    for i, k in enumerate((BROWN, WHITE, BROWN, WHITE)):
        c.box(8, 50 + 10 * i, 92, 60 + 10 * i, k)
    c.disc(56, 34, 8, NAMED["red"])


def french_fries(c: Canvas) -> None:
    for x in range(26, 74, 8):
        c.box(x, int(c.rng.integers(6, 24)), x + 6, 60, NAMED["yellow"])
    c.poly([20, 46, 80, 46, 72, 94, 28, 94], NAMED["red"])


# Joints of a stick figure: hip, neck, hands, feet.
POSES: dict[str, tuple[tuple[float, float], ...]] = {
    "jumping": ((50, 58), (50, 32), (14, 10), (86, 10), (22, 86), (78, 86)),
    "push ups": ((58, 66), (26, 54), (24, 84), (32, 84), (94, 82), (92, 86)),
    "handstand": ((50, 38), (50, 66), (40, 96), (60, 96), (44, 6), (56, 6)),
    "sitting": ((38, 66), (38, 36), (60, 52), (58, 58), (66, 92), (72, 90)),
    "archery": ((46, 62), (46, 34), (86, 36), (58, 38), (36, 94), (58, 94)),
    "lunges": ((46, 60), (48, 30), (38, 54), (58, 54), (88, 92), (8, 90)),
    "dog walking": ((40, 62), (40, 34), (70, 60), (28, 58), (32, 94), (50, 94)),
    "weight lifting": ((50, 62), (50, 36), (26, 12), (74, 12), (36, 94), (64, 94)),
    "basketball": ((46, 62), (46, 34), (70, 12), (34, 56), (36, 94), (58, 94)),
    "swimming": ((64, 52), (30, 50), (6, 40), (10, 62), (94, 44), (94, 62)),
}


def action(name: str) -> Painter:
    def paint(c: Canvas) -> None:
        jitter = c.rng.uniform(-2.5, 2.5, (6, 2))
        hip, neck, lh, rh, lf, rf = (np.array(p) + j for p, j in zip(POSES[name], jitter, strict=True))
        k, limb = bright(c.rng), BLACK if c.rng.random() < 0.5 else bright(c.rng)
        for a, b, colour, width in (
            (neck, lh, limb, 6),
            (neck, rh, limb, 6),
            (hip, lf, limb, 7),
            (hip, rf, limb, 7),
            (hip, neck, k, 11),
        ):
            c.line([*a, *b], colour, width)
        up = (neck - hip) / np.linalg.norm(neck - hip)
        x, y = neck + 11 * up
        c.disc(x, y, 10, SKIN)
        if name == "archery":
            c.arc(66, 10, 98, 64, 270, 90, BROWN, 4)
        elif name == "dog walking":
            c.oval(66, 76, 92, 90, BROWN)
            c.disc(92, 76, 6, BROWN)
        elif name == "weight lifting":
            c.line([6, 12, 94, 12], GREY, 4)
            for x in (8, 92):
                c.disc(x, 12, 10, BLACK)
        elif name == "basketball":
            c.disc(76, 10, 10, NAMED["orange"])
        elif name == "swimming":
            c.box(0, 62, 100, 100, (60, 130, 220))

    return paint


def digit(value: int) -> Painter:
    def paint(c: Canvas) -> None:
        import matplotlib

        folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
        fonts = ("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "cmr10")
        font = ImageFont.truetype(str(folder / f"{fonts[int(c.rng.integers(len(fonts)))]}.ttf"), 84)
        k = bright(c.rng) if c.rng.random() < 0.5 else BLACK if c.rng.random() < 0.5 else WHITE
        ImageDraw.Draw(c.image).text(
            (BIG_HALF, BIG_HALF), str(value), k, font, anchor="mm", stroke_width=int(c.rng.integers(0, 4))
        )

    return paint


BIG_HALF = 48


def drawn(paint: Painter, upright: bool) -> Callable[[np.random.Generator], Image.Image]:
    """A function that draws one picture with the painter."""

    def make(rng: np.random.Generator) -> Image.Image:
        canvas = Canvas(rng)
        paint(canvas)
        return place(canvas, upright)

    return make
