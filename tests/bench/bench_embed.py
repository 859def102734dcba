"""How fast images are embedded, beside the bare model on the same images, decoded before.

``python -m tests.bench.bench_embed``. First both must give the same embeddings. Then the contenders take turns in one process: the engine
with each decoder, files in the page cache, and the model alone. Seconds are of the clock: what is decoded beside the model costs time only
where no core is to spare.

Exit code 1 if the embeddings differ; how fast anything is decides nothing.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_pipeline.synthetic import draw_face
from eval.decoding import DECODERS
from eval.embed import embed
from eval.embedder import Embedder, load_embedder, module_embedder
from eval.images import FaceImages
from model.vit import build_vit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_t", help="a backbone's name, with random weights, or a model that eval opens")
    parser.add_argument("--faces", type=Path, help="folder <identity>/<image>.jpg of 112 x 112 pixels; default: synthetic faces")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    embedder = _model(arguments.model, arguments.batch_size)
    return measure(embedder, _images(arguments.faces, arguments.images), arguments.repeats)


def measure(embedder: Embedder, images: FaceImages, repeats: int) -> int:
    """Print images per second; the exit code."""
    pixels = torch.from_numpy(np.stack([images.decode(image) for image in range(len(images))])).to(embedder.device)

    def bare() -> np.ndarray:
        return np.stack([embedder(pixels), embedder(pixels.flip(2))], axis=1)

    expected = bare()
    contenders: dict[str, Callable[[], np.ndarray]] = {"bare": bare}
    for decoder in DECODERS:
        contenders[decoder] = lambda decoder=decoder: embed(embedder, images, mirror=True, decoder=decoder)
        difference = np.abs(contenders[decoder]() - expected).max() / np.abs(expected).max()
        if difference > 1e-2:  # on a GPU its own JPEG decoder rounds otherwise
            print(f"embeddings with {decoder} differ from the bare model's by {difference:.1e}", file=sys.stderr)
            return 1
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    speeds = {name: len(images) / statistics.median(taken) for name, taken in seconds.items()}
    place = f"{embedder.device.type}, {torch.get_num_threads()} threads"
    print(f"embed  {place}  {embedder.source}  {len(images)} images and mirrors, batches of {embedder.batch_size}  median of {repeats}")
    for name in DECODERS:
        print(f"images/s   {name:8}{speeds[name]:9.1f}   bare model {speeds['bare']:9.1f}   ratio {speeds[name] / speeds['bare']:.3f}")
    return 0


def _model(name: str, batch_size: int) -> Embedder:
    if Path(name).exists():
        return load_embedder(name, batch_size=batch_size)
    torch.manual_seed(0)
    return module_embedder(build_vit(name).to("cuda" if torch.cuda.is_available() else "cpu"), source=name, batch_size=batch_size)


def _images(faces: Path | None, count: int) -> FaceImages:
    if faces is None:
        files = [_jpeg(draw_face(0, identity, 0)) for identity in range(min(count, 100))]
    else:
        files = [path.read_bytes() for path in sorted(faces.glob("*/*.jpg"))[:count]]
    return FaceImages([f"image {number}" for number in range(count)], lambda image: files[image % len(files)])


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
