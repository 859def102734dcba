"""The cheap test of JPEG bytes: is the image all there?"""

_START, _SCAN, _END = b"\xff\xd8\xff", b"\xff\xda", b"\xff\xd9"


def jpeg_problem(data: bytes) -> str | None:
    """What is wrong with a JPEG's frame, or None. Nothing is decoded: bytes that changed inside the image stay unseen.

    The end marker must follow the last start of scan: thumbnails bring an end marker of their own, earlier. Bytes after it are fine.
    """
    if not data:
        return "no image bytes"
    if not data.startswith(_START):
        return f"no JPEG: starts with {data[:4].hex()}, expected {_START.hex()}"
    scan = data.rfind(_SCAN)
    if scan < 0:
        return "JPEG without image data (no start-of-scan marker)"
    if data.rfind(_END) < scan:
        return "JPEG is cut short (no end marker ffd9 after the image data)"
    return None
