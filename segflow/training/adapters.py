"""What peft says of a model: the names in its adapter's files, and the options that its adapter was made with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..arguments import shown
from ..errors import TrajectoryError
from ..runtime.sharding import named_modules, plain_name
from ..store.files import read_json

_CONFIG = "adapter_config.json"
_SCALES = ("lora_alpha", "alpha_pattern", "use_rslora", "fan_in_fan_out")  # options that no tensor's shape shows


def has_adapter(model: nn.Module) -> bool:
    """Whether a model is peft's, so that a file may hold its adapter alone."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def active_adapter(model: Any) -> str:
    """The one adapter of peft that the model runs with; TrajectoryError for several."""
    names = list(model.active_adapters)
    if len(names) == 1:
        return str(names[0])
    raise TrajectoryError(
        f"the model runs with the adapters {names}, and an adapter's file does not say whose it is. Activate the one "
        "that was trained: model.set_adapter(name)."
    )


def adapter_names(model: nn.Module) -> dict[str, str]:
    """{name in an adapter's file: name in the model's state}, as peft says; empty for a model that is not peft's."""
    if not has_adapter(model):
        return {}
    from peft import get_peft_model_state_dict

    state = model.state_dict()
    names = {id(value): name for name, value in state.items()}
    saved: Mapping[str, Any] = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=active_adapter(model), save_embedding_layers=False
    )
    return {plain_name(key): plain_name(names[id(value)]) for key, value in saved.items() if id(value) in names}


def of_embeddings(model: nn.Module, names: Collection[str]) -> set[str]:
    """The tensors of a language model's first and last layer, which peft writes beside an adapter where it must."""
    getters: list[Callable[[], Any] | None]
    getters = [getattr(model, getter, None) for getter in ("get_input_embeddings", "get_output_embeddings")]
    layers = [getter() for getter in getters if getter is not None]
    inside = [name for name, module in named_modules(model).items() if any(module is layer for layer in layers)]
    return {name for name in names if name.startswith(tuple(f"{module}." for module in inside))}


def check_config(model: Any, folder: Path) -> None:
    """Raise TrajectoryError where the model scales its adapter otherwise than one whose options lie in a folder."""
    if not (folder / _CONFIG).is_file():
        return
    saved, here = read_json(folder / _CONFIG, TrajectoryError, {}), model.peft_config[active_adapter(model)].to_dict()
    for option in _SCALES:
        if option in saved and option in here and saved[option] != here[option]:
            raise TrajectoryError(
                f"{folder / _CONFIG}: the adapter was trained with {option}={shown(saved[option])}, the model has "
                f"{shown(here[option])}. Make the model with the options in this file."
            )
