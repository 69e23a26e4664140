"""What every step of live optimizers did to every parameter of a model, told round by round.

A round is one step of each optimizer; one that an optimizer begins anew before all have stepped ends without the
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrajectoryError
from ..runtime.sharding import whole
from .gradient_watch import Factor, GradientWatch
from .live_optimizers import joined, numbers, skipped, started, steps_taken
from .step_log import CARRIED, FRESH, LEFT_OUT, MOVED, Numbers, Round

ONE = 1.0  # the factor of gradients that were not clipped


class StepObserver:
    """Follows every parameter of the model that one of the optimizers holds; the parameters are told by their places.

    `names`: of the parameters. `moved`: places that have moved so far. `skipped`: steps that were left out.

    Raises TrajectoryError if no parameter is held, or one by two optimizers.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]):
        self.model, self.optimizers, self.watch = model, optimizers, GradientWatch()
        self.names: list[str] = []
        self.moved: set[int] = set()
        self.skipped = 0
        self._places: list[list[int]] = [[] for _ in optimizers]  # those that each optimizer holds
        self._groups: list[tuple[int, int]] = []  # each one's optimizer, and its parameter group there
        self._layout: list[Any] = []
        self._stateless: list[set[int]] = [set() for _ in optimizers]  # places of which an optimizer has no state yet
        self._looks: list[Any] = [None for _ in optimizers]  # how the optimizers' states looked then
        self._numbers: list[Numbers] = [numbers(one) for one in optimizers]
        self._stepped: set[int] = set()  # the optimizers that have taken this round's step
        self._codes: list[int] = []  # of this round
        self._factors: list[Factor] = []
        self._zero: dict[int, tuple[Any, bool]] = {}  # gradients that no backward pass reached, and whether all zeros
        self._note_parameters()
        if not self.names:
            raise TrajectoryError(
                f"the optimizer holds none of this model's parameters{self._why_none()}. "
                "Give record() the model and the optimizer in training."
            )

    def _why_none(self) -> str:
        averaged = isinstance(self.model, torch.optim.swa_utils.AveragedModel)
        return " (it is an average of another model's weights, which training does not step)" if averaged else ""

    def before_step(self, number: int) -> Round | None:
        """An optimizer is about to step; the round that this ends, because it had stepped in it already."""
        ended = self.rest() if number in self._stepped else None
        if self._layout != self._look_at_layout():
            self._note_parameters()
        optimizer, places = self.optimizers[number], self._places[number]
        self._numbers[number] = numbers(optimizer)
        if self._looks[number] != (look := (id(optimizer.state), len(optimizer.state))):
            parameters = self.watch.parameters
            self._stateless[number] = {p for p in places if not started(optimizer, parameters[p])}
            self._looks[number] = look
        self.watch.check(places)
        return ended

    def after_step(self, number: int) -> Round | None:
        """An optimizer has stepped; the round, if that ends it."""
        optimizer, places = self.optimizers[number], self._places[number]
        if skipped(optimizer):
            self.skipped += 1
            self.watch.rewritten()
            return None
        stateless = self._stateless[number]
        for place in places:
            code = self._code(place)
            if code & MOVED:
                if place in stateless:
                    code |= FRESH
                    stateless.discard(place)
                self._factors[place] = self.watch.factors[place]
            self._codes[place] = code
        self.watch.stepped(places)
        self._stepped.add(number)
        if len(self._stepped) == len(self.optimizers):
            return self.rest()
        self._note_left_out()
        return None

    def _code(self, place: int) -> int:
        """What the step just taken did to a parameter; see the codes in `step_log`."""
        parameter = self.watch.parameters[place]
        if parameter.grad is None:
            return LEFT_OUT if parameter.requires_grad else 0
        if self.watch.reached(place) or not self._all_zero(place, parameter):
            return MOVED | CARRIED  # a gradient that nobody removed moves the parameter again
        return MOVED | LEFT_OUT if parameter.requires_grad else MOVED

    def _all_zero(self, place: int, parameter: Tensor) -> bool:
        """Whether a gradient that no backward pass reached is all zeros; looked at again only if it was written to."""
        gradient: Any = parameter.grad
        look = (id(gradient), gradient._version)
        known = self._zero.get(place)
        stays_zero = known is not None and known[1] and known[0][0] == look[0] and not parameter.requires_grad
        if known is None or (known[0] != look and not stays_zero):
            known = look, not bool(whole(gradient).count_nonzero())
        self._zero[place] = look, known[1]
        return known[1]

    def _note_left_out(self) -> None:
        """Of optimizers that have not stepped in this round: which parameters its batch left out."""
        for number, places in enumerate(self._places):
            if number not in self._stepped:
                for place in places:
                    parameter = self.watch.parameters[place]
                    reached = parameter.grad is not None and self.watch.reached(place)
                    self._codes[place] = LEFT_OUT if parameter.requires_grad and not reached else 0

    def rest(self) -> Round | None:
        """The round under way, ended; None if no optimizer has stepped in it."""
        if not self._stepped:
            return None
        round_ = Round(joined(self._numbers), self._codes, self._factors)
        self.moved |= {place for place, code in enumerate(self._codes) if code & MOVED}
        self._codes, self._factors = [0] * len(self.names), [ONE] * len(self.names)
        self._stepped.clear()
        return round_

    def _look_at_layout(self) -> list[Any]:
        return [[len(group["params"]) for group in one.param_groups] for one in self.optimizers]

    def _note_parameters(self) -> None:
        """Follow every parameter of the model that an optimizer holds; refuse one that two of them hold."""
        self._layout = self._look_at_layout()
        holders = {
            id(p): (number, g)
            for number, one in enumerate(self.optimizers)
            for g, group in enumerate(one.param_groups)
            for p in group["params"]
        }
        twice = len(holders) < sum(map(sum, self._layout))
        known, new = set(self.names), list[Tensor]()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) in holders and name not in known:
                if twice:
                    self._check_holders(name, parameter)
                self._places[holders[id(parameter)][0]].append(len(self.names))
                self.names.append(name)
                self._groups.append(holders[id(parameter)])
                new.append(parameter)
        self.watch.follow(new)
        self._codes += [0] * len(new)
        self._factors += [ONE] * len(new)
        self._looks = [None for _ in self.optimizers]

    def _check_holders(self, name: str, parameter: Tensor) -> None:
        held = [any(p is parameter for g in one.param_groups for p in g["params"]) for one in self.optimizers]
        if sum(held) > 1:
            raise TrajectoryError(
                f"parameter {name!r} is held by {sum(held)} of the optimizers, so that its steps are those of none. "
                "Record them one after the other, as stages, or give each parameter to one optimizer."
            )

    def groups(self) -> list[int]:
        """Each parameter's parameter group, counted through all optimizers."""
        sizes = [len(one.param_groups) for one in self.optimizers]
        return [sum(sizes[:number]) + group for number, group in self._groups]

    def taken_before(self) -> dict[str, int]:
        """How many steps the optimizers have taken with each parameter; -1 where they have, and do not count them."""
        taken = {}
        for place, name in enumerate(self.names):
            steps = steps_taken(self.optimizers[self._groups[place][0]], self.watch.parameters[place])
            if steps != 0:
                taken[name] = -1 if steps is None else steps
        return taken

    def unheld(self) -> list[str]:
        """Parameters in training that no recorded optimizer holds."""
        held = set(self.names)
        parameters = self.model.named_parameters(remove_duplicate=False)
        return [name for name, parameter in parameters if parameter.requires_grad and name not in held]

    def holder(self, place: int) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
        """The optimizer that holds a parameter, and the options of its parameter group there."""
        number, group = self._groups[place]
        return self.optimizers[number], self.optimizers[number].param_groups[group]
