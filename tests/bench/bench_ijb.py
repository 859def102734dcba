"""What IJB-C costs beside its embeddings: seconds, and peak private memory, of reading the files, pooling and the metrics.

``python -m tests.bench.bench_ijb``. Makes the files of a set of IJB-C's size (469,375 images in 23,124 templates, 15,658,489 pairs, two
galleries of 1,772 and 1,759 subjects and 19,593 probes) and embeddings of it as a file that is mapped, in a temporary folder of 2.4 GB.
Scores of some pairs are compared with a float64 sum before anything is printed; exit code 1 if they differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.align import TEMPLATE
from eval.curves import score_curves
from eval.ijb_identification import search
from eval.ijb_meta import read_search, read_templates
from eval.ijb_pairs import read_pairs
from eval.ijb_templates import pool_templates
from eval.ijb_verification import FAR_TARGETS, nearest_tars, score_pairs, strict_tars
from eval.verification import can_resolve

TOLERANCE = 1e-6  # of a float32 dot product of rows of length 1


@dataclass(frozen=True)
class Size:
    """IJB-C's numbers."""

    images: int = 469_375
    templates: int = 23_124  # an even number
    genuine: int = 19_557
    pairs: int = 15_658_489
    subjects: int = 3_531
    embedding_size: int = 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    size = Size(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory(prefix="bench_ijb_") as folder:
        return measure(Path(folder), size)


def measure(root: Path, size: Size) -> int:
    write_files(root, size)
    write_embeddings(root / "embeddings.npy", size)
    print(f"private memory at the start {private_bytes() / 2**20:.0f} MiB, most of it libraries")
    print(f"{size.images:,} images in {size.templates:,} templates, {size.pairs:,} pairs, D = {size.embedding_size}")
    with timed("read images and templates"):
        templates = read_templates(root, "IJBC")
    with timed("read pairs"):
        pairs = read_pairs(root, "IJBC", templates)
    with timed("read galleries and probes"):
        protocol = read_search(root, "IJBC", templates)
    with timed("pool templates, 8 modes"):
        pooled = pool_templates(np.load(root / "embeddings.npy", mmap_mode="r"), templates)
    features = pooled[0]
    with timed("1:1 of one mode"):
        with timed("  score all pairs"):
            scores = score_pairs(features, pairs)
        with timed("  sort"):
            genuine, impostor = np.sort(scores[pairs.same]), np.sort(scores[~pairs.same])
        fars = [far for far in FAR_TARGETS if can_resolve(far, len(impostor))]
        with timed("  strict TAR"):
            strict_tars(genuine, impostor, fars)
        with timed("  nearest TAR"):
            nearest_tars(genuine, impostor, fars)
    with timed("curves of one mode"):
        score_curves(genuine, impostor)
    with timed("1:N of one mode"):
        search(features, protocol)
    some = np.random.default_rng(1).integers(0, len(scores), 1000)
    expected = (features[pairs.first[some]].astype(np.float64) * features[pairs.second[some]]).sum(axis=1)
    error = np.abs(scores[some] - expected).max()
    if error > TOLERANCE or len(scores) != size.pairs:
        print(f"{len(scores)} scores differ by {error:.1e}, expected {size.pairs} within {TOLERANCE:.0e}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print seconds, and the most private memory of the process meanwhile: what it maps of the embeddings' file is not its own."""
    peak, ended = [private_bytes()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        ended.set()
        watcher.join()
    print(f"{what:28} {seconds:7.2f} s   peak {peak[0] / 2**20:6.0f} MiB", flush=True)


def private_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def write_files(root: Path, size: Size) -> None:
    """Every template has an image; the first images of the templates stand in the first lines. Image files are empty: none is opened."""
    rng = np.random.default_rng(0)
    (root / "meta").mkdir()
    (root / "loose_crop").mkdir()
    owners = np.concatenate([np.arange(size.templates), rng.integers(0, size.templates, size.images - size.templates)])
    landmarks = (TEMPLATE + 100 + rng.normal(0, 3, (size.images, 5, 2))).round(3).reshape(-1, 10).tolist()
    scores = rng.uniform(0.5, 1, size.images).round(6).tolist()
    with (root / "meta/ijbc_face_tid_mid.txt").open("w") as members, (root / "meta/ijbc_name_5pts_score.txt").open("w") as points:
        for image, (owner, place, score) in enumerate(zip(owners.tolist(), landmarks, scores, strict=True), start=1):
            (root / f"loose_crop/{image}.jpg").touch()
            members.write(f"{image}.jpg {owner + 1} {image // 3}\n")
            points.write(f"{image}.jpg {' '.join(map(str, place))} {score}\n")
    subject = np.concatenate([np.arange(size.subjects), rng.integers(0, size.subjects, size.templates - size.subjects)])
    half = (size.subjects + 1) // 2
    for name, part in (
        ("gallery_G1", slice(half)),
        ("gallery_G2", slice(half, size.subjects)),
        ("probe_mixed", slice(size.subjects, None)),
    ):
        lines = [f"{number + 1},{subject[number] + 1},img/1.jpg,1,2,3,4" for number in range(size.templates)[part]]
        (root / f"meta/ijbc_1N_{name}.csv").write_text(
            "\n".join(["TEMPLATE_ID,SUBJECT_ID,FILENAME,FACE_X,FACE_Y,FACE_WIDTH,FACE_HEIGHT", *lines])
        )
    write_pairs(root / "meta/ijbc_template_pair_label.txt", size, rng)


def write_pairs(path: Path, size: Size, rng: np.random.Generator) -> None:
    """Genuine pairs first, then impostors, of templates at random: labels follow no subject."""
    with path.open("w") as file:
        for start in range(0, size.pairs, 1 << 20):
            count = min(1 << 20, size.pairs - start)
            first = rng.integers(0, size.templates, count)
            label = (np.arange(start, start + count) < size.genuine).astype(int)
            apart = 2 * rng.integers(1, size.templates // 2, count) - 1 + label  # odd or even: no pair has both labels
            second = (first + apart) % size.templates
            file.write(
                "".join(f"{a} {b} {c}\n" for a, b, c in zip((first + 1).tolist(), (second + 1).tolist(), label.tolist(), strict=True))
            )


def write_embeddings(path: Path, size: Size) -> None:
    rng = np.random.default_rng(2)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(size.images, 2, size.embedding_size))
    for start in range(0, size.images, 1 << 13):
        part = rows[start : start + (1 << 13)]
        part[:] = rng.standard_normal(part.shape, np.float32)
    rows.flush()


if __name__ == "__main__":
    sys.exit(main())
