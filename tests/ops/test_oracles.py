"""TRL's and Liger's own losses, called as they are, for every objective they share with us."""

import dataclasses
import importlib.util
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from r1kernels.objective import PolicyObjective
from r1kernels.policy_loss import policy_loss

B, S, D, V = 4, 6, 8, 17
LENGTHS = [6, 3, 1, 5]
MAX_LENGTH = 11

needs_trl = pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="trl is not installed")
needs_liger = pytest.mark.skipif(
    not importlib.util.find_spec("liger_kernel"), reason="liger_kernel is not installed"
)

LOSSES = {
    "grpo": PolicyObjective(clip_low=0.1, clip_high=0.2, aggregation="seq_mean_token_mean"),
    "bnpo": PolicyObjective(clip_low=0.1, clip_high=0.2),
    "dapo": PolicyObjective(clip_low=0.1, clip_high=0.28),
    "dr_grpo": dataclasses.replace(PolicyObjective.dr_grpo(MAX_LENGTH), clip_low=0.1),
    "cispo": PolicyObjective.cispo(1.3),
    "sapo": dataclasses.replace(PolicyObjective.sapo(), sapo_temperature=(1.2, 1.7)),
}
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def shared_objectives(liger):
    """(TRL's loss_type, objective): every loss, then every option on top of what accepts it."""
    for loss_type, base in LOSSES.items():
        options = [
            {},
            {"kl_coef": 0.3},
            {"kl_coef": 0.3, "kl_ratio_corrected": True},
            *({"sampler_correction": mode, "sampler_cap": 1.2} for mode in CORRECTIONS),
        ]
        if base.surrogate == "clip":
            options.append({"clip_max": 1.5})
        if base.surrogate == "clip" or not liger:
            options += [
                {"ratio_level": "sequence"},
                {"ratio_level": "sequence", "kl_coef": 0.3, "kl_ratio_corrected": True},
            ]
        if not liger:
            options += [
                {"off_policy_threshold": 0.05},
                {"off_policy_threshold": 0.05, "sampler_correction": "token_mask"},
                {"top_entropy_quantile": 0.4},
                {"top_entropy_quantile": 0.4, "kl_coef": 0.3},
            ]
            if loss_type == "bnpo":
                # TRL's bonus is a mean over tokens in every loss; ours has the loss's aggregation.
                options.append({"entropy_coef": 0.2})
        for option in options:
            yield pytest.param(
                loss_type,
                dataclasses.replace(base, **option),
                id="-".join([loss_type, *(f"{k}={v}" for k, v in option.items())]),
            )


def random_call(dtype):
    def normal(*shape):
        return torch.randn(*shape, dtype=dtype)

    mask = torch.arange(S) < torch.tensor(LENGTHS).unsqueeze(1)
    logp = -normal(B, S).abs() - 1
    near = {name: logp + 0.4 * normal(B, S) for name in ("old", "ref", "sampler")}
    return logp, normal(B), near, normal(B, S).abs(), mask


def sampler_ratio(objective, logp_old, logp_sampler, mask):
    """TRL's importance_sampling_ratio: made while it generates, where no call of ours reaches."""
    gap = (logp_old - logp_sampler) * mask
    if objective.sampler_correction.startswith("sequence"):
        gap = gap.sum(-1, keepdim=True)
    ratio = gap.exp()
    if objective.sampler_correction.endswith("truncate"):
        return ratio.clamp(max=objective.sampler_cap)
    return ratio.masked_fill(ratio > objective.sampler_cap, 0.0)


def trl_trainer(loss_type, objective, logp, entropy):
    """A GRPOTrainer with the attributes _compute_loss reads, and the given log-probabilities."""
    from trl import GRPOTrainer

    trainer = object.__new__(GRPOTrainer)
    positive, negative = objective.sapo_temperature
    corrected = objective.sampler_correction != "none"
    attributes = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logp, entropy, None),
        "_entropy_bonus_enabled": objective.entropy_coef != 0,
        "_metrics": {"train": defaultdict(list)},
        "accelerator": SimpleNamespace(
            num_processes=1,
            sync_gradients=True,
            gather=lambda x: x,
            pad_across_processes=lambda x, **_: x,
            reduce=lambda x, reduction: x,
        ),
        "args": SimpleNamespace(
            delta=objective.clip_max,
            sapo_temperature_pos=positive,
            sapo_temperature_neg=negative,
            steps_per_generation=1,
            use_bias_correction_kl=objective.kl_ratio_corrected,
        ),
        "aux_loss_enabled": False,
        "beta": objective.kl_coef,
        "current_gradient_accumulation_steps": 1,
        "entropy_coef": objective.entropy_coef,
        "epsilon_high": objective.clip_max if loss_type == "cispo" else objective.clip_high,
        "epsilon_low": objective.clip_low,
        "importance_sampling_level": objective.ratio_level,
        "loss_type": loss_type,
        "max_completion_length": MAX_LENGTH,
        "model": SimpleNamespace(training=True),
        "off_policy_mask_threshold": objective.off_policy_threshold,
        "top_entropy_quantile": objective.top_entropy_quantile,
        "use_adaptive_entropy": False,
        "use_vllm": corrected,
        "vllm_importance_sampling_correction": corrected,
    }
    vars(trainer).update(attributes)
    return trainer


@needs_trl
@pytest.mark.parametrize("loss_type, objective", list(shared_objectives(liger=False)))
@pytest.mark.parametrize("has_old", [True, False])
def test_trl(loss_type, objective, has_old):
    logp, advantages, near, entropy, mask = random_call(torch.float64)
    old = near["old"] if has_old else logp
    # What TRL divides these two by, in place of the batch's own count.
    normalizer = 2 * mask.sum() if loss_type in ("dapo", "cispo") else None
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(B, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(B, S, dtype=torch.int64),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "ref_per_token_logps": near["ref"],
        "num_items_in_batch": normalizer,
    }
    if has_old:
        inputs["old_per_token_logps"] = old
    sampler = near["sampler"] if objective.sampler_correction != "none" else None
    if sampler is not None:
        inputs["sampling_per_token_logps"] = sampler
        inputs["importance_sampling_ratio"] = sampler_ratio(objective, old, sampler, mask)

    theirs_logp, theirs_entropy = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
    trainer = trl_trainer(loss_type, objective, theirs_logp, theirs_entropy)
    theirs = trainer._compute_loss(trainer.model, inputs)
    leaves = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
    ours = policy_loss(
        leaves[0],
        advantages,
        objective,
        logp_old=old if has_old else None,
        logp_ref=near["ref"],
        logp_sampler=sampler,
        entropy=leaves[1],
        mask=mask,
        normalizer=normalizer,
    )

    torch.testing.assert_close(ours.loss, theirs, rtol=1e-10, atol=1e-12)
    theirs_grads = torch.autograd.grad(theirs, (theirs_logp, theirs_entropy), allow_unused=True)
    ours_grads = torch.autograd.grad(ours.loss, leaves, allow_unused=True)
    torch.testing.assert_close(ours_grads[0], theirs_grads[0], rtol=1e-10, atol=1e-12)
    if objective.entropy_coef:
        torch.testing.assert_close(ours_grads[1], theirs_grads[1], rtol=1e-10, atol=1e-12)
    assert ours_grads[0].abs().max() > 0


@needs_liger
@pytest.mark.parametrize("loss_type, objective", list(shared_objectives(liger=True)))
def test_liger(loss_type, objective):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    _, advantages, _, _, mask = random_call(torch.float32)
    hidden, weight = torch.randn(B, S, D), torch.randn(V, D) / 2
    targets = torch.randint(0, V, (B, S))

    def leaves():
        return hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def token_logp(hidden, weight):
        logits = hidden @ weight.T
        return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    # The other policies' log-probabilities lie about the current ones, as those of a run do.
    centre = token_logp(hidden, weight)
    old, ref, sampler = (centre + 0.3 * torch.randn(B, S) for _ in range(3))
    corrected = objective.sampler_correction != "none"
    positive, negative = objective.sapo_temperature
    module = LigerFusedLinearGRPOLoss(
        beta=objective.kl_coef,
        compiled=False,
        use_ref_model=objective.kl_coef != 0,
        epsilon_low=objective.clip_low,
        epsilon_high=objective.clip_max if loss_type == "cispo" else objective.clip_high,
        loss_type=loss_type,
        max_completion_length=MAX_LENGTH,
        importance_sampling_level=objective.ratio_level,
        sapo_temperature_pos=positive,
        sapo_temperature_neg=negative,
        delta=objective.clip_max,
        use_bias_correction_kl=objective.kl_ratio_corrected,
    )
    theirs_leaves = leaves()
    theirs, _ = module(
        *theirs_leaves,
        targets,
        mask,
        advantages,
        ref_per_token_logps=ref,
        old_per_token_logps=old,
        vllm_is_ratio=sampler_ratio(objective, old, sampler, mask) if corrected else None,
    )
    ours_leaves = leaves()
    ours = policy_loss(
        token_logp(*ours_leaves),
        advantages,
        objective,
        logp_old=old,
        logp_ref=ref,
        logp_sampler=sampler if corrected else None,
        mask=mask,
    )
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-5, atol=1e-6)
    grads = zip(
        torch.autograd.grad(ours.loss, ours_leaves),
        torch.autograd.grad(theirs, theirs_leaves),
        strict=True,
    )
    for mine, other in grads:
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
        assert mine.abs().max() > 1e-3
