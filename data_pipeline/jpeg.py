"""Cheap tests of encoded images, without decoding: is the image all there, and how large is it?"""

import struct

import numpy as np

from data_pipeline import SIDE

_START, SCAN, _END = b"\xff\xd8\xff", b"\xff\xda", b"\xff\xd9"
_SEGMENT = struct.Struct(">BBH")  # ff, marker, length
_PNG = b"\x89PNG\r\n\x1a\n"
_NOT_FRAMES = frozenset((0xC4, 0xC8, 0xCC))  # of the markers ffc0 to ffcf: Huffman tables, reserved, arithmetic coding
_IS_FRAME = np.array([0xC0 <= marker <= 0xC2 for marker in range(256)])  # those that DALI takes: baseline, extended, progressive
_HAS_LENGTH = np.array([0xC0 <= marker <= 0xC2 or marker in (0xC4, 0xCC) or 0xDA < marker < 0xFF for marker in range(256)])
NO_SIZE = "JPEG whose markers do not lead to a frame header and image data"  # what is wrong where jpeg_size finds none
_MARKERS = 16  # that stand before the image data at the most, but for rare files


def jpeg_problem(data: bytes) -> str | None:
    """What is wrong with a JPEG's frame, or None. Nothing is decoded: bytes that changed inside the image stay unseen.

    The end marker must follow the last start of scan: thumbnails bring an end marker of their own, earlier. Bytes after it are fine.
    """
    if not data:
        return "no image bytes"
    if not data.startswith(_START):
        return f"no JPEG: starts with {data[:4].hex()}, expected {_START.hex()}"
    if SCAN not in data:
        return "JPEG without image data (no start-of-scan marker)"
    if not data.endswith(_END) and data.rfind(_END) < data.rfind(SCAN):
        return "JPEG is cut short (no end marker ffd9 after the image data)"
    return None


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) by the frame header, in pixels as stored; None when the markers do not lead through it to the image data.

    ``data`` starts with the start-of-image marker (``jpeg_problem`` is None). DALI 2.4 must not be given anything else: in a batch of more
    than eight, an image whose markers its parser refuses can crash the process. It takes 8 bits and one or three components.
    """
    at, end, size = 2, len(data) - 9, None
    while at < end:
        lead, marker, length = _SEGMENT.unpack_from(data, at)
        if lead != 0xFF:
            return None
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xDA:  # start of scan
            return size
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9 or length < 2:  # markers without a length, which do not belong here
            return None
        if marker <= 0xCF and marker not in _NOT_FRAMES:
            components = data[at + 9]
            if marker > 0xC2 or data[at + 4] != 8 or components not in (1, 3) or length != 8 + 3 * components:
                return None
            size = (data[at + 7] << 8 | data[at + 8], data[at + 5] << 8 | data[at + 6])
        at += 2 + length
    return None


def image_suffix(data: bytes) -> str | None:
    """The usual end of such a file's name; None of what is neither JPEG nor PNG."""
    return ".jpg" if data.startswith(_START) else ".png" if data.startswith(_PNG) else None


def image_problem(data: bytes) -> str | None:
    """Why a record's image cannot be trained on, or None: a JPEG that is all there, or a PNG's start, of 112 x 112 pixels."""
    if data.startswith(_PNG):
        size = (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))
    elif problem := jpeg_problem(data):
        return problem
    else:
        size = jpeg_size(data)
    if size is None:
        return NO_SIZE
    return None if size == (SIDE, SIDE) else f"an image of {size[0]}x{size[1]} pixels, expected {SIDE}x{SIDE}; crop the faces first"


def frame_sizes(data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """``jpeg_size`` of many images at once: those at ``starts`` to ``ends`` ([n] each) of ``data`` ([bytes] uint8).

    [n, 2] int64; 0 x 0 where it is not found at once: the markers lead nowhere, or are unusual.
    """
    found, sizes = np.zeros((len(starts), 2), np.int64), np.zeros((len(starts), 2), np.int64)
    numbers, at = np.arange(len(starts)), starts + 2
    for _ in range(_MARKERS):
        inside = at + 9 < ends[numbers]
        numbers, at = numbers[inside], at[inside]
        marker, length = data[at + 1], _uint16(data, at + 2)
        scan = (data[at] == 0xFF) & (marker == 0xDA)
        sizes[numbers[scan]] = found[numbers[scan]]
        frame = _IS_FRAME[marker]
        components = data[at + 9]
        sound = (data[at] == 0xFF) & ~scan & (length >= 2) & _HAS_LENGTH[marker]
        sound &= ~frame | (data[at + 4] == 8) & ((components == 1) | (components == 3)) & (length == 8 + 3 * components.astype(np.int64))
        for axis, byte in enumerate((7, 5)):
            found[numbers[frame], axis] = _uint16(data, at[frame] + byte)
        numbers, at = numbers[sound], (at + 2 + length)[sound]
        if not len(numbers):
            break
    return sizes


def _uint16(data: np.ndarray, at: np.ndarray) -> np.ndarray:
    return data[at].astype(np.int64) << 8 | data[at + 1]
