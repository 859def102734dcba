"""Images to embeddings: the same numbers however they are decoded, batched and kept, and one line about what is wrong."""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_pipeline.synthetic import draw_face
from eval.cache import EmbeddingCache
from eval.decoding import AHEAD, DECODERS
from eval.embed import HASHED, embed
from eval.embedder import Embedder, load_embedder, module_embedder
from eval.errors import EvalError
from eval.images import FaceImages
from model.vit import build_vit

COUNT = 11


def encoded(pixels: np.ndarray, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """COUNT faces, every third as PNG, the others as JPEG."""
    return [encoded(draw_face(0, identity, 0), "JPEG" if identity % 3 else "PNG") for identity in range(COUNT)]


def of(files: list[bytes]) -> FaceImages:
    return FaceImages([f"face {number}" for number in range(len(files))], files.__getitem__)


def corners(batch_size: int = 4, calls: list | None = None) -> Embedder:
    """The embedding: 16 x 16 pixels of the red channel."""

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        if calls is not None:
            calls.append(len(pixels))
        return pixels[:, 0, ::7, ::7].flatten(1)

    return Embedder(forward, source="corners", input_range="0..255", batch_size=batch_size)


def by_hand(files: list[bytes]) -> np.ndarray:
    pixels = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), np.float32)[:, :, 0] for file in files]
    return np.stack([[image[::7, ::7].ravel(), image[:, ::-1][::7, ::7].ravel()] for image in pixels])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_image_and_its_mirror_are_embedded_in_order(files, decoder, batch_size):
    calls: list[int] = []
    rows = embed(corners(batch_size, calls), of(files), mirror=True, decoder=decoder)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, by_hand(files))  # DALI and Pillow decode alike, bit for bit
    assert sum(calls) == 2 * COUNT


@pytest.mark.parametrize("decoder", DECODERS)
def test_without_mirrors_there_is_one_view(files, decoder):
    calls: list[int] = []
    rows = embed(corners(4, calls), of(files), mirror=False, decoder=decoder)
    np.testing.assert_array_equal(rows, by_hand(files)[:, :1])
    assert calls == [4, 4, 3]


def test_more_images_than_between_two_gathers_stay_in_order(files):
    many = files * 9
    np.testing.assert_array_equal(embed(corners(2), of(many), mirror=True), by_hand(many))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"not an image", r"face 5: not a readable image"),
        (lambda data: data[:400], r"face 5: not a readable image"),
        (lambda data: encoded(np.zeros((112, 96, 3), np.uint8)), r"face 5: expected an aligned 112 x 112 face, found 96 x 112 pixels"),
        (lambda data: encoded(np.zeros((112, 112), np.uint16), "PNG"), r"face 5: more than 8 bits per pixel and channel \(mode I;16\)"),
    ],
)
def test_an_image_that_cannot_be_embedded_is_named(files, decoder, damage, message):
    broken = [damage(file) if number == 5 else file for number, file in enumerate(files)]
    with pytest.raises(EvalError, match=message):
        embed(corners(), of(broken), mirror=True, decoder=decoder)


def test_progress_counts_every_image_once(files):
    progress: list[tuple[int, int]] = []
    embed(corners(), of(files), mirror=True, progress=lambda counted: lambda *done: progress.append(done))
    assert progress == [(4, 11), (8, 11), (11, 11)]


def test_progress_says_what_it_counts_with_a_cache_hashed_images_too(files, model, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.embed.HASHED", 5)
    progress: list[tuple] = []
    options = {"cache": EmbeddingCache(tmp_path / "cache"), "progress": lambda counted: lambda *done: progress.append((counted, *done))}
    embed(load_embedder(model), of(files), mirror=True, **options)
    assert progress == [*(("images hashed", done, 11) for done in (5, 10, 11)), ("images", 11, 11)]


# --- the cache


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    save_file(build_vit("vit_xxt", embedding_size=16).state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def forbidden(path) -> Embedder:
    """The model at ``path``, which must not be run."""

    def forward(pixels):
        raise AssertionError("the model was run")

    return Embedder(forward, source="idle", input_range="-1..1", files=[path])


def test_what_is_in_the_cache_is_not_embedded_again(files, model, tmp_path):
    cache = EmbeddingCache(tmp_path / "cache")
    first = embed(load_embedder(model), of(files), mirror=True, cache=cache)
    np.testing.assert_array_equal(first, embed(load_embedder(model), of(files), mirror=True))
    again = embed(forbidden(model), of(files), mirror=True, cache=EmbeddingCache(tmp_path / "cache"))
    np.testing.assert_array_equal(again, first)
    assert not again.flags.writeable
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".npy"]


def test_other_images_another_model_or_no_mirrors_are_other_entries(files, model, tmp_path):
    cache = EmbeddingCache(tmp_path / "cache")
    embed(load_embedder(model), of(files), mirror=True, cache=cache)
    with pytest.raises(AssertionError, match="the model was run"):
        embed(forbidden(model), of(files), mirror=False, cache=cache)
    with pytest.raises(AssertionError, match="the model was run"):
        embed(forbidden(model), of([*files[1:], files[0]]), mirror=True, cache=cache)
    other = tmp_path / "other.safetensors"
    save_file(build_vit("vit_xxt", embedding_size=16).state_dict(), other)
    with pytest.raises(AssertionError, match="the model was run"):
        embed(forbidden(other), of(files), mirror=True, cache=cache)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # what was not finished left nothing


def test_an_entry_of_the_cache_that_is_damaged_is_named(files, model, tmp_path):
    cache = EmbeddingCache(tmp_path / "cache")
    embed(load_embedder(model), of(files), mirror=True, cache=cache)
    (array,), (about,) = ((tmp_path / "cache").glob(pattern) for pattern in ("*.npy", "*.json"))
    content, description = array.read_bytes(), about.read_text()
    other = io.BytesIO()
    np.save(other, np.zeros((COUNT, 1, 16), np.float32))
    one_bit = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    for damaged, message in (
        (one_bit, rf"{array.name}: is not what {about.name} says; delete both"),
        (other.getvalue(), rf"{array.name}: is not what {about.name} says; delete both"),
        (content[:-4], rf"{about.name}: a damaged entry of the cache \(.*\); delete it"),
        (None, rf"{about.name}: a damaged entry of the cache \(.*\); delete it"),
    ):
        array.write_bytes(damaged) if damaged else array.unlink()
        with pytest.raises(EvalError, match=message):
            embed(load_embedder(model), of(files), mirror=True, cache=cache)
    array.write_bytes(content)
    for damaged in ("[]", "{}", "null", '{"sha256": 3}', description[:-9]):
        about.write_text(damaged)
        with pytest.raises(EvalError, match=rf"{about.name}: a damaged entry of the cache \(.*\); delete it"):
            embed(load_embedder(model), of(files), mirror=True, cache=cache)
    about.write_text(description.replace('"num_images": 11', '"num_images": 12'))
    with pytest.raises(EvalError, match=rf"{array.name}: is not what {about.name} says; delete both"):
        embed(load_embedder(model), of(files), mirror=True, cache=cache)


def test_what_another_decoder_made_is_another_entry(files, model, tmp_path):
    """On a GPU DALI rounds otherwise."""
    cache = EmbeddingCache(tmp_path / "cache")
    embed(load_embedder(model), of(files), mirror=True, cache=cache)
    with pytest.raises(AssertionError, match="the model was run"):
        embed(forbidden(model), of(files), mirror=True, cache=cache, decoder="dali")


def test_the_room_for_an_entry_is_taken_before_it_is_filled(tmp_path):
    """A mapped file with holes kills the process, by SIGBUS, when the disk is full."""

    entry = EmbeddingCache(tmp_path).entry({"of": "nothing"})
    entry.allocate((1000, 2, 512))
    (file,) = tmp_path.iterdir()
    assert 512 * file.stat().st_blocks >= 4 * 1000 * 2 * 512


def test_images_are_hashed_a_few_batches_ahead(model, tmp_path):
    """All at once, millions of images would take gigabytes of futures."""
    read: list[int] = []

    def slow(image: int) -> bytes:
        if image == 0:
            time.sleep(1)
            raise EvalError("the first is bad")
        read.append(image)
        return b""

    with pytest.raises(EvalError, match="the first is bad"):
        embed(forbidden(model), FaceImages(range(100_000), slow), mirror=True, cache=EmbeddingCache(tmp_path))
    assert max(read, default=0) < (1 + AHEAD) * HASHED


def test_a_network_that_still_learns_is_not_cached(files, tmp_path):
    embedder = module_embedder(build_vit("vit_xxt"), source="live")
    with pytest.raises(EvalError, match="a network that still learns"):
        embed(embedder, of(files), mirror=True, cache=EmbeddingCache(tmp_path / "cache"))
