"""The logits-input op: log-probability and entropy of stored logits [T, V], and its gradient.

Bound by memory: the forward reads the logits once, the step reads them again and writes gradients,
over the logits where a provider can. The floor copies as many bytes.
"""

import functools
from collections.abc import Callable

import torch

from benchmarks.peers import load
from benchmarks.problem import CHUNK, relative_error
from benchmarks.provider import Missing, Provider
from benchmarks.shapes import Shape
from r1kernels.backend import refusal, use_backend

MODES = ("logits_forward", "logits_step")
# Passes over the logits that a mode cannot do without.
PASSES = {"logits_forward": 1, "logits_step": 3}
ROWS_CHECKED = 256


def build(shape: Shape, dtype: str, seed: int = 0, *, device: str = "cpu") -> dict:
    """Logits of which every other row has a likely target, targets, and upstream gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    small = torch.Generator().manual_seed(seed)
    T, V = shape.T, shape.V
    targets_T = torch.randint(V, (T,), generator=small)
    logits_TV = torch.empty(T, V, dtype=getattr(torch, dtype), device=device)
    for rows in torch.arange(T).split(1024):
        part = torch.randn(len(rows), V, generator=generator, device=device)
        logits_TV[rows[0] : rows[-1] + 1] = part * 1.5
    likely_T = torch.arange(T)[::2]
    logit_T = 8.0 + 18.0 * torch.rand(len(likely_T), generator=small)
    logits_TV[likely_T.to(device), targets_T[likely_T].to(device)] = logit_T.to(logits_TV)
    return {
        "shape": shape,
        "dtype": dtype,
        "source": logits_TV,
        "targets": targets_T.to(device),
        "dlogp": torch.randn(T, generator=small).to(device),
    }


def truth(problem: dict) -> dict:
    """logp and entropy of every row and dlogits of some, float64."""
    logits_TV, targets_T = problem["source"], problem["targets"]
    rows_R = torch.randperm(len(targets_T), generator=torch.Generator().manual_seed(1))
    rows_R = rows_R[:ROWS_CHECKED].sort().values.to(targets_T.device)
    logp, entropy = [], []
    for rows in torch.arange(len(targets_T), device=targets_T.device).split(CHUNK):
        l_CV = logits_TV[rows].double()
        at_C1 = targets_T[rows].unsqueeze(1)
        logp_CV = l_CV - l_CV.logsumexp(-1, keepdim=True)
        p_CV = logp_CV.exp()
        entropy.append(-(p_CV * logp_CV).sum(-1))
        rest_C = p_CV.scatter_(1, at_C1, 0.0).sum(-1)
        logp.append(
            torch.where(rest_C < 0.5, torch.log1p(-rest_C), logp_CV.gather(1, at_C1).squeeze(1))
        )
    logp_T = torch.cat(logp)
    p_RV = logits_TV[rows_R].double().softmax(-1)
    dlogits_RV = -problem["dlogp"][rows_R].double().unsqueeze(1) * p_RV
    target_R1 = targets_T[rows_R].unsqueeze(1)
    at_target_R = problem["dlogp"][rows_R].double() * -torch.expm1(logp_T[rows_R])
    dlogits_RV.scatter_(1, target_R1, at_target_R.unsqueeze(1))
    return {
        "logp": logp_T,
        "entropy": torch.cat(entropy),
        "rows": rows_R,
        "dlogits": dlogits_RV,
    }


def errors(problem: dict, truth: dict, logp_T, entropy_T, dlogits_TV) -> dict:
    """Relative errors against float64; None for what the provider does not return."""
    near_T = truth["logp"] > -0.01
    return {
        "logp": relative_error(logp_T, truth["logp"]),
        "logp_near_one": relative_error(logp_T[near_T], truth["logp"][near_T])
        if near_T.any()
        else None,
        "entropy": relative_error(entropy_T, truth["entropy"]),
        "dlogits": None
        if dlogits_TV is None
        else relative_error(dlogits_TV[truth["rows"]], truth["dlogits"]),
    }


def eager_errors(problem: dict, mode: str, truth: dict) -> dict:
    """Errors of plain torch, a chunk of rows at a time."""
    logp, entropy = [], []
    targets_T = problem["targets"]
    for rows in torch.arange(len(targets_T), device=targets_T.device).split(CHUNK):
        logp_C, entropy_C = _eager_logp(problem["source"][rows], targets_T[rows])
        logp.append(logp_C)
        entropy.append(entropy_C)
    out = errors(problem, truth, torch.cat(logp), torch.cat(entropy), None)
    if mode == "logits_step":
        rows = truth["rows"]
        leaf = problem["source"][rows].requires_grad_()
        _eager_logp(leaf, targets_T[rows])[0].backward(problem["dlogp"][rows])
        out["dlogits"] = relative_error(leaf.grad, truth["dlogits"])
    return out


def _eager_logp(logits_TV, targets_T):
    logp_TV = logits_TV.float().log_softmax(-1)
    logp_T = logp_TV.gather(1, targets_T.unsqueeze(1)).squeeze(1)
    return logp_T, -(logp_TV.detach().exp() * logp_TV.detach()).sum(-1)


def _step(problem: dict, mode: str, function: Callable, inplace: bool) -> Callable:
    """One iteration: `function(logits, targets)` gives (logp, entropy)."""
    source_TV, targets_T, dlogp_T = (problem[k] for k in ("source", "targets", "dlogp"))
    # A backward that writes over its input gets a copy, restored before each iteration, untimed.
    logits_TV = source_TV.clone() if inplace else source_TV.detach()
    logits_TV.requires_grad_(mode == "logits_step")

    def run():
        dlogits_TV = None
        with torch.set_grad_enabled(mode == "logits_step"):
            logp_T, entropy_T = function(logits_TV, targets_T)
        if mode == "logits_step":
            # A leaf's .grad would be a copy where the gradient lies in the leaf's own memory.
            (dlogits_TV,) = torch.autograd.grad(logp_T, logits_TV, dlogp_T.to(logp_T))
        return logp_T.detach(), entropy_T.detach(), dlogits_TV

    def before():
        with torch.no_grad():
            logits_TV.copy_(source_TV)

    if inplace:
        run.before = before
    return run


def _ours(backend: str) -> Callable:
    def make(problem: dict, mode: str) -> Callable:
        import r1kernels

        reason = refusal("token_logp", backend, problem["source"])
        if reason:
            raise Missing(reason)
        inplace = mode == "logits_step"

        def function(logits_TV, targets_T):
            out = r1kernels.token_logp(logits_TV, targets_T, entropy=True, inplace_backward=inplace)
            return out.logp, out.entropy

        inner = _step(problem, mode, function, inplace)

        def run():
            with use_backend(backend):
                return inner()

        if inplace:
            run.before = inner.before
        return run

    return make


def _floor(problem: dict, mode: str) -> Callable:
    source_TV = problem["source"]
    T = len(source_TV)
    target_TV = torch.empty_like(source_TV)

    def run():
        # A copy of n rows moves 2n; the last half makes one pass more or the only one.
        if PASSES[mode] == 3:
            target_TV.copy_(source_TV)
        target_TV[: T // 2].copy_(source_TV[: T // 2])
        return None, None, None

    return run


def _eager(problem: dict, mode: str) -> Callable:
    return _step(problem, mode, _eager_logp, False)


@functools.cache
def _compiled_logp() -> Callable:
    return torch.compile(_eager_logp, dynamic=False)


def _compiled(problem: dict, mode: str) -> Callable:
    return _step(problem, mode, _compiled_logp(), False)


def _trl(problem: dict, mode: str) -> Callable:
    function = load("trl", "trl.kernels", "selective_log_softmax_and_entropy")
    if problem["source"].device.type != "cuda":
        raise Missing("its Triton kernel needs a GPU")
    return _step(problem, mode, function, False)


def _provider(name: str, make: Callable, family: str, **rest) -> Provider:
    return Provider(name, make, modes=MODES, family=family, **rest)


LOGITS_PROVIDERS = {
    provider.name: provider
    for provider in (
        _provider("floor", _floor, "torch", is_floor=True, note="a copy of as many bytes"),
        *(
            _provider(b, _ours(b), b, backend=b, package="r1kernels", is_ours=True)
            for b in ("native", "triton", "cuda", "reference")
        ),
        _provider("eager", _eager, "torch"),
        _provider("compile", _compiled, "compile", backend="inductor"),
        _provider("trl", _trl, "trl", package="trl"),
    )
}
