"""Liger's fused linear GRPO loss."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from r1kernels.check import IGNORE, choice
from r1kernels.linear_logp import linear_logp
from r1kernels.linear_policy_loss import linear_policy_loss
from r1kernels.objective import PolicyObjective

AGGREGATION = {
    "grpo": "seq_mean_token_mean",
    "sapo": "seq_mean_token_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "vespo": "token_mean",
    "dr_grpo": "seq_mean_token_sum_norm",
    "luspo": "seq_mean_token_sum",
}


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """(loss, metrics) of a policy-gradient objective from hidden states, gradients included.

    The options are those of liger-kernel 0.8.5; here they become a `PolicyObjective`. compiled and
    chunk_size have no effect. Refused, with a ValueError that says so: loss_type "luspo" other than
    with sequence ratios and without KL, because there the original averages padding; epsilon_high
    below 1 for "cispo", where it is the cap of the ratio; delta below 1. "vespo" needs every
    log-probability of a sequence before the first coefficient, and takes one more forward.
    Log-ratios are clamped to +-20, which the original does for "vespo" alone.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        for name, value in list(locals().items()):
            if name not in ("self", "__class__"):
                setattr(self, name, value)
        self.objective(self.beta)

    def objective(self, kl_coef: float) -> PolicyObjective:
        """The objective that the options describe; they may change between calls.

        Raises: ValueError on an option that has no counterpart.
        """
        choice("loss_type", self.loss_type, tuple(AGGREGATION))
        level = self.importance_sampling_level
        choice("importance_sampling_level", level, ("token", "sequence"))
        if level == "sequence" and self.loss_type in ("cispo", "sapo", "vespo"):
            raise ValueError(
                f"importance_sampling_level 'sequence' is not for loss_type {self.loss_type!r}"
            )
        if self.loss_type == "luspo" and (level == "token" or kl_coef):
            raise ValueError(
                "loss_type 'luspo' needs importance_sampling_level='sequence' and beta=0, got "
                f"{level!r} and {self.beta}: otherwise Liger averages over padding"
            )
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length must be given for loss_type 'dr_grpo'")
        options = {}
        if self.loss_type == "cispo":
            if self.epsilon_high < 1:
                raise ValueError(
                    "epsilon_high caps the ratio of loss_type 'cispo' and must be at least 1, "
                    f"got {self.epsilon_high}"
                )
            options = {"surrogate": "cispo", "clip_max": self.epsilon_high}
        elif self.loss_type == "sapo":
            heat = (self.sapo_temperature_pos, self.sapo_temperature_neg)
            options = {"surrogate": "sapo", "sapo_temperature": heat}
        elif self.loss_type == "vespo":
            options = {"surrogate": "reinforce"}
        else:
            # min(min(r, delta) A, clip(r) A): the lower of the two bounds holds A > 0, the upper
            # one A < 0.
            cap, delta = 1 + self.epsilon_high, self.delta
            if delta is not None and delta < 1:
                raise ValueError(f"delta must be at least 1, got {delta}")
            options = {
                "clip_low": self.epsilon_low,
                "clip_high": self.epsilon_high if delta is None else min(delta, cap) - 1,
                "clip_max": None if delta is None else max(delta, cap),
            }
        return PolicyObjective(
            ratio_level=level,
            kl_coef=kl_coef,
            kl_ratio_corrected=self.use_bias_correction_kl,
            aggregation=AGGREGATION[self.loss_type],
            length=self.max_completion_length if self.loss_type == "dr_grpo" else None,
            **options,
        )

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss, 0-d float32, and (mean KL if beta is not 0, share of clipped tokens).

        Args:
            _input: [B, S, D] hidden states, float32, bfloat16 or float16.
            lin_weight: [V, D]; bias: [V].
            selected_token_ids: [B, S] int64: the token that each position predicts.
            attention_mask: [B, S]: 1 where a token counts, else 0; what stands there is not read.
            advantages: [B].
            ref_per_token_logps, old_per_token_logps: [B, S]. Without old ones the ratio is 1.
            ref_input, ref_weight, ref_bias: the reference model's head, where it has no
                log-probabilities yet.
            vllm_is_ratio: [B], [B, 1] or [B, S], not below 0: multiplies the loss, not the KL; a
                factor of VESPO's sequence ratio.
            num_items_in_batch: the divisor of "dapo", "cispo" and "vespo", over all processes.

        Raises: ValueError as `objective`, and when use_ref_model has nothing to refer to.
        """
        B, S = attention_mask.shape
        mask = attention_mask.bool()
        targets = selected_token_ids.masked_fill(~mask, IGNORE)

        def logp(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            with torch.no_grad():
                weight = weight.to(hidden.dtype)
                return linear_logp(
                    hidden, weight, targets, bias=bias, temperature=self.temperature
                ).logp

        logp_ref = ref_per_token_logps if self.use_ref_model else None
        if self.use_ref_model and logp_ref is None:
            if ref_input is None:
                raise ValueError("use_ref_model needs ref_per_token_logps or ref_input")
            logp_ref = logp(ref_input, ref_weight, ref_bias)
        # Relative to itself a policy has no KL and no gradient of it.
        objective = self.objective(0.0 if logp_ref is None else self.beta)
        ratio = vllm_is_ratio
        if ratio is not None:
            ratio = ratio[:, None] if ratio.ndim == 1 else ratio
            if ratio.ndim != 2 or ratio.shape not in ((B, 1), (B, S)):
                raise ValueError(
                    f"vllm_is_ratio must be [{B}], [{B}, 1] or [{B}, {S}], "
                    f"got {list(vllm_is_ratio.shape)}"
                )
            if self.loss_type == "luspo" and ratio.shape[1] != 1:
                raise ValueError("vllm_is_ratio must be one per sequence for loss_type 'luspo'")
        if self.loss_type == "vespo":
            old = old_per_token_logps
            gap = 0.0 if old is None else logp(_input, lin_weight, bias) - old.float()
            ratio = self._gamma(torch.where(mask, gap, 0.0), mask, advantages, ratio)
        # Every surrogate is linear in |A|.
        scaled = advantages.float()[:, None] * (1.0 if ratio is None else ratio)
        out = linear_policy_loss(
            _input,
            lin_weight.to(_input.dtype),
            targets,
            scaled.expand(B, S),
            objective,
            bias=bias,
            temperature=self.temperature,
            logp_old=old_per_token_logps,
            logp_ref=logp_ref,
            mask=mask,
            normalizer=self._normalizer(mask, num_items_in_batch),
        )
        return out.loss, self._metrics(out.logp, mask, advantages, old_per_token_logps, logp_ref)

    def _gamma(
        self, log_ratio: Tensor, mask: Tensor, advantages: Tensor, ratio: Tensor | None
    ) -> Tensor:
        """VESPO's weight of a sequence [B, 1]: exp(lambda (1 - w)) w^k of its ratio w."""
        floor = math.log(1e-8)
        log_w = log_ratio.clamp(-20, 20).sum(1, keepdim=True)
        if ratio is not None:
            log_is = ratio.float().log().clamp(floor, 20)
            log_w = log_w + (log_is if log_is.shape[1] == 1 else log_is * mask).sum(1, keepdim=True)
        log_w = log_w.clamp(floor, 20)
        positive = advantages[:, None] >= 0
        k = torch.where(positive, self.vespo_k_pos, self.vespo_k_neg)
        rate = torch.where(positive, self.vespo_lambda_pos, self.vespo_lambda_neg).clamp(min=1e-4)
        return (rate + k * log_w - rate * log_w.exp()).exp()

    def _normalizer(self, mask: Tensor, count: float | Tensor | None) -> Tensor | None:
        if self.loss_type not in ("dapo", "cispo", "vespo"):
            return None
        spread = dist.is_available() and dist.is_initialized()
        if count is None:
            count = mask.sum().float()
            if spread:
                dist.all_reduce(count)
        count = torch.as_tensor(count, dtype=torch.float32, device=mask.device)
        return (count / (dist.get_world_size() if spread else 1)).clamp(min=1.0)

    def _metrics(
        self,
        logp: Tensor,
        mask: Tensor,
        advantages: Tensor,
        logp_old: Tensor | None,
        logp_ref: Tensor | None,
    ) -> tuple[Tensor, ...]:
        def clean(x: Tensor | None) -> Tensor:
            return logp if x is None else torch.where(mask, x.float(), 0.0)

        count = mask.sum().clamp(min=1)
        log_ratio = logp - clean(logp_old)
        if self.importance_sampling_level == "sequence":
            log_ratio = (log_ratio.sum(1) / mask.sum(1).clamp(min=1))[:, None]
        ratio = log_ratio.exp()
        positive, negative = advantages[:, None] > 0, advantages[:, None] < 0
        if self.loss_type == "cispo":
            clipped = positive & (ratio > self.epsilon_high)
        elif self.loss_type in ("sapo", "vespo"):
            clipped = torch.zeros_like(mask)
        else:
            clipped = (positive & (ratio > 1 + self.epsilon_high)) | (
                negative & (ratio < 1 - self.epsilon_low)
            )
        metrics = ((clipped & mask).sum() / count,)
        if self.beta == 0:
            return metrics
        gap = clean(logp_ref) - logp
        kl = (gap.expm1() - gap) * (ratio if self.use_bias_correction_kl else 1.0)
        return (torch.where(mask, kl, 0.0).sum() / count, *metrics)
