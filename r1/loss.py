"""The loss of a pack: one component per kind of stream, each divided by its own global count."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from r1.batch import IGNORE, Pack
from r1.config import Objective
from r1.model import CausalLM
from r1kernels import PolicyObjective, linear_logp, linear_loss, linear_policy_loss


class Scores(NamedTuple):
    """Log-probability of each target and entropy of its distribution; 0 where none counts."""

    logp_T: Tensor
    entropy_T: Tensor


class PackLoss(NamedTuple):
    """`metrics` are sums and counts on the device, to be added over packs and ranks.

    logp_T: of the policy component's tokens, as the forward found them; None without one.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logp_T: Tensor | None


def objective_of(config: Objective) -> PolicyObjective:
    """The preset with the fields the settings replace.

    Raises: ValueError naming the preset when it refuses an argument or a field.
    """
    try:
        preset = getattr(PolicyObjective, config.preset)(**config.args)
        fields = {
            name: getattr(preset, name)
            for name in Objective.__dataclass_fields__
            if hasattr(preset, name)
        }
        return PolicyObjective(**{**fields, "length": preset.length, **config.overrides})
    except (TypeError, ValueError) as error:
        raise ValueError(f"objective preset {config.preset!r}: {error}") from None


def needs_every_sample(objective: PolicyObjective) -> bool:
    """Whether a sample of advantage 0 can still change the gradient."""
    return bool(
        objective.kl_coef
        or objective.entropy_coef
        or objective.surrogate == "mirror_descent"
        or objective.scope == "batch"
    )


def score(model: CausalLM, pack: Pack, temperature: float) -> Scores:
    """Log-probability and entropy at every row with a target, without a graph.

    Rows, chunks and prior are those of the training pass, so that an unchanged policy repeats
    `logp_T` to the last bit.
    """
    with torch.no_grad():
        hidden_TD = hidden_rows(model, pack)
        out = linear_logp(
            hidden_TD,
            model.head.weight,
            policy_targets(pack),
            entropy=True,
            prior=pack.logp_sampler_T,
            temperature=temperature,
            **_head_options(model),
        )
    return Scores(out.logp, out.entropy)


def pack_loss(
    model: CausalLM,
    pack: Pack,
    counts: Mapping[str, int],
    *,
    objective: PolicyObjective | None,
    temperature: float,
) -> PackLoss:
    """The pack's share of the loss of a whole optimizer step, whose global counts are `counts`."""
    hidden_TD = hidden_rows(model, pack)
    loss = hidden_TD.new_zeros((), dtype=torch.float32)
    metrics: dict[str, Tensor] = {}
    logp_T = None
    if counts["policy_tokens"]:
        assert objective is not None, "a batch with policy weights needs an objective"
        out = linear_policy_loss(
            hidden_TD,
            model.head.weight,
            policy_targets(pack),
            pack.advantages_T,
            objective,
            logp_old=pack.logp_old_T,
            logp_ref=pack.logp_ref_T,
            logp_sampler=pack.logp_sampler_T,
            prior=pack.logp_sampler_T,
            entropy=True,
            weights=pack.policy_T,
            cu_seqlens=pack.cu_seqlens,
            normalizer=counts[f"policy_{objective.counts}"],
            temperature=temperature,
            **_head_options(model),
        )
        loss = loss + out.loss
        metrics.update(out.metrics)
        logp_T = out.logp
    if counts["cross_entropy_tokens"]:
        component = cross_entropy(model, hidden_TD, pack, counts["cross_entropy_tokens"])
        loss = loss + component
        metrics["cross_entropy"] = component.detach()
    return PackLoss(loss, metrics, logp_T)


def cross_entropy(model: CausalLM, hidden_TD: Tensor, pack: Pack, normalizer: float) -> Tensor:
    """Sum of the weighted negative log-probabilities of the targets, over `normalizer`."""
    targets_T = torch.where(pack.cross_entropy_T != 0, pack.targets_T, IGNORE)
    weights_T = pack.cross_entropy_T / -normalizer

    def weighted(logp_N: Tensor, _entropy: Tensor | None, rows_N: Tensor) -> Tensor:
        return weights_T[rows_N] * logp_N

    return linear_loss(hidden_TD, model.head.weight, targets_T, weighted, **_head_options(model))


def hidden_rows(model: CausalLM, pack: Pack) -> Tensor:
    """The hidden state that each row of the pack's streams belongs to."""
    if pack.layout is None:
        return model.hidden(pack.tokens_T, pack.cu_seqlens)
    return model.shared_hidden(pack.tokens_T, pack.layout)


def policy_targets(pack: Pack) -> Tensor:
    return torch.where(pack.policy_T != 0, pack.targets_T, IGNORE)


def _head_options(model: CausalLM) -> dict:
    head = model.head
    return {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale}
