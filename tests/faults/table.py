"""Fills in the results of docs/reliability.md: `python tests/faults/table.py REPORT.xml...`.

Reports are what `pytest --junitxml REPORT.xml` wrote; a row's result is that of all tests it names.
"""

import re
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "reliability.md"
TEST = re.compile(r"`(?P<file>[\w/]+\.py)?(?:::(?P<name>\w+)(?P<parameters>\[[^`]*\])?)?`")


def outcomes(paths: list[str]) -> dict[tuple[str, str], str]:
    """(file below tests/, test with its parameters) -> passed, failed or skipped; later reports win."""
    found = {}
    for path in paths:
        for case in xml.parse(path).iterfind(".//testcase[@classname]"):  # one that was interrupted has none
            kinds = {child.tag for child in case}
            failed = kinds & {"failure", "error"}
            file = case.get("classname").removeprefix("tests.").replace(".", "/") + ".py"
            found[file, case.get("name")] = "failed" if failed else "skipped" if kinds else "passed"
    return found


def result(cell: str, known: dict[tuple[str, str], str]) -> str:
    """Of the tests that a cell names: "passed (3)", or every other outcome with its number."""
    counts, file = {}, None
    for match in TEST.finditer(cell):
        file = match["file"] or file
        named = [
            outcome
            for (place, test), outcome in known.items()
            if place == file
            and (match["name"] is None or test.partition("[")[0] == match["name"])
            and (match["parameters"] is None or test.endswith(match["parameters"]))
        ]
        for outcome in named or ["not run"]:
            counts[outcome] = counts.get(outcome, 0) + 1
    return ", ".join(f"{outcome} ({number})" for outcome, number in sorted(counts.items()))


def main(reports: list[str]) -> None:
    known, lines = outcomes(reports), PAGE.read_text(encoding="utf-8").splitlines()
    for at, line in enumerate(lines):
        *cells, _ = line.split(" | ")
        if len(cells) == 4 and re.match(r"\| \d+$", cells[0]):
            lines[at] = " | ".join([*cells, f"{result(cells[3], known)} |"])
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
