"""docs/STATISTICS.md is what the committed coverages give."""

from __future__ import annotations

from benchmarks.coverage import DOCUMENT, table, written


def test_the_document_is_what_the_files_give() -> None:
    document = DOCUMENT.read_text()
    assert written(document) == document
    assert written(document.replace("| 10 subsets |", "| 11 subsets |")) == document


def test_a_table_has_the_ends_and_the_median_of_each_size() -> None:
    entries = [
        {"task": "a_task", "world": {"subsets": size, "queries": 3}, "coverage": {"share": share, "none": 0.5}}
        for size, share in ((5, 0.9), (5, 0.96), (5, 0.95), (8, 0.94))
    ]
    lines = table(entries).splitlines()[2:]
    assert lines == [
        "| a task | share | 5 subsets | 3 | 0.900 | 0.950 | 0.960 |",
        "| a task | share | 8 subsets | 1 | 0.940 | 0.940 | 0.940 |",
    ]
