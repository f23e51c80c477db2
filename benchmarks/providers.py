"""What is timed: every provider makes one iteration of a mode as a callable.

Imports of peers happen inside functions.
"""

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.problem import CLIP, MODES, clipped_loss, rows_with_coefficient, streams


class Missing(Exception):
    """A provider that is not installed, refuses the case or does not have the feature.

    The message is the reason.
    """


class Result(NamedTuple):
    logp: torch.Tensor | None
    dhidden: torch.Tensor | None
    dweight: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Provider:
    """`make(problem.

    Mode)` returns a callable without arguments that runs one iteration and returns a Result.
    """

    name: str
    make: Callable
    backend: str = "torch"
    package: str = "torch"
    modes: tuple[str, ...] = MODES
    objective: str = "policy"
    compiles: bool = False
    logit_copies: int = 0
    is_ours: bool = False
    is_floor: bool = False
    note: str = ""

    def op(self, mode: str) -> str:
        if self.objective == "ce":
            return "linear_cross_entropy"
        return "linear_logp" if mode in ("forward", "frozen") else "linear_policy_loss"


def _leaves(problem: dict, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    trains = mode != "forward"
    hidden_TD = problem["hidden"].detach().requires_grad_(trains)
    weight_VD = problem["weight"].detach().requires_grad_(trains and mode != "frozen")
    return hidden_TD, weight_VD


def _from_logp(
    problem: dict, mode: str, logp_and_entropy: Callable, loss_fn: Callable = clipped_loss
) -> Callable:
    """One iteration of a mode for a provider that gives differentiable (logp.

    Entropy) of every token.
    """
    hidden_TD, weight_VD = _leaves(problem, mode)
    advantages_B, logp_old_T, mask_T, entropy_coef = streams(problem, mode)

    def run() -> Result:
        hidden_TD.grad = weight_VD.grad = None
        with contextlib.nullcontext() if mode != "forward" else torch.no_grad():
            logp_T, entropy_T = logp_and_entropy(hidden_TD, weight_VD, entropy_coef != 0)
        if mode != "forward":
            loss_fn(logp_T, entropy_T, advantages_B, logp_old_T, mask_T, entropy_coef).backward()
        return Result(logp_T.detach(), hidden_TD.grad, weight_VD.grad)

    return run


def _ours(backend: str) -> Callable:
    def make(problem: dict, mode: str) -> Callable:
        import r1kernels

        hidden_TD, weight_VD = _leaves(problem, mode)
        targets_T = problem["targets"]
        advantages_B, logp_old_T, mask_T, entropy_coef = streams(problem, mode)
        T, B = len(targets_T), len(advantages_B)
        cu_seqlens = torch.arange(0, T + 1, T // B, dtype=torch.int32)

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
                        advantages_B,
                        objective,
                        prior=logp_old_T,
                        logp_old=logp_old_T,
                        mask=mask_T,
                        cu_seqlens=cu_seqlens,
                    )
                out.loss.backward()
            return Result(out.logp, hidden_TD.grad, weight_VD.grad)

        return run

    return make


def chunk_rows(weight_VD: torch.Tensor) -> int | None:
    """Rows of the native backend's chunks: the floor multiplies the same ones.

    None where it is not built.
    """
    try:
        native = importlib.import_module("r1kernels._native.linear_logp")
        head = importlib.import_module("r1kernels.chunked_head")
    except ImportError:
        return None
    return head.chunk_rows(native.HeadChunk, head.Head(weight_VD, None, 0.0, 1.0), None)


def _floor(whole: bool) -> Callable:
    def make(problem: dict, mode: str) -> Callable:
        """Bare torch.mm into preallocated outputs: what no implementation of the mode can do
        without.

        bfloat16 products are rounded to bfloat16 and dweight is summed in float32, as torch has no
        CPU product with float32 output.
        """
        kept_T = streams(problem, mode)[2] > 0
        active_T = rows_with_coefficient(problem, mode)[kept_T]
        hidden_KD, weight_VD = problem["hidden"][kept_T], problem["weight"]
        K, D = hidden_KD.shape
        V = weight_VD.shape[0]
        C = K if whole else min(K, chunk_rows(weight_VD) or K)
        logits_CV = hidden_KD.new_empty(C, V)
        dhidden_KD = torch.empty_like(hidden_KD)
        dweight_VD = torch.empty(V, D, dtype=torch.float32)
        product_VD = torch.empty_like(weight_VD) if weight_VD.dtype != torch.float32 else dweight_VD
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
                    logits_VA = logits_CV[:A].T
                    if weight_VD.dtype != torch.float32:
                        torch.mm(logits_VA, active_AD, out=product_VD)
                        dweight_VD.copy_(product_VD) if i == 0 else dweight_VD.add_(product_VD)
                    elif i == 0:
                        torch.mm(logits_VA, active_AD, out=dweight_VD)
                    else:
                        dweight_VD.addmm_(logits_VA, active_AD)
                done += A
            return Result(None, None, None)

        return run

    return make


def _eager_logp(targets_T: torch.Tensor) -> Callable:
    def logp_and_entropy(hidden_TD, weight_VD, with_entropy):
        logits_TV = (hidden_TD @ weight_VD.T).float()
        logp_T = -F.cross_entropy(logits_TV, targets_T, reduction="none")
        entropy_T = None
        if with_entropy:
            logp_TV = logits_TV.log_softmax(-1)
            entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
        return logp_T, entropy_T

    return logp_and_entropy


def _eager(problem: dict, mode: str) -> Callable:
    return _from_logp(problem, mode, _eager_logp(problem["targets"]))


def _compiled(problem: dict, mode: str) -> Callable:
    logp = _eager_logp(problem["targets"])

    def whole(hidden_TD, weight_VD, advantages_B, logp_old_T, mask_T, entropy_coef):
        logp_T, entropy_T = logp(hidden_TD, weight_VD, entropy_coef != 0)
        return clipped_loss(
            logp_T, entropy_T, advantages_B, logp_old_T, mask_T, entropy_coef
        ), logp_T

    if mode == "forward":
        return _from_logp(problem, mode, torch.compile(logp, dynamic=False))
    compiled = torch.compile(whole, dynamic=False)
    hidden_TD, weight_VD = _leaves(problem, mode)
    args = streams(problem, mode)

    def run() -> Result:
        hidden_TD.grad = weight_VD.grad = None
        loss, logp_T = compiled(hidden_TD, weight_VD, *args)
        loss.backward()
        return Result(logp_T.detach(), hidden_TD.grad, weight_VD.grad)

    return run


def _trl(problem: dict, mode: str) -> Callable:
    """TRL's chunked log-probabilities as its trainer calls them on a CPU, and its clipped loss."""
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    except ImportError as error:
        raise Missing(f"trl is not usable: {error}") from error

    def logp_and_entropy(hidden_TD, weight_VD, with_entropy):
        outputs = ("entropy",) if with_entropy else ()
        return ChunkedLogProbFunction.apply(
            hidden_TD,
            weight_VD,
            None,
            problem["targets"],
            1.0,
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            None,
            1.0,
            outputs,
        )[:2]

    return _from_logp(problem, mode, logp_and_entropy)


def _liger(problem: dict, mode: str) -> Callable:
    """Liger's chunked GRPO loss with its defaults: one sequence per chunk.

    Loss mathematics compiled.
    """
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
        from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
    except ImportError as error:
        raise Missing(f"liger-kernel is not usable: {error}") from error
    if mode == "entropy":
        raise Missing("no entropy")
    hidden_TD, weight_VD = _leaves(problem, mode)
    advantages_B, logp_old_T, mask_T, _ = streams(problem, mode)
    B = len(advantages_B)
    targets_BS, logp_old_BS, mask_BS = (
        x.view(B, -1) for x in (problem["targets"], logp_old_T, mask_T)
    )
    hidden_BSD = hidden_TD.view(B, -1, hidden_TD.shape[1])
    if mode == "forward":

        def run_forward() -> Result:
            with torch.no_grad():
                logp_BS = LigerFusedLinearPPOBase.chunk_forward(hidden_BSD, weight_VD, targets_BS)
            return Result(logp_BS.flatten(), None, None)

        return run_forward
    loss_fn = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="bnpo"
    )

    # The loss mathematics is compiled on first use and depends on [B, S] alone: compile it on a
    # head of width 8.
    small_BSD, small_VD = (
        x.detach()[..., :8].clone().requires_grad_() for x in (hidden_BSD, weight_VD[:8])
    )
    small = loss_fn(
        small_BSD, small_VD, targets_BS % 8, mask_BS, advantages_B, old_per_token_logps=logp_old_BS
    )
    small[0].backward()

    def run() -> Result:
        hidden_TD.grad = weight_VD.grad = None
        hidden_BSD = hidden_TD.view(B, -1, hidden_TD.shape[1])
        loss, _ = loss_fn(
            hidden_BSD,
            weight_VD,
            targets_BS,
            mask_BS,
            advantages_B,
            old_per_token_logps=logp_old_BS,
        )
        loss.backward()
        return Result(None, hidden_TD.grad, weight_VD.grad)

    return run


def _linear_cross_entropy(problem: dict, mode: str) -> Callable:
    """torch's chunked linear_cross_entropy: the mean cross entropy alone, no ratio, no clipping.

    No per-token output.
    """
    if not hasattr(F, "linear_cross_entropy"):
        raise Missing(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    hidden_TD, weight_VD = _leaves(problem, mode)
    mask_T = streams(problem, mode)[2]
    targets_T = torch.where(mask_T > 0, problem["targets"], -100)

    def run() -> Result:
        hidden_TD.grad = weight_VD.grad = None
        F.linear_cross_entropy(hidden_TD, weight_VD, targets_T, options=options).backward()
        return Result(None, hidden_TD.grad, weight_VD.grad)

    return run


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("floor", _floor(whole=False), is_floor=True, note="bare GEMMs in our row chunks"),
        Provider(
            "floor_whole", _floor(whole=True), is_floor=True, note="bare GEMMs, all rows at once"
        ),
        Provider("native", _ours("native"), "native", "r1kernels", is_ours=True),
        Provider("reference", _ours("reference"), "reference", "r1kernels", is_ours=True),
        Provider("eager", _eager, logit_copies=4),
        Provider("compile", _compiled, "inductor", compiles=True, logit_copies=4),
        Provider("trl", _trl, package="trl"),
        Provider("liger", _liger, package="liger-kernel"),
        Provider(
            "torch_lce",
            _linear_cross_entropy,
            modes=("forward_backward",),
            objective="ce",
            note="cross entropy only: less work than a policy loss",
        ),
    )
}


def find(name: str) -> Provider:
    """A provider by name, or by `module:attribute` for one defined elsewhere."""
    if ":" in name:
        module, attribute = name.split(":")
        return getattr(importlib.import_module(module), attribute)
    if name not in PROVIDERS:
        raise ValueError(
            f"no provider {name!r}; there are {', '.join(PROVIDERS)}, or module:attribute"
        )
    return PROVIDERS[name]
