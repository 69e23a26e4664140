"""Queries of language models, and pairs: completions, contrasts, each token by itself, padding, and what is refused."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import segflow as sf
from segflow.tasks import (
    CausalLM,
    Completions,
    ContrastivePairs,
    Padding,
    TokenClassification,
    each_token,
    mean_tokens,
    pad,
)

from ..support.helpers import analyzer_of, trajectory_of
from ..support.model_tasks import causal_data
from ..support.models import gpt2, masked_bert

NO = -100


class Letters:
    """A tokenizer of 24 letters, with a token of beginning and one of end if asked for."""

    def __init__(self, begins: bool = False, ends: bool = False):
        self.front, self.back = [1] * begins, [2] * ends

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [3 + ord(letter) % 20 for letter in text]
        return [*self.front, *ids, *self.back] if add_special_tokens else ids

    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


class Called:
    """Is called, as transformers' tokenizers are, and knows no special tokens."""

    def __call__(self, text: str) -> Any:
        return UserDict(input_ids=torch.tensor([3 + ord(letter) % 20 for letter in text]))


class Encoding:
    def __init__(self, ids: list[int]):
        self.ids = ids


class Tokenizers(Letters):
    """Gives objects with ids, as the tokenizers library does."""

    def encode(self, text: str, add_special_tokens: bool = True) -> Any:
        return Encoding(super().encode(text, add_special_tokens))


def test_a_completion_is_labelled_and_its_prompt_is_not() -> None:
    ids = Letters().encode("abcd")
    for tokenizer in (Letters(), Called(), Tokenizers()):
        query = Completions(tokenizer, ["ab"], ["cd"])[0]
        assert query["input_ids"].tolist() == ids and query["attention_mask"].tolist() == [1] * 4
        assert query["labels"].tolist() == [NO, NO, *ids[2:]]
    queries = Completions(Letters(), ["ab", "a"], ["cd", "b"])
    assert queries.labels == ["0: cd", "1: b"] and len(queries) == 2


@pytest.mark.parametrize("prompt", ["ab", ""])
@pytest.mark.parametrize("ends", [False, True])
def test_special_tokens_stand_once_in_front(prompt: str, ends: bool) -> None:
    query = Completions(Letters(begins=True, ends=ends), [prompt], ["c"])[0]
    assert query["input_ids"].tolist() == [1, *Letters().encode(prompt + "c")]


def test_transformers_tokenizers_are_taken() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[BOS]": 0, "the": 1, "cat": 2, "[UNK]": 3}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[BOS] $A", special_tokens=[("[BOS]", 0)])
    for tokenizer in (words, PreTrainedTokenizerFast(tokenizer_object=words)):
        assert Completions(tokenizer, ["the"], [" cat"])[0]["input_ids"].tolist() == [0, 1, 2]
        assert each_token(Completions(tokenizer, ["the"], [" cat the"])).labels == [
            "0, token 2: cat",
            "0, token 3: the",
        ]


def _log_probability(model: nn.Module, query: dict[str, Tensor], prefix: str = "") -> Tensor:
    ids, labels = query[f"{prefix}input_ids"], query[f"{prefix}labels"]
    log_p = model(ids[None]).logits[0].log_softmax(-1)
    return sum((log_p[s - 1, labels[s]] for s in range(1, len(ids)) if labels[s] != NO), torch.zeros(()).double())


QUERIES = (["ab", "hello"], ["cd", " you"], [" why", "a"])


def test_log_probabilities_and_contrasts_are_those_of_the_completions() -> None:
    model, queries = gpt2().double().eval(), Completions(Letters(), *QUERIES)
    whole = sum(_log_probability(model, query) for query in queries)
    other = sum(_log_probability(model, query, "contrast_") for query in queries)
    batch = pad(list(queries))
    for objective in ("sequence mean", "token sum"):
        task = CausalLM(objective, measurement="log_probability")
        torch.testing.assert_close(task.compute_measurement(batch, model), whole)
        task = CausalLM(objective, measurement="contrast")
        torch.testing.assert_close(task.compute_measurement(batch, model), whole - other)
    loss = CausalLM("token sum").compute_train_loss(batch, model)
    torch.testing.assert_close(loss, -whole)  # of the completions alone


@pytest.mark.parametrize("contrast", [False, True])
def test_each_tokens_queries_add_up_to_the_completions(contrast: bool) -> None:
    model, queries = gpt2().double().eval(), Completions(Letters(), *QUERIES[: 3 if contrast else 2])
    task = CausalLM(measurement="contrast" if contrast else "log_probability")
    tokens = each_token(queries)
    assert len(tokens) == len(tokens.labels) == 2 + 4 + (4 + 1) * contrast
    of_token = [task.compute_measurement(pad([query]), model).item() for query in tokens]
    whole = [task.compute_measurement(pad([query]), model).item() for query in queries]
    places = [int(label.split(",")[0]) for label in tokens.labels]
    for number, expected in enumerate(whole):
        found = sum(value for value, place in zip(of_token, places, strict=True) if place == number)
        assert found == pytest.approx(expected)
    assert tokens.labels[0] == f"0, token 2: <{3 + ord('c') % 20}>"


def test_scores_of_each_token_add_up_to_those_of_the_completion(tmp_path: Path) -> None:
    model, train, queries = (
        gpt2(tied=False).double().eval(),
        causal_data((4, 6, 3)),
        Completions(Letters(), ["ab"], ["cde"]),
    )
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], 3)
    options = {"method": sf.TracIn(), "collate_fn": pad}
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", CausalLM(measurement="log_probability"), **options)
    groups, tokens = sf.Groups.singletons(3), each_token(queries)
    whole = analyzer.score(groups, train, queries, query_labels=queries.labels)
    each = analyzer.score(groups, train, tokens, query_labels=tokens.labels)
    torch.testing.assert_close(each.values.sum(0, keepdim=True), whole.values)
    assert len(each.query_labels) == 3 and each.values.abs().min() > 0


# ---- counting and padding ----


def test_mean_tokens_counts_what_is_not_ignored() -> None:
    data = [{"labels": [NO, 5, NO]}, {"labels": torch.tensor([NO, 1, 2, 3])}]
    assert mean_tokens(data) == mean_tokens(data, shifted=True) == mean_tokens(data, shifted=False) == 2
    assert mean_tokens([(None, example["labels"]) for example in data]) == 2
    assert mean_tokens([{"y": e["labels"]} for e in data], labels="y") == 2
    assert mean_tokens(data, ignore_index=5, shifted=False) == 3
    first = [{"input_ids": [7, 5, 3], "attention_mask": [1, 1, 0]}, {"input_ids": [7]}]
    assert mean_tokens(first, shifted=True) == 0.5 and mean_tokens(first, shifted=False) == 1.5
    assert mean_tokens([3, 4], lambda examples: {"labels": torch.ones(1, examples[0])}, shifted=True) == 2.5
    assert mean_tokens(first, model=gpt2()) == mean_tokens(first, model=masked_bert()) == 1.5


def test_padding_fills_each_kind_of_column_on_either_side_and_draws_nothing() -> None:
    examples = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "token_type_ids": [1, 1, 1], "score": 0.5, "text": "a"},
        {"input_ids": torch.tensor([8]), "labels": [8], "token_type_ids": [1], "score": 1.5, "text": "b"},
    ]
    state = torch.random.get_rng_state()
    right = Padding(pad_id=9)(examples)
    left = Padding(pad_id=9, side="left", ignore_index=-1)(examples)
    assert torch.random.get_rng_state().equal(state)
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]] and left["input_ids"].tolist() == [
        [5, 6, 7],
        [9, 9, 8],
    ]
    assert right["labels"].tolist()[1] == [8, NO, NO] and left["labels"].tolist()[1] == [-1, -1, 8]
    assert right["attention_mask"].tolist()[1] == [1, 0, 0] and left["attention_mask"].tolist()[1] == [0, 0, 1]
    assert right["token_type_ids"].tolist()[1] == [1, 0, 0]
    assert right["score"].tolist() == [0.5, 1.5] and right["text"] == ["a", "b"]
    second = [{f"contrast_{k}": v for k, v in example.items()} for example in examples]
    assert Padding(pad_id=9)(second)["contrast_labels"].tolist()[1] == [8, NO, NO]
    assert Padding(pad_id=9)(second)["contrast_attention_mask"].tolist()[1] == [1, 0, 0]
    masked = pad([{"input_ids": [1, 2], "attention_mask": [1, 0]}])
    assert masked["attention_mask"].tolist() == [[1, 0]]  # one that is given is kept
    assert pad([{"pixels": torch.ones(2, 3), "labels": 1}] * 2)["pixels"].shape == (2, 2, 3)


# ---- pairs ----


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.line = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        from types import SimpleNamespace

        states = torch.tanh(self.line(self.embed(input_ids)))
        return SimpleNamespace(last_hidden_state=states, pooler_output=states[:, 0])


def _pairs(labels: bool = True) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 9, (length,), generator=generator) for length in (3, 5, 2, 4, 6, 3)]
    pairs = [{"first_input_ids": a, "second_input_ids": b} for a, b in zip(rows[:3], rows[3:], strict=True)]
    return [pair | ({"labels": n % 2} if labels else {}) for n, pair in enumerate(pairs)]


@pytest.mark.parametrize("embedding", ["mean", "pooler_output"])
@pytest.mark.parametrize("labels", [True, False])
def test_pairs_have_the_sigmoid_loss_of_their_cosine(embedding: str, labels: bool) -> None:
    model, pairs = Encoder(), _pairs(labels)
    expected: dict[str, Tensor] = dict.fromkeys(("loss", "log_probability", "margin", "cosine"), torch.zeros(()))
    for pair in pairs:
        outputs = [model(pair[f"{side}_input_ids"][None]) for side in ("first", "second")]
        a, b = (o.last_hidden_state.mean(1)[0] if embedding == "mean" else o.pooler_output[0] for o in outputs)
        cosine = a @ b / (a.norm() * b.norm())
        sign = 2 * pair.get("labels", 1) - 1
        margin = sign * (4 * cosine - 1)
        found = {"loss": -functional.logsigmoid(margin), "log_probability": functional.logsigmoid(margin)}
        found |= {"margin": margin, "cosine": cosine}
        expected = {name: value + found[name] for name, value in expected.items()}
    flat = pad(pairs)
    nested = {
        side: {k.removeprefix(f"{side}_"): v for k, v in flat.items() if k.startswith(side)}
        for side in ("first", "second")
    }
    nested |= {"labels": flat["labels"]} if labels else {}
    for name, value in expected.items():
        task = ContrastivePairs(name, scale=4, bias=-1, embedding=embedding)
        for batch in (flat, nested):
            torch.testing.assert_close(task.compute_measurement(batch, model), value)
            torch.testing.assert_close(task.compute_train_loss(batch, model), expected["loss"])
            torch.testing.assert_close(task.compute_output(batch, model), expected["margin"])
            assert (
                task.get_attention_mask(batch).tolist()
                == torch.cat([flat["first_attention_mask"], flat["second_attention_mask"]], 1).tolist()
            )


def test_factors_of_pairs_do_not_depend_on_padding(tmp_path: Path) -> None:
    model, pairs = Encoder(), _pairs()
    trajectory = trajectory_of(tmp_path / "run", [model.state_dict()], 3)
    task, values = ContrastivePairs(scale=4, bias=-1, embedding="mean"), []
    for size in (1, 3):
        analyzer = analyzer_of(
            model, trajectory, tmp_path / f"store{size}", task, method=sf.Source(segments=1), collate_fn=pad
        )
        analyzer.fit(pairs, batch_size=size)
        values.append(analyzer.score(sf.Groups.singletons(3), pairs, pairs, batch_size=size).values)
    torch.testing.assert_close(values[0], values[1], rtol=1e-8, atol=1e-12)


# ---- refusals ----


class Changing(Letters):
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [9] if add_special_tokens else [8]


Z, LABELS = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)


def _of_pairs(batch: Any, **options: Any) -> Any:
    return ContrastivePairs(scale=1, bias=0, **options).compute_train_loss(batch, Encoder())


def _t5() -> Any:
    from types import SimpleNamespace

    model = nn.Identity()
    model.config = SimpleNamespace(is_encoder_decoder=True)  # type: ignore[assignment]
    return model


FAULTS: dict[str, tuple[Any, str]] = {
    "mean_tokens missing": (
        lambda: CausalLM("batch token mean"),
        r"without mean_tokens=, the mean number of targets of an example\. segflow\.tasks\.mean_tokens\(train\)",
    ),
    "mean_tokens unused": (
        lambda: CausalLM(mean_tokens=3),
        "mean_tokens=3 with objective='sequence mean', which does not",
    ),
    "objective": (lambda: CausalLM("mean"), "objective='mean' is not known"),
    "measurement": (lambda: CausalLM(measurement="margin"), "Choose one of: 'contrast', 'log_probability', 'loss'"),
    "labels of examples": (
        lambda: CausalLM().compute_train_loss((Z, LABELS[:, 0]), nn.Identity()),
        r"CausalLM: expected labels \[B, S\], one for each token, found \(2,\)",
    ),
    "logits of examples": (
        lambda: CausalLM().compute_train_loss((Z[:, 0], LABELS), nn.Identity()),
        r"expected logits \[B, S, C\] and labels \[B, S\], found \(2, 4\) and \(2, 3\)",
    ),
    "fewer positions": (lambda: CausalLM().compute_train_loss((Z[:, 1:], LABELS), nn.Identity()), r"found \(2, 2, 4\)"),
    "a label too large": (
        lambda: TokenClassification().compute_train_loss((Z, LABELS + 4), nn.Identity()),
        r"the label is 4, but the model has the classes 0\.\.3",
    ),
    "an encoder and a decoder": (
        lambda: CausalLM().compute_train_loss((Z, LABELS), _t5()),
        "CausalLM: the model has an encoder and a decoder, whose positions have padding of their own",
    ),
    "class weights alone": (
        lambda: TokenClassification(class_weights=[1, 2]),
        r"class_weights without mean_weight=.*torch's cross_entropy\(weight=\) divides by the batch's summed weights",
    ),
    "weights alone": (lambda: sf.tasks.Regression(weights="w"), r"weights without mean_weight="),
    "mean_weight alone": (lambda: sf.tasks.MultiLabel(mean_weight=2), "mean_weight=2 without weights"),
    "class weights of other classes": (
        lambda: sf.tasks.Classification(class_weights=[1, 2], mean_weight=1).compute_train_loss(
            (Z[:, 0], LABELS[:, 0]), nn.Identity()
        ),
        "class_weights holds 2 numbers, but the model has 4 classes",
    ),
    "a negative class weight": (
        lambda: sf.tasks.Classification(class_weights=[1, -2], mean_weight=1),
        r"class_weights\[1\]=-2.0: expected a finite number, at least 0",
    ),
    "a negative weight": (
        lambda: sf.tasks.Binary(weights="w", mean_weight=1).compute_train_loss(
            {"inputs": torch.zeros(2), "labels": torch.zeros(2), "w": torch.tensor([1.0, -1.0])}, nn.Identity()
        ),
        "its weight is -1.0, expected a number from 0",
    ),
    "weights of tokens": (
        lambda: sf.tasks.Binary(weights="w", mean_weight=1).compute_train_loss(
            {"inputs": torch.zeros(2), "labels": torch.zeros(2), "w": torch.ones(2, 2)}, nn.Identity()
        ),
        r"expected a tensor of one number for each of 2 examples, found \(2, 2\)",
    ),
    "smoothing": (lambda: CausalLM(label_smoothing=1), "label_smoothing=1: expected a finite number"),
    "a third label": (
        lambda: sf.tasks.MultiLabel().compute_train_loss(
            (torch.zeros(2, 2), torch.tensor([[0, 1], [2, 0]])), nn.Identity()
        ),
        "MultiLabel: a label is 2, expected 0 or 1",
    ),
    "one label of several": (
        lambda: sf.tasks.MultiLabel().compute_train_loss((torch.zeros(2, 2), torch.zeros(2)), nn.Identity()),
        r"found \(2, 2\) and \(2,\)\. Take Classification",
    ),
    "two logits": (
        lambda: sf.tasks.Binary().compute_train_loss((torch.zeros(2, 2), torch.zeros(2)), nn.Identity()),
        "Binary: expected one logit and one label of each example",
    ),
    "pos_weight of others": (
        lambda: sf.tasks.MultiLabel(pos_weight=[1, 2, 3]).compute_train_loss(
            (torch.zeros(2, 2), torch.zeros(2, 2)), nn.Identity()
        ),
        "pos_weight holds 3 numbers, but the model has 2 outputs",
    ),
    "no contrast": (
        lambda: CausalLM(measurement="contrast").compute_measurement({"input": Z, "labels": LABELS}, nn.Identity()),
        "measurement='contrast' without a second completion",
    ),
    "no embedding chosen": (
        lambda: _of_pairs(pad(_pairs())),
        r"found SimpleNamespace with embedding=None\. Name an entry",
    ),
    "no hidden states": (
        lambda: ContrastivePairs(scale=1, bias=0, embedding="mean").compute_train_loss(
            {"first": Z[0], "second": Z[0]}, nn.Identity()
        ),
        r"embedding='mean' expects last_hidden_state \[B, S, E\], found Tensor",
    ),
    "no sides": (lambda: _of_pairs({"a": Z}, embedding="mean"), "the batch has no 'first'"),
    "a pair": (lambda: _of_pairs((Z, LABELS)), "expected a mapping with 'first' and 'second'"),
    "labels of pairs": (
        lambda: _of_pairs(pad(_pairs()) | {"labels": torch.zeros(3, 2)}, embedding="mean"),
        "expected a label 0 or 1 of each of 3 pairs",
    ),
    "first labels": (
        lambda: mean_tokens([{"labels": [1, 2]}]),
        r"1 of 1 examples begin with a label that is not ignored\. Say if the trainer counted these: model=",
    ),
    "nothing to count": (lambda: mean_tokens([{"labels": [NO]}]), "no example has a label that is not ignored"),
    "no examples": (lambda: mean_tokens([]), "no example has a label"),
    "no labels": (lambda: mean_tokens([{"x": [1]}]), r"expected examples with 'labels', found \['x'\]\. Name the key"),
    "other keys": (lambda: pad([{"labels": [1]}, {"x": [1]}]), "example 1 of the batch has the keys"),
    "other shapes": (
        lambda: pad([{"x": torch.ones(2, 2)}, {"x": torch.ones(3, 2)}]),
        r"'x' has the shapes \[\(2, 2\), \(3, 2\)\]",
    ),
    "no mapping": (lambda: pad([(1, 2)]), "expected examples that are mappings, found tuple"),
    "what is no tensor": (lambda: pad([{"x": [[1], [2, 3]]}]), "'x' cannot be made a tensor"),
    "side": (lambda: Padding(side="both"), "side='both' is not known"),
    "one text": (lambda: Completions(Letters(), "ab", ["c"]), "prompts='ab': expected a list of texts"),
    "fewer texts": (lambda: Completions(Letters(), ["a", "b"], ["c"]), "expected as many texts of each"),
    "an empty completion": (lambda: Completions(Letters(), ["a"], [""]), "completion 0, '', has no token"),
    "an empty prompt": (lambda: Completions(Letters(), [""], ["a"]), "nothing predicts the completion's first"),
    "another tokenizer": (
        lambda: Completions(Changing(), ["a"], ["b"]),
        "other tokens of 'a' with special tokens than",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_with_what_to_do(fault: str) -> None:
    make, text = FAULTS[fault]
    with pytest.raises(sf.TaskError, match=text):
        make()


def test_options_that_training_had_tell_factors_apart_and_measurements_do_not(tmp_path: Path) -> None:
    from segflow.data.code_identity import task_fingerprint

    def told(task: sf.Task) -> dict[str, str]:
        return dict(task_fingerprint(task))

    plain = told(CausalLM())
    assert told(CausalLM(measurement="contrast")) == plain
    others = [
        CausalLM("token sum"),
        CausalLM("batch token mean", mean_tokens=2),
        CausalLM("batch token mean", mean_tokens=3),
        CausalLM(label_smoothing=0.1),
        CausalLM(ignore_index=0),
        CausalLM(labels="labels"),
        CausalLM(inputs="input_ids"),
        sf.tasks.MaskedLM(),
        sf.tasks.Classification(class_weights=[1, 2], mean_weight=1),
        sf.tasks.Classification(class_weights=[1, 3], mean_weight=1),
        sf.tasks.Classification(class_weights=[1, 3], mean_weight=2),
        sf.tasks.Binary(pos_weight=2),
        sf.tasks.Binary(weights="w", mean_weight=1),
        ContrastivePairs(scale=1, bias=0),
        ContrastivePairs(scale=2, bias=0),
        ContrastivePairs(scale=1, bias=1),
        ContrastivePairs(scale=1, bias=0, embedding="mean"),
    ]
    fingerprints = [str(sorted(told(task).items())) for task in others] + [str(sorted(plain.items()))]
    assert len(set(fingerprints)) == len(fingerprints)


@pytest.mark.parametrize("base", [sf.tasks.Classification, sf.tasks.MultiLabel, CausalLM, sf.tasks.Regression])
def test_attributes_that_a_subclass_adds_and_no_loss_reads_do_not_count(base: type[sf.Task]) -> None:
    from segflow.data.code_identity import task_fingerprint

    one, other = base(), base()
    one.remark, other.remark = "first", "second"  # type: ignore[attr-defined]
    assert task_fingerprint(one) == task_fingerprint(other)


class Merging:
    """Words with their spaces are tokens; a text that begins with a space has that space as a token of its own."""

    def encode(self, text: str) -> list[int]:
        import re

        return [sum(map(ord, piece)) for piece in re.findall(r"^ |^\w+| \w+|\w+", text)]


def test_prompt_and_completion_are_tokenised_as_one_text() -> None:
    [query] = sf.tasks.Completions(Merging(), ["The capital"], [" Paris"])
    assert query["input_ids"].tolist() == Merging().encode("The capital Paris")
    assert (query["labels"] != -100).tolist() == [False, False, True]
    with pytest.warns(UserWarning, match="reaches over the end of prompt 0"):
        [apart] = sf.tasks.Completions(Merging(), ["The cap"], ["ital"])
    assert len(apart["input_ids"]) == 3


def test_each_token_of_queries_without_labels_is_refused() -> None:
    with pytest.raises(sf.TaskError, match="query 0 has no 'labels'"):
        sf.tasks.each_token([{"input_ids": torch.tensor([1, 2])}])


def test_a_class_label_beside_tokens_is_no_label_of_a_language_model() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5))
    batch = {"input": torch.tensor([[1, 4, 2]]), "input_ids": torch.tensor([[1, 4, 2]])}
    task = sf.tasks.CausalLM("token sum", inputs="input")
    with_class = task.compute_train_loss({**batch, "label": torch.tensor([1])}, model)
    assert torch.equal(with_class, task.compute_train_loss(batch, model))


def test_labels_under_another_key_are_filled_up_as_told() -> None:
    examples = [{"input_ids": [1, 2], "ner_tags": [3, 4]}, {"input_ids": [1], "ner_tags": [3]}]
    assert sf.tasks.Padding(fill={"ner_tags": -100})(examples)["ner_tags"].tolist() == [[3, 4], [3, -100]]
    assert sf.tasks.pad(examples)["ner_tags"].tolist() == [[3, 4], [3, 0]]
    with pytest.raises(sf.TaskError, match=r"fill\['ner_tags'\]"):
        sf.tasks.Padding(fill={"ner_tags": "x"})
