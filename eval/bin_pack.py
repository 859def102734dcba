"""The field's verification packs (``lfw.bin``, ``cfp_fp.bin``, ``agedb_30.bin``), read without executing anything of theirs.

A pack is a pickle of ``(bins, issame_list)``: 2 P encoded images, of which 2 i and 2 i + 1 are pair i, and P booleans. A pickle is a
program. It names functions and calls them, so a stranger's pack can run any command when it is opened the usual way. Here

- every global is refused but those that honest packs name;
- those are answered by stand-ins in this file. Numpy's own would not do: with a dtype whose pickled state denies that it holds objects,
  a pickle makes numpy follow bytes of the file as pointers;
- opcodes that could take time or memory out of proportion to the file are refused before.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from eval.errors import EvalError
from eval.images import FaceImages
from eval.pair_set import PairSet
from eval.verification import contiguous_folds

NUM_FOLDS = 10  # contiguous, in the order of the file: so the field evaluates every pack

# Dictionaries and sets hash what they hold, which never ends for tuples nested 60 deep; extension codes go round find_class.
_REFUSED_OPCODES = {
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET"),
    *("EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER"),
}
_MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}
_NUMBERS = {"b1": "u1", "u1": "u1", "i4": "i4", "i8": "i8"}  # dtypes that are read, and as what: a byte may be no valid bool


def read_bin(path: Path) -> PairSet:
    """Read a pack: pickle protocol 1 to 5, by Python 2 or 3; images as bytes or uint8 arrays; lists, tuples or arrays of them.

    Images of equal bytes become one. The folds are the field's: ten, contiguous.
    Raises: EvalError that names the file, and the global when it asks for one that no honest pack needs.
    """
    content = _unpickle(path)
    if not isinstance(content, tuple | list) or len(content) != 2:
        raise EvalError(f"{path}: expected a pickled pair (images, issame_list), found {_kind(content)}")
    images, flags = map(_items, content)
    if images is None or flags is None:
        raise EvalError(f"{path}: expected two lists (images, issame_list), found {_kind(content[0])} and {_kind(content[1])}")
    if len(images) != 2 * len(flags):
        raise EvalError(f"{path}: expected 2 x {len(flags)} images for {len(flags)} issame flags, found {len(images)}")
    distinct: dict[bytes, int] = {}  # encoded image -> its number
    names: list[str] = []
    numbers: list[int] = []  # of the image at each position
    for position, item in enumerate(images):
        data = _image_bytes(item)
        if data is None:
            raise EvalError(f"{path}: image {position}: expected the bytes of an encoded image, found {_kind(item)}")
        if data not in distinct:
            distinct[data] = len(names)
            names.append(f"{path}: image {position}")
        numbers.append(distinct[data])
    for position, flag in enumerate(flags):
        if not isinstance(flag, int) or flag not in (0, 1):
            raise EvalError(f"{path}: issame flag {position}: expected True or False (1 or 0), found {_kind(flag)}")
    try:
        fold = contiguous_folds(len(flags), NUM_FOLDS)
    except EvalError as error:
        raise EvalError(f"{path}: {error}") from error
    encoded = list(distinct)
    return PairSet(
        source=path,
        origin=path.name,
        images=FaceImages(names, lambda image: encoded[image]),
        pairs=np.array(numbers).reshape(-1, 2),
        same=np.array(flags, dtype=bool),
        fold=fold,
    )


def _unpickle(path: Path) -> object:
    data, refused = path.read_bytes(), None
    try:
        end, refused = _sound_part(data)
        return _Unpickler(path, data[:end]).load()
    except EvalError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        if refused is not None:
            raise EvalError(f"{path}: holds {refused} at byte {end}, which no pack of images needs; it was not read") from error
        raise EvalError(f"{path}: not a readable pack, {type(error).__name__}: {_shown(str(error))}; copy it again") from error


def _sound_part(data: bytes) -> tuple[int, str | None]:
    """(where to stop reading, the opcode there), for the first opcode that could be out of proportion; (the end, None) without one.

    Builds and calls nothing. The rest is refused, but what the part before it asks for is worth naming.
    Raises: ValueError for a pickle that is cut short: ``genops`` checks every length against what is left.
    """
    for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
        # What is remembered is numbered from 0 or 1 on, and the unpickler's table is as long as the highest number.
        if opcode.name in _REFUSED_OPCODES or (opcode.name in _MEMO_OPCODES and argument > count):
            return position, opcode.name
    return len(data), None


class _Unpickler(pickle.Unpickler):
    """Builds lists, tuples, bytes, text, numbers and the stand-ins below; refuses every other global."""

    def __init__(self, path: Path, data: bytes):
        super().__init__(io.BytesIO(data), encoding="bytes")  # Python 2's strings are bytes: images, and also names of dtypes
        self._path = path

    def find_class(self, module: str, name: str) -> "_StandIn":
        if (module, name) not in _STAND_INS:
            raise EvalError(
                f"{self._path}: asks for {_shown(f'{module}.{name}')}, which no pack of images needs; it may be an attack. "
                "Nothing of it was executed"
            )
        return _STAND_INS[module, name]


class _StandIn:
    """What a pickle gets for a global: it can call it, and set nothing on it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]):
        self._function = function

    def __call__(self, *args: object) -> object:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("sets the state of a global")


class _Dtype:
    """Stands in for ``numpy.dtype``: a name and a byte order."""

    def __init__(self, name: object, align: object, copy: object):
        self.name, self._order = _text(name), "|"

    def __setstate__(self, state: tuple) -> None:
        self._order = _text(state[1])

    def parse(self, data: object) -> np.ndarray:
        """[k] integers of the bytes of an array."""
        if self.name not in _NUMBERS or self._order not in ("|", "<", ">") or not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError(f"an array of dtype {self.name}, expected {', '.join(_NUMBERS)} or O")
        return np.frombuffer(data, np.dtype(_NUMBERS[self.name]).newbyteorder(self._order))


class _Array:
    """Stands in for a numpy array, whose shape does not matter here. ``values``: [k] integers, or a list of objects."""

    values: np.ndarray | list | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, _, data = state
        self.fill(data, dtype, shape)

    def fill(self, data: object, dtype: object, shape: object) -> None:
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a dtype")
        if dtype.name[:1] == "O" and isinstance(data, list):
            self.values = data
        else:
            self.values = dtype.parse(data)
        count = len(self.values)
        sizes = shape if isinstance(shape, tuple) and len(shape) <= 2 else ()
        if not all(isinstance(size, int) and 0 <= size <= count for size in sizes) or math.prod(sizes) != count:
            raise pickle.UnpicklingError(f"an array of another shape than its {count} values")


def _array_from_buffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.fill(data, dtype, shape)
    return array


def _scalar(dtype: object, data: object) -> int:
    (value,) = dtype.parse(data) if isinstance(dtype, _Dtype) else ()
    return int(value)


def _encode(text: object, encoding: object) -> bytes:
    """What Python 3 calls to make the bytes of a pickle below protocol 3; ``_codecs.encode`` itself knows other codecs than this one."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("a text in another encoding than latin1")
    return text.encode("latin1")


_STAND_INS = {
    ("_codecs", "encode"): _StandIn(_encode),
    ("numpy", "dtype"): _StandIn(_Dtype),
    ("numpy", "ndarray"): _StandIn(lambda: None),  # named as the class to make, never called
    **{
        (f"{core}.{module}", name): _StandIn(function)
        for core in ("numpy.core", "numpy._core")  # before numpy 2, and since
        for module, name, function in (
            ("multiarray", "_reconstruct", lambda cls, shape, typecode: _Array()),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _array_from_buffer),  # protocol 5
        )
    },
}


def _items(value: object) -> list | tuple | None:
    """The items of a list, or of an array as Python objects; None for anything else."""
    if isinstance(value, _Array) and value.values is not None:
        return value.values if isinstance(value.values, list) else value.values.tolist()
    return value if isinstance(value, list | tuple) else None


def _image_bytes(item: object) -> bytes | None:
    if isinstance(item, _Array) and isinstance(item.values, np.ndarray) and item.values.dtype == np.uint8:
        return item.values.tobytes()
    return bytes(item) if isinstance(item, bytes | bytearray) else None


def _text(value: object) -> str:
    if not isinstance(value, str | bytes):
        raise pickle.UnpicklingError(f"expected a text, found {_kind(value)}")
    return value if isinstance(value, str) else value.decode("ascii")


def _kind(value: object) -> str:
    """For messages. Never the value itself: a few bytes of pickle can make a list whose repr never ends."""
    return "a numpy array" if isinstance(value, _Array) else type(value).__name__


def _shown(text: str) -> str:
    """Text of the file for a message: one line, no control characters."""
    return text.encode("unicode_escape").decode("ascii")[:100]
