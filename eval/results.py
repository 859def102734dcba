"""Results that the evaluations wrote with ``--json``, read back and checked: they may be old, cut short or made by hand."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from eval.errors import EvalError

MFR_SETS = {  # key in a result -> its name in papers
    "mask": "Mask",
    "children": "Children",
    "african": "African",
    "caucasian": "Caucasian",
    "south_asian": "South Asian",
    "east_asian": "East Asian",
    "mr_all": "MR-All",
}
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Far = Annotated[float, Field(gt=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    """Of a result. What is not named here is not read."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Bounds(_Part):
    """A confidence interval."""

    low: Share
    high: Share


class Curves(_Part):
    """See ``eval.curves.ScoreCurves``."""

    genuine: PositiveInt
    impostor: PositiveInt
    far: list[Far]
    tar: list[Share]
    edges: list[Finite]
    genuine_counts: list[Annotated[int, Field(ge=0)]]
    impostor_counts: list[Annotated[int, Field(ge=0)]]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not len(self.far) == len(self.tar) > 0 or self.far != sorted(self.far):
            raise ValueError("far and tar must be equally long, and far must rise")
        if not len(self.edges) - 1 == len(self.genuine_counts) == len(self.impostor_counts) > 0 or self.edges != sorted(set(self.edges)):
            raise ValueError("edges must rise, and be one more than genuine_counts and than impostor_counts")
        if (sum(self.genuine_counts), sum(self.impostor_counts)) != (self.genuine, self.impostor):
            raise ValueError("the counts of the histograms must add up to genuine and impostor")
        return self


class Accuracy(_Part):
    mean: Share
    std: Share


class FarPoint(_Part):
    """TAR at a FAR, as ``eval.verification.TarAtFar``."""

    far_target: Far
    tar: Share
    genuine: PositiveInt
    impostor: PositiveInt


class Intervals(_Part):
    """See ``eval.bootstrap.PairIntervals``."""

    confidence: Share
    replicates: PositiveInt
    identities: PositiveInt
    identities_inferred: bool
    accuracy: Bounds | None
    accuracy_exact: Bounds | None
    tar_at_far: list[Bounds | None]


class _Result(_Part):
    model: str  # path
    model_sha256: str | None = None


class PairsResult(_Result):
    """``python -m eval pairs --json``."""

    protocol: Literal["pairs"]
    source: str
    num_pairs: PositiveInt
    num_images: PositiveInt
    accuracy: Accuracy
    accuracy_exact: Accuracy
    tar_at_far: list[FarPoint]
    unresolved_far: list[Far]
    intervals: Intervals | None = None  # results of before have none, nor curves
    curves: Curves | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.intervals and len(self.intervals.tar_at_far) != len(self.tar_at_far):
            raise ValueError("intervals.tar_at_far must have one entry for each of tar_at_far")
        if len({point.far_target for point in self.tar_at_far}) < len(self.tar_at_far):
            raise ValueError("tar_at_far must name each far_target once")
        return self


class IjbPoint(_Part):
    far: Far
    tar: Share


class Search(_Part):
    mean_ranks: dict[int, Share]
    mean_tpir: dict[float, Share]


class IjbMode(_Part):
    """``strict`` and ``nearest``: two readings of TAR at a FAR; empty where 1:1 was not evaluated."""

    strict: list[IjbPoint] = []
    nearest: list[IjbPoint] = []
    search: Search | None = None


class IjbResult(_Result):
    """``python -m eval ijb --json``."""

    protocol: Literal["ijb"]
    target: str
    modes: Annotated[dict[str, IjbMode], Field(min_length=1)]  # N1D1F1, ...
    genuine: int | None = None
    impostor: int | None = None
    unresolved_far: list[Far] = []
    curves: Curves | None = None


class MfrResult(_Result):
    """``python -m eval mfr --json``. A set that was not there is None."""

    protocol: Literal["mfr"]
    sets: dict[Literal[tuple(MFR_SETS)], FarPoint | None]


Result = PairsResult | IjbResult | MfrResult
_KINDS = {"pairs": PairsResult, "ijb": IjbResult, "mfr": MfrResult}


@dataclass(frozen=True)
class Entry:
    """A result, the file it was read from, and what its model is called among the others."""

    file: Path
    result: Result
    label: str = ""

    @property
    def model_key(self) -> tuple[str, str | None]:
        """Equal for results of one model: its digest; without one, its name."""
        sha = self.result.model_sha256
        return ("", sha) if sha else (self.result.model, None)


def read_results(files: Sequence[Path]) -> list[Entry]:
    """Read result files, in their order, and name their models so that no two models share a name.

    Raises: EvalError that names the file and the key, and what was expected there; for a file that is given twice.
    """
    twice = [file for file, times in Counter(file.resolve() for file in files).items() if times > 1]
    if twice:
        raise EvalError(f"{twice[0]}: given twice")
    entries = [Entry(file, _read(file)) for file in files]
    labels = _labels({entry.model_key: entry.result.model for entry in reversed(entries)})
    return [Entry(entry.file, entry.result, labels[entry.model_key]) for entry in entries]


def _read(file: Path) -> Result:
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise EvalError(f"{file}: not a readable file: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise EvalError(f"{file}: not readable as JSON: {error}; expected what pairs, ijb or mfr wrote with --json") from error
    protocol = values.get("protocol") if isinstance(values, dict) else None
    if not isinstance(protocol, str) or protocol not in _KINDS:
        raise EvalError(f"{file}: protocol: expected {', '.join(_KINDS)}, found {protocol!r:.40}; give what these wrote with --json")
    try:
        return _KINDS[protocol].model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        found = "" if first["type"] == "missing" else f", found {first['input']!r:.40}" if key else ""
        message = first["msg"].removeprefix("Value error, ")
        raise EvalError(f"{file}: {key or protocol}: {message[0].lower()}{message[1:]}{found}") from error


def _labels(models: dict[tuple[str, str | None], str]) -> dict[tuple[str, str | None], str]:
    """The shortest end of each model's path that is its own; of models that share a path, with the start of the digest."""
    parts = {key: _telling_parts(model) for key, model in models.items()}
    labels, length = {}, 1
    while len(labels) < len(parts):
        ends = {key: "/".join(part[-length:]) for key, part in parts.items()}
        for key, end in ends.items():
            whole = length >= len(parts[key])
            if key not in labels and (whole or list(ends.values()).count(end) == 1):
                labels[key] = end
        length += 1
    shared = Counter(labels.values())
    return {key: f"{label} {key[1][:8] if key[1] else 'without digest'}" if shared[label] > 1 else label for key, label in labels.items()}


def _telling_parts(model: str) -> list[str]:
    """Of the path of a model. A run's weights are RUN/checkpoints/STEP/backbone.safetensors: RUN and STEP tell it, together."""
    parts = list(Path(model).parts) or [model]
    if parts[-3:-2] == ["checkpoints"] and len(parts) > 3:
        own = parts[-2:-1] if parts[-1] == "backbone.safetensors" else parts[-2:]
        return [*parts[:-4], "/".join([parts[-4], *own])]
    return parts
