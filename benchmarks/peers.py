"""The other libraries' heads, each called as its own documentation or trainer does.

Imports happen inside functions; a library that is absent or refuses is a reason in its row.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.problem import CLIP, streams
from benchmarks.provider import Missing, Provider, Result, from_logp, leaves

# What TRL 1.16's trainer passes (trl.trainer.utils needs more packages than the function does).
TRL_CHUNK = 32768
MODULES = {"liger-kernel": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}


def absent(package: str) -> bool:
    """Whether a package cannot even be found; importing one takes seconds."""
    return importlib.util.find_spec(MODULES.get(package, package)) is None


def load(package: str, module: str, name: str):
    """An attribute of a library's module. Raises Missing with the reason."""
    try:
        return getattr(importlib.import_module(module), name)
    # A broken installation may raise anything while it is imported.
    except Exception as error:
        raise Missing(f"{package} is not usable: {type(error).__name__}: {error}") from error


def _trl(problem: dict, mode: str) -> Callable:
    """TRL's chunked log-probabilities as its trainer calls them, and its clipped loss."""
    ChunkedLogProbFunction = load("trl", "trl.kernels", "ChunkedLogProbFunction")
    kept_T = streams(problem, mode)[2] > 0
    # On a GPU its trainer scores the rows of the mask alone, elsewhere every row.
    compact = kept_T.is_cuda

    def logp_and_entropy(hidden_TD, weight_VD, with_entropy):
        outputs = ("entropy",) if with_entropy else ()
        found = ChunkedLogProbFunction.apply(
            hidden_TD[kept_T] if compact else hidden_TD,
            weight_VD,
            None,
            problem["targets"][kept_T] if compact else problem["targets"],
            1.0,
            TRL_CHUNK,
            None,
            1.0,
            outputs,
        )[:2]
        if not compact:
            return found
        return tuple(x if x is None else x.new_zeros(kept_T.shape).masked_scatter(kept_T, x)
                     for x in found)  # fmt: skip

    return from_logp(problem, mode, logp_and_entropy)


def _liger(problem: dict, mode: str) -> Callable:
    """Liger's chunked GRPO loss with its defaults: a sequence a chunk, its mathematics compiled."""
    module = "liger_kernel.chunked_loss"
    LigerFusedLinearGRPOLoss = load("liger-kernel", module, "LigerFusedLinearGRPOLoss")
    LigerFusedLinearPPOBase = load(
        "liger-kernel", f"{module}.fused_linear_ppo", "LigerFusedLinearPPOBase"
    )
    if mode == "entropy":
        raise Missing("no entropy")
    hidden_TD, weight_VD = leaves(problem, mode)
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


def _liger_flce(accum_dtype: torch.dtype | None) -> Callable:
    def make(problem: dict, mode: str) -> Callable:
        """Liger's fused linear cross entropy: mean cross entropy alone."""
        loss_class = load("liger-kernel", "liger_kernel.transformers.fused_linear_cross_entropy",
                          "LigerFusedLinearCrossEntropyLoss")  # fmt: skip
        loss_fn = loss_class(accum_dtype=accum_dtype)
        return _cross_entropy(problem, mode, lambda h, w, y: loss_fn(w, h, y))

    return make


def _liger_scaled(implementation: str) -> Callable:
    def make(problem: dict, mode: str) -> Callable:
        """Liger's per-token scaled cross entropy, by the implementation named."""
        ops = "liger_kernel.ops"
        fallback = f"{ops}.fused_linear_scaled_cross_entropy"
        module, name = {
            "sm90": (f"{ops}.cutedsl.ops.fused_scaled_cross_entropy_sm90",
                     "LigerFusedScaledCrossEntropySM90Function"),
            "cutile": (f"{ops}.cutile.ops.fused_linear_scaled_cross_entropy",
                       "LigerFusedLinearScaledCrossEntropyFunction"),
            "torch": (fallback, "_FusedLinearPPOFallbackFunction"),
        }[implementation]  # fmt: skip
        function = load("liger-kernel", module, name)
        # The tiles of a cluster are an argument of all but the plain torch version.
        extra = () if implementation == "torch" else (1,)

        def logp_and_entropy(hidden_TD, weight_VD, with_entropy):
            out = function.apply(
                hidden_TD, weight_VD, problem["targets"], 1.0, -100, *extra, with_entropy
            )
            return (-out[0], out[1]) if with_entropy else (-out, None)

        return from_logp(problem, mode, logp_and_entropy)

    return make


def _cce(filter_eps: str | None) -> Callable:
    def make(problem: dict, mode: str) -> Callable:
        """Cut cross entropy per token; `filter_eps` None keeps every gradient tile."""
        if mode == "entropy":
            raise Missing("no entropy")
        function = load("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy")
        mask_T = streams(problem, mode)[2]
        targets_T = torch.where(mask_T > 0, problem["targets"], -100)

        def logp_and_entropy(hidden_TD, weight_VD, with_entropy):
            nll_T = function(
                hidden_TD, weight_VD, targets_T, reduction="none", filter_eps=filter_eps
            )
            return -nll_T.float(), None

        return from_logp(problem, mode, logp_and_entropy)

    return make


def _verl(problem: dict, mode: str) -> Callable:
    """verl's Triton head, which always returns the entropy too."""
    name = "linear_cross_entropy"
    function = load("verl", f"verl.utils.kernel.{name}", name)

    def logp_and_entropy(hidden_TD, weight_VD, with_entropy):
        return function(hidden_TD, weight_VD, problem["targets"], 1.0, "none")

    return from_logp(problem, mode, logp_and_entropy)


def _torch_lce(problem: dict, mode: str) -> Callable:
    """torch's chunked linear_cross_entropy: the mean cross entropy alone."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Missing(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    function = functools.partial(F.linear_cross_entropy, options=options)
    return _cross_entropy(problem, mode, function)


def _cross_entropy(problem: dict, mode: str, function: Callable) -> Callable:
    """One iteration of a mean cross entropy: no ratio, no clipping, no per-token output."""
    hidden_TD, weight_VD = leaves(problem, mode)
    mask_T = streams(problem, mode)[2]
    targets_T = torch.where(mask_T > 0, problem["targets"], -100)

    def run() -> Result:
        hidden_TD.grad = weight_VD.grad = None
        function(hidden_TD, weight_VD, targets_T).backward()
        return Result(None, hidden_TD.grad, weight_VD.grad)

    return run


CE = {
    "modes": ("forward_backward",),
    "objective": "ce",
    "note": "cross entropy only: less work than a policy loss",
}
LIGER = {"package": "liger-kernel", "family": "liger"}
CUT = {"package": "cut-cross-entropy", "family": "cce", "suites": ("gpu",)}
PEERS = (
    Provider("trl", _trl, package="trl", family="trl", slowness=2.5),
    Provider("liger", _liger, slowness=12.0, **LIGER),
    Provider("liger_flce", _liger_flce(None), suites=("gpu",), slowness=3.0, **LIGER, **CE),
    Provider(
        "liger_flce_fp32", _liger_flce(torch.float32), suites=("gpu",), slowness=3.0, **LIGER, **CE
    ),
    Provider("liger_sm90", _liger_scaled("sm90"), suites=("gpu",), slowness=1.5, **LIGER),
    Provider("liger_cutile", _liger_scaled("cutile"), suites=("gpu",), slowness=1.8, **LIGER),
    Provider("liger_torch", _liger_scaled("torch"), suites=("gpu",), slowness=3.5, **LIGER),
    Provider("cce", _cce("high"), slowness=2.5, note="drops small gradients", **CUT),
    Provider("cce_exact", _cce(None), slowness=4.0, **CUT),
    Provider("verl", _verl, package="verl", family="verl", suites=("gpu",), slowness=2.0),
    Provider("torch_lce", _torch_lce, slowness=2.0, **CE),
)
