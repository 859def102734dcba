"""Results in the columns of the paper, beside its own rows."""

from collections.abc import Sequence

from tabulate import tabulate

from eval.errors import EvalError
from eval.published import COLUMNS, IJB_FARS, PUBLISHED
from eval.results import Entry, IjbResult, MfrResult

IJB_MODE = "N1D1F1"  # of published figures
ABSENT = "-"
LOCAL, OTHER_FAR = "*", "!"  # marks of figures that are no match for the published ones beside them
_READINGS = ("nearest", "strict")


def paper_table(entries: Sequence[Entry], *, markdown: bool = False) -> str:
    """The published rows, then one row for each model and reading of IJB, and below them what the marks mean.

    Raises: EvalError when two results give the same figures of one model.
    """
    rows = [[row.model, "nearest" if 1e-4 in row.percent else ABSENT, *_cells(row.percent)] for row in PUBLISHED]
    models: dict[tuple, list[Entry]] = {}
    for entry in entries:
        models.setdefault(entry.model_key, []).append(entry)
    for own in models.values():
        rows += _rows_of_model(own)
    notes = [f"Published: {'; '.join(dict.fromkeys(row.source for row in PUBLISHED))}.", *_notes(entries)]
    style = "github" if markdown else "simple"
    if markdown:
        rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]  # of a label
    table = tabulate(rows, ["model", "IJB reading", *COLUMNS.values()], tablefmt=style, disable_numparse=True, preserve_whitespace=True)
    return "\n".join([table, "", *(f"{note}{'  ' if markdown else ''}" for note in notes)])


def _rows_of_model(entries: list[Entry]) -> list[list[str]]:
    ijb = _only(entries, [entry for entry in entries if _is_ijbc(entry)], "IJB-C")
    mfr = _only(entries, [entry for entry in entries if isinstance(entry.result, MfrResult)], "the MFR sets")
    figures: dict[str | float, str] = {}
    for name, point in mfr.result.sets.items() if mfr else ():
        if point:
            other = f" {OTHER_FAR}{point.far_target:.0e}" if point.far_target != (1e-4 if name in ("mask", "children") else 1e-6) else ""
            figures[name] = f"{100 * point.tar:.2f}{LOCAL}{other}"
    mode = ijb.result.modes.get(IJB_MODE) if ijb else None
    if not mode or not (mode.nearest or mode.strict):
        return [[entries[0].label, ABSENT, *_cells(figures)]] if figures else []
    rows = []
    for reading in _READINGS:
        tars = {point.far: 100 * point.tar for point in getattr(mode, reading)}
        found = {far: tars[far] for far in IJB_FARS if far in tars}
        rows.append([entries[0].label, reading, *_cells(figures | found)])
    return rows


def _only(entries: list[Entry], found: list[Entry], what: str) -> Entry | None:
    if len(found) > 1:
        raise EvalError(f"{found[0].file} and {found[1].file}: both give {what} of {entries[0].label}; give one of them")
    return found[0] if found else None


def _cells(figures: dict[str | float, float | str]) -> list[str]:
    values = (figures.get(key, ABSENT) for key in COLUMNS)
    return [value if isinstance(value, str) else f"{value:.2f}" for value in values]


def _notes(entries: Sequence[Entry]) -> list[str]:
    notes = [
        f"IJB-C in mode {IJB_MODE}. Nearest: TAR at the FAR nearest to the target, as the field's script reads it; published figures are "
        "nearest. Strict: the highest TAR whose FAR is at most the target."
    ]
    if any(isinstance(entry.result, MfrResult) for entry in entries):
        notes.append(f"{LOCAL} on local sets, which are not those of the MFR-Ongoing server: not comparable with the published figures.")
    if any(OTHER_FAR in cell for entry in entries for row in _rows_of_model([entry]) for cell in row[2:]):
        notes.append(f"{OTHER_FAR} at another FAR than the published figure.")
    for entry in entries:
        if not _rows_of_model([entry]):
            notes.append(f"Not in the table: {entry.file}, which holds none of these figures; see python -m eval report.")
    return notes


def _is_ijbc(entry: Entry) -> bool:
    """Whether it has figures of IJB-C's 1:1."""
    result = entry.result
    return isinstance(result, IjbResult) and result.target == "IJBC" and any(mode.nearest or mode.strict for mode in result.modes.values())
