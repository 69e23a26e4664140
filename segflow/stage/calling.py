"""What every call of an Analyzer is wrapped in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ..data.changing import one_call
from ..methods.method import prefixed
from ..model.observing import observing
from ..runtime.signals import orderly
from ..store.journal import RESERVED
from .context import StageContext
from .unfilled import forget


@contextmanager
def one_call_of(
    runs: Sequence[Sequence[StageContext]], method: Mapping[str, Any], name: str, store: bool, facts: Mapping[str, Any]
) -> Iterator[None]:
    """One call on all ranks: the store locked, the work logged, the model left as it was.

    method: described; store: whether the call uses units of the store; facts: what it was asked, for the log.
    """
    context = runs[0][-1]
    shared = context.store
    with ExitStack() as stack:
        stack.enter_context(orderly())
        stack.enter_context(one_call())
        stack.enter_context(context.ranks.together(name))
        held = stack.enter_context(shared.on_rank_0.locked(name)) if store and context.ranks.main else None
        told = {"ranks": context.ranks.count, **facts}
        stack.enter_context(shared.journal.call(name, **prefixed(method, {*told, *RESERVED}), **told))
        if held is not None and held.took_over:
            shared.journal.event("took_over", holder=held.took_over.as_json())
        settings = [one.agreement() for contexts in runs for one in contexts]
        context.ranks.agree("the model, task, method and settings", [settings, method, facts])
        stack.enter_context(observing(context.model))
        forget(context.model)
        readers = context.settings.readers
        readers.begin(digesting=store)
        yield
        readers.confirm(context.ranks, context.settings.progress)
