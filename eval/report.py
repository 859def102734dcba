"""One page that compares models: results side by side, with curves of those that were measured on the same pairs."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.pictures import DARK, LIGHT, embedded, page
from eval.plots import ModelScores, plots
from eval.results import MFR_SETS, Bounds, Entry, IjbResult, PairsResult

INDEX = "index.html"
NOT_RESOLVED, ABSENT = "not resolved", "-"


@dataclass(frozen=True)
class Cell:
    """Of a table: a text, and what is said of it in small print."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Results of one protocol on one data set: what may be compared."""

    protocol: str
    title: str
    about: str
    columns: list[str]
    rows: list[list[Cell]]
    models: list[ModelScores]  # those with curves
    notes: list[str] = field(default_factory=list)


def sections(entries: Sequence[Entry]) -> list[Section]:
    """Results are compared when protocol, source and every count agree, in the order in which they were given."""
    groups: dict[tuple, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(_data_set(entry), []).append(entry)
    return [_SECTIONS[key[0]](_told_apart(group)) for key, group in groups.items()]


def write_report(entries: Sequence[Entry], folder: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write ``index.html``, which needs no other file and no network, and its pictures as PNG beside it; returns the page."""
    compared, shown = sections(entries), []
    drawn = [plots(section.models) if section.models else [] for section in compared]
    done, total = 0, sum(map(len, drawn))
    for number, (section, pictures) in enumerate(zip(compared, drawn, strict=True), start=1):
        embeddings = []
        for plot in pictures:
            light, dark = plot.png(LIGHT), plot.png(DARK)
            (folder / f"{number}-{section.protocol}-{plot.name}.png").write_bytes(light)
            embeddings.append(embedded(plot.title, light, dark))
            done += 1
            if progress:
                progress(done, total)
        shown.append({**vars(section), "pictures": embeddings})
    models = list(dict.fromkeys(entry.label for entry in entries))
    values = {"title": " and ".join(models) if len(models) < 3 else f"{len(models)} models compared", "sections": shown}
    values["files"] = [
        {"label": entry.label, "model": entry.result.model, "digest": entry.result.model_sha256, "file": entry.file} for entry in entries
    ]
    (folder / INDEX).write_text(page(Path(__file__).with_name("report.html"), values), encoding="utf-8")
    return folder / INDEX


def _data_set(entry: Entry) -> tuple:
    result = entry.result
    if isinstance(result, PairsResult):
        counts = {(point.genuine, point.impostor) for point in result.tar_at_far}
        counts |= {(result.curves.genuine, result.curves.impostor)} if result.curves else set()
        return "pairs", result.source, result.num_pairs, result.num_images, frozenset(counts)
    if isinstance(result, IjbResult):
        return "ijb", result.target, result.genuine, result.impostor
    sizes = ((name, point and (point.far_target, point.genuine, point.impostor)) for name, point in sorted(result.sets.items()))
    return "mfr", *(size for size in sizes if size[1])


def _told_apart(entries: list[Entry]) -> list[Entry]:
    """A model that stands there twice gets its file's name."""
    times = Counter(entry.label for entry in entries)
    return [
        Entry(entry.file, entry.result, f"{entry.label} ({entry.file})" if times[entry.label] > 1 else entry.label) for entry in entries
    ]


def _pairs_section(entries: list[Entry]) -> Section:
    first: PairsResult = entries[0].result
    fars = sorted({point.far_target for entry in entries for point in entry.result.tar_at_far} | _unresolved(entries), reverse=True)
    rows, models = [], []
    for entry in entries:
        result: PairsResult = entry.result
        known = result.intervals
        points = {point.far_target: point.tar for point in result.tar_at_far}
        bounds = dict(zip(points, known.tar_at_far, strict=True)) if known else {}
        accuracies = [
            Cell(_percent(accuracy.mean), _joined(f"std {_percent(accuracy.std)}", _range(known and interval)))
            for accuracy, interval in (
                (result.accuracy, known and known.accuracy),
                (result.accuracy_exact, known and known.accuracy_exact),
            )
        ]
        tars = [
            Cell(_percent(points[far]), _range(bounds.get(far))) if far in points else _no_tar(far, result.unresolved_far) for far in fars
        ]
        rows.append([Cell(entry.label), *accuracies, *tars])
        if result.curves:
            bars = [(far, interval.low, interval.high) for far, interval in bounds.items() if interval]
            models.append(ModelScores(entry.label, result.curves, bars))
    return Section(
        "pairs",
        f"Pairs of {first.source}",
        f"{first.num_pairs:,} pairs of {first.num_images:,} images. Accuracy over folds, and TAR at a FAR of at most; in %.",
        ["model", "accuracy", "with exact thresholds", *(f"TAR@FAR={far:.0e}" for far in fars)],
        rows,
        models,
        [*_interval_notes(entries), *_curve_note(entries)],
    )


def _ijb_section(entries: list[Entry]) -> Section:
    first: IjbResult = entries[0].result
    everything = [(entry, name, mode) for entry in entries for name, mode in entry.result.modes.items()]
    fars = sorted({point.far for _, _, mode in everything for point in (*mode.strict, *mode.nearest)} | _unresolved(entries))
    ranks = sorted({rank for _, _, mode in everything if mode.search for rank in mode.search.mean_ranks})
    fpirs = sorted({fpir for _, _, mode in everything if mode.search for fpir in mode.search.mean_tpir})
    rows = []
    for entry, name, mode in everything:
        found = [_percent_or_absent(mode.search and mode.search.mean_ranks.get(rank)) for rank in ranks]
        found += [_percent_or_absent(mode.search and mode.search.mean_tpir.get(fpir)) for fpir in fpirs]
        readings = [(reading, points) for reading, points in (("nearest", mode.nearest), ("strict", mode.strict)) if points]
        for reading, points in readings or [(ABSENT, [])]:  # 1:N alone
            tars = {point.far: point.tar for point in points}
            cells = [Cell(_percent(tars[far])) if far in tars else _no_tar(far, entry.result.unresolved_far) for far in fars]
            rows.append([Cell(entry.label), Cell(name), Cell(reading), *cells, *found])
    pairs = f"{first.genuine:,} genuine and {first.impostor:,} impostor pairs of templates. " if first.genuine and first.impostor else ""
    return Section(
        "ijb",
        first.target,
        f"{pairs}TAR at the FAR above it, rank-k and TPIR at an FPIR as means of both galleries; in %.",
        [
            *("model", "mode", "reading"),
            *(f"TAR@FAR={far:.0e}" for far in fars),
            *(f"rank-{k}" for k in ranks),
            *(f"TPIR@FPIR={fpir:.0e}" for fpir in fpirs),
        ],
        rows,
        [ModelScores(entry.label, entry.result.curves) for entry in entries if entry.result.curves],
        [
            "Strict: the highest TAR whose FAR is at most the target. Nearest: at the FAR that lies nearest to it, which may exceed it; "
            "published figures are read so, in mode N1D1F1. Curves are of N1D1F1.",
            *_curve_note(entries),
        ],
    )


def _mfr_section(entries: list[Entry]) -> Section:
    names = [name for name in MFR_SETS if any(entry.result.sets.get(name) for entry in entries)]
    points = {name: next(entry.result.sets[name] for entry in entries if entry.result.sets.get(name)) for name in names}
    rows = [
        [Cell(entry.label), *(_percent_or_absent(point and point.tar) for point in (entry.result.sets.get(name) for name in names))]
        for entry in entries
    ]
    sizes = [f"{MFR_SETS[name]} {points[name].genuine:,} and {points[name].impostor:,}" for name in names]
    return Section(
        "mfr",
        "Sets in the manner of MFR-Ongoing",
        "TAR at a FAR of at most, all images compared with all; in %. These are local sets, not those of the server.",
        ["model", *(f"{MFR_SETS[name]} @{points[name].far_target:.0e}" for name in names)],
        rows,
        [],
        [f"Genuine and impostor pairs: {'; '.join(sizes)}."] if sizes else [],
    )


_SECTIONS = {"pairs": _pairs_section, "ijb": _ijb_section, "mfr": _mfr_section}


def _unresolved(entries: list[Entry]) -> set[float]:
    return {far for entry in entries for far in entry.result.unresolved_far}


def _no_tar(far: float, unresolved: list[float]) -> Cell:
    return Cell(NOT_RESOLVED, f"needs {1 / far:,.0f} impostor pairs") if far in unresolved else Cell(ABSENT)


def _interval_notes(entries: list[Entry]) -> list[str]:
    known = [entry for entry in entries if entry.result.intervals]
    notes = []
    if known:
        intervals = known[0].result.intervals
        inferred = ", inferred from the genuine pairs" if intervals.identities_inferred else ""
        notes.append(
            f"Ranges are {intervals.confidence:.0%} intervals from {intervals.replicates:,} bootstrap replicates of the "
            f"{intervals.identities:,} identities{inferred}. None stands where no pair was judged wrong, or identities are too few."
        )
    if len(known) < len(entries):
        notes.append(f"Without intervals: {', '.join(entry.label for entry in entries if not entry.result.intervals)}.")
    return notes


def _curve_note(entries: list[Entry]) -> list[str]:
    without = [entry.label for entry in entries if not entry.result.curves]
    return [f"Not in the pictures, because their results hold no curves: {', '.join(without)}."] if without else []


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _percent_or_absent(share: float | None) -> Cell:
    return Cell(ABSENT if share is None else _percent(share))


def _range(bounds: Bounds | None) -> str:
    return f"{_percent(bounds.low)} to {_percent(bounds.high)}" if bounds else ""


def _joined(*texts: str) -> str:
    return "; ".join(text for text in texts if text)
