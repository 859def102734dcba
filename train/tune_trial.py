"""What ``train tune`` starts in every process of a trial: the run as it is, and then a note of the memory that it took.

    python -m train.tune_trial FOLDER --config ... --deepspeed_config ... [key=value ...]

FOLDER takes one file per rank, ``peak_00000.json``; it is there if the run came to its end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from train.__main__ import main
from train.dist import read_ranks
from train.window import memory


def peak_file(folder: Path, rank: int) -> Path:
    """Where a rank notes its peak: an object of one key, ``bytes``."""
    return folder / f"peak_{rank:05d}.json"


if __name__ == "__main__":
    notes = Path(sys.argv.pop(1))
    main()
    this = read_ranks()
    peak_file(notes, this.rank).write_text(json.dumps({"bytes": memory(this.device)["peak"]}))
