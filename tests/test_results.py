"""The page of results says what the runs gave: its tables are those of the rows that are kept beside it."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import real_sweep_report
from reproduction.tables import tables


DOCS = Path(__file__).parents[1] / "docs"
FIGURES = sorted(path for path in (DOCS / "results").glob("*.json") if path.stem not in ("fig1", "smollm2"))


@pytest.mark.parametrize("path", FIGURES, ids=[path.stem for path in FIGURES])
def test_the_tables_are_those_of_the_rows(path):
    panels = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == tables(panels)
    assert all(
        len(runs) == (2 if path.stem.startswith("tune") else 3) for found in panels.values() for runs in found.values()
    )


def test_the_page_quotes_the_tables_as_they_are():
    known = {line for path in (DOCS / "results").glob("*.md") for line in path.read_text().splitlines()}
    page = (DOCS / "results.md").read_text().splitlines()
    quoted = [line for line in page if re.match(r"\| .*(\d \[-?\d|\| [\d.]+ to [\d.]+ \|)", line)]
    assert len(quoted) > 20
    assert [line for line in quoted if line not in known] == []


def test_every_picture_is_shown():
    page = (DOCS / "results.md").read_text()
    assert all(f"results/{path.name}" in page for path in (DOCS / "results").glob("*.png"))


def test_the_tables_of_the_real_model_are_those_of_its_runs(tmp_path, monkeypatch):
    numbers = json.loads((DOCS / "results" / "smollm2.json").read_text())
    for name, run in numbers.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    (tmp_path / "again").mkdir()
    monkeypatch.setattr("sys.argv", ["real_sweep_report", str(tmp_path), str(tmp_path / "again")])
    real_sweep_report.main()
    for name in ("smollm2.md", "smollm2.json"):
        assert (tmp_path / "again" / name).read_text() == (DOCS / "results" / name).read_text()
