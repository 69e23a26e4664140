"""What checkpoints leave in the model as it is, as adapters' files leave the base: the same for all, and told apart.

Loading one checkpoint after another must give the same model in every order, so all of an analyzer's leave the same
tensors alone; and these are part of every point in training, so a digest of them binds what is made there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..data.fingerprints import digest
from ..errors import TrajectoryError
from ..methods.plan import Point
from ..runtime.sharding import local, named_parameters, plain_name, state_of, whole
from .context import StageContext

_digests: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()  # with how the tensors looked


def check_unfilled(runs: Sequence[Sequence[StageContext]]) -> None:
    """Raise TrajectoryError where checkpoints of the runs and stages leave different tensors of the model alone."""
    stages = [context.trajectory for contexts in runs for context in contexts]
    points = [(stage, index) for stage in stages for index in range(len(stage))]
    left = [(stage.left_alone(runs[0][0].model, index), stage.checkpoints[index]) for stage, index in points]
    for (names, path), (others, other) in itertools.pairwise(left):
        if odd := sorted(names ^ others):
            raise TrajectoryError(
                f"of the checkpoints {path} and {other} one leaves {odd[:4]} as they are in the model, and the other "
                "does not. Give whole states at all checkpoints, or an adapter's alone at all."
            )


def unfilled(context: StageContext, point: Point) -> frozenset[str]:
    """The names in the model's state that the point's checkpoints leave as they are."""
    index, _ = point.weights[0]
    return context.run.stages[point.stage].left_alone(context.model, index)


def unfilled_digest(context: StageContext, point: Point) -> str:
    """A digest of what the point leaves as it is in the model, parameters and buffers; "" where that is nothing.

    Every rank must call it. It is remembered until `forget`, and as long as torch sees nobody write to these tensors.
    """
    names = unfilled(context, point)
    if not names:
        return ""
    tensors = _everything(context.model)
    filled = set(state_of(context.model)) - names
    rest = {name: tensor for name, tensor in sorted(tensors.items()) if name not in filled}
    look = [(name, local(tensor).data_ptr(), tensor._version) for name, tensor in rest.items()]
    known = _digests.get(context.model)
    if known is None or known[0] != look:
        known = look, digest([[name, digest(whole(tensor).detach())] for name, tensor in rest.items()])
        _digests[context.model] = known
    return known[1]


def forget(model: nn.Module) -> None:
    """Have the digest of what checkpoints leave in the model computed again: somebody may have changed it."""
    _digests.pop(model, None)


def _everything(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers, also such buffers as are in no state_dict, by their plain names."""
    buffers = {plain_name(name): buffer for name, buffer in model.named_buffers()}
    return {**buffers, **named_parameters(model)}
