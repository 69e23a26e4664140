"""From a method to the plan for one stage's data, checked against the run that it is a plan for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import MethodError, TrajectoryError
from ..methods.method import Cuts, Method, is_automatic
from ..methods.plan import CoupledFunction, Plan, fishers, spectral
from ..methods.plan_check import StageFacts, check_plan
from .context import StageContext


def check_method(method: Any) -> None:
    """Raise MethodError unless a method can be asked for its plan."""
    if isinstance(method, type) or not callable(getattr(method, "plan", None)):
        raise MethodError(f"method={method!r}: expected one of Source(...), InfluenceFunction(...), TracIn(), ...")


def plan_for(method: Method, contexts: Sequence[StageContext], place: int, cuts: Cuts | None) -> Plan:
    """The method's plan for one stage's data.

    Raises MethodError or TrajectoryError where it does not fit the run, and MethodError for a plan that is another one
    when it is asked for again: `fit` and `score`, and all ranks, must follow one plan.
    """
    run = contexts[-1].run
    extra = {"cuts": cuts} if is_automatic(method) else {}
    plan, again = (method.plan(run, place, **extra) for _ in range(2))
    if repr(plan) != repr(again):  # NaN, of rates that are not known, is not equal to itself
        raise MethodError(
            f"{type(method).__name__}: plan() gave two different plans for the same run. Expected one that depends on "
            "the method's options and the trajectory only; make a seed an option, and draw from it."
        )
    facts = [
        StageFacts(len(c.trajectory), c.trajectory.learning_rates.shape[1], tuple(c.layers.tracked)) for c in contexts
    ]
    checked = check_plan(plan, place, facts)
    check_rates(contexts, checked)
    for operator in (operator for term in checked for operator in term.operators):
        if isinstance(operator, CoupledFunction):
            operator.check_shifts(contexts[operator.stage].parameter_groups.values())
    return checked


def check_rates(contexts: Sequence[StageContext], plan: Plan) -> None:
    """Raise TrajectoryError if a plan needs rates of layers whose optimizer has none that are known, naming them."""
    of_operators: list[tuple[int, tuple[tuple[float | None, ...], ...]]]
    of_operators = [(op.stage, (op.amount, op.shift, op.coupled)) for op in spectral(plan)]
    of_operators += [(op.stage, (op.trace_shares.rates,)) for op in spectral(plan) if op.trace_shares is not None]
    of_operators += [(fisher.stage, (fisher.rates,)) for fisher in fishers(plan)]
    for stage, numbers_of in of_operators:
        context = contexts[stage]
        needed = [numbers for numbers in numbers_of if numbers]
        unknown = {
            parameter: context.trajectory.kinds[group]
            for name, group in context.parameter_groups.items()
            for parameter in context.layers.tracked[name].parameter_names
            if any(math.isnan(numbers[group] or 0.0) for numbers in needed)
        }
        if unknown:
            raise TrajectoryError(
                f"parameters {list(unknown)[:8]}{' and more' if len(unknown) > 8 else ''} were trained by "
                f"{' and '.join(sorted(set(unknown.values())))}, whose rates are not known, and this method needs "
                "them. Leave their layers out through get_influence_tracked_modules(), or use InfluenceFunction or "
                "GradientDot, which need no rates."
            )
