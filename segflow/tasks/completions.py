"""Queries for language models: completions of prompts, and each token of them by itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import shown
from ..errors import TaskError
from .causal_lm import CONTRAST
from .classification import IGNORED

Example = dict[str, Tensor]


class Completions:
    """Completions of prompts as a dataset of queries, for CausalLM's measurement="log_probability".

    Each is a mapping with `input_ids`, `attention_mask`, and `labels` that are -100 on the prompt. Prompt and
    completion are tokenised together, as one text; begin the completion with the space that belongs there. Where a
    token would reach over the end of the prompt they are tokenised apart, with a warning. What the tokenizer puts in
    front of a text (a token of beginning) stands once in front of the prompt; nothing is put behind the completion.

    Args:
        tokenizer: of transformers or tokenizers, or anything whose `encode`, or which when called, makes ids of a text.
        prompts, completions: as many texts of each.
        contrast: other completions of the same prompts, for measurement="contrast", under keys with "contrast_".

    Attributes:
        labels: a text for each query, for `score(query_labels=)`.

    Example:
        >>> class Letters:
        ...     def encode(self, text):
        ...         return [ord(letter) for letter in text]
        >>> query = Completions(Letters(), ["ab"], ["c"])[0]
        >>> query["input_ids"].tolist(), query["labels"].tolist()
        ([97, 98, 99], [-100, -100, 99])
    """

    def __init__(
        self, tokenizer: Any, prompts: Sequence[str], completions: Sequence[str], contrast: Sequence[str] | None = None
    ):
        sides = {"prompts": prompts, "completions": completions} | ({} if contrast is None else {"contrast": contrast})
        _check_texts(sides)
        self.tokenizer = tokenizer
        self.labels = [f"{n}: {text}" for n, text in enumerate(completions)]
        self._examples = [
            _joined(tokenizer, prompt, completion, n)
            for n, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        for n, (prompt, other) in enumerate(zip(prompts, contrast or [], strict=contrast is not None)):
            second = _joined(tokenizer, prompt, other, n)
            self._examples[n] |= {f"{CONTRAST}{key}": value for key, value in second.items()}

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return dict(self._examples[index])


class TokenQueries:
    """What `each_token` makes: queries of one target each. labels: a text for each, such as "2, token 5: the"."""

    def __init__(self, examples: Sequence[Example], labels: Sequence[str]):
        self._examples, self.labels = examples, list(labels)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return dict(self._examples[index])


def each_token(queries: Any) -> TokenQueries:
    """A dataset in which each target of each query is a query by itself, in order.

    The scores of a query's targets add up to its own where the measurement is a sum over targets ("log_probability",
    "contrast", of which a target of the second completion counts with a minus). Of a row's first label, which
    `CausalLM` asks nobody for, no query is made.

    Args:
        queries: a map-style dataset of mappings with `labels` [S], and `contrast_labels` if it contrasts; with a
            `tokenizer`, as `Completions` has, tokens are named by their texts.

    Example:
        >>> tokens = each_token([{"input_ids": torch.tensor([4, 5, 6]), "labels": torch.tensor([-100, 5, 6])}])
        >>> [query["labels"].tolist() for query in tokens], tokens.labels
        ([[-100, 5, -100], [-100, -100, 6]], ['0, token 1: 5', '0, token 2: 6'])
    """
    examples, labels = [], []
    for number in range(len(queries)):
        query = queries[number]
        names = [name for name in ("labels", f"{CONTRAST}labels") if name in query]
        if not names:
            raise TaskError(
                f"each_token: query {number} has no 'labels', only {shown(sorted(query))}. Give labels that say which "
                "tokens are asked about, -100 for the others, as Completions does."
            )
        nothing = {name: torch.full_like(torch.as_tensor(query[name]), IGNORED) for name in names}
        for name in names:
            given_S = torch.as_tensor(query[name])
            for place in (given_S[1:] != IGNORED).nonzero().flatten().tolist():
                only_S = nothing[name].clone()
                only_S[place + 1] = given_S[place + 1]
                examples.append({**query, **nothing, name: only_S})
                text = _text(getattr(queries, "tokenizer", None), int(given_S[place + 1]))
                side = "token" if name == "labels" else "contrasted token"
                labels.append(f"{number}, {side} {place + 1}: {text}")
    return TokenQueries(examples, labels)


def _text(tokenizer: Any, token: int) -> str:
    decode = getattr(tokenizer, "decode", None)
    return str(token) if decode is None else str(decode([token]))


def _check_texts(sides: Mapping[str, Any]) -> None:
    """Raise TaskError unless there are as many prompts as completions, and all are texts."""
    for name, texts in sides.items():
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TaskError(f"Completions: {name}={shown(texts)}: expected a list of texts.")
    counts = {name: len(texts) for name, texts in sides.items()}
    if len(set(counts.values())) > 1 or not counts["prompts"]:
        raise TaskError(f"Completions: expected as many texts of each, at least one, found {counts}.")


def _joined(tokenizer: Any, prompt: str, completion: str, number: int) -> Example:
    """The query of one prompt and its completion."""
    given, asked = _prompt_ids(tokenizer, prompt), _completion_ids(tokenizer, prompt, completion, number)
    if not asked:
        raise TaskError(f"Completions: completion {number}, {completion!r}, has no token. Give a text to explain.")
    if not given:
        raise TaskError(
            f"Completions: prompt {number} has no token, so that nothing predicts the completion's first. Give one, "
            "or a tokenizer that puts a token of beginning in front."
        )
    ids_S = torch.tensor(given + asked)
    labels_S = torch.tensor([IGNORED] * len(given) + asked)
    return {"input_ids": ids_S, "attention_mask": torch.ones_like(ids_S), "labels": labels_S}


def _completion_ids(tokenizer: Any, prompt: str, completion: str, number: int) -> list[int]:
    """The completion's ids: what the text of both has after the prompt's own."""
    bare, both = (_ids(tokenizer, text, special=False) for text in (prompt, prompt + completion))
    if both[: len(bare)] == bare:
        return both[len(bare) :]
    warnings.warn(
        f"Completions: a token of {shown(prompt + completion)} reaches over the end of prompt {number}, so prompt and "
        "completion are tokenised apart, as the model may never have seen them. Divide them between two words, and "
        "begin the completion with its space.",
        stacklevel=4,
    )
    return _ids(tokenizer, completion, special=False)


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt's ids, with what the tokenizer puts in front of a text, and without what it puts behind."""
    bare, whole = _ids(tokenizer, prompt, special=False), _ids(tokenizer, prompt, special=True)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[: start + len(bare)] if bare else _in_front(tokenizer, whole)
    raise TaskError(
        f"Completions: the tokenizer makes other tokens of {shown(prompt)} with special tokens than without. Make the "
        "queries' input_ids and labels yourself."
    )


def _in_front(tokenizer: Any, whole: list[int]) -> list[int]:
    """Of the special tokens of an empty text, those in front: what stands before a letter, too."""
    letter, with_letter = _ids(tokenizer, "a", special=False), _ids(tokenizer, "a", special=True)
    return whole[: next((n for n in range(len(with_letter)) if with_letter[n : n + len(letter)] == letter), 0)]


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    encode = getattr(tokenizer, "encode", tokenizer)
    try:
        found = encode(text, add_special_tokens=special)
    except TypeError:  # it knows no special tokens
        found = encode(text)
    found = found["input_ids"] if isinstance(found, Mapping) else getattr(found, "ids", found)
    return [int(token) for token in found]
