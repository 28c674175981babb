"""A grid of numbers → a PNG heatmap with axes and a colour bar.

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
# 3 × 5 dots, five rows of three bits.
_FONT = {
    "0": 0b111101101101111, "1": 0b010110010010111, "2": 0b111001111100111, "3": 0b111001111001111,
    "4": 0b101101111001001, "5": 0b111100111001111, "6": 0b111100111101111, "7": 0b111001010010010,
    "8": 0b111101111101111, "9": 0b111101111001111, "/": 0b001001010100100, "X": 0b101101010101101,
    "A": 0b010101111101101, "E": 0b111100110100111, "L": 0b100100100100111, "P": 0b110101110100100,
    "R": 0b110101110101101, "S": 0b111100111001111, "T": 0b111010010010010, "Y": 0b101101010010010,
    "H": 0b101101111101101, "U": 0b101101101101111, "N": 0b110101101101101, "D": 0b110101101101110,
    "V": 0b101101101101010, " ": 0,
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


def heatmap_png(relative_share: npt.NDArray[np.float64], layer_ids: Sequence[int]) -> bytes:
    """Layers down, experts across; red is above an even share, blue below, grey never used.

    Args:
        relative_share: `[layers, experts]`, 1 is an even share.
    """
    num_layers, num_experts = relative_share.shape
    cell = int(np.clip(1024 // max(num_experts, 1), 4, 32))
    left, top, right, bottom = 60, 26, 110, 14
    width, height = left + cell * max(num_experts, 8) + right, top + max(cell * num_layers, 110) + bottom
    image = np.full((height, width, 3), _BACKGROUND, np.uint8)
    colours = _colours(relative_share)
    cells = colours.repeat(cell, axis=0).repeat(cell, axis=1)
    image[top : top + cells.shape[0], left : left + cells.shape[1]] = cells
    _write(image, 4, 6, "LAYER")
    for row in range(0, num_layers, _stride(num_layers, cell, 16)):
        _write(image, 10, top + cell * row + (cell - 5 * _SCALE) // 2, str(layer_ids[row]))
    for expert_id in range(0, num_experts, _stride(num_experts, cell, 40)):
        _write(image, left + cell * expert_id, 6, str(expert_id))
    _colour_bar(image, left + cell * max(num_experts, 8) + 16, top)
    return encode_png(image)


def _colours(relative_share: npt.NDArray[np.float64]) -> _Pixels:
    with np.errstate(divide="ignore"):
        level = np.clip(np.log2(relative_share), -RANGE, RANGE)
    places = np.linspace(-RANGE, RANGE, len(_STOPS))
    channels = [np.interp(level, places, [stop[channel] for stop in _STOPS]) for channel in range(3)]
    colours = np.stack(channels, axis=-1).round().astype(np.uint8)
    colours[relative_share <= 0] = _UNUSED
    return colours


def _colour_bar(image: _Pixels, left: int, top: int) -> None:
    levels = np.linspace(RANGE, -RANGE, 70)
    image[top : top + 70, left : left + 14] = _colours(2.0**levels)[:, None]
    for text, offset in (("8X EVEN", 0), ("1X", 30), ("1/8X", 60)):
        _write(image, left + 20, top + offset, text)
    image[top + 84 : top + 98, left : left + 14] = _UNUSED
    _write(image, left + 20, top + 86, "UNUSED")


def _write(image: _Pixels, left: int, top: int, text: str) -> None:
    for index, letter in enumerate(text):
        dots = np.array([int(bit) for bit in f"{_FONT[letter]:015b}"], bool).reshape(5, 3)
        dots = dots.repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)
        x = left + index * 4 * _SCALE
        image[top : top + dots.shape[0], x : x + dots.shape[1]][dots] = _INK


def _stride(count: int, cell: int, pixels: int) -> int:
    """Label every so many of `count` cells, so that labels stand at least `pixels` apart."""
    return next(stride for stride in (1, 2, 4, 8, 16, 32, 64, count + 1) if stride * cell >= pixels or stride > count)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
