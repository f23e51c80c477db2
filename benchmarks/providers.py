"""What is timed: every provider makes one iteration of a mode as a callable.

Here the bare GEMMs, ours and torch's own; `peers.py` has the other libraries.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.peers import PEERS
from benchmarks.problem import CLIP, clipped_loss, rows_with_coefficient, streams
from benchmarks.provider import Missing, Provider, Result, from_logp, leaves
from r1kernels.backend import refusal


def _ours(backend: str) -> Callable:
    def make(problem: dict, mode: str) -> Callable:
        import r1kernels

        hidden_TD, weight_VD = leaves(problem, mode)
        reason = refusal("linear_logp", backend, hidden_TD, weight_VD)
        if reason:
            raise Missing(reason)
        advantages_B, logp_old_T, mask_T, entropy_coef = streams(problem, mode)
        T, B = len(mask_T), len(advantages_B)
        # A trainer has these on the host before it has them on a device: then nothing is read back,
        # and rows of advantage 0 are known beforehand.
        targets_T, host_mask_T, host_advantages_B = (
            x.cpu() for x in (problem["targets"], mask_T, advantages_B)
        )
        host_cu_seqlens = torch.arange(0, T + 1, T // B, dtype=torch.int32)
        cu_seqlens = host_cu_seqlens.to(mask_T.device)

        if mode == "forward":

            def run_forward() -> Result:
                with torch.no_grad(), r1kernels.use_backend(backend):
                    logp_T = r1kernels.linear_logp(
                        hidden_TD, weight_VD, targets_T, prior=logp_old_T
                    ).logp
                return Result(logp_T, None, None)

            return run_forward
        objective = r1kernels.PolicyObjective(
            clip_low=CLIP, clip_high=CLIP, aggregation="token_mean", entropy_coef=entropy_coef
        )

        def run() -> Result:
            hidden_TD.grad = weight_VD.grad = None
            with r1kernels.use_backend(backend):
                if mode == "frozen":
                    logp_T = r1kernels.linear_logp(
                        hidden_TD, weight_VD, targets_T, prior=logp_old_T
                    ).logp
                    out = r1kernels.policy_loss(
                        logp_T,
                        advantages_B,
                        objective,
                        logp_old=logp_old_T,
                        mask=mask_T,
                        cu_seqlens=cu_seqlens,
                    )
                else:
                    out = r1kernels.linear_policy_loss(
                        hidden_TD,
                        weight_VD,
                        targets_T,
                        host_advantages_B,
                        objective,
                        prior=logp_old_T,
                        logp_old=logp_old_T,
                        mask=host_mask_T,
                        cu_seqlens=host_cu_seqlens,
                    )
                out.loss.backward()
            return Result(out.logp, hidden_TD.grad, weight_VD.grad)

        return run

    return make


def _invariant(make: Callable) -> Callable:
    """The same under batch_invariant."""

    def make_invariant(problem: dict, mode: str) -> Callable:
        import r1kernels

        plain = make(problem, mode)

        def run() -> Result:
            with r1kernels.batch_invariant():
                return plain()

        return run

    return make_invariant


def chunk_rows(weight_VD: torch.Tensor) -> int | None:
    """Rows of our default backend's chunks: the floor multiplies the same ones.

    None where it is not built.
    """
    folder = "_triton" if weight_VD.is_cuda else "_native"
    try:
        backend = importlib.import_module(f"r1kernels.{folder}.linear_logp")
        head = importlib.import_module("r1kernels.chunked_head")
    except ImportError:
        return None
    return head.chunk_rows(backend.HeadChunk, head.Head(weight_VD, None, 0.0, 1.0), None)


def accumulate(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool) -> None:
    """out (float32) = or += left @ right in float32, by the fastest product the library has."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out) if first else out.addmm_(left, right)
    elif not left.is_cuda:
        # A CPU rounds the product to the operands' dtype: it has none with a float32 result.
        product = left @ right
        out.copy_(product) if first else out.add_(product)
    elif first:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)


def _floor(whole: bool) -> Callable:
    def make(problem: dict, mode: str) -> Callable:
        """Bare products into preallocated outputs: what no implementation of the mode can do
        without.

        Logits and dhidden have the inputs' dtype, dweight is summed in float32.
        """
        kept_T = streams(problem, mode)[2] > 0
        active_T = rows_with_coefficient(problem, mode)[kept_T]
        hidden_KD, weight_VD = problem["hidden"][kept_T], problem["weight"]
        K = len(hidden_KD)
        C = K if whole else min(K, chunk_rows(weight_VD) or K)
        logits_CV = hidden_KD.new_empty(C, len(weight_VD))
        dhidden_KD = torch.empty_like(hidden_KD)
        dweight_VD = torch.empty_like(weight_VD, dtype=torch.float32)
        chunks = []
        for start in range(0, K, C):
            rows_C = active_T[start : start + C].nonzero().squeeze(1)
            hidden_CD = hidden_KD[start : start + C]
            chunks.append((hidden_CD, hidden_CD[rows_C], len(rows_C)))
        gradients = {"forward": 0, "frozen": 1}.get(mode, 2)

        def run() -> Result:
            done = 0
            for i, (hidden_CD, active_AD, A) in enumerate(chunks):
                torch.mm(hidden_CD, weight_VD.T, out=logits_CV[: len(hidden_CD)])
                if gradients:
                    torch.mm(logits_CV[:A], weight_VD, out=dhidden_KD[done : done + A])
                if gradients == 2:
                    accumulate(dweight_VD, logits_CV[:A].T, active_AD, i == 0)
                done += A
            return Result(None, None, None)

        return run

    return make


def eager_logp(targets_T, hidden_TD, weight_VD, with_entropy):
    """(logp, entropy or None) [T] as written by hand: logits in the inputs' dtype."""
    logits_TV = (hidden_TD @ weight_VD.T).float()
    logp_T = -F.cross_entropy(logits_TV, targets_T, reduction="none")
    entropy_T = None
    if with_entropy:
        logp_TV = logits_TV.log_softmax(-1)
        entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    return logp_T, entropy_T


def _eager(problem: dict, mode: str) -> Callable:
    return from_logp(problem, mode, functools.partial(eager_logp, problem["targets"]))


def _compiled(problem: dict, mode: str) -> Callable:
    # Every mode and shape is a graph of its own.
    torch._dynamo.config.recompile_limit = 1000
    hidden_TD, weight_VD = leaves(problem, mode)
    if mode == "forward":
        logp = _compiled_logp(problem["targets"])
        return from_logp(problem, mode, logp)
    compiled = _compiled_loss()
    args = (problem["targets"], *streams(problem, mode))

    def run() -> Result:
        hidden_TD.grad = weight_VD.grad = None
        loss, logp_T = compiled(hidden_TD, weight_VD, *args)
        loss.backward()
        return Result(logp_T.detach(), hidden_TD.grad, weight_VD.grad)

    return run


def _compiled_logp(targets_T: torch.Tensor) -> Callable:
    def logp_and_entropy(hidden_TD, weight_VD, with_entropy):
        return _compiled_eager()(targets_T, hidden_TD, weight_VD, with_entropy)

    return logp_and_entropy


@functools.cache
def _compiled_eager() -> Callable:
    return torch.compile(eager_logp, dynamic=False)


@functools.cache
def _compiled_loss() -> Callable:
    def whole(hidden_TD, weight_VD, targets_T, advantages_B, logp_old_T, mask_T, entropy_coef):
        logp_T, entropy_T = eager_logp(targets_T, hidden_TD, weight_VD, entropy_coef != 0)
        loss = clipped_loss(logp_T, entropy_T, advantages_B, logp_old_T, mask_T, entropy_coef)
        return loss, logp_T

    return torch.compile(whole, dynamic=False)


def variants() -> list[str]:
    """Triton's products for this GPU beside those that run by themselves, as providers.

    "triton@counted" multiplies rows that the device lists, the others have another GEMM 1.
    """
    try:
        configs = importlib.import_module("r1kernels._triton.head_configs")
        common = importlib.import_module("r1kernels._triton.common")
    except ImportError:
        return []
    arch = common.architecture(torch.device("cuda")) if torch.cuda.is_available() else 0
    names = [k for k, v in configs.VARIANTS.items() if arch in v and k != configs.CHOICE.get(arch)]
    names += [] if configs.COUNTED.get(arch) else ["counted"]
    return [f"triton@{name}" for name in names]


def _variant(name: str) -> Callable:
    """Ours by Triton with another table entry than the chosen one, for the time of an iteration."""

    def make(problem: dict, mode: str) -> Callable:
        configs = importlib.import_module("r1kernels._triton.head_configs")
        common = importlib.import_module("r1kernels._triton.common")
        arch = common.architecture(problem["hidden"].device)
        counted = name == "counted"
        table, entry = (configs.COUNTED, True) if counted else (configs.CHOICE, name)
        with mock.patch.dict(table, {arch: entry}):
            run = _ours("triton")(problem, mode)

        def run_variant() -> Result:
            with mock.patch.dict(table, {arch: entry}):
                return run()

        return run_variant

    return make


def _ours_provider(backend: str, suites: tuple[str, ...]) -> Provider:
    return Provider(
        backend,
        _ours(backend),
        backend,
        "r1kernels",
        suites=suites,
        family=backend,
        slowness=1.2,
        is_ours=True,
    )


def _invariant_provider(backend: str, suites: tuple[str, ...]) -> Provider:
    return dataclasses.replace(
        _ours_provider(backend, suites),
        name=f"{backend}_invariant",
        make=_invariant(_ours(backend)),
        modes=("forward", "forward_backward"),
        note="under batch_invariant",
    )


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            "floor",
            _floor(whole=False),
            slowness=1.0,
            is_floor=True,
            note="bare GEMMs in our row chunks",
        ),
        Provider(
            "floor_whole",
            _floor(whole=True),
            slowness=1.0,
            is_floor=True,
            note="bare GEMMs, all rows at once",
        ),
        _ours_provider("native", ("cpu",)),
        _invariant_provider("native", ("cpu",)),
        _ours_provider("triton", ("gpu",)),
        _invariant_provider("triton", ("gpu",)),
        _ours_provider("cuda", ("gpu",)),
        _ours_provider("reference", ()),
        Provider("eager", _eager, logit_copies=4),
        Provider("compile", _compiled, "inductor", family="compile", compiles=True, logit_copies=4),
        *PEERS,
    )
}


def find(name: str) -> Provider:
    """A provider by name, by `triton@variant`, or by `module:attribute` if defined elsewhere."""
    if ":" in name:
        module, attribute = name.split(":")
        return getattr(importlib.import_module(module), attribute)
    if name.startswith("triton@"):
        make = _variant(name.removeprefix("triton@"))
        return dataclasses.replace(PROVIDERS["triton"], name=name, make=make)
    if name not in PROVIDERS:
        raise ValueError(
            f"no provider {name!r}; there are {', '.join(PROVIDERS)}, or module:attribute"
        )
    return PROVIDERS[name]
