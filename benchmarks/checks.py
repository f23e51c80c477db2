"""Properties of the ops that hold on any device and are worth a look at real sizes on a GPU.

Every check raises AssertionError with the numbers, and returns what it measured.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import r1kernels
from benchmarks import problem as problems
from benchmarks.harness import MIB
from benchmarks.meter import meter
from benchmarks.problem import relative_error
from benchmarks.provider import leaves
from benchmarks.providers import accumulate
from benchmarks.shapes import Shape


def _bitwise(name: str, left: Tensor, right: Tensor) -> None:
    """NaN is equal to nothing: a row that was not written fails."""
    wrong = (left != right).sum().item()
    assert wrong == 0, f"{name}: {wrong} of {left.numel()} numbers differ"


def _loss(problem: dict, hidden_TD: Tensor, weight_VD: Tensor, **options):
    advantages_B, logp_old_T, mask_T, _ = problems.streams(problem, "forward_backward")
    T, B = len(mask_T), len(advantages_B)
    return r1kernels.linear_policy_loss(
        hidden_TD,
        weight_VD,
        problem["targets"],
        advantages_B,
        r1kernels.PolicyObjective(aggregation="token_mean"),
        prior=logp_old_T,
        logp_old=logp_old_T,
        mask=mask_T,
        cu_seqlens=torch.arange(0, T + 1, T // B, dtype=torch.int32, device=mask_T.device),
        **options,
    )


def paths_agree(problem: dict) -> dict:
    """Forward-only, frozen, trainable and fused give bitwise the same logp.

    The first stores nothing, the others keep their exponentials for the gradients.
    """
    prior_T = problem["logp_old"]
    hidden_TD, weight_VD = leaves(problem, "forward_backward")
    args = (problem["targets"],)
    with torch.no_grad():
        forward_T = r1kernels.linear_logp(hidden_TD, weight_VD, *args, prior=prior_T).logp
    frozen_T = r1kernels.linear_logp(hidden_TD, weight_VD.detach(), *args, prior=prior_T).logp
    trained_T = r1kernels.linear_logp(hidden_TD, weight_VD, *args, prior=prior_T).logp
    fused_T = _loss(problem, hidden_TD, weight_VD).logp
    for name, logp_T in (("frozen", frozen_T), ("trainable", trained_T), ("fused", fused_T)):
        _bitwise(f"logp of the {name} path against forward only", logp_T.detach(), forward_T)
    return {}


def repeats(problem: dict) -> dict:
    """Two runs give bitwise the same log-probabilities and gradients."""
    found = []
    for _ in range(2):
        hidden_TD, weight_VD = leaves(problem, "forward_backward")
        out = _loss(problem, hidden_TD, weight_VD)
        out.loss.backward()
        found.append((out.logp, hidden_TD.grad, weight_VD.grad))
    for name, first, second in zip(("logp", "dhidden", "dweight"), *found, strict=True):
        _bitwise(f"{name} of two runs", first, second)
    return {}


def _rows(problem: dict, most: int) -> slice:
    """The first rows, whole sequences of them."""
    S = problem["shape"].S
    return slice(0, max(S, min(most, problem["shape"].T) // S * S))


def _log_softmax(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, transform=None) -> tuple:
    """(logp, entropy, lse) by plain torch: logits rounded to the operands' dtype, the rest in
    float32, or all of it in float64.
    """
    logits_TV = hidden_TD @ weight_VD.T
    logits_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    logits_TV = transform(logits_TV) if transform else logits_TV
    lse_T = logits_TV.logsumexp(-1)
    logp_TV = logits_TV - lse_T.unsqueeze(1)
    logp_T = logp_TV.gather(1, targets_T.unsqueeze(1)).squeeze(1)
    return logp_T, -(logp_TV.exp() * logp_TV.clamp(min=-1e4)).sum(-1), lse_T


def _compared(op: str, problem: dict, rows: slice, eager: Callable, ours: Callable) -> dict:
    """Errors of dhidden and dweight, at most twice eager's in the problem's dtype.

    Both are losses of (hidden, weight).
    """

    def gradients(loss: Callable, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        hidden_TD = problem["hidden"][rows].to(dtype).detach().requires_grad_()
        weight_VD = problem["weight"].to(dtype).detach().requires_grad_()
        loss(hidden_TD, weight_VD).backward()
        return hidden_TD.grad, weight_VD.grad

    dtype = problem["hidden"].dtype
    truth, plain = gradients(eager, torch.float64), gradients(eager, dtype)
    found = gradients(ours, dtype)
    return {
        f"{op} {name}": _no_worse(f"{op}'s {name}", *values)
        for name, *values in zip(("dhidden", "dweight"), found, plain, truth, strict=True)
    }


def _upstream(problem: dict, rows: slice) -> Tensor:
    """[3, T] random gradients of logp, entropy and lse."""
    targets_T = problem["targets"][rows]
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, len(targets_T), generator=generator).to(targets_T.device)


def _weighted(parts: tuple[Tensor, ...], upstream_3T: Tensor) -> Tensor:
    return sum((x * u.to(x)).sum() for x, u in zip(parts, upstream_3T, strict=False))


def any_upstream(problem: dict) -> dict:
    """`linear_logp` under gradients of logp, entropy and lse; `linear_loss` of the first two."""
    rows = _rows(problem, 512)
    targets_T, prior_T = problem["targets"][rows], problem["logp_old"][rows]
    upstream_3T = _upstream(problem, rows)

    def eager(count: int) -> Callable:
        return lambda h, w: _weighted(_log_softmax(h, w, targets_T)[:count], upstream_3T)

    def ours(h, w):
        out = r1kernels.linear_logp(h, w, targets_T, entropy=True, prior=prior_T)
        return _weighted(out, upstream_3T)

    def fused(h, w):
        def loss_fn(logp_C, entropy_C, at):
            return logp_C * upstream_3T[0, at] + entropy_C * upstream_3T[1, at]

        return r1kernels.linear_loss(h, w, targets_T, loss_fn, entropy=True, prior=prior_T)

    found = _compared("linear_logp", problem, rows, eager(3), ours)
    return found | _compared("linear_loss", problem, rows, eager(2), fused)


def transforms(problem: dict) -> dict:
    """Bias, softcap, logit scale and a temperature for each token."""
    rows = _rows(problem, 512)
    targets_T, prior_T = problem["targets"][rows], problem["logp_old"][rows]
    upstream_3T = _upstream(problem, rows)
    generator = torch.Generator().manual_seed(4)
    bias_V = torch.randn(len(problem["weight"]), generator=generator).to(problem["weight"])
    tau_T = (0.5 + torch.rand(len(targets_T), generator=generator)).to(targets_T.device)

    def transform(logits_TV):
        z_TV = 0.8 * (logits_TV + bias_V.to(logits_TV))
        return 30.0 * torch.tanh(z_TV / 30.0) / tau_T.to(logits_TV).unsqueeze(1)

    def eager(h, w):
        return _weighted(_log_softmax(h, w, targets_T, transform), upstream_3T)

    def ours(h, w):
        out = r1kernels.linear_logp(
            h, w, targets_T, bias=bias_V, temperature=tau_T, softcap=30.0, logit_scale=0.8,
            entropy=True, prior=prior_T,
        )  # fmt: skip
        return _weighted(out, upstream_3T)

    return _compared("linear_logp", problem, rows, eager, ours)


def objectives(problem: dict) -> dict:
    """Losses of the GRPO family beside the clipped one of the modes, over several chunks.

    The truth is `policy_loss`, plain torch, of float64 log-probabilities.
    """
    rows = _rows(problem, 1024)
    S, device = problem["shape"].S, problem["hidden"].device
    cu_seqlens = torch.arange(0, rows.stop + 1, S, dtype=torch.int32, device=device)
    targets_T, old_T = problem["targets"][rows], problem["logp_old"][rows]
    advantages_B = problem["advantages"][: rows.stop // S]
    kinds = {
        "gspo": r1kernels.PolicyObjective.gspo(),
        "grpo with a KL term": r1kernels.PolicyObjective.grpo(kl_coef=0.04),
        "cispo": r1kernels.PolicyObjective.cispo(),
        "sapo": r1kernels.PolicyObjective.sapo(),
    }
    out = {}
    for name, objective in kinds.items():
        streams = {"logp_old": old_T, "cu_seqlens": cu_seqlens}
        if objective.kl_coef:
            streams["logp_ref"] = old_T - 0.1

        def eager(h, w, objective=objective, streams=streams):
            logp_T = _log_softmax(h, w, targets_T)[0]
            return r1kernels.policy_loss(logp_T, advantages_B, objective, **streams).loss

        def ours(h, w, objective=objective, streams=streams):
            return r1kernels.linear_policy_loss(
                h, w, targets_T, advantages_B, objective, prior=old_T, workspace_mb=64, **streams
            ).loss

        out |= _compared(name, problem, rows, eager, ours)
    return out


def vector_ops(problem: dict) -> dict:
    """`policy_loss` and `group_advantages` where the problem is, in float32, against float64 on the
    CPU: loss, gradient and metrics of log-probabilities, advantages of rewards.
    """
    advantages_B, old_T, mask_T, _ = problems.streams(problem, "masked_50")
    B, T = len(advantages_B), len(mask_T)
    rewards_B = (advantages_B * 2).round() / 2
    groups_B = torch.arange(B, device=rewards_B.device) // max(2, B // 2)

    def evaluate(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        def there(x: Tensor) -> Tensor:
            return x.to(device, dtype if x.is_floating_point() else x.dtype)

        logp_T = there(problem["truth_logp"]).clone().requires_grad_()
        cu_seqlens = torch.arange(0, T + 1, T // B, dtype=torch.int32, device=device)
        out = r1kernels.policy_loss(
            logp_T, there(advantages_B), r1kernels.PolicyObjective.gspo(), logp_old=there(old_T),
            mask=there(mask_T), cu_seqlens=cu_seqlens,
        )  # fmt: skip
        out.loss.backward()
        metrics = torch.stack([value.double() for value in out.metrics.values()])
        made_B = r1kernels.group_advantages(there(rewards_B), groups_B.to(device))
        return out.loss.detach(), logp_T.grad, metrics, made_B

    here = evaluate(torch.float32, problem["hidden"].device)
    exact = evaluate(torch.float64, torch.device("cpu"))
    names = ("loss", "dlogp", "metrics", "advantages")
    found = {
        name: relative_error(value.cpu(), truth)
        for name, value, truth in zip(names, here, exact, strict=True)
    }
    for name, error in found.items():
        assert error <= 1e-5, f"{name}: error {error:.1e} against float64 on the CPU"
    return found


def kept_sets(problem: dict) -> dict:
    """`linear_logp` under ragged sets of kept ids, up to 64 for a row."""
    rows = _rows(problem, 256)
    targets_T = problem["targets"][rows]
    T, V = len(targets_T), len(problem["weight"])
    generator = torch.Generator().manual_seed(5)
    sizes_T = torch.randint(1, min(64, V), (T,), generator=generator)
    kept_TV = torch.zeros(T, V, dtype=torch.bool)
    for row, size in enumerate(sizes_T.tolist()):
        kept_TV[row, torch.randint(V, (size,), generator=generator)] = True
    kept_TV[torch.arange(T), targets_T.cpu()] = True
    ids_N = kept_TV.nonzero()[:, 1].to(targets_T.device)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept_TV.sum(1).cumsum(0)])
    upstream_3T = _upstream(problem, rows)
    left_out_TV = ~kept_TV.to(targets_T.device)

    def eager(h, w):
        out = _log_softmax(h, w, targets_T, lambda l_TV: l_TV.masked_fill(left_out_TV, -torch.inf))
        return _weighted(out[:1], upstream_3T)

    def ours(h, w):
        kept = (ids_N, offsets.to(targets_T.device))
        return _weighted(r1kernels.linear_logp(h, w, targets_T, kept=kept)[:1], upstream_3T)

    return _compared("kept", problem, rows, eager, ours)


def _no_worse(name: str, value: Tensor, eager: Tensor, truth: Tensor) -> float:
    error, theirs = relative_error(value, truth), relative_error(eager, truth)
    bound = 2 * theirs + 4 * 2.0**-23
    assert error <= bound, f"{name}: error {error:.2e}, eager's {theirs:.2e}, allowed {bound:.2e}"
    return error


def beyond_int32(device: str, T: int, D: int, V: int, workspace_mb: int) -> dict:
    """Offsets past 2^31 in one chunk's [C, V]: last rows equal those computed alone, in a chunk
    of their own, up to rounding. Logits stored whole: the same, forward and in place.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    problem = problems.build(Shape(T=T, D=D, V=V, S=T // 4), str(dtype)[6:], device=device, drawn=T)
    tail = slice(T - 64, T)
    hidden_TD, weight_VD = leaves(problem, "forward_backward")
    out = _loss(problem, hidden_TD, weight_VD, workspace_mb=workspace_mb)
    out.loss.backward()
    errors = {"logp": relative_error(out.logp[tail], problem["truth_logp"][tail])}
    g_T, _ = problems.upstream(
        problem, "forward_backward", "policy", problem["truth_logp"], problem["truth_entropy"]
    )
    wide_VD = problem["weight"].double()
    p_RV = (problem["hidden"][tail].double() @ wide_VD.T).softmax(-1)
    at_R1 = problem["targets"][tail].unsqueeze(1)
    p_RV.scatter_add_(1, at_R1, -torch.ones_like(at_R1, dtype=p_RV.dtype))
    truth_RD = -g_T[tail].unsqueeze(1) * (p_RV @ wide_VD)
    errors["dhidden"] = relative_error(hidden_TD.grad[tail], truth_RD)
    del out, p_RV, wide_VD

    logits_TV = problem["hidden"] @ problem["weight"].T
    exact_RV = logits_TV[tail].double().log_softmax(-1)
    exact_R = exact_RV.gather(1, at_R1).squeeze(1)
    logits_TV.requires_grad_()
    logp_T = r1kernels.token_logp(logits_TV, problem["targets"], inplace_backward=True).logp
    (dlogits_TV,) = torch.autograd.grad(logp_T.sum(), logits_TV)
    truth_RV = -exact_RV.exp()
    truth_RV.scatter_add_(1, at_R1, torch.ones_like(truth_RV[:, :1]))
    errors["token_logp"] = relative_error(logp_T.detach()[tail], exact_R)
    errors["dlogits"] = relative_error(dlogits_TV[tail], truth_RV)
    limits = {"logp": 1e-4, "dhidden": 1e-2, "token_logp": 1e-4, "dlogits": 1e-2}
    for name, limit in limits.items():
        # `not <=` so that NaN fails.
        assert errors[name] <= limit, f"{name} of the last rows: error {errors[name]:.1e}"
    return errors | {"elements": T * V}


def float32_accumulation(device: str, M: int, K: int, N: int) -> dict:
    """Products of 16-bit operands added into a float32 matrix in place: no copy, no rounding
    beyond float32's, across chunks.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).bfloat16()

    chunks = [(normal(K, M), normal(K, N)) for _ in range(3)]
    out_MN = torch.full((M, N), float("nan"), dtype=torch.float32, device=device)
    address = out_MN.data_ptr()
    watch = meter(device)
    accumulate(out_MN, chunks[0][0].T, chunks[0][1], True)
    _, peak_mib = watch.peak(
        lambda: [accumulate(out_MN, left.T, right, False) for left, right in chunks[1:]]
    )
    truth_MN = sum(left.double().T @ right.double() for left, right in chunks)
    error = relative_error(out_MN, truth_MN)
    assert out_MN.data_ptr() == address
    if device == "cuda":
        assert error <= 1e-5, f"error {error:.1e}: the sum was rounded to 16 bits"
        # A whole copy of the output would be M N 4 bytes; the library's scratch is smaller.
        assert peak_mib * MIB < M * N * 2, f"{peak_mib:.0f} MiB were allocated"
    return {"error": error, "peak_mib": peak_mib}


def memory_is_flat(device: str, D: int, V: int, tokens: tuple[int, ...], workspace_mb: int) -> dict:
    """Peak above the inputs of the fused loss stays below a formula in which only [T] vectors and
    the gradients grow with T, at every T.
    """
    watch = meter(device)
    out = {}
    for T in tokens:
        watch.release()
        problem = problems.build(
            Shape(T=T, D=D, V=V, S=T // 4), "bfloat16", device=device, drawn=T, truth=_no_truth(T)
        )
        hidden_TD, weight_VD = leaves(problem, "forward_backward")
        _loss(problem, hidden_TD, weight_VD, workspace_mb=workspace_mb).loss.backward()

        def step(hidden_TD=hidden_TD, weight_VD=weight_VD, problem=problem):
            hidden_TD.grad = weight_VD.grad = None
            _loss(problem, hidden_TD, weight_VD, workspace_mb=workspace_mb).loss.backward()

        hidden_TD.grad = weight_VD.grad = None
        _, peak_mib = watch.peak(step)
        out[T] = peak_mib
        limit = allowance_mib(T, D, V, workspace_mb)
        assert peak_mib <= limit, f"T={T}: {peak_mib:.0f} MiB, the formula gives {limit:.0f}"
    return out


def allowance_mib(T: int, D: int, V: int, workspace_mb: int) -> float:
    """MiB that the fused loss may take above its bfloat16 inputs: gradients in the inputs' dtype,
    one float32 dweight, the workspace with an eighth for scratch, 256 bytes of vectors a token.
    """
    gradients = 2 * (T * D + V * D) + 4 * V * D
    return gradients / MIB + 1.125 * workspace_mb + 256 * T / MIB


def _no_truth(T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stands for a truth that nothing is compared with: memory does not depend on it."""
    return torch.full((T,), -2.0).double(), torch.zeros(T).double(), torch.ones(T).double()


# What a problem is enough for; the others choose sizes of their own.
ON_A_PROBLEM = {
    check.__name__: check
    for check in (
        any_upstream,
        transforms,
        objectives,
        kept_sets,
        vector_ops,
        paths_agree,
        repeats,
    )
}
