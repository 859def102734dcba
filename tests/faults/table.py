"""The table of faults: what was done to a run, what had to follow, and whether it did; on the terminal, or in the file of --fault-table."""

from __future__ import annotations

from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--fault-table", help="write the table of faults to this file, as Markdown")


def pytest_configure(config):
    config.addinivalue_line("markers", "fault(what, expected): a row in the table of faults; {id} stands for the test's parameters")


def pytest_collection_modifyitems(items):
    for item in items:
        marker = item.get_closest_marker("fault")
        if marker:
            parameters = item.callspec.id if hasattr(item, "callspec") else ""
            item.user_properties.append(("fault", [text.replace("{id}", parameters) for text in marker.args]))


def pytest_terminal_summary(terminalreporter, config):
    rows = []
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.getreports(outcome):
            properties = dict(getattr(report, "user_properties", ()))
            if "fault" in properties and (report.when == "call" or outcome != "passed"):
                rows.append((*properties["fault"], outcome))
    if not rows:
        return
    rows.sort()
    terminalreporter.section("faults")
    for what, expected, outcome in rows:
        terminalreporter.write_line(f"{outcome:<8}{what} -> {expected}")
    terminalreporter.write_line(f"{len(rows)} faults, {sum(outcome == 'passed' for *_, outcome in rows)} survived or named")
    if path := config.getoption("--fault-table"):
        lines = ["| fault | what must follow | result |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
        Path(path).write_text("\n".join(lines) + "\n")
