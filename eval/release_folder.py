"""The files of a release, and whether they are what its checksums say. Nothing here needs torch.

NAME/
  backbone.safetensors   float32 weights under the released key names
  config.json            which network: preset, embedding size and the numbers behind them
  preprocessing.json     what the network takes: size, colours, alignment, range of pixels
  README.md              the model card
  SHA256SUMS             of the four; `sha256sum -c SHA256SUMS` checks them without this package
"""

import hashlib
import re
from pathlib import Path

from data_pipeline.names import is_plain_name
from eval.errors import EvalError
from train.checkpoint_folder import BACKBONE

CONFIG, PREPROCESSING, CARD, CHECKSUMS = "config.json", "preprocessing.json", "README.md", "SHA256SUMS"
FILES = (BACKBONE, CONFIG, PREPROCESSING, CARD)  # that CHECKSUMS covers
OWNED = re.compile("|".join(re.escape(name) for name in (*FILES, CHECKSUMS)))


def is_release(path: Path) -> bool:
    """Whether a folder is meant to be a release, be it damaged: it holds one of its JSON files or checksums, and no checkpoints."""
    return not (path / "checkpoints").exists() and any((path / name).is_file() for name in (CONFIG, PREPROCESSING, CHECKSUMS))


def sha256(path: Path) -> str:
    """Of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_lines(folder: Path) -> str:
    """The content of ``SHA256SUMS``: a line ``HEX  NAME`` for each of ``FILES``."""
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in FILES)


def check_release(folder: Path) -> None:
    """Compare every file with its checksum. Raises: EvalError that names the file that is missing, damaged or not covered."""
    sums = folder / CHECKSUMS
    if not sums.is_file():
        raise EvalError(f"{sums}: missing; copy the release again")
    wanted = {}
    for number, line in enumerate(sums.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](\S+)", line)
        if not match or not is_plain_name(match[2]):
            raise EvalError(f"{sums}, line {number}: expected a SHA-256 and the name of a file beside it, found {line!r:.100}")
        wanted[match[2]] = match[1]
    for name in dict.fromkeys((*FILES, *wanted)):
        path = folder / name
        if name not in wanted:
            raise EvalError(f"{sums}: says nothing of {name}; copy the release again")
        if not path.is_file():
            raise EvalError(f"{path}: missing; copy the release again")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise EvalError(f"{path}: leads out of the release, to {path.resolve()}; copy it there")
        if sha256(path) != wanted[name]:
            raise EvalError(f"{path}: damaged or changed, its SHA-256 is not the one in {CHECKSUMS}; copy the release again")
