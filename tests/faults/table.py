"""The table of faults: what was done to a run, what had to follow, and whether it did; on the terminal, or in the file of --fault-table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """A test of a fault and its outcome."""

    what: str  # "{id}" stands for ``case``
    expected: str
    case: str  # the test's parameters, or ""
    outcome: str

    def __str__(self) -> str:
        return f"{self.outcome:<8}{self.what.replace('{id}', self.case)} -> {self.expected}"


def pytest_addoption(parser):
    parser.addoption("--fault-table", help="write the table of faults to this file, as Markdown; one row for all parameters of a test")


def pytest_configure(config):
    config.addinivalue_line("markers", "fault(what, expected): a row in the table of faults; {id} stands for the test's parameters")


def pytest_collection_modifyitems(items):
    for item in items:
        marker = item.get_closest_marker("fault")
        if marker:
            item.user_properties.append(("fault", [*marker.args, item.callspec.id if hasattr(item, "callspec") else ""]))


def pytest_terminal_summary(terminalreporter, config):
    cases = []
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.getreports(outcome):
            properties = dict(getattr(report, "user_properties", ()))
            if "fault" in properties and (report.when == "call" or outcome != "passed"):
                cases.append(Case(*properties["fault"], outcome))
    if not cases:
        return
    cases.sort()
    terminalreporter.section("faults")
    for case in cases:
        terminalreporter.write_line(str(case))
    terminalreporter.write_line(f"{len(cases)} faults, {sum(case.outcome == 'passed' for case in cases)} survived or named")
    if path := config.getoption("--fault-table"):
        Path(path).write_text(markdown(cases))


def markdown(cases: Iterable[Case]) -> str:
    rows: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        rows.setdefault((case.what, case.expected), []).append(case)
    lines = ["| what was done | what had to follow | it did |", "|---|---|---|"]
    for (what, expected), same in rows.items():
        passed = sum(case.outcome == "passed" for case in same)
        lines.append(f"| {what.replace('{id}', ', '.join(case.case for case in same))} | {expected} | {passed} of {len(same)} |")
    return "\n".join(lines) + "\n"
