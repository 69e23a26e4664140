"""Which blocks of a model are attributed: every trained parameter belongs to one, unless the user leaves it out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn

from ...arguments import names
from ...errors import LayerError
from ...runtime.sharding import named_modules, named_parameters
from .attention import Projection
from .function import FunctionLayer, UnfollowedLayer
from .registry import kind_of, why_never
from .sizes import BlockSizes
from .tied import TiedLayer
from .tracked import Owner, TrackedLayer, VectorLayer

Alike = Callable[[str, str], bool]


class LayerChoice(NamedTuple):
    """The tracked layers by name, and why every other module, block or parameter is not attributed.

    left_out: the blocks among those, which could be attributed, and are not as the user chose.
    """

    tracked: dict[str, TrackedLayer]
    skipped: dict[str, str]
    left_out: Mapping[str, TrackedLayer]


@dataclass(frozen=True)
class Training:
    """What is known of how parameters were trained, by their names in the model.

    why_untrained: why training did not change a parameter, None if it did; None asks `requires_grad`. alike: whether
    two were treated alike, so that they may be one block. apart: names of biases that are blocks by themselves however
    they were treated.
    """

    why_untrained: Callable[[str], str | None] | None = None
    alike: Alike = field(default=lambda _one, _other: True)
    apart: Collection[str] = ()


class Selection(NamedTuple):
    """What the user chose: names or patterns (None: everything), and names or patterns of what is left out.

    They are of modules, whose parameters are then all meant, of blocks, or of parameters.
    """

    layers: Collection[str] | None = None
    exclude: Collection[str] = ()

    @classmethod
    def of(cls, layers: object, exclude: object) -> Selection:
        """What a user gave: a name, or several; LayerError for anything else."""
        chosen = None if layers is None else names("layers", layers, LayerError)
        return cls(chosen, names("exclude", exclude, LayerError))


def choose_layers(
    model: nn.Module,
    named: Collection[str] | None = None,
    training: Training | None = None,
    selection: Selection | None = None,
    sizes: BlockSizes | None = None,
) -> LayerChoice:
    """The layers to attribute, and the reason for everything else that has parameters.

    Args:
        named: the modules to attribute, as the task names them; None takes every one.

    Raises:
        LayerError: a name or pattern fits nothing, or nothing is left to attribute.
    """
    training, selection = training or Training(), selection or Selection()
    canonical, aliases = _names(model)
    training = replace(training, apart={*training.apart, *_asked_apart(canonical, named, selection)})
    untrained = _untrained(model, training, aliases)
    found, skipped = _blocks(model, canonical, untrained, training, sizes or BlockSizes())
    blocks = _tied(found)
    chosen = _chosen(model, blocks, named, selection, skipped)
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "no module has parameters"
        raise LayerError(f"no layer can be attributed ({reasons}).")
    return LayerChoice(chosen, skipped, {name: layer for name, layer in blocks.items() if name not in chosen})


def _asked_apart(canonical: Mapping[str, str], named: Collection[str] | None, selection: Selection) -> set[str]:
    """The biases that a name or pattern means without their weights, or the weights of without them: blocks apart."""
    apart = set()
    for pattern in (*(named or ()), *(selection.layers or ()), *selection.exclude):
        means = {name for name in canonical if fnmatchcase(name, pattern)}
        for name in canonical:
            weight = f"{name.removesuffix('bias')}weight"
            if name.endswith("bias") and weight in canonical and (name in means) != (weight in means):
                apart.add(canonical[name])
    return apart


def _identity(parameter: Tensor) -> Hashable:
    """What is equal for parameters that share memory, also where two Parameter objects do."""
    if isinstance(parameter, nn.UninitializedParameter) or parameter.data_ptr() == 0:
        return id(parameter)
    return parameter.device, parameter.data_ptr()


def parameter_aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by its first one."""
    return _names(model)[1]


def _names(model: nn.Module) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Each parameter's first name in the model by any name, and all names by the first one."""
    first: dict[Hashable, str] = {}
    canonical: dict[str, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, parameter in named_parameters(model, remove_duplicate=False).items():
        canonical[name] = first.setdefault(_identity(parameter), name)
        aliases.setdefault(canonical[name], []).append(name)
    return canonical, aliases


def _untrained(model: nn.Module, training: Training, aliases: Mapping[str, list[str]]) -> Callable[[str], str | None]:
    """Tells why a parameter, by its first name, was not trained under any of its names."""
    parameters = named_parameters(model, remove_duplicate=False)

    def why(name: str) -> str | None:
        if training.why_untrained is None:
            return None if parameters[name].requires_grad else "it does not require gradients"
        reasons = [training.why_untrained(alias) for alias in aliases[name]]
        return None if None in reasons else reasons[0]

    return why


class _Found(NamedTuple):
    """A block, and the memory of the tensor it is of."""

    layer: TrackedLayer
    tensor: Hashable


def _blocks(
    model: nn.Module,
    canonical: Mapping[str, str],
    untrained: Callable[[str], str | None],
    training: Training,
    sizes: BlockSizes,
) -> tuple[list[_Found], dict[str, str]]:
    """The blocks of every module, tied ones apart, and why everything else is left out."""
    found: list[_Found] = []
    skipped: dict[str, str] = {}
    inside: set[nn.Module] = set()  # what is differentiated with a module around it
    shared, never = _shared(model), _never(model) | _doubled(model)
    for name, module in named_modules(model).items():
        if module in inside:
            continue
        attributes = _attributes(module, inside)
        if not attributes:
            continue
        prefix = f"{name}." if name else ""
        reasons = {a: _why_not(module, a, untrained(canonical[prefix + a]), never) for a in attributes}
        names = {a: canonical[prefix + a] for a, reason in reasons.items() if reason is None}
        if not names:
            skipped[name] = next(iter(reasons.values())) or ""
            continue
        skipped |= {prefix + a: reason for a, reason in reasons.items() if reason}
        alike = _alike(names, module, training, shared)
        owner, kind = Owner(name, module, names, alike, sizes), kind_of(module)
        blocks = FunctionLayer.of(owner) if kind is None else kind.blocks(owner)
        found += [_Found(block, _identity(block.parameters[0])) for block in blocks]
    return found, skipped


def _fits(pattern: str, answer: str) -> bool:
    """Whether a name or pattern means what has this name, or what it is in."""
    return pattern in ("", answer) or answer.startswith(f"{pattern}.") or fnmatchcase(answer, pattern)


def _attributes(module: nn.Module, inside: set[nn.Module]) -> list[str]:
    """A module's own parameters, and those that it computes its own from (parametrizations)."""
    own = [name for name, parameter in module._parameters.items() if parameter is not None]
    parametrized = getattr(module, "parametrizations", None)
    if isinstance(parametrized, nn.ModuleDict):
        inside.update(parametrized.modules())
        own += [f"parametrizations.{name}" for name, _ in parametrized.named_parameters()]
    return own


def _never(model: nn.Module) -> dict[Hashable, str]:
    """Why no gradient of a tensor belongs to an example, of those that some module uses so."""
    reasons: dict[Hashable, str] = {}
    for module in model.modules():
        reason = why_never(module)
        if reason is not None:
            reasons |= {_identity(parameter): reason for parameter in module.parameters()}
    return reasons


def _why_not(module: nn.Module, attribute: str, why_untrained: str | None, never: Mapping[Hashable, str]) -> str | None:
    """Why a parameter of a module is not attributed; None if it is. never: what `_never` found."""
    parameter = module.get_parameter(attribute)
    if isinstance(parameter, nn.UninitializedParameter):
        return "it is lazy and not initialised yet"
    if why_untrained:
        return f"it was not trained: {why_untrained}"
    if not parameter.is_floating_point():
        return f"its numbers are {parameter.dtype}, whose gradients are not taken"
    return never.get(_identity(parameter))


def _doubled(model: nn.Module) -> dict[Hashable, str]:
    """Why memory that two parameters share is not attributed: neither's gradient is that of the memory."""
    first: dict[Hashable, str] = {}
    reasons: dict[Hashable, str] = {}
    for name, parameter in named_parameters(model).items():
        identity = _identity(parameter)
        if first.setdefault(identity, name) != name:
            reasons[identity] = (
                f"{first[identity]!r} and {name!r} are two parameters in one memory. Tie them by having one parameter "
                "in both places"
            )
    return reasons


def _shared(model: nn.Module) -> set[Hashable]:
    """The memory of tensors that several modules hold."""
    owners: dict[Hashable, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(_identity(parameter), set()).add(id(module))
    return {identity for identity, modules in owners.items() if len(modules) > 1}


def _alike(names: Mapping[str, str], module: nn.Module, training: Training, shared: Collection[Hashable]) -> Alike:
    """Whether two of a module's parameters may be one block: treated alike, and used by no other module."""

    def alike(one: str, other: str) -> bool:
        if any(_identity(module.get_parameter(attribute)) in shared for attribute in (one, other)):
            return False
        return names[other] not in training.apart and training.alike(names[one], names[other])

    return alike


def _tied(found: Iterable[_Found]) -> dict[str, TrackedLayer]:
    """The blocks by name, those of one tensor joined into one."""
    by_tensor: dict[Hashable, list[TrackedLayer]] = {}
    for layer, tensor in found:
        part = layer.module.part if isinstance(layer.module, Projection) else None  # three blocks are of one tensor
        by_tensor.setdefault((tensor, part), []).append(layer)
    blocks: dict[str, TrackedLayer] = {}
    for layers in by_tensor.values():
        called = [layer for layer in layers if not isinstance(layer, FunctionLayer)] or layers
        joined = called[0] if len(called) == 1 else TiedLayer.of(called) or UnfollowedLayer.over(called[0])
        blocks[joined.name] = joined
    return blocks


def _chosen(
    model: nn.Module,
    blocks: Mapping[str, TrackedLayer],
    named: Collection[str] | None,
    selection: Selection,
    skipped: dict[str, str],
) -> dict[str, TrackedLayer]:
    """The blocks that the task and the user chose; why the others are left out goes into `skipped`."""
    aliases = _aliases(model)
    wanted = _wanted(blocks, named, aliases, skipped, "get_influence_tracked_modules()")
    asked = _wanted(blocks, selection.layers, aliases, skipped, "layers=")
    left_out = _wanted(blocks, selection.exclude or (), aliases, skipped, "exclude=")
    chosen = {}
    for name, layer in blocks.items():
        if name not in wanted:
            skipped[name] = "not among the tracked modules that the task names"
        elif name not in asked:
            skipped[name] = "not among layers="
        elif name in left_out:
            skipped[name] = "left out with exclude="
        else:
            chosen[name] = layer
    return chosen


def _aliases(model: nn.Module) -> dict[str, str]:
    """The first name of every module by any of its names."""
    first: dict[nn.Module, str] = {}
    modules = named_modules(model, remove_duplicate=False)
    return {name: first.setdefault(module, name) for name, module in modules.items()}


def selected(
    blocks: Mapping[str, TrackedLayer], patterns: Collection[str], aliases: Mapping[str, str] | None = None
) -> dict[str, set[str]]:
    """For each name or pattern the blocks that it means: by the block's name, its modules' or its parameters'.

    aliases: the first name of every module by any of its names.
    """
    of_block = {name: _answers_to(layer) for name, layer in blocks.items()}
    first = aliases or {}
    found = {}
    for pattern in patterns:
        means = first.get(pattern, pattern)
        found[pattern] = {name for name, answers in of_block.items() if any(_fits(means, answer) for answer in answers)}
    return found


def _answers_to(layer: TrackedLayer) -> set[str]:
    """The names that a block answers to: its own, its modules', and its parameters' in each of these."""
    own = {f"{use.name}.weight".lstrip(".") for use in layer.uses if not isinstance(use, VectorLayer)}
    return own | {
        layer.name,
        *layer.names,
        *(use.name for use in layer.uses),
        *(n for u in layer.uses for n in u.names),
    }


def _wanted(
    blocks: Mapping[str, TrackedLayer],
    patterns: Collection[str] | None,
    aliases: Mapping[str, str],
    skipped: Mapping[str, str],
    what: str,
) -> set[str]:
    """The blocks that patterns mean, all for None; LayerError for a pattern that means none. what: names them."""
    if patterns is None:
        return set(blocks)
    if not patterns and what.startswith("get"):
        raise LayerError("get_influence_tracked_modules() returned no names. Return None to track every layer.")
    found = selected(blocks, patterns, aliases)
    for pattern, means in found.items():
        if not means and what != "exclude=":
            _refuse(pattern, blocks, aliases, skipped, what)
        if not means and not any(fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for name in skipped):
            _refuse(pattern, blocks, aliases, skipped, what)
    return {name for means in found.values() for name in means}


def chosen_layers(tracked: Mapping[str, TrackedLayer], layers: object) -> dict[str, TrackedLayer]:
    """Those of the tracked layers that names or patterns mean, all for None; LayerError for one that means none."""
    if layers is None:
        return dict(tracked)
    found = selected(tracked, names("layers", layers, LayerError))
    if not found:
        raise LayerError("layers=[]: expected names or patterns of layers, or None for all.")
    for pattern, means in found.items():
        if not means:
            _refuse(pattern, tracked, {}, {}, "layers=")
    return {name: layer for name, layer in tracked.items() if any(name in means for means in found.values())}


def _refuse(
    pattern: str,
    blocks: Mapping[str, TrackedLayer],
    aliases: Mapping[str, str],
    skipped: Mapping[str, str],
    what: str,
) -> None:
    """Raise LayerError: there is nothing of this name, or nothing to attribute in it, and why."""
    if pattern in skipped:
        raise LayerError(f"{what}: {pattern!r} cannot be attributed: {skipped[pattern]}.")
    if pattern in aliases:
        inside = {name: reason for name, reason in skipped.items() if name.startswith(f"{pattern}.")}
        reasons = f" ({'; '.join(f'{n}: {r}' for n, r in list(inside.items())[:4])})" if inside else ""
        raise LayerError(f"{what}: module {pattern!r} has nothing to attribute{reasons}. Leave it out.")
    close = difflib.get_close_matches(pattern, [*blocks, *aliases], n=3)
    raise LayerError(
        f"{what}: the model has no module or parameter {pattern!r}. Did you mean one of {close or list(blocks)[:8]}?"
    )
