"""What exact TAR at a FAR of 1e-6 among all pairs costs: ``score_pairs`` against bare products of the same tiles, and against its estimate.

``python -m tests.bench.bench_mfr``. Makes unit vectors around random persons (100,000 images of 10,000 persons, half of them hard to tell),
says what ``TileSpeed`` lets expect, scores all pairs, multiplies the same tiles again without looking at them, and checks
the result by another method: numpy's own products in strips, all impostors above a cut-off sorted in full.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import numpy as np
import torch

from eval.commands.shared import Progress
from eval.mfr_pairs import TILE_SIZES, Comparison, Images, TileSpeed, score_pairs
from eval.verification import TarAtFar


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--persons", type=int, default=10_000)
    parser.add_argument("--embedding-size", type=int, default=512)
    parser.add_argument("--far", type=float, default=1e-6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tile_size = TILE_SIZES[torch.device(arguments.device).type]

    embeddings, labels = clustered_vectors(arguments.images, arguments.persons, arguments.embedding_size)
    images, comparison = Images(labels, (len(labels),)), Comparison("all", ((0, 0),), arguments.far)
    pairs = len(labels) * (len(labels) - 1) // 2
    print(
        f"{arguments.device}, {arguments.threads} threads, float32, {len(labels):,} images, D={embeddings.shape[1]}, tiles of {tile_size}"
    )

    expected = TileSpeed.measure(arguments.embedding_size, arguments.device).seconds(images, [comparison])
    start, start_cpu = time.perf_counter(), time.process_time()
    result = score_pairs(embeddings, images, [comparison], device=arguments.device, progress=Progress("pairs"))["all"]
    taken, taken_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    floor, floor_cpu = time_of_bare_products(torch.as_tensor(embeddings, device=arguments.device), tile_size)
    rate = 2 * arguments.embedding_size * pairs / taken / 1e9
    print(f"{pairs:,} pairs   estimated {expected:.1f} s   taken {taken:.1f} s   ratio {taken / expected:.2f}   {rate:.1f} GFLOP/s")
    print(f"bare products of the same tiles {floor:.1f} s   ratio {taken / floor:.2f}")
    print(
        f"the same in CPU time   {taken_cpu:.1f} s, {floor_cpu:.1f} s   ratio {taken_cpu / floor_cpu:.2f}   (other processes do not count)"
    )
    print(f"peak memory of the process {peak / 1024:.0f} MiB; the embeddings are {embeddings.nbytes / 2**20:.0f} MiB of it")
    print(f"TAR {result.tar:.6f} at FAR {result.far:.3e}, threshold {result.threshold:.7f}, {result.genuine:,} genuine pairs")
    other = by_sorting(embeddings, labels, arguments.far, result.threshold - 0.02)
    print(f"TAR {other.tar:.6f} at FAR {other.far:.3e}, threshold {other.threshold:.7f}, by numpy and a sort")
    # Two libraries round a product differently: a score next to the threshold may fall on its other side.
    equal = abs(result.threshold - other.threshold) < 1e-6 and abs(result.tar - other.tar) * result.genuine <= 3
    print("equal up to rounding" if equal else "NOT EQUAL")
    return 0 if equal else 1


def clustered_vectors(images: int, persons: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """([n, size] float32 of unit length, [n] int64 labels in no order): a person's images lie around one direction, more or less near."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(images) % persons)
    centers = rng.standard_normal((persons, size), dtype=np.float32)
    spread = rng.uniform(0.5, 2.5, (images, 1)).astype(np.float32)
    vectors = centers[labels] + spread * rng.standard_normal((images, size), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), labels


def time_of_bare_products(embeddings: torch.Tensor, tile_size: int) -> tuple[float, float]:
    """Seconds, by the clock and of CPU time, for the products alone, into the same buffer."""
    buffer = torch.empty(tile_size * tile_size, device=embeddings.device)
    start, start_cpu = time.perf_counter(), time.process_time()
    for row in range(0, len(embeddings), tile_size):
        first = embeddings[row : row + tile_size]
        for column in range(row, len(embeddings), tile_size):
            second = embeddings[column : column + tile_size]
            torch.mm(first, second.T, out=buffer[: len(first) * len(second)].view(len(first), len(second)))
    if embeddings.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - start_cpu


def by_sorting(embeddings: np.ndarray, labels: np.ndarray, far: float, cut: float) -> TarAtFar:
    """The same by numpy: strips of rows in the given order, each against all images after it; impostors above ``cut`` sorted in full."""
    genuine, tail, num_impostor = [], [], 0
    for row in range(0, len(labels), 500):
        scores = embeddings[row : row + 500] @ embeddings[row:].T
        after = np.triu(np.ones(scores.shape, bool), 1)
        same = labels[row : row + 500, None] == labels[None, row:]
        genuine.append(scores[same & after])
        impostor = after & ~same
        num_impostor += int(np.count_nonzero(impostor))
        tail.append(scores[impostor & (scores > cut)])
    genuine, tail = np.concatenate(genuine), np.sort(np.concatenate(tail))[::-1]
    allowed = int(far * num_impostor)
    if len(tail) <= allowed:
        raise SystemExit(f"only {len(tail)} impostors lie above {cut}: the threshold is further off than that")
    accepted = [genuine[genuine > tail[allowed]], tail[tail > tail[allowed]]]
    tar, threshold = len(accepted[0]) / len(genuine), min(map(np.min, accepted))
    return TarAtFar(far, tar, len(accepted[1]) / num_impostor, float(threshold), len(genuine), num_impostor)


if __name__ == "__main__":
    sys.exit(main())
