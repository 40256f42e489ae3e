"""Drawing: a 96 px canvas in units of 0..100, composed over a background and reduced to 32 px."""

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 32
BIG = 96
Colour = tuple[int, int, int]

NAMED: dict[str, Colour] = {
    "red": (214, 40, 40),
    "blue": (38, 84, 205),
    "green": (38, 150, 62),
    "yellow": (240, 205, 40),
    "orange": (240, 130, 30),
    "purple": (125, 50, 170),
    "pink": (240, 130, 175),
    "white": (245, 245, 245),
    "black": (28, 28, 30),
    "grey": (135, 135, 140),
    "brown": (120, 76, 40),
}


class Canvas:
    """A transparent layer to draw one object on; coordinates run over 0..100."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.image = Image.new("RGBA", (BIG, BIG), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)

    @staticmethod
    def _at(values: tuple[float, ...] | list[float]) -> list[float]:
        return [v * BIG / 100 for v in values]

    def oval(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.draw.ellipse(self._at((x0, y0, x1, y1)), fill=colour)

    def disc(self, x: float, y: float, r: float, colour: Colour) -> None:
        self.oval(x - r, y - r, x + r, y + r, colour)

    def ring(self, x: float, y: float, r: float, colour: Colour, width: float = 4) -> None:
        self.draw.ellipse(self._at((x - r, y - r, x + r, y + r)), outline=colour, width=round(width))

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.draw.rectangle(self._at((x0, y0, x1, y1)), fill=colour)

    def poly(self, points: list[float], colour: Colour) -> None:
        self.draw.polygon(self._at(points), fill=colour)

    def line(self, points: list[float], colour: Colour, width: float = 5) -> None:
        self.draw.line(self._at(points), fill=colour, width=round(width), joint="curve")

    def arc(self, x0: float, y0: float, x1: float, y1: float, a: float, b: float, colour: Colour, width=5) -> None:
        self.draw.arc(self._at((x0, y0, x1, y1)), a, b, fill=colour, width=round(width))


def bright(rng: np.random.Generator) -> Colour:
    """A random saturated colour."""
    r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.6, 0.95), rng.uniform(0.6, 0.95))
    return int(255 * r), int(255 * g), int(255 * b)


def near(colour: Colour, rng: np.random.Generator, spread: int = 18) -> Colour:
    """A random colour close to `colour`."""
    r, g, b = np.clip(np.array(colour) + rng.integers(-spread, spread + 1, 3), 0, 255).tolist()
    return r, g, b


def background(rng: np.random.Generator) -> Image.Image:
    """A pale or dark vertical gradient."""
    light = rng.random() < 0.7
    ends = rng.uniform(165, 255, (2, 3)) if light else rng.uniform(0, 60, (2, 3))
    t = np.linspace(0, 1, BIG)[:, None, None]
    rows = ends[0] * (1 - t) + ends[1] * t
    return Image.fromarray(np.broadcast_to(rows, (BIG, BIG, 3)).astype(np.uint8))


def place(canvas: Canvas, upright: bool = True) -> Image.Image:
    """Put the object on a background, with a random size, place, tilt and mirror image."""
    rng = canvas.rng
    layer = canvas.image
    if rng.random() < 0.5 and not upright:
        layer = layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    layer = layer.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC)
    side = int(BIG * rng.uniform(0.78, 1.05))
    layer = layer.resize((side, side), Image.Resampling.BICUBIC)
    room = BIG - side
    low, high = min(0, room), max(0, room)
    picture = background(rng)
    picture.paste(layer, (int(rng.integers(low, high + 1)), int(rng.integers(low, high + 1))), layer)
    return picture


def shrink(picture: Image.Image) -> Image.Image:
    """To the final 32 x 32 pixels."""
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def shift(picture: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """The domain gap between pretraining and benchmark images: low contrast, a colour cast, coloured clutter
    and noise. `strength` 0 leaves the picture as it is; 1 is the one of all benchmark sets."""
    x = np.asarray(picture.convert("RGB"), dtype=np.float32)
    contrast = 1 - strength * rng.uniform(0.35, 0.6)
    x = 128 + (x - 128) * contrast
    x += strength * rng.normal(0, 14, 3)
    coarse = rng.normal(0, 255, (6, 6, 3)).clip(-255, 255)
    clutter = [
        np.asarray(
            Image.fromarray(coarse[..., c].astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
        )
        for c in range(3)
    ]
    x += strength * 0.1 * np.stack(clutter, axis=-1)
    x += strength * rng.normal(0, 24, x.shape)
    return Image.fromarray(x.clip(0, 255).astype(np.uint8))


def sketch(picture: Image.Image) -> Image.Image:
    """Grey edges on white."""
    edges = picture.convert("L").filter(ImageFilter.FIND_EDGES)
    values = 255 - np.clip(np.asarray(edges, dtype=np.float32) * 2.2, 0, 255)
    values[[0, -1], :] = values[:, [0, -1]] = 255
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def rendition(picture: Image.Image) -> Image.Image:
    """Three grey levels a channel, colours rotated: a poster of the picture."""
    x = np.asarray(picture)[..., [2, 0, 1]]
    return Image.fromarray((x // 86 * 127).clip(0, 255).astype(np.uint8))


def occlude(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Two random boxes over the picture."""
    picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    for _ in range(2):
        x, y = rng.integers(0, 72, 2).tolist()
        draw.rectangle((x, y, x + 24, y + 20), fill=bright(rng))
    return picture
