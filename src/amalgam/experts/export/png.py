"""A grid of numbers → a PNG heatmap with a title, axes and a legend.

In: an array. Out: bytes. Follows the PNG specification (ISO/IEC 15948), true colour, 8 bits, no interlacing.

An encoder of our own: a plotting library would bring tens of megabytes, or a browser, for one kind of picture.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RANGE = 3.0  # log2 of share × experts, either way
# Blue, white and red as ColorBrewer's RdBu has them: told apart with any colour vision, and on paper.
_STOPS = ((5, 48, 97), (67, 147, 195), (209, 229, 240), (247, 247, 247), (253, 219, 199), (214, 96, 77), (103, 0, 31))
_UNUSED = (64, 64, 64)
_BACKGROUND, _INK = (255, 255, 255), (40, 40, 40)
_SCALE = 2  # pixels of one dot of a letter
_LINE = 8 * _SCALE
_MARGIN = 8
_MIN_WIDTH, _LEGEND_WIDTH, _LEGEND_HEIGHT = 256, 126, 124
# 3 × 5 dots, five rows of three bits. Small letters are written as capitals, what is not here as a question mark.
_FONT = {
    "0": 0b111101101101111, "1": 0b010110010010111, "2": 0b111001111100111, "3": 0b111001111001111,
    "4": 0b101101111001001, "5": 0b111100111001111, "6": 0b111100111101111, "7": 0b111001010010010,
    "8": 0b111101111101111, "9": 0b111101111001111, "A": 0b010101111101101, "B": 0b110101110101110,
    "C": 0b111100100100111, "D": 0b110101101101110, "E": 0b111100110100111, "F": 0b111100110100100,
    "G": 0b111100101101111, "H": 0b101101111101101, "I": 0b111010010010111, "J": 0b001001001101111,
    "K": 0b101101110101101, "L": 0b100100100100111, "M": 0b101111111101101, "N": 0b110101101101101,
    "O": 0b010101101101010, "P": 0b110101110100100, "Q": 0b010101101110011, "R": 0b110101110101101,
    "S": 0b011100010001110, "T": 0b111010010010010, "U": 0b101101101101111, "V": 0b101101101101010,
    "W": 0b101101111111101, "X": 0b101101010101101, "Y": 0b101101010010010, "Z": 0b111001010100111,
    "/": 0b001001010100100, "-": 0b000000111000000, "_": 0b000000000000111, ".": 0b000000000000010,
    ",": 0b000000000010100, ":": 0b000010000010000, "(": 0b001010010010001, ")": 0b100010010010100,
    "+": 0b000010111010000, "=": 0b000111000111000, "?": 0b111001011000010, " ": 0,
}  # fmt: skip
_Pixels = npt.NDArray[np.uint8]  # [height, width, 3]


def encode_png(pixels: _Pixels) -> bytes:
    """An image `[height, width, 3]` as a PNG file."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row after its filter type, 0: none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, *zip(*chunks, strict=True)))


def heatmap_png(
    relative_share: npt.NDArray[np.float64], layer_ids: Sequence[int], captions: Sequence[str] = ()
) -> bytes:
    """Layers down, experts across; red is above an even share, blue below, grey never used.

        captions
               EXPERT
        LAYER  0   1   2  …      legend
            0  ▒▒▒▒▒▒▒▒▒▒▒▒

    Args:
        relative_share: `[layers, experts]`, 1 is an even share.
        captions: lines above it, cut where they are too long; the first is the title.
    """
    num_layers, num_experts = relative_share.shape
    cell = int(np.clip(1024 // max(num_experts, 1), 4, 32))
    left, top = 60, _MARGIN + _LINE * (len(captions) + 2)
    grid_width = max(cell * num_experts, _MIN_WIDTH)
    width, height = left + grid_width + _LEGEND_WIDTH, top + max(cell * num_layers, _LEGEND_HEIGHT) + _MARGIN
    image = np.full((height, width, 3), _BACKGROUND, np.uint8)
    for index, caption in enumerate(captions):
        room = (width - 2 * _MARGIN) // _text_width("0")
        text = caption if len(caption) <= room else caption[: room - 2] + ".."
        _write(image, _MARGIN, _MARGIN + _LINE * index, text)
    colours = _colours(relative_share)
    cells = colours.repeat(cell, axis=0).repeat(cell, axis=1)
    image[top : top + cells.shape[0], left : left + cells.shape[1]] = cells
    _write(image, left, top - 2 * _LINE, "EXPERT")
    _write(image, _MARGIN, top - _LINE, "LAYER")
    for row in range(0, num_layers, _stride(num_layers, cell, 16)):
        text = str(layer_ids[row])
        _write(image, left - _MARGIN - _text_width(text), top + cell * row + (cell - 5 * _SCALE) // 2, text)
    for expert_id in range(0, num_experts, _stride(num_experts, cell, 40)):
        _write(image, left + cell * expert_id, top - _LINE, str(expert_id))
    _legend(image, left + grid_width + 2 * _MARGIN, top)
    return encode_png(image)


def _colours(relative_share: npt.NDArray[np.float64]) -> _Pixels:
    with np.errstate(divide="ignore"):
        level = np.clip(np.log2(relative_share), -RANGE, RANGE)
    places = np.linspace(-RANGE, RANGE, len(_STOPS))
    channels = [np.interp(level, places, [stop[channel] for stop in _STOPS]) for channel in range(3)]
    colours = np.stack(channels, axis=-1).round().astype(np.uint8)
    colours[relative_share <= 0] = _UNUSED
    return colours


def _legend(image: _Pixels, left: int, top: int) -> None:
    levels = np.linspace(RANGE, -RANGE, 90)
    image[top : top + 90, left : left + 14] = _colours(2.0**levels)[:, None]
    for text, offset in (("8X EVEN", 0), ("2X", 25), ("EVEN", 40), ("1/2X", 55), ("1/8X", 80)):
        _write(image, left + 20, top + offset, text)
    image[top + 102 : top + 116, left : left + 14] = _UNUSED
    _write(image, left + 20, top + 104, "NEVER USED")


def _write(image: _Pixels, left: int, top: int, text: str) -> None:
    for index, letter in enumerate(text.upper()):
        dots = np.array([int(bit) for bit in f"{_FONT.get(letter, _FONT['?']):015b}"], bool).reshape(5, 3)
        dots = dots.repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)
        x = left + index * _text_width("0")
        place = image[top : top + dots.shape[0], x : x + dots.shape[1]]
        place[dots[: place.shape[0], : place.shape[1]]] = _INK


def _text_width(text: str) -> int:
    return 4 * _SCALE * len(text)


def _stride(count: int, cell: int, pixels: int) -> int:
    """Label every so many of `count` cells, so that labels stand at least `pixels` apart."""
    return next(stride for stride in (1, 2, 4, 8, 16, 32, 64, count + 1) if stride * cell >= pixels or stride > count)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
