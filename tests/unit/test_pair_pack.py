"""Packs of pairs: the field's pickles are read as they are and can't do anything; our own file gives the same pairs, or an error."""

import io
import json
import pickle
import struct

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from eval.embedder import Embedder
from eval.errors import EvalError
from eval.pair_pack import open_pack, write_pack
from eval.pairs import evaluate_pairs
from eval.pairs_file import find_pairs
from tests.unit.record_sets import jpeg

NUM_PAIRS = 23
# The images of the pairs, two by two. Numbers 0 to 11 stand for files; file 3 comes again and again.
SHOWN = [3, *(k % 12 for k in range(2 * NUM_PAIRS - 1))]
SAME = [k % 3 != 1 for k in range(NUM_PAIRS)]


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """Twelve different images, one of them a PNG."""
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)).save(png, "PNG")
    return [png.getvalue(), *(jpeg((20 * k, 250 - 20 * k, 100), mark=k) for k in range(1, 12))]


@pytest.fixture
def bin_file(tmp_path, files):
    """A function that writes (images, flags) as Python 3 does at protocol 2, and returns the file."""

    def write(images=None, flags=SAME, protocol=2):
        path = tmp_path / "lfw.bin"
        path.write_bytes(pickle.dumps(([files[k] for k in SHOWN] if images is None else images, flags), protocol))
        return path

    return write


def check_pairs(pack, files):
    """``pack`` holds SHOWN and SAME in ten contiguous folds, every image once, in the order in which they are shown first."""
    order = list(dict.fromkeys(SHOWN))
    assert [pack.images.read(image) for image in range(len(pack.images))] == [files[k] for k in order]
    assert [order[image] for image in pack.pairs.ravel()] == SHOWN
    assert pack.pairs.shape == (NUM_PAIRS, 2)
    assert pack.same.dtype == bool
    assert pack.same.tolist() == SAME
    assert "".join(map(str, pack.fold)) == "00011122233445566778899"  # the first 23 % 10 folds hold one more
    assert (pack.num_folds, pack.origin) == (10, "lfw.bin")


# --- the field's packs, honest ones


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["bytes", "arrays", "object array"])
def test_a_bin_pack_is_read_whatever_wrote_it(bin_file, files, protocol, kind):
    images, flags = [files[k] for k in SHOWN], SAME
    if kind != "bytes":
        images = [np.frombuffer(data, np.uint8) for data in images]
        flags = [np.bool_(flag) for flag in SAME]
    if kind == "object array":
        array = np.empty(len(images), object)
        array[:] = images
        images, flags = array, np.array(SAME)
    path = bin_file(images, flags, protocol)
    check_pairs(open_pack(path), files)
    if protocol == 2:  # names are lines of text there: the same pickle by numpy 1
        path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))
        check_pairs(open_pack(path), files)


def python2_string(data: bytes) -> bytes:
    """SHORT_BINSTRING or BINSTRING, as Python 2 pickles a ``str``."""
    return (b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data))) + data


def array(dtype: bytes, length: int, contents: bytes, numpy: str = "numpy._core", flags: int = 0) -> bytes:
    """Opcodes of a 1-d array; ``contents`` are those of its bytes or of its list. Flags of numpy's object dtype are 63."""
    made = f"c{numpy}.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0".encode() + b"\x85" + python2_string(b"b") + b"\x87R"
    state = b"(K\x03" + python2_string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK" + bytes([flags]) + b"tb"
    typed = b"cnumpy\ndtype\n" + python2_string(dtype) + b"\x89\x88\x87R" + state
    return made + b"(K\x01J" + struct.pack("<i", length) + b"\x85" + typed + b"\x89" + contents + b"tb"


@pytest.mark.parametrize("arrays", [False, True])
def test_a_bin_pack_of_python_2_is_read(tmp_path, files, arrays):
    """Opcode by opcode; Python 2 counts what it remembers (q) from 1 on."""
    strings = [python2_string(files[k]) for k in SHOWN]
    if arrays:
        strings = [array(b"u1", len(files[k]), string, "numpy.core") for k, string in zip(SHOWN, strings, strict=True)]
    flags = b"".join(b"\x88" if flag else b"\x89" for flag in SAME)
    path = tmp_path / "lfw.bin"
    path.write_bytes(b"\x80\x02]q\x01(" + b"".join(strings) + b"e]q\x02(" + flags + b"e\x86q\x03.")
    check_pairs(open_pack(path), files)


def test_pairs_that_contradict_each_other_are_refused(bin_file, files):
    shown = [k for pair in range(12) for k in (pair, (pair + 1) % 12)]
    flags = [True, False] * 6
    images = [files[k] for k in [*shown, 4, 3]]  # pair 3 again, in the other order
    with pytest.raises(
        EvalError, match=r"lfw.bin: pairs 3 and 12, from 0, are of the same two images, once as one person and once as two$"
    ):
        open_pack(bin_file(images, [*flags, True]))
    assert open_pack(bin_file(images, [*flags, False])).repeated == 1


def test_pairs_of_one_image_are_counted_and_told(bin_file, files):
    """Two images of a set may be equal byte for byte: of one person, and where names are wrong of two."""
    shown = [k for pair in range(12) for k in (pair, (pair + 1) % 12)]
    pack = open_pack(bin_file([files[k] for k in [*shown, 5, 5, 7, 7]], [True, False] * 7))
    assert (pack.repeated, pack.self_pairs) == (0, 2)
    (remark,) = pack.remarks()
    assert remark.endswith("lfw.bin: 2 of 14 pairs are of an image with itself")


# --- and dishonest ones


def values(*arguments: object) -> bytes:
    """Opcodes that put a tuple on the stack."""
    return pickle.dumps(arguments, 2)[2:-1]


def call(name: str, *arguments: object) -> bytes:
    """Opcodes that call a global: GLOBAL, its arguments, REDUCE."""
    return b"c" + "\n".join(name.rsplit(".", 1)).encode() + b"\n" + values(*arguments) + b"R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<i", len(value)) + value.encode()


PYTHON = "open('canary', 'w').close()"
ATTACKS = [  # the global asked for, and opcodes that make a file named canary when they are unpickled the usual way
    ("os.system", call("os.system", "touch canary")),
    ("posix.system", b"(" + text("touch canary") + b"iposix\nsystem\n"),  # INST
    ("subprocess.getoutput", b"(csubprocess\ngetoutput\n" + text("touch canary") + b"o"),  # OBJ
    ("builtins.eval", call("builtins.eval", PYTHON)),
    ("__builtin__.eval", call("__builtin__.eval", PYTHON)),
    ("builtins.exec", call("builtins.exec", PYTHON, {})),  # the dictionary alone would be refused, but less clearly
    (
        "builtins.getattr",
        b"cbuiltins\ngetattr\n" + call("builtins.__import__", "os") + text("system") + b"\x86R" + values("touch canary") + b"R",
    ),
    ("shutil.os.system", b"\x80\x04" + text("shutil") + text("os.system") + b"\x93" + values("touch canary") + b"R"),  # STACK_GLOBAL
    ("numpy.memmap", call("numpy.memmap", "canary", "u1", "w+", 0, (1,))),
    ("numpy.testing._private.utils.runstring", call("numpy.testing._private.utils.runstring", PYTHON, {})),
]


def image_list(opcodes: bytes) -> bytes:
    """An honest pack, but for one image in the middle."""
    image = python2_string(b"\xff\xd8\xff an image")
    return b"\x80\x02](" + image + opcodes + image + b"e](\x88\x89e\x86."


def object_array(opcodes: bytes) -> bytes:
    """A pack whose images are an object array, of which ``opcodes`` put the only content on the stack."""
    return b"\x80\x02" + array(b"O8", 1, b"](" + opcodes + b"e", flags=63) + b"](\x88e\x86."


@pytest.mark.parametrize("place", [image_list, object_array])
@pytest.mark.parametrize(("asked_for", "opcodes"), ATTACKS, ids=[name for name, _ in ATTACKS])
def test_a_pack_that_asks_for_anything_else_is_refused_and_nothing_runs(tmp_path, monkeypatch, place, asked_for, opcodes):
    monkeypatch.chdir(tmp_path)
    path, canary = tmp_path / "lfw.bin", tmp_path / "canary"
    path.write_bytes(place(opcodes))
    with pytest.raises(EvalError) as caught:
        open_pack(path)
    assert str(caught.value).startswith(f"{path}: asks for {asked_for}, which no pack of images needs")
    assert not canary.exists()
    pickle.loads(path.read_bytes(), encoding="bytes")
    assert canary.exists()  # the usual way it does run


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        # Objects, which the dtype's state denies: numpy's own classes would follow these eight bytes to somewhere in memory.
        (array(b"O8", 1, python2_string(b"AAAAAAAA"), flags=0), "an array of dtype O8, expected b1, u1, i4, i8 or O"),
        (array(b"V8", 1, python2_string(b"AAAAAAAA")), "an array of dtype V8"),
        (call("_codecs.encode", "canary", "rot13"), "a text in another encoding than latin1"),
        (b"cnumpy\ndtype\n" + values(None, {}) + b"b", "holds EMPTY_DICT at byte"),
        (b"cnumpy\ndtype\n" + values(None, 1) + b"b", "sets the state of a global"),
        (b"cnumpy\nndarray\n)\x81", "NEWOBJ"),
        (b"\x82\x01", "holds EXT1 at byte"),
        (b"Pcanary\n", "holds PERSID at byte"),
        # Time and memory out of proportion to the file.
        (call("numpy.ndarray", (1 << 40,)), "TypeError"),
        (call("numpy._core.multiarray._reconstruct", 0, (1 << 40,), b"b") + values(0) + b"b", "ValueError"),
        (array(b"u1", 1, b"U\x01x").replace(b"J\1\0\0\0\x85", values(1 << 40, [0])), "an array of another shape than its 1 values"),
        (b"Nr\xff\xff\xff\xff", "holds LONG_BINPUT at byte"),
        (b"Np99999999999\n", "holds PUT at byte"),
        (b"\x8e" + struct.pack("<Q", 1 << 62), "not a readable pack, ValueError: expected 4611686018427387904 bytes"),
        (b"})" + 60 * b"2\x86" + b"Ns", "holds EMPTY_DICT at byte"),  # a dictionary whose key takes 2^60 steps to hash
    ],
)
@pytest.mark.parametrize("place", [image_list, object_array])
def test_ways_around_the_list_of_globals_and_bombs_are_refused(tmp_path, place, opcodes, message):
    path = tmp_path / "lfw.bin"
    path.write_bytes(place(opcodes))
    with pytest.raises(EvalError) as caught:
        open_pack(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_name_cannot_reach_the_terminal_as_control_characters(tmp_path):
    path = tmp_path / "lfw.bin"
    path.write_bytes(image_list(text("os\x1b[2J\n") + text("x" * 1000) + b"\x93"))
    with pytest.raises(EvalError, match=r"asks for os\\x1b\[2J\\n\.x{80,90}, which") as caught:
        open_pack(path)
    assert str(caught.value).isprintable()


# --- the field's packs, damaged ones


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.999])
def test_a_pack_cut_short_is_refused(bin_file, share):
    path = bin_file()
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(EvalError, match=r"lfw.bin: not a readable pack, ValueError: .*copy it again"):
        open_pack(path)


@pytest.mark.parametrize(
    ("images", "flags", "message"),
    [
        ([b"x"] * 45, SAME, r"expected 2 x 23 images for 23 issame flags, found 45"),
        ([b"x"] * 8, [True] * 4, r"10 folds of 4 pairs: need at least 2 folds and a pair in each"),
        ([b"x"] * 46, [2, *SAME[1:]], r"issame flag 0: expected True or False \(1 or 0\), found int"),
        ([b"x"] * 46, [*SAME[1:], "True"], r"issame flag 22: expected True or False \(1 or 0\), found str"),
        ([*[b"x"] * 45, "x"], SAME, r"image 45: expected the bytes of an encoded image, found str"),
        ([np.zeros(3)] * 46, SAME, r"an array of dtype f8, expected b1, u1, i4, i8 or O"),
        ([np.zeros(3, int)] * 46, SAME, r"image 0: expected the bytes of an encoded image, found a numpy array"),
        (b"x" * 46, SAME, r"expected two lists \(images, issame_list\), found bytes and list"),
    ],
)
def test_a_pack_of_another_structure_is_refused(bin_file, images, flags, message):
    path = bin_file(images, flags)
    with pytest.raises(EvalError, match=f"lfw.bin: (not a readable pack, UnpicklingError: )?{message}"):
        open_pack(path)


def test_files_that_are_no_packs_are_refused(tmp_path):
    path = tmp_path / "lfw.bin"
    path.write_bytes(pickle.dumps([1, 2, 3], 2))
    with pytest.raises(EvalError, match=r"lfw.bin: expected a pickled pair \(images, issame_list\), found list"):
        open_pack(path)
    path.write_bytes(jpeg())
    with pytest.raises(EvalError, match=r"lfw.bin: not a readable pack"):
        open_pack(path)
    with pytest.raises(EvalError, match=r"nowhere.bin: no such pack"):
        open_pack(tmp_path / "nowhere.bin")
    with pytest.raises(EvalError, match=r"lfw.pkl: unknown kind of pack; expected NAME.pairs.safetensors, or the field's NAME.bin"):
        open_pack(tmp_path / "lfw.pkl")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"\xff\xd8\xff no image", "not a readable image"),
        (jpeg()[:1000], "not a readable image"),
        (jpeg(side=96), "expected an aligned 112 x 112 face, found 96 x 96 pixels"),
    ],
)
def test_an_image_that_cannot_be_evaluated_is_named_and_leaves_no_pack(bin_file, files, tmp_path, image, message):
    path = bin_file([image if k == 5 else files[k] for k in SHOWN])
    message = f"lfw.bin: image {SHOWN.index(5)}: {message}"
    out = tmp_path / "lfw.pairs.safetensors"
    out.write_bytes(b"an older one")
    with pytest.raises(EvalError, match=message):
        write_pack(open_pack(path), out)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["lfw.bin", "lfw.pairs.safetensors"]
    assert out.read_bytes() == b"an older one"
    with pytest.raises(EvalError, match=message):
        evaluate_pairs(colours_embedder(), open_pack(path))


# --- our own format


def colours_embedder() -> Embedder:
    """The embedding is a grid of pixels, as many numbers."""
    return Embedder(lambda pixels: pixels[:, :, ::37, ::37].reshape(len(pixels), -1), source="colours", input_range="-1..1", batch_size=5)


@pytest.fixture
def pack_file(bin_file, tmp_path):
    out = tmp_path / "lfw.pairs.safetensors"
    progress = []
    size = write_pack(open_pack(bin_file()), out, progress=lambda *done: progress.append(done))
    assert progress == [(done, 12) for done in range(1, 13)]
    assert size == out.stat().st_size
    return out


def test_a_bin_pack_becomes_ours_and_means_the_same(bin_file, pack_file, files):
    check_pairs(open_pack(pack_file), files)
    reports = [evaluate_pairs(colours_embedder(), open_pack(path)) for path in (bin_file(), pack_file)]
    assert numbers(reports[0]) == numbers(reports[1])
    assert reports[0].num_images == 12
    assert 0 < reports[0].accuracy.mean < 1


def numbers(report) -> dict:
    return {key: value for key, value in vars(report).items() if key != "seconds"}


def test_the_file_is_as_documented_and_the_same_pairs_give_the_same_bytes(bin_file, pack_file, files, tmp_path):
    tensors = load_file(pack_file)
    order = list(dict.fromkeys(SHOWN))
    assert tensors["jpeg"].tobytes() == b"".join(files[k] for k in order)
    assert tensors["ends"].tolist() == [sum(len(files[k]) for k in order[: i + 1]) for i in range(12)]
    assert [order[image] for image in tensors["pairs"].ravel()] == SHOWN
    assert tensors["same"].tolist() == SAME
    assert {name: (str(each.dtype), each.ndim) for name, each in tensors.items()} == {
        "jpeg": ("uint8", 1), "ends": ("int64", 1), "pairs": ("int64", 2), "same": ("uint8", 1), "fold": ("int64", 1)
    }  # fmt: skip
    with safe_open(pack_file, "np") as file:
        assert {key: json.loads(value) for key, value in file.metadata().items()} == {
            "pairs": {"format_version": 1, "source": "lfw.bin", "num_folds": 10}
        }
    for path in (bin_file(), pack_file):
        write_pack(open_pack(path), tmp_path / "again.pairs.safetensors")
        assert (tmp_path / "again.pairs.safetensors").read_bytes() == pack_file.read_bytes()


def test_a_folder_and_its_pack_give_the_same_numbers(files, tmp_path):
    """Two people's folders hold the same image under two names: those stay two images, as in the folder."""
    for person in range(6):
        (tmp_path / "images" / f"P{person}").mkdir(parents=True)
        for number in (1, 2):
            data = files[0] if person < 2 and number == 2 else files[2 * person + number - 1]
            suffix = ".png" if data.startswith(b"\x89PNG") else ".jpg"
            (tmp_path / "images" / f"P{person}" / f"P{person}_{number:04d}{suffix}").write_bytes(data)
    lines = ["3 2"]
    for fold in range(3):
        lines += [f"P{2 * fold} 1 2", f"P{2 * fold + 1} 1 2", f"P{2 * fold} 1 P{(2 * fold + 3) % 6} 2", f"P{fold} 2 P{fold + 3} 1"]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    folder = find_pairs(tmp_path / "images", tmp_path / "pairs.txt")
    write_pack(folder, tmp_path / "p.pairs.safetensors")
    pack = open_pack(tmp_path / "p.pairs.safetensors")
    assert pack.fold.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert pack.same.tolist() == [True, True, False, False] * 3
    assert pack.origin == "pairs.txt"
    reports = [evaluate_pairs(colours_embedder(), pairs) for pairs in (folder, pack)]
    assert numbers(reports[0]) == numbers(reports[1])
    assert reports[1].num_images == 12
    assert 0 < reports[1].accuracy.mean < 1


def changed(name: str, place: object, value: object):
    def change(tensors, about):
        tensors[name][place] = value

    return change


def replaced(name: str, make):
    def change(tensors, about):
        tensors[name] = make(tensors[name])

    return change


def described(**changes):
    return lambda tensors, about: about.update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("pairs", (3, 1), 12), r"pair 3 is of the images \[\d+, 12\], expected numbers from 0 to 11"),
        (changed("pairs", (0, 0), -1), r"pair 0 is of the images \[-1, \d+\], expected numbers from 0 to 11"),
        (changed("ends", 4, 0), "ends: expected rising numbers"),
        (changed("ends", 0, -5), "ends: expected rising numbers"),
        (changed("ends", 0, -(1 << 63)), "ends: expected rising numbers"),
        (changed("ends", -1, 1 << 62), "ends: expected rising numbers, the last "),
        (replaced("ends", lambda ends: ends[:-1].copy()), "ends: expected rising numbers, the last "),
        (replaced("ends", lambda ends: ends[:0].copy()), "holds 23 pairs of 0 images, expected some"),
        (replaced("jpeg", lambda data: data[:-1].copy()), "ends: expected rising numbers, the last "),
        (changed("same", 7, 2), "same: expected 0 or 1, found 2"),
        (replaced("same", lambda same: same[:-1].copy()), "holds 23 pairs, 22 times 'same' and 23 folds, expected one of each per pair"),
        (replaced("same", lambda same: same.astype(bool)), r"same: expected U8 with 1 dimension, found BOOL of shape \[23\]"),
        (changed("fold", 22, 10), "fold: 11 folds, but the metadata says 10"),
        (changed("fold", 22, 1 << 62), f"11 folds numbered 0 to {1 << 62}, expected 0 to 10, with a pair in each"),
        (changed("fold", 0, -1), "11 folds numbered -1 to 9, expected 0 to 10"),
        (changed("fold", slice(None), 0), "one fold; accuracy needs two or more"),
        (replaced("fold", lambda fold: fold.astype(np.int32)), r"fold: expected I64 with 1 dimension, found I32 of shape \[23\]"),
        (replaced("pairs", lambda pairs: pairs.ravel()), r"pairs: expected I64 with 2 dimensions, found I64 of shape \[46\]"),
        (replaced("pairs", lambda pairs: np.ones((23, 3), np.int64)), r"pairs: expected two images per pair, found shape \[23, 3\]"),
        (replaced("pairs", lambda pairs: pairs[:0].copy()), "holds 0 pairs of 12 images"),
        (lambda tensors, about: tensors.pop("same"), r"expected the tensors ends, fold, jpeg, pairs, same, found \['ends', 'fold', "),
        (lambda tensors, about: tensors.update(more=np.zeros(1)), r"expected the tensors .*, found .*'more'"),
        (lambda tensors, about: tensors.update(identity=np.zeros(12, np.int64)), "pair 1 is of two persons, but its images show the"),
        (lambda tensors, about: tensors.update(identity=np.zeros(3, np.int64)), "names 3 identities of 12 images, expected one of each"),
        (lambda tensors, about: tensors.update(identity=np.zeros(12)), r"identity: expected I64 .*, found F64 of shape \[12\]"),
        (described(format_version=2), "metadata: expected format_version 1, found 2; make the pack anew"),
        (described(num_folds="10"), "metadata: expected source, a text, and num_folds, a number"),
        (described(source=None), "metadata: expected source, a text, and num_folds, a number"),
        (described(num_folds=5), "fold: 10 folds, but the metadata says 5"),
    ],
)  # fmt: skip
def test_a_pack_of_ours_that_contradicts_itself_is_refused(pack_file, change, message):
    tensors, about = load_file(pack_file), {"format_version": 1, "source": "lfw.bin", "num_folds": 10}
    change(tensors, about)
    save_file(tensors, pack_file, {"pairs": json.dumps(about)})
    with pytest.raises(EvalError, match=f"lfw.pairs.safetensors: {message}"):
        open_pack(pack_file)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "no pack of pairs: its metadata lacks the key pairs"),
        ({"pairs": "{"}, "metadata: pairs: not readable as JSON"),
        ({"pairs": "[" * 100_000}, "metadata: pairs: not readable as JSON"),
        ({"pairs": "[1]"}, "metadata: expected format_version 1, found None"),
    ],
)
def test_other_safetensors_files_are_refused(pack_file, metadata, message):
    save_file(load_file(pack_file), pack_file, metadata)
    with pytest.raises(EvalError, match=f"lfw.pairs.safetensors: {message}"):
        open_pack(pack_file)


def test_a_damaged_pack_of_either_kind_is_read_or_refused_in_one_line(bin_file, pack_file):
    """Bytes changed in what describes the images, and files cut anywhere: a pack or an EvalError, never another error."""
    rng, messages = np.random.default_rng(0), []
    for path in (bin_file([b"image %d" % k for k in SHOWN]), pack_file):
        sound = path.read_bytes()
        for _ in range(200):
            damaged = bytearray(sound)
            for position in rng.integers(0, min(len(sound), 2000), 1 + rng.integers(3)):
                damaged[position] = rng.integers(256)
            if rng.random() < 0.2:
                del damaged[rng.integers(len(damaged)) :]
            path.write_bytes(damaged)
            try:
                open_pack(path)
            except EvalError as error:
                messages.append(str(error).removeprefix(f"{path}: "))
    assert len(messages) > 200
    assert all(message.isprintable() and not message.startswith("/") for message in messages)


@pytest.mark.faces
def test_the_pack_of_real_pairs_is_the_folder_and_its_list(faces, tmp_path):
    """Against the text of the list and the files that it names, read here anew."""
    pairs_file = faces / "protocol" / "lfw" / "heldout_pairs.txt"
    write_pack(find_pairs(faces / "lfw_112", pairs_file), tmp_path / "lfw.pairs.safetensors")
    pack = open_pack(tmp_path / "lfw.pairs.safetensors")
    lines = [line.split("\t") for line in pairs_file.read_text().splitlines()[1:]]
    assert len(pack.pairs) == len(lines) == 2000
    shown = set()
    for index, (line, pair) in enumerate(zip(lines, pack.pairs, strict=True)):
        people = (line[0], line[0]) if len(line) == 3 else (line[0], line[2])
        for image, person, number in zip(pair, people, (line[1], line[-1]), strict=True):
            shown.add((person, number))
            assert pack.images.read(image) == (faces / "lfw_112" / person / f"{person}_{int(number):04d}.jpg").read_bytes()
        assert pack.same[index] == (len(line) == 3)
        assert pack.fold[index] == index // 200
    assert len(pack.images) == len(shown)
