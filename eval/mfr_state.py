"""Progress of a long scoring, in a file that is complete or absent."""

import json
import time
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data_pipeline.output import replace_file
from eval.errors import EvalError

SAVE_EVERY_S = 60.0


class ScoringState:
    """How many steps of a scoring are done, and the scores that they kept.

    The file is a safetensors: ``NAME.genuine`` and ``NAME.impostor`` float32 for each comparison, and one key of metadata, ``state``: JSON
    with ``done`` and with ``of``, a description of all that the scores depend on.

    Args:
        path: of the file; its folder exists.
        save_every_s: least seconds between two saves; what was done since the last is done again after a kill.
    """

    def __init__(self, path: Path, save_every_s: float = SAVE_EVERY_S) -> None:
        self._path, self._save_every_s = path, save_every_s
        self._of: dict[str, object] = {}
        self._saved = time.monotonic()

    def open(self, of: dict[str, object], steps: int) -> tuple[int, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """Begin, or go on from the file.

        Args:
            of: JSON-like; the file must have been written of the same.
        Returns: (steps done, comparison -> its (genuine, impostor) scores so far).
        Raises: EvalError for a file of other data, or that is damaged.
        """
        self._of, self._saved = json.loads(json.dumps(of)), time.monotonic()
        if not self._path.exists():
            return 0, {}
        remedy = "delete it to begin anew, or keep progress elsewhere"
        try:
            with safe_open(self._path, framework="np") as file:
                about = json.loads((file.metadata() or {})["state"])
                found, done = about["of"], about["done"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safetensors handle is not iterable)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise EvalError(f"{self._path}: no readable progress of a scoring: {error}; {remedy}") from error
        differing = [key for key in self._of if not isinstance(found, dict) or found.get(key) != self._of[key]]
        if differing:
            raise EvalError(f"{self._path}: is the progress of another scoring: {', '.join(differing)} differ; {remedy}")
        names = {name.rpartition(".")[0] for name in tensors}
        scores = {name: (tensors.get(f"{name}.genuine"), tensors.get(f"{name}.impostor")) for name in names}
        sound = all(each is not None and each.dtype == np.float32 and each.ndim == 1 for pair in scores.values() for each in pair)
        if type(done) is not int or not 0 < done <= steps or not sound:
            raise EvalError(f"{self._path}: no readable progress of a scoring: damaged; {remedy}")
        return done, scores

    def is_due(self) -> bool:
        return time.monotonic() - self._saved >= self._save_every_s

    def save(self, done: int, scores: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Replace the file. Arguments are what ``open`` returns."""
        tensors = {}
        for name, pair in scores.items():
            tensors[f"{name}.genuine"], tensors[f"{name}.impostor"] = pair
        replace_file(self._path, save(tensors, {"state": json.dumps({"done": done, "of": self._of})}))
        self._saved = time.monotonic()

    def discard(self) -> None:
        """Remove the file, once its result is safe elsewhere."""
        self._path.unlink(missing_ok=True)
