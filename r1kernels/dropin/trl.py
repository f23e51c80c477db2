"""TRL 1.16's chunked head, its fused head for models, and its functions of logits."""

import functools
import math
import sys
import types
from contextlib import nullcontext

import torch
from torch import Tensor

from r1kernels.check import IGNORE
from r1kernels.dropin.transformers import LMHead, backbone, compute_dtype, head_logp, head_of
from r1kernels.reference.token_logp import Logp
from r1kernels.token_logp import token_logp

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TOKEN_CHUNK_SIZE = 4096
VOCAB_CHUNK_SIZE = 32768

PerToken = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class ChunkedLogProbFunction:
    """(log-probabilities, entropy, log sum p^2, mean logit, is top-1) of a head's targets.

    Only `apply` exists. The first two are `linear_logp`'s, with gradients; the others have none.
    The last three cost a pass over the head where they are asked for: the mean logit none without
    softcap, the top-1 flag one over the rows that log-probability and entropy leave open.
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> PerToken:
        """Each [N] float32, the last bool; None where `outputs` does not name it.

        Args:
            hidden: [N, D] float32, bfloat16 or float16; cast to autocast's dtype where that is on.
            weight: [V, D]; bias: [V].
            targets: [N] int64; -100 gives zeros.
            temperature: > 0; final_logit_softcapping: > 0 or None; logit_scale: > 0.
            chunk_size: vocabulary entries at a time for the outputs after the second.

        Raises: ValueError on a trainable weight under ZeRO-3, which has gone again when the
            backward needs it; otherwise as `linear_logp`.
        """
        head = LMHead(weight, bias, final_logit_softcapping, logit_scale)
        return _per_token(hidden, head, targets, temperature, chunk_size, outputs)


def add_fused_lm_head(
    model: torch.nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """`model(..., labels=labels, fused_lm_head=True)` returns TRL's FusedCausalLMOutput.

    As TRL's, but rows with label -100 enter no product on any device.

    Raises: ValueError as `logprobs_forward`, when the model is called.
    """
    original = model.forward
    utils = sys.modules["trl.trainer.utils"]

    @functools.wraps(type(model).forward)
    def forward(
        self,
        *args,
        fused_lm_head=False,
        labels=None,
        shift_labels=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        if not fused_lm_head:
            given = {
                "labels": labels,
                "shift_labels": shift_labels,
                "num_items_in_batch": num_items_in_batch,
            }
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return original(*args, **kwargs)
        config = self.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        out = backbone(self)(*args, **(kwargs | {"use_cache": False}))
        hidden = out.last_hidden_state
        if shift_labels is None:
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        fp32 = nullcontext()
        if cast_lm_head_to_fp32:
            hidden = hidden.float()
            fp32 = torch.autocast(hidden.device.type, enabled=False)
        layer = self.get_output_embeddings()
        with fp32, utils.maybe_gather_lm_head_ctx(layer.weight, layer.bias):
            head = head_of(self)
            targets = shift_labels.to(head.weight.device)
            found = _per_token(
                hidden.flatten(0, 1).to(targets.device),
                head,
                targets.flatten(),
                temperature,
                VOCAB_CHUNK_SIZE,
                outputs,
            )
        logp, entropy, log_sum_sq, mean_logits, is_top1 = (
            None if x is None else x.view(targets.shape) for x in found
        )
        mask = targets != IGNORE
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -logp.sum() / count
        aux_loss = None
        if kwargs.get("output_router_logits"):
            from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

            experts = getattr(config, "num_experts", None) or config.num_local_experts
            aux_loss = load_balancing_loss_func(
                out.router_logits, experts, config.num_experts_per_tok, kwargs.get("attention_mask")
            )
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
        return utils.FusedCausalLMOutput(
            loss=loss,
            log_probs=logp,
            entropy=entropy,
            log_sum_sq_probs=log_sum_sq,
            mean_logits=mean_logits,
            is_top1=is_top1,
            label_mask=mask,
            aux_loss=aux_loss,
        )

    model.forward = types.MethodType(forward, model)


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities at `index`, float32, shaped as index.

    Args:
        logits: [..., V] float32, bfloat16 or float16.
        index: [...] or [..., K] integers in [0, V).
        temperature: > 0.
        row_mask: like index: 0 where the result is 0 and has no gradient.

    Raises: as `token_logp`.
    """
    # TRL's own takes int32 too, which no gather does.
    index = index.long()
    if index.ndim < logits.ndim:
        targets = index if row_mask is None else index.masked_fill(row_mask == 0, IGNORE)
        return token_logp(logits, targets, temperature=temperature).logp
    lse = token_logp(logits, index[..., 0], temperature=temperature).lse
    logp = logits.gather(-1, index).float() / temperature - lse[..., None]
    return logp if row_mask is None else logp.masked_fill(row_mask == 0, 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy of each row of [..., V] logits, float32, in nats. chunk_size has no effect."""
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logp(logits, targets, entropy=True).entropy


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(`selective_log_softmax`, entropy) in one pass; index is [...], masked rows give 0 twice."""
    index = index.long()
    targets = index if row_mask is None else index.masked_fill(row_mask == 0, IGNORE)
    out = token_logp(logits, targets, temperature=temperature, entropy=True)
    return out.logp, out.entropy if entropy_requires_grad else out.entropy.detach()


def _per_token(
    hidden: Tensor,
    head: LMHead,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    outputs: tuple[str, ...],
) -> PerToken:
    trained = [x for x in (head.weight, *(head.lora or ())[:2]) if x.requires_grad]
    if any(hasattr(x, "ds_id") for x in trained):
        raise ValueError(
            "weight is a trainable parameter under DeepSpeed ZeRO-3, which drops it before the "
            "backward: unpatch TRL there, or freeze the head"
        )
    # The entropy says which tokens may be the most likely ones.
    wants_entropy = "entropy" in outputs or "is_top1" in outputs
    found = head_logp(hidden, head, targets, temperature, wants_entropy)
    with torch.no_grad():
        rest = _statistics(hidden, head, targets, found, temperature, chunk_size, outputs)
    return found.logp, found.entropy if "entropy" in outputs else None, *rest


def _statistics(
    hidden: Tensor,
    head: LMHead,
    targets: Tensor,
    found: Logp,
    temperature: float,
    chunk_size: int,
    outputs: tuple[str, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(log sum p^2, mean logit, is top-1) of the rows that count, zeros elsewhere."""
    counted = targets != IGNORE
    log_sum_sq = mean_logits = is_top1 = None
    scale = head.logit_scale / temperature
    if "log_sum_sq_probs" in outputs:
        # sum exp(l)^2 is the partition function at half the temperature.
        doubled = head_logp(hidden, head, targets, temperature / 2, False)
        log_sum_sq = torch.where(counted, doubled.lse - 2 * found.lse, 0.0)
    if "mean_logits" in outputs and head.softcap is None:
        mean_D = head.weight.mean(0, dtype=torch.float32)
        if head.lora is not None:
            lora_RD, lora_VR, lora_scale = head.lora
            mean_D += lora_scale * (lora_VR.mean(0, dtype=torch.float32) @ lora_RD.float())
        mean = hidden.float() @ mean_D + (0.0 if head.bias is None else head.bias.float().mean())
        mean_logits = torch.where(counted, mean * scale, 0.0)
    if "is_top1" in outputs:
        # The largest probability is at least exp(-entropy); above 1/2 there is no other.
        is_top1 = counted & (found.logp > math.log(0.5) + 1e-3)
        is_open = counted & ~is_top1 & (found.logp > -found.entropy - 1e-3)
        rows = is_open.nonzero().squeeze(1)
        is_top1[rows] = _tiles(hidden[rows], head, targets[rows], chunk_size, mean=False)
    if "mean_logits" in outputs and head.softcap is not None:
        rows = counted.nonzero().squeeze(1)
        mean_logits = torch.zeros_like(found.logp)
        mean_logits[rows] = _tiles(hidden[rows], head, targets[rows], chunk_size, mean=True)
        mean_logits /= temperature
    return log_sum_sq, mean_logits, is_top1


def _tiles(hidden: Tensor, head: LMHead, targets: Tensor, chunk_size: int, mean: bool) -> Tensor:
    """Over tiles of the logits: their capped mean [N], or whether the target is the first maximum.

    Scale and softcap are monotonic, so the second needs neither.
    """
    dtype, vocab = compute_dtype(hidden), head.weight.shape[0]
    result = []
    for h, y in zip(hidden.split(TOKEN_CHUNK_SIZE), targets.split(TOKEN_CHUNK_SIZE), strict=True):
        total, best, place = 0.0, None, None
        for start in range(0, vocab, chunk_size):
            part = slice(start, min(start + chunk_size, vocab))
            z = (h.to(dtype) @ head.weight[part].to(dtype).T).float()
            z = z if head.bias is None else z.add_(head.bias[part])
            if head.lora is not None:
                lora_RD, lora_VR, lora_scale = head.lora
                z += lora_scale * ((h.float() @ lora_RD.float().T) @ lora_VR[part].float().T)
            if mean:
                capped = head.softcap * torch.tanh(z * (head.logit_scale / head.softcap))
                total = total + capped.sum(1, dtype=torch.float64)
                continue
            top, at = z.max(1)
            ahead = torch.ones_like(y, dtype=torch.bool) if best is None else top > best
            best = top if best is None else torch.maximum(best, top)
            place = torch.where(ahead, at + start, y if place is None else place)
        result.append((total / vocab).float() if mean else place == y)
    if not result:
        return hidden.new_zeros(0, dtype=torch.float32 if mean else torch.bool)
    return torch.cat(result)
