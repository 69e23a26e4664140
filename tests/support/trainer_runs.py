"""Tiny language models in float64, trained with transformers' Trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import segflow as sf

from .model_tasks import WORDS, Example, WordTask
from .models import gpt2, llama

N, STEPS = 10, 8


def model_of(kind: str) -> nn.Module:
    """A "gpt2" (with a tied head), "llama" or "lora" (adapters of a GPT-2), always with the same values."""
    torch.manual_seed(0)
    if kind != "lora":
        return {"gpt2": gpt2, "llama": llama}[kind]().double()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_fc"], lora_dropout=0.0, fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft reads an old name
        adapted = get_peft_model(gpt2(), config).double()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # peft begins with zeros, from which A has no gradient
                parameter.normal_(std=0.1)
    return adapted


def sentences(n: int = N, seed: int = 1) -> list[Example]:
    words = torch.randint(1, WORDS, (n, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row.clone()} for row in words]


def trainer_of(folder: Path, model: nn.Module, data: Any = None, **options: Any) -> Any:
    """A Trainer of 8 steps with 2 checkpoints; options: of the Trainer, its class (kind), or of its arguments."""
    from transformers import Trainer, TrainingArguments

    own = {
        name: options.pop(name) for name in ("callbacks", "optimizers", "eval_dataset", "model_init") if name in options
    }
    kind = options.pop("kind", Trainer)
    arguments = {
        "per_device_train_batch_size": 3,
        "max_steps": STEPS,
        "save_steps": 4,
        "logging_steps": 1,
        "learning_rate": 0.02,
        "weight_decay": 0.2,
        "max_grad_norm": 0.0,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
        **options,
    }
    data = sentences() if data is None else data
    return kind(model, TrainingArguments(str(folder), **arguments), train_dataset=data, **own)


def scores(store: Path, model: nn.Module, trajectory: sf.Trajectory, method: sf.Method | None = None) -> torch.Tensor:
    """SOURCE's scores of two queries, [2, 3 groups], by the model's own names."""
    task = WordTask(shift=True, fixed=True)
    method = method or sf.Source(segments=2)
    analyzer = sf.Analyzer(model, task, trajectory, store=store, progress=False, method=method)
    analyzer.fit(sentences())
    groups = sf.Groups.from_lists([[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]], N)
    return torch.as_tensor(analyzer.score(groups, sentences(), sentences(2, seed=9)).values)
