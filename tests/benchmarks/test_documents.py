"""The documents' numbers are those of the committed result files, and what they say of them in words holds there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import minilm, prose, result_files
from benchmarks.fidelity import table as fidelity
from benchmarks.groups import table as groups
from examples import digits

from .claims import DOCUMENTS, ROOT

README = (ROOT / "README.md").read_text()
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+\.\d+(?![\w.]*\d)|(?<![\w.])\d+%")
# Numbers of the prose that no result of ours can back, and why.
GIVEN = {
    "95%": "what all intervals are of",
    "20%": "a share of labels or examples that the benchmark sets",
    "15%": "a share of labels that the demo sets",
    "0.642": "GGDA's own table",
    "3.10": "a version of Python",
    "1.15": "a version of accelerate",
}


@pytest.mark.parametrize("table", [fidelity, groups], ids=["FIDELITY", "GROUPS"])
def test_the_documents_are_what_the_result_files_give(
    table: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    committed = table.DOCUMENT
    monkeypatch.setattr(table, "DOCUMENT", tmp_path / committed.name)
    assert table.write_table().read_text() == committed.read_text(), f"run `python -m {table.__package__} table`"


def written_by_hand(text: str) -> str:
    """Prose without places, tables, code and addresses."""
    text = re.sub(r"```.*?```", "", prose.without_places(text), flags=re.DOTALL)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
    return "\n".join(line for line in text.splitlines() if not line.startswith("|"))


@pytest.mark.parametrize(
    "text",
    [
        fidelity.NOTES.read_text(),
        f"{fidelity._HEAD}{fidelity._VERDICTS} {fidelity._SIZES}",
        groups.NOTES.read_text(),
        groups._HEAD,
        README,
    ],
    ids=["notes of FIDELITY", "head of FIDELITY", "notes of GROUPS", "head of GROUPS", "README"],
)
def test_no_number_in_prose_is_written_by_hand(text: str) -> None:
    bare = [number for number in NUMBER.findall(written_by_hand(text)) if number not in GIVEN]
    assert not bare, f"give {bare} as places in a result file: {{{{file | ... | figure}}}}"


def test_the_search_for_bare_numbers_finds_them() -> None:
    text = "From 0.35 to {{a | b}}, `0.1`, [1](x-2.5)\n| 0.2 |\nby -0.70, or 7% (2024), [+0.021, 3.5].\n"
    assert NUMBER.findall(written_by_hand(text)) == ["0.35", "-0.70", "7%", "+0.021", "3.5"]


@pytest.mark.parametrize(
    ("document", "quote", "holds"),
    [(path, *claim) for path, claims in DOCUMENTS.items() for claim in claims],
    ids=[f"{path.name}: {quote}" for path, claims in DOCUMENTS.items() for quote, _ in claims],
)
def test_what_the_documents_say_in_words_holds(document: Path, quote: str, holds: Callable[[], bool]) -> None:
    assert quote in " ".join(document.read_text().split()), f"{document.name} does not say this: mend tests' claims.py"
    assert holds(), f"the results do not bear out what {document.name} says: “{quote}”. Mend the sentence."


def test_readmes_table_is_the_demos() -> None:
    found = json.loads((ROOT / "docs" / "demo.json").read_text())
    assert digits.table(found) in README, (
        "make demo; cp demo-output/{demo.json,influence.png} docs; and the table it prints"
    )


def test_the_tables_of_minilm_are_those_of_its_result_files() -> None:
    pytest.importorskip("transformers")
    from examples import trainer_minilm

    document = (ROOT / "docs" / "REAL_MODELS.md").read_text()
    found = json.loads((ROOT / "docs" / "trainer_minilm.json").read_text())
    assert trainer_minilm.as_text(found) in document, "python -m examples.trainer_minilm; cp minilm-output/*.json docs"
    assert minilm.table(result_files.read_result(minilm.RESULT)) in document, "python -m benchmarks.minilm"


def test_what_taught_the_gpt_its_completions_is_in_its_result_file() -> None:
    pytest.importorskip("transformers")
    from examples import trainer_gpt

    found = json.loads((ROOT / "docs" / "trainer_gpt.json").read_text())
    document = (ROOT / "docs" / "REAL_MODELS.md").read_text()
    assert trainer_gpt.as_text(found) in document, "python -m examples.trainer_gpt; cp gpt-output/*.json docs"
    sentences = ["".join(sentence) for sentence in trainer_gpt.SENTENCES]
    (first, _), *_ = found["bible"][sentences[0]]["for it"]
    assert first == found["book"] == "Genesis"
    assert {book for book, _ in found["bible"][sentences[1]]["for it"][:3]} <= {"Matthew", "Mark", "Luke", "John"}
    taught, against = (found["bible"][sentences[2]][kind] for kind in ("for it", "against it"))
    assert max(number for _, number in taught) < 0.02 and min(number for _, number in against) < -0.2
    assert max(found["tokens"], key=lambda one: abs(one[1]))[0] == "'the'"
    assert max(found["completion"], key=lambda one: one[1])[0] == "heaven"
    minutes = [found[f"seconds of {what}"] / 60 for what in ("training", "explaining")]
    assert [round(number) for number in minutes] == [7, 7]


@pytest.mark.parametrize("name", ["mlp", "group_speed", "ranks", "query_points"])
def test_tables_of_speed_are_the_result_files(name: str) -> None:
    lines = (ROOT / "benchmarks" / "README.md").read_text().splitlines()
    table = {
        line.split(" | ")[0].removeprefix("| "): line.split(" | ", 1)[1] for line in lines if line.startswith("| ")
    }
    for title, figures in result_files.read_result(result_files.FOLDER / "speed" / f"{name}.json")["rows"].items():
        shown = re.findall(r"\d+(?:\.\d+)?", table[title])
        digits = [len(number.partition(".")[2]) for number in shown]
        assert list(map(float, shown)) == [round(figure, d) for figure, d in zip(figures, digits, strict=True)], title


def test_places_are_filled_wrapped_and_named_where_nothing_is_there() -> None:
    template = "# Head {{a |\n b}}\n\n- one {{c | d}}\n  two\n- three " + "word " * 30 + "\n\n{{t}}\n"
    values = {("a", "b"): "1", ("c", "d"): "0.5", ("t",): "| x |\n|---|"}
    expected = ["# Head 1", "", "- one 0.5 two", "- three " + " ".join(["word"] * 23), "  " + " ".join(["word"] * 7)]
    assert prose.filled(template, lambda *words: values[words]).splitlines() == [*expected, "", "| x |", "|---|"]
    with pytest.raises(KeyError, match=r"\{\{e \| f\}\}"):
        prose.filled("{{e | f}}", lambda *words: values[words])


def test_results_are_compact_plain_json_without_infinities(tmp_path: Path) -> None:
    content = {"a": {"b": 0.123456789, "c": (1, float("inf"))}, "long": {str(k): {"x": k} for k in range(50)}}
    path = result_files.write_result(tmp_path / "new" / "file.json", content)
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found == {"a": {"b": 0.123457, "c": [1, None]}, "long": {str(k): {"x": k} for k in range(50)}}
    assert path.read_text().splitlines()[1] == ' "a": {"b": 0.123457, "c": [1, null]},'
    assert result_files.read_result(tmp_path / "absent.json") is None


def test_an_estimate_without_an_interval_is_shown_without_one() -> None:
    known = {"mean": 0.5, "low": -0.25, "high": 0.75}
    unknown = known | {"high": None}
    assert result_files.shown_estimate(known, "+") == "+0.500 [-0.250, +0.750]"
    assert result_files.shown_estimate(unknown) == "0.500"
    assert result_files.shown_estimate(None) == ""
    assert groups._plus_minus(known) == "0.500 ± 0.500"
    assert groups._plus_minus(unknown) == "0.500"


def test_every_result_says_when_it_was_made() -> None:
    files = sorted(result_files.FOLDER.rglob("*.json"))
    assert len(files) > 40
    for path in files:
        found = json.loads(path.read_text())
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["made"]["date"]), path
        assert ("read_back" in found) != ("segflow" in found["made"]), path
    read_back, anew = (
        {"read_back": True, "made": {"date": "2026-01-02"}},
        {"made": {"date": "2026-01-02", "segflow": "9"}},
    )
    assert "read back" in result_files.shown_made(read_back)
    assert result_files.shown_made(anew) == "Made 2026-01-02 with segflow 9."
    assert (result_files.short_made(read_back), result_files.short_made(anew)) == (
        "2026-01-02, read back",
        "2026-01-02",
    )
