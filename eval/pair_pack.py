"""Pairs and their images in one file. Ours is ``NAME.pairs.safetensors``, which holds numbers and image bytes and can't run anything.

Tensors, for n images and P pairs:

- ``jpeg`` uint8: the images' files (JPEG, or PNG where the source had PNG), one after the other
- ``ends`` int64 [n]: where each of them ends in ``jpeg``
- ``pairs`` int64 [P, 2]: numbers of images, from 0
- ``same`` uint8 [P]: 1 for pairs of one person, else 0
- ``fold`` int64 [P]: from 0
- ``identity`` int64 [n]: the person on each image; absent where the source of the pairs does not name people

The metadata has one key, ``pairs``: JSON with ``format_version``, ``source`` (name of the file that the pairs come from) and
``num_folds``. (In one key, because safetensors writes several in any order, and the same pairs shall give the same bytes.)
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data_pipeline.output import replace_file
from eval.bin_pack import read_bin
from eval.errors import EvalError
from eval.images import FaceImages, decode_image
from eval.pair_set import PairSet

FORMAT_VERSION = 1
SUFFIX = ".pairs.safetensors"
_TENSORS = {"ends": ("I64", 1), "fold": ("I64", 1), "jpeg": ("U8", 1), "pairs": ("I64", 2), "same": ("U8", 1)}  # dtype, dimensions
_IDENTITY = {"identity": ("I64", 1)}  # may be absent


def open_pack(path: str | Path) -> PairSet:
    """Read a pack: ours (``.pairs.safetensors``) or the field's (``.bin``).

    Raises: EvalError that names the file and what is wrong with it. Images are checked when they are decoded.
    """
    path = Path(path)
    if not path.name.endswith((SUFFIX, ".bin")):
        raise EvalError(f"{path}: unknown kind of pack; expected NAME{SUFFIX}, or the field's NAME.bin")
    if not path.is_file():
        raise EvalError(f"{path}: no such pack")
    return read_bin(path) if path.suffix == ".bin" else _read_safetensors(path)


def write_pack(pairs: PairSet, out: Path, progress: Callable[[int, int], None] | None = None) -> int:
    """Write pairs and images as a pack of ours, complete or not at all; an existing file is replaced. Returns its size in bytes.

    The images' files are kept byte for byte. Each is decoded once, so that a pack holds none that can't be evaluated.
    Raises: EvalError for such an image. ``progress`` is called as (images done, images in all).
    """
    encoded, total = [], len(pairs.images)
    for image, name in enumerate(pairs.images.names):
        encoded.append(pairs.images.read(image))
        decode_image(encoded[-1], name)
        if progress:
            progress(image + 1, total)
    tensors = {
        "jpeg": np.frombuffer(b"".join(encoded), np.uint8),
        "ends": np.cumsum([len(data) for data in encoded], dtype=np.int64),
        "pairs": pairs.pairs.astype(np.int64),
        "same": pairs.same.astype(np.uint8),
        "fold": pairs.fold.astype(np.int64),
    }
    if pairs.named_identities is not None:
        tensors["identity"] = pairs.named_identities.astype(np.int64)
    about = {"format_version": FORMAT_VERSION, "source": pairs.origin, "num_folds": pairs.num_folds}
    content = save(tensors, {"pairs": json.dumps(about)})
    replace_file(out, content)
    return len(content)


def _read_safetensors(path: Path) -> PairSet:
    try:
        with safe_open(path, framework="np") as file:
            about = _about(path, (file.metadata() or {}).get("pairs"))
            names = sorted(file.keys())
            if sorted({*names, *_IDENTITY}) != sorted(_TENSORS | _IDENTITY):
                raise EvalError(f"{path}: expected the tensors {', '.join(sorted(_TENSORS))}, found {names}")
            for name in names:
                dtype, dimensions = (_TENSORS | _IDENTITY)[name]
                found = file.get_slice(name)
                if found.get_dtype() != dtype or len(found.get_shape()) != dimensions:
                    expected = f"{dtype} with {dimensions} dimension{'s' * (dimensions > 1)}"
                    raise EvalError(f"{path}: {name}: expected {expected}, found {found.get_dtype()} of shape {found.get_shape()}")
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise EvalError(f"{path}: not a readable safetensors file: {error}; copy it again") from error

    jpeg, ends, same = tensors["jpeg"], tensors["ends"], tensors["same"]
    starts = np.concatenate([[0], ends[:-1]])
    if len(ends) and not ((ends > starts).all() and ends[-1] == len(jpeg)):
        raise EvalError(f"{path}: ends: expected rising numbers, the last {len(jpeg)}, the bytes of all images; the pack is damaged")
    if tensors["pairs"].shape[1] != 2:
        raise EvalError(f"{path}: pairs: expected two images per pair, found shape {list(tensors['pairs'].shape)}")
    if (same > 1).any():
        raise EvalError(f"{path}: same: expected 0 or 1, found {same.max()}")
    pairs = PairSet(
        source=path,
        origin=about["source"],
        images=FaceImages(
            [f"{path}: image {image}" for image in range(len(ends))],
            lambda image: jpeg[starts[image] : ends[image]].tobytes(),
        ),
        pairs=tensors["pairs"],
        same=same.astype(bool),
        fold=tensors["fold"],
        named_identities=tensors.get("identity"),
    )
    if pairs.num_folds != about["num_folds"]:
        raise EvalError(f"{path}: fold: {pairs.num_folds} folds, but the metadata says {about['num_folds']}; the pack is damaged")
    return pairs


def _about(path: Path, metadata: str | None) -> dict:
    """What the metadata says: format_version, source, num_folds."""
    if metadata is None:
        raise EvalError(f"{path}: no pack of pairs: its metadata lacks the key pairs; make one with python -m eval pack")
    try:
        about = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise EvalError(f"{path}: metadata: pairs: not readable as JSON: {error}") from error
    version = about.get("format_version") if isinstance(about, dict) else None
    if version != FORMAT_VERSION:
        raise EvalError(f"{path}: metadata: expected format_version {FORMAT_VERSION}, found {version!r:.40}; make the pack anew")
    if not isinstance(about.get("source"), str) or type(about.get("num_folds")) is not int:
        raise EvalError(f"{path}: metadata: expected source, a text, and num_folds, a number")
    return about
