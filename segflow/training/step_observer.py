"""What every step of live optimizers did to every parameter of a model, told round by round.

A round is one step of each optimizer; one that an optimizer begins anew before all have stepped ends without the
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrajectoryError
from ..runtime.sharding import named_parameters, whole
from .gradient_watch import ONE, Factor, GradientWatch
from .live_optimizers import numbers, skipped, started, steps_taken
from .step_log import CARRIED, FRESH, LEFT_OUT, MOVED, Numbers, Round


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
        self.layouts = 0  # how often parameters came, went or changed their parameter group
        self._places: list[list[int]] = [[] for _ in optimizers]  # those that each optimizer holds
        self._groups: list[tuple[int, int]] = []  # each one's optimizer, and its parameter group there
        self._layout: list[int] = []
        self._stateless: list[set[int]] = [set() for _ in optimizers]  # places of which an optimizer has no state yet
        self._looks: list[Any] = [None for _ in optimizers]  # how the optimizers' states looked then
        self._numbers: list[Numbers] = [numbers(one) for one in optimizers]
        self._joined: Numbers = ()
        self._stepped: set[int] = set()  # the optimizers that have taken this round's step
        self._codes: list[int] = []  # of this round
        self._factors: list[Factor] = []
        self._last_codes: list[int] = []  # of the round before
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

    def check(self, number: int) -> None:
        """The closure of an optimizer's step has run: note it if gradients were changed after its backward pass."""
        self.watch.check(self._places[number])

    def after_step(self, number: int) -> Round | None:
        """An optimizer has stepped; the round, if that ends it."""
        optimizer, places = self.optimizers[number], self._places[number]
        if skipped(optimizer):
            self.skipped += 1
            self.watch.rewritten()
            return None
        self._codes_of(number)
        self.watch.stepped(places)
        self._stepped.add(number)
        if len(self._stepped) == len(self.optimizers):
            return self.rest()
        self._note_left_out()
        return None

    def _codes_of(self, number: int) -> None:
        """Note what an optimizer's step did to its parameters."""
        places, stateless, watch = self._places[number], self._stateless[number], self.watch
        codes, factors = self._codes, self._factors
        for place, reached in zip(places, watch.reached(places), strict=True):
            codes[place] = code = MOVED | CARRIED if reached else self._code(place)
            if code & MOVED:
                factors[place] = watch.factors[place]
        for place in [place for place in stateless if codes[place] & MOVED] if stateless else ():
            codes[place] |= FRESH
            stateless.discard(place)

    def _code(self, place: int) -> int:
        """What the step just taken did to a parameter that no backward pass reached; see the codes in `step_log`."""
        parameter = self.watch.parameters[place]
        if parameter.grad is None:
            return LEFT_OUT if parameter.requires_grad else 0
        if not self.watch.told or not self._all_zero(place, parameter):
            return MOVED | CARRIED  # a gradient that nobody removed moves the parameter again
        return MOVED | LEFT_OUT if parameter.requires_grad else MOVED

    def _all_zero(self, place: int, parameter: Tensor) -> bool:
        """Whether a gradient that no backward pass reached is all zeros; looked at again only if it was written to."""
        gradient: Any = parameter.grad
        look = (id(gradient), gradient._version)
        known = self._zero.get(place)
        stays_zero = known is not None and known[1] and known[0][0] == look[0] and not parameter.requires_grad
        if known is None or (known[0] != look and not stays_zero):
            values = gradient.coalesce().values() if gradient.is_sparse else whole(gradient)
            known = look, not bool(values.count_nonzero())
        self._zero[place] = look, known[1]
        return known[1]

    def _note_left_out(self) -> None:
        """Of optimizers that have not stepped in this round: which parameters its batch left out."""
        for number, places in enumerate(self._places):
            if number not in self._stepped:
                for place, reached in zip(places, self.watch.reached(places), strict=True):
                    in_training = self.watch.parameters[place].requires_grad
                    self._codes[place] = LEFT_OUT if in_training and not reached else 0

    def rest(self) -> Round | None:
        """The round under way, ended; None if no optimizer has stepped in it."""
        if not self._stepped:
            return None
        joined = tuple(chain.from_iterable(self._numbers))
        if joined != self._joined:
            self._joined = joined
        round_ = Round(self._joined, self._codes, self._factors)
        if self._codes != self._last_codes:
            self.moved |= {place for place, code in enumerate(self._codes) if code & MOVED}
            self._last_codes = self._codes
        self._codes, self._factors = [0] * len(self.names), [ONE] * len(self.names)
        self._stepped.clear()
        return round_

    def _look_at_layout(self) -> list[int]:
        return [id(p) for one in self.optimizers for group in one.param_groups for p in (*group["params"], group)]

    def _note_parameters(self) -> None:
        """Follow every parameter of the model that an optimizer holds; refuse one that two of them hold.

        Also called where parameters came, went, were replaced or changed their parameter group.
        """
        self._layout = self._look_at_layout()
        holders: dict[int, tuple[int, int]] = {}
        for number, one in enumerate(self.optimizers):
            for g, group in enumerate(one.param_groups):
                holders |= {id(p): (number, g) for p in group["params"]}
        known, new = {name: place for place, name in enumerate(self.names)}, list[Tensor]()
        self._places = [[] for _ in self.optimizers]
        self._groups = [(number, 0) for number, _ in self._groups]  # of those that nothing holds any more
        for name, parameter in named_parameters(self.model, remove_duplicate=False).items():
            if id(parameter) not in holders:
                continue
            self._check_holders(name, parameter)
            if name not in known:
                known[name] = len(self.names)
                self.names.append(name)
                self._groups.append(holders[id(parameter)])
                new.append(parameter)
            place = known[name]
            self._places[holders[id(parameter)][0]].append(place)
            self._groups[place] = holders[id(parameter)]
            if place < len(self.watch.parameters) and self.watch.parameters[place] is not parameter:
                self.watch.replace(place, parameter)
        self.watch.follow(new)
        self._codes += [0] * len(new)
        self._factors += [ONE] * len(new)
        self._looks = [None for _ in self.optimizers]
        self.layouts += 1

    def _check_holders(self, name: str, parameter: Tensor) -> None:
        if len(self.optimizers) == 1:
            return
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
        parameters = named_parameters(self.model, remove_duplicate=False)
        return [name for name, parameter in parameters.items() if parameter.requires_grad and name not in held]

    def holder(self, place: int) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
        """The optimizer that holds a parameter, and the options of its parameter group there."""
        number, group = self._groups[place]
        return self.optimizers[number], self.optimizers[number].param_groups[group]
