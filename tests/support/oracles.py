"""Naive, obviously correct references that the tests compare segflow with.

Nothing here imports segflow. Models are tiny, everything is float64, loops are welcome.

SOURCE: Bae, Lin, Lorraine, Grosse 2024, arXiv 2405.12186 (Eqs. 13-22, Appendix D).
EK-FAC: George et al. 2018, arXiv 1806.03884.

Letters: P groups of a layer (1 for Linear), O outputs and I inputs of one group (a bias is one more input,
the last, always 1), T tokens, D = O*I flattened row-major, Q queries, K groups of examples, N dataset size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Spectral = Callable[[Tensor], Tensor]
ConvNd = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


# ---- gradients and tokens of a layer ----


def layer_matrix(module: nn.Module, grad_weight: Tensor, grad_bias: Tensor | None = None) -> Tensor:
    """Weight and bias gradient as one matrix [P, O, I], the bias the last input column (SOURCE App. D).

    Pure indexing, any dtype: fed with parameter *positions* it gives the permutation to layer order.
    """
    assert isinstance(module, (nn.Linear, *ConvNd)), f"no oracle for {type(module).__name__}"
    parts = getattr(module, "groups", 1)
    per_part = grad_weight.shape[0] // parts
    matrix = grad_weight.reshape(parts, per_part, -1)
    if module.bias is None:
        return matrix
    assert grad_bias is not None, "the module has a bias: its gradient is needed"
    return torch.cat([matrix, grad_bias.reshape(parts, per_part, 1)], dim=2)


def example_gradients(
    model: nn.Module, layers: dict[str, nn.Module], loss_of_example: Callable[[int], Tensor], n: int
) -> dict[str, Tensor]:
    """G_b = d l_b / d W for b = 0..n-1, one backward each, as {name: [n, P, O, I]} (SOURCE App. D)."""
    _assert_layers_belong(model, layers)
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    for example in range(n):
        params = [p for layer in layers.values() for p in (layer.weight, layer.bias) if p is not None]
        grads = torch.autograd.grad(loss_of_example(example), params, allow_unused=True)
        filled = iter([torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)])
        for name, layer in layers.items():
            grad_weight = next(filled)
            grad_bias = None if layer.bias is None else next(filled)
            rows[name].append(layer_matrix(layer, grad_weight, grad_bias).double())
    return {name: torch.stack(matrices) for name, matrices in rows.items()}


def naive_tokens(
    model: nn.Module, layers: dict[str, nn.Module], loss_of_example: Callable[[int], Tensor], example: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """One example's tokens {name: (a [T, P, I], g [T, P, O])}: inputs and output gradients, all calls joined.

    G_b = sum_t g_t a_t^T (SOURCE App. D). A call that the loss does not depend on has g = 0; a layer that is
    never called is left out. The layers' parameters must require gradients.
    """
    _assert_layers_belong(model, layers)
    with recorded_calls(layers) as calls:
        loss = loss_of_example(example)
    outputs = [output for _, _, output in calls]
    grads = torch.autograd.grad(loss, outputs, allow_unused=True)
    joined: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for (name, x, output), grad in zip(calls, grads, strict=True):
        a, g = _call_tokens(layers[name], x, torch.zeros_like(output) if grad is None else grad)
        a_list, g_list = joined.setdefault(name, ([], []))
        a_list.append(a)
        g_list.append(g)
    return {name: (torch.cat(a_list), torch.cat(g_list)) for name, (a_list, g_list) in joined.items()}


def naive_covariances(
    model: nn.Module, layers: dict[str, nn.Module], loss_of_example: Callable[[int], Tensor], n: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """A = mean a a^T [P, I, I], S = mean g g^T [P, O, O], over all tokens of all examples (SOURCE App. D)."""
    tokens: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    for example in range(n):
        for name, (a_TPI, g_TPO) in naive_tokens(model, layers, loss_of_example, example).items():
            tokens[name] += list(zip(a_TPI, g_TPO, strict=True))
    covariances = {}
    for name, pairs in tokens.items():
        A = sum(a[:, :, None] * a[:, None, :] for a, _ in pairs) / len(pairs)
        S = sum(g[:, :, None] * g[:, None, :] for _, g in pairs) / len(pairs)
        covariances[name] = (A, S)
    return covariances


def _assert_layers_belong(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Every layer is a module of the model (SOURCE App. D works layer by layer)."""
    for name, layer in layers.items():
        assert any(layer is module for module in model.modules()), f"{name} is not in the model"


@contextmanager
def recorded_calls(layers: dict[str, nn.Module]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """List of (name, input copy, output) of every layer call: the a and, by autograd, the g of SOURCE App. D.

    Both are kept apart from what the model goes on with, so an in-place activation cannot change them.
    """
    calls: list[tuple[str, Tensor, Tensor]] = []

    def hook_for(name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            calls.append((name, inputs[0].detach().clone(), output))
            return output.clone()

        return hook

    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _call_tokens(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens a [T, P, I] and g [T, P, O] of one call of a layer (SOURCE App. D), the bias input appended."""
    if isinstance(module, nn.Linear):
        a_TPI = x.reshape(-1, 1, x.shape[-1])
        g_TPO = grad.reshape(-1, 1, grad.shape[-1])
    else:
        a_TPI, g_TPO = conv_tokens(module, x, grad)
    if module.bias is not None:
        a_TPI = torch.cat([a_TPI, torch.ones_like(a_TPI[:, :, :1])], dim=2)
    return a_TPI.double(), g_TPO.double()


def conv_tokens(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution's tokens: at each output position the input patch under the kernel (SOURCE App. D)."""
    assert isinstance(module, ConvNd), f"no oracle for {type(module).__name__}"
    if x.dim() == len(module.kernel_size) + 1:  # a call without a batch axis
        x, grad = x[None], grad[None]
    padded = _padded(module, x)
    batch, parts = x.shape[0], module.groups
    a_list, g_list = [], []
    for position in itertools.product(*(range(size) for size in grad.shape[2:])):
        window = [
            slice(at * stride, at * stride + dilation * (kernel - 1) + 1, dilation)
            for at, stride, dilation, kernel in zip(
                position, module.stride, module.dilation, module.kernel_size, strict=True
            )
        ]
        a_list.append(padded[(slice(None), slice(None), *window)].reshape(batch, parts, -1))
        g_list.append(grad[(slice(None), slice(None), *position)].reshape(batch, parts, -1))
    return torch.cat(a_list), torch.cat(g_list)


def _padded(module: nn.Module, x: Tensor) -> Tensor:
    """The input as the convolution sees it: padded by `padding` in `padding_mode` (torch.nn.Conv2d)."""
    sides: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):  # F.pad starts from the last axis
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        elif module.padding == "valid":
            sides += [0, 0]
        else:
            sides += [module.padding[axis], module.padding[axis]]
    return F.pad(x, sides, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


# ---- EK-FAC ----


def eigenbasis(A: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Q_A [P, I, I], Q_S [P, O, O] with A = Q_A L_A Q_A^T, S = Q_S L_S Q_S^T (EK-FAC; SOURCE App. D)."""
    return torch.linalg.eigh(A.double()).eigenvectors, torch.linalg.eigh(S.double()).eigenvectors


def corrected_eigenvalues(example_grads: Tensor, Q_A: Tensor, Q_S: Tensor) -> Tensor:
    """Lambda [P, O, I] = mean over examples of (Q_S^T G_b Q_A)^2, G [n, P, O, I] (EK-FAC; SOURCE App. D)."""
    total = torch.zeros_like(example_grads[0])
    for G in example_grads:
        total = total + (Q_S.mT @ G @ Q_A) ** 2
    return total / len(example_grads)


def pooled_ekfac(
    per_checkpoint: Sequence[tuple[Tensor, Tensor, Tensor]], weights: Sequence[float] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(Q_A, Q_S, Lambda) of a segment from its checkpoints' (A, S, example_grads) (SOURCE App. D).

    A and S are averaged first (by default with equal weights); Lambda is fitted per checkpoint in that basis, then
    averaged.
    """
    weights = weights or [1 / len(per_checkpoint)] * len(per_checkpoint)
    A_mean = sum(weight * A for weight, (A, _, _) in zip(weights, per_checkpoint, strict=True))
    S_mean = sum(weight * S for weight, (_, S, _) in zip(weights, per_checkpoint, strict=True))
    Q_A, Q_S = eigenbasis(A_mean, S_mean)
    Lambda = sum(
        weight * corrected_eigenvalues(grads, Q_A, Q_S)
        for weight, (_, _, grads) in zip(weights, per_checkpoint, strict=True)
    )
    return Q_A, Q_S, Lambda


def dense_curvature(Q_A: Tensor, Q_S: Tensor, Lambda: Tensor) -> Tensor:
    """(Q_S kron Q_A) diag(Lambda) (Q_S kron Q_A)^T as [P, O*I, O*I], row-major in (o, i) (EK-FAC)."""
    blocks = []
    for Q_A_part, Q_S_part, Lambda_part in zip(Q_A, Q_S, Lambda, strict=True):
        Q = torch.kron(Q_S_part, Q_A_part)
        blocks.append(Q @ torch.diag(Lambda_part.reshape(-1)) @ Q.T)
    return torch.stack(blocks)


# ---- SOURCE and its relatives, dense ----


def dense_function(matrix: Tensor, f: Spectral) -> Tensor:
    """f(M) = U f(sigma) U^T of a symmetric M [D, D] = U diag(sigma) U^T (SOURCE Eqs. 17-22)."""
    matrix = matrix.double()
    torch.testing.assert_close(matrix, matrix.T)
    sigma, U = torch.linalg.eigh((matrix + matrix.T) / 2)
    return U @ torch.diag(f(sigma)) @ U.T


def decay(lr_steps: float, decay_steps: float = 0.0) -> Spectral:
    """sigma -> exp(-(lr_steps sigma + decay_steps)): what a segment forgets (SOURCE Eqs. 13-22, in sums)."""
    return lambda sigma: torch.exp(-lr_steps * sigma) * math.exp(-decay_steps)


def response(lr_steps: float, decay_steps: float = 0.0) -> Spectral:
    """sigma -> the integral over t in [0, 1] of lr_steps exp(-t (lr_steps sigma + decay_steps)) (SOURCE Eqs. 13-22).

    A gradient that comes in at a time is forgotten over what is left of the segment.
    """

    def f(sigma: Tensor) -> Tensor:
        if lr_steps == 0.0:
            return torch.zeros_like(sigma)
        s = sigma + decay_steps / lr_steps
        return torch.where(s == 0.0, torch.full_like(s, lr_steps), -torch.expm1(-lr_steps * s) / s)

    return f


def source_scores(query_grads: Tensor, segments: Sequence[dict[str, Any]], dataset_size: int) -> list[Tensor]:
    """SOURCE's parts [Q, K], one per segment, first to last; their sum is the score (SOURCE Eqs. 13-22).

    `query_grads` [Q, D] at the final parameters. Segments, first to last, are dicts with "curvature" [D, D],
    "lr_steps", "decay_steps" and "group_gradients": a list over checkpoints of [K, D], sums over members, with
    "weights" (by default equal ones).
    Sign: the predicted change of the measurement if the group were removed, + <r_l, mean sum grad> / N.
    """
    v = query_grads.double()
    parts: list[Tensor] = []
    for segment in reversed(segments):
        options = (segment["lr_steps"], segment["decay_steps"])
        r = v @ dense_function(segment["curvature"], response(*options))
        gradients = segment["group_gradients"]
        weights = segment.get("weights") or [1 / len(gradients)] * len(gradients)
        group_gradients = sum(weight * gradient for weight, gradient in zip(weights, gradients, strict=True))
        parts.append(r @ group_gradients.double().T / dataset_size)
        v = v @ dense_function(segment["curvature"], decay(*options))
    return parts[::-1]


def influence_scores(
    query_grads: Tensor, curvature: Tensor, damping: float, group_gradients: Tensor, dataset_size: int
) -> Tensor:
    """q^T (H + damping)^-1 (sum grad) / N as [Q, K], SOURCE's limit lr_steps -> inf (Koh and Liang 2017)."""
    damped = curvature.double() + damping * torch.eye(len(curvature), dtype=torch.float64)
    return query_grads.double() @ torch.linalg.solve(damped, group_gradients.double().T) / dataset_size


def trace_shares(traces: dict[str, float], rates: dict[str, float]) -> dict[str, float]:
    """Each layer's share of rate * trace, by which coupled layers' curvature is divided."""
    amounts = {name: rates[name] * trace for name, trace in traces.items()}
    return {name: amount / sum(amounts.values()) for name, amount in amounts.items()}


def tracin_scores(checkpoints: Iterable[tuple[Tensor, float, Tensor]], dataset_size: int) -> Tensor:
    """Sum over (query_grads [Q, D], lr_steps, group_gradients [K, D]) of lr_steps q g^T / N (TracIn)."""
    return sum(lr_steps * q.double() @ g.double().T for q, lr_steps, g in checkpoints) / dataset_size


# ---- preconditioned optimizers ----


def preconditioner(second_moments: Sequence[Tensor], eps: float, weights: Sequence[float] | None = None) -> Tensor:
    """P = 1 / (sqrt(v_hat) + eps), elementwise (SOURCE App. C); over checkpoints the harmonic mean, that of 1 / P.

    Weights are equal by default.
    """
    weights = weights or [1 / len(second_moments)] * len(second_moments)
    return 1 / sum(w * (moments.sqrt() + eps) for w, moments in zip(weights, second_moments, strict=True))


def rank_one(P: Tensor) -> tuple[Tensor, Tensor]:
    """(p_O [P, O], p_I [P, I]) with p_O p_I^T the geometric row and column means of P [P, O, I]."""
    logs = P.double().log()
    grand = logs.mean((1, 2), keepdim=True)
    return logs.mean(2).exp(), (logs.mean(1) - grand[:, 0]).exp()


def scaled_fit(fit: tuple[Tensor, Tensor, Tensor], P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(A, S, example_grads) of tokens scaled by the square roots of P's rank-one part."""
    A, S, grads = fit
    p_O, p_I = (side.sqrt() for side in rank_one(P))
    scaled_A = p_I[:, :, None] * A * p_I[:, None, :]
    scaled_S = p_O[:, :, None] * S * p_O[:, None, :]
    return scaled_A, scaled_S, p_O[None, :, :, None] * grads * p_I[None, :, None, :]


def preconditioned_source_scores(
    query_grads: Tensor, segments: Sequence[dict[str, Any]], dataset_size: int
) -> list[Tensor]:
    """SOURCE's parts where steps are preconditioned, dense; segments as for `source_scores`, with "P" [D].

    "basis" is (sigma, U), the eigenvalues and eigenvectors of the curvature of P^1/2 H P^1/2; "coupled" decay_steps are
    multiplied by P's diagonal in that basis.
    """
    v = query_grads.double()
    parts: list[Tensor] = []
    for segment in reversed(segments):
        root = segment["P"].sqrt()
        sigma, U = segment["basis"]
        unit = (U.square().T @ segment["P"]) if segment["coupled"] else torch.ones_like(sigma)
        shift = segment["decay_steps"] * unit
        forget = torch.exp(-segment["lr_steps"] * sigma - shift)
        answer = torch.stack([response(segment["lr_steps"], d.item())(x) for x, d in zip(sigma, shift, strict=True)])
        gradients = sum(w * g for w, g in zip(segment["weights"], segment["group_gradients"], strict=True))
        parts.append((v * root) @ U @ torch.diag(answer) @ U.T * root @ gradients.T / dataset_size)
        v = (v * root) @ U @ torch.diag(forget) @ U.T / root
    return parts[::-1]


def hybrid_source_scores(query_grads: Tensor, segments: Sequence[dict[str, Any]], dataset_size: int) -> list[Tensor]:
    """The paper's hybrid (SOURCE App. C): "diagonal" [D] of H in the exponential, damped "curvature" in the inverse."""
    v = query_grads.double()
    parts: list[Tensor] = []
    for segment in reversed(segments):
        unit = segment["P"] if segment["coupled"] else torch.ones_like(segment["P"])
        kept = torch.exp(-segment["lr_steps"] * segment["P"] * segment["diagonal"] - segment["decay_steps"] * unit)
        weight_decay = segment["decay_steps"] / segment["lr_steps"]
        damping = 0.1 * segment["curvature"].diagonal().mean() + weight_decay * segment["coupled"]
        inverse = torch.linalg.inv(segment["curvature"] + damping * torch.eye(len(kept), dtype=torch.float64))
        gradients = sum(w * g for w, g in zip(segment["weights"], segment["group_gradients"], strict=True))
        parts.append((v * (1 - kept)) @ inverse @ gradients.T / dataset_size)
        v = v * kept
    return parts[::-1]


# ---- exact training and its derivative ----


def weighted_gradient(losses_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """(theta, w) -> gradient of (1/N) sum_i w_i l_i(theta), differentiable; `losses_of(theta)` is [N].

    The objective whose weights SOURCE perturbs (Eqs. 13-16).
    """

    def gradient_of(theta: Tensor, weights: Tensor) -> Tensor:
        theta = theta if theta.requires_grad else theta.detach().requires_grad_()
        return torch.autograd.grad((weights * losses_of(theta)).mean(), theta, create_graph=True)[0]

    return gradient_of


def train_sgd(
    theta0: Tensor,
    gradient_of: Callable[[Tensor, Tensor], Tensor],
    weights: Tensor,
    lrs: Sequence[float],
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    preconditioner: Tensor | float = 1.0,
    decoupled: float = 0.0,
) -> Tensor:
    """Final theta after one step per learning rate, as torch.optim.SGD does it, differentiable in `weights`.

    The run that SOURCE Eqs. 13-16 unroll; `gradient_of(theta, weights)` is that of (1/N) sum_i w_i l_i. A fixed
    diagonal `preconditioner` multiplies the gradient with its weight decay; `decoupled` weight decay acts beside it.
    """
    theta, buffer = theta0, None
    for lr in lrs:
        step = preconditioner * (gradient_of(theta, weights) + weight_decay * theta) + decoupled * theta
        if momentum != 0.0:
            buffer = step if buffer is None else momentum * buffer + (1.0 - dampening) * step
            step = step + momentum * buffer if nesterov else buffer
        theta = theta - lr * step
    return theta


def unrolled_influence(
    measurement: Callable[[Tensor], Tensor],
    theta0: Tensor,
    gradient_of: Callable[[Tensor, Tensor], Tensor],
    groups: Sequence[Sequence[int]],
    dataset_size: int,
    lrs: Sequence[float],
    **sgd_options: float,
) -> Tensor:
    """-sum_{i in group} d f_q(theta_final) / d w_i at w = 1, as [Q, K]: what SOURCE Eqs. 13-16 approximate.

    `measurement(theta)` is a scalar or [Q]; `sgd_options` go to `train_sgd`. Exact: autograd through the run.
    """
    weights = torch.ones(dataset_size, dtype=torch.float64, requires_grad=True)
    values = measurement(train_sgd(theta0, gradient_of, weights, lrs, **sgd_options)).reshape(-1)
    rows = []
    for value in values:
        (slope,) = torch.autograd.grad(value, weights, retain_graph=True)
        rows.append(torch.stack([-slope[list(group)].sum() for group in groups]))
    return torch.stack(rows)


def gauss_newton(
    model: nn.Module,
    params: Sequence[Tensor],
    outputs_fn: Callable[[], Tensor],
    loss_of_outputs: Callable[[Tensor], Tensor],
) -> Tensor:
    """Exact J^T H J of the summed loss, params flattened and joined in the given order (SOURCE App. D).

    J: outputs' Jacobian; H: the loss's Hessian in the outputs; divided by nothing. For a layer's (o, i)
    order index rows and columns with `layer_matrix` of the parameter positions, flattened.
    """
    assert all(any(p is own for own in model.parameters()) for p in params), "a parameter is not the model's"
    outputs = outputs_fn()
    rows = []
    for output in outputs.reshape(-1):
        grads = torch.autograd.grad(output, params, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
        rows.append(torch.cat([g.reshape(-1) for g in filled]))
    J = torch.stack(rows).double()
    flat = outputs.detach().double().reshape(-1)
    H = torch.autograd.functional.hessian(lambda z: loss_of_outputs(z.reshape(outputs.shape)), flat)
    return J.T @ H @ J
