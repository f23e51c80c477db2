"""Settings of the optimizer and of the stages that train."""

from dataclasses import dataclass, field
from typing import Any, Literal

from r1.schema import at_least, fraction, positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    name: Literal["adamw", "muon"] = "adamw"
    """"muon" steps matrices by Muon and the rest by AdamW."""
    lr: float = 1e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    eps: float = 1e-8
    """AdamW's denominator offset."""
    momentum: float = 0.95
    """Muon's momentum."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    decay_fraction: float = 1.0
    """Share of the steps, at the end, over which the learning rate decays."""
    final_lr: float = 0.0
    """Learning rate after the decay, as a share of the peak."""

    def __post_init__(self) -> None:
        positive(self, "lr", "eps")
        at_least(self, 0, "weight_decay", "clip_norm", "warmup_steps")
        fraction(self, "momentum", "decay_fraction", "final_lr")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Long:
    """What the backward pass of long sequences keeps and where; no loss or gradient depends on it
    but for rounding."""

    mode: Literal["auto", "plain", "checkpoint", "stream"] = "auto"
    """"plain" keeps all activations, "checkpoint" the inputs of the layers, "stream" runs the
    layers in chunks of queries; "auto" takes the first whose predicted peak fits."""
    chunk_size: int | None = None
    """stream: queries of a chunk; none lets it choose."""
    device_gib: float | None = None
    """Inputs of layers kept on the GPU, in GiB; the others wait in pinned host memory. None keeps
    all there."""
    save_attention: bool = False
    """checkpoint, stream: keep the attention's output too, which is then not computed twice."""

    def __post_init__(self) -> None:
        at_least(self, 1, "chunk_size")
        at_least(self, 0, "device_gib")


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 64
    """Sequences a step."""
    sequence_length: int = 128
    """Longest training sequence."""
    optim: Optim = field(
        default_factory=lambda: Optim(
            name="muon", lr=4e-3, warmup_steps=20, schedule="linear", decay_fraction=0.4
        )
    )
    """Optimizer of the base stage."""
    eval_every: int = 100
    """Steps between evaluations; 0 only at the end."""
    save_every: int = 100
    """Steps between checkpoints."""
    gate: float = 0.0
    """Largest loss on careful solutions, in nats net of the style, at which the base counts."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch_size", "sequence_length", "save_every")
        at_least(self, 0, "eval_every")


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A preset of r1kernels.PolicyObjective; a field that is not none replaces the preset's."""

    preset: Literal[
        "grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "sapo", "rloo", "kimi", "r1"
    ] = "dapo"
    """Named setting of all fields below."""
    args: dict[str, float] = field(default_factory=dict)
    """Arguments of the preset: length of dr_grpo, tau of kimi, kl_coef and clip of r1."""
    surrogate: Literal["clip", "cispo", "sapo", "reinforce", "mirror_descent"] | None = None
    """Form of the policy term."""
    ratio_level: Literal["token", "sequence"] | None = None
    """Whether the importance ratio is a token's or a sequence's."""
    clip_low: float | None = None
    """Distance of the lower clip from 1."""
    clip_high: float | None = None
    """Distance of the upper clip from 1."""
    clip_max: float | None = None
    """Cap of the ratio on negative advantages."""
    kl_coef: float | None = None
    """Weight of the divergence from the reference model; 0 loads none."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimator of that divergence."""
    kl_ratio_corrected: bool | None = None
    """Weigh the divergence by the importance ratio."""
    sampler_correction: (
        Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = None
    """Correction for the gap between sampler and trainer."""
    sampler_cap: float | None = None
    """Largest weight of that correction."""
    entropy_coef: float | None = None
    """Weight of the entropy bonus."""
    top_entropy_quantile: float | None = None
    """Share of tokens, by entropy, that take part."""
    off_policy_threshold: float | None = None
    """Mask sequences that moved further than this from the old policy."""
    aggregation: (
        Literal[
            "seq_mean_token_mean", "token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"
        ]
        | None
    ) = None
    """How tokens and sequences are averaged."""
    mirror_tau: float | None = None
    """Temperature of mirror descent."""
    sapo_temperature: tuple[float, float] | None = None
    """Temperatures of SAPO's gate for positive and negative advantages."""

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields that replace the preset's."""
        given = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {k: v for k, v in given.items() if k not in ("preset", "args") and v is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class RL:
    steps: int = 1000
    """Rollouts; each feeds epochs x minibatches optimizer steps."""
    prompts_per_step: int = 32
    """Questions of one rollout."""
    group_size: int = 16
    """Completions sampled for each question."""
    minibatch_size: int | None = None
    """Completions of one optimizer step; none takes the whole rollout."""
    epochs: int = 1
    """Passes over one rollout."""
    micro_batch_tokens: int = 32_768
    """Tokens of one forward and backward pass; more are accumulated."""
    share_prefix: Literal["auto", "never"] = "auto"
    """Whether a prompt is processed once for all its completions in a pass; "auto" where that
    leaves out a sixth of their tokens or more. Changes no gradient."""
    optim: Optim = field(default_factory=Optim)
    """Optimizer of the rl stage."""
    objective: Objective = field(default_factory=Objective)
    """What is optimised."""
    rewards: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 0.3})
    """Weight of each reward by name."""
    reward_timeout: float = 5.0
    """Seconds a worker may take over one completion before it is killed."""
    reward_workers: int = 2
    """Worker processes that check answers."""
    advantage: Literal["std", "mean", "leave_one_out"] | None = None
    """Normalisation of rewards inside a group; none takes that of the objective's paper: "mean" for
    dr_grpo and kimi, "leave_one_out" for rloo, "std" for the others."""
    advantage_ddof: int = 1
    """Degrees of freedom taken off the group's standard deviation."""
    truncated: Literal["keep", "mask"] = "keep"
    """Whether completions cut at max_tokens stay in the loss."""
    ref_refresh_every: int = 400
    """Optimizer steps between copies of the policy into the reference; 0 never."""
    max_nonfinite_skips: int = 10
    """Skipped steps with a non-finite loss or gradient after which the run stops."""
    eval_every: int = 20
    """Steps between evaluations on the selection prompts; 0 only at the end."""
    save_every: int = 20
    """Steps between checkpoints."""
    table_rows: int = 2
    """Completions shown with each evaluation."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "prompts_per_step", "minibatch_size", "epochs", "save_every")
        at_least(self, 1, "micro_batch_tokens", "reward_workers")
        at_least(self, 2, "group_size")
        at_least(self, 0, "ref_refresh_every", "max_nonfinite_skips", "eval_every", "table_rows")
        positive(self, "reward_timeout")
        if self.advantage_ddof not in (0, 1):
            raise ValueError(f"advantage_ddof must be 0 or 1, got {self.advantage_ddof}")
        if not self.rewards:
            raise ValueError("rewards must name at least one reward, got none")

    @property
    def normalize(self) -> str:
        """How rewards become advantages, as `group_advantages` names it."""
        own = {"dr_grpo": "mean", "kimi": "mean", "rloo": "leave_one_out"}
        return self.advantage or own.get(self.objective.preset, "std")
