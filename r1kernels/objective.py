"""PolicyObjective: which policy loss is meant, as data."""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass, field
from typing import Literal

from r1kernels import check

CHOICES = {
    "surrogate": ("clip", "cispo", "sapo", "reinforce", "mirror_descent"),
    "ratio_level": ("token", "sequence"),
    "kl_estimator": ("k1", "k2", "k3"),
    "sampler_correction": (
        "none",
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
    ),
    "aggregation": (
        "seq_mean_token_mean",
        "token_mean",
        "seq_mean_token_sum",
        "seq_mean_token_sum_norm",
    ),
}

# field -> (smallest value, whether it is itself allowed, whether infinity is)
BOUNDS = {
    "clip_low": (0.0, True, True),
    "clip_high": (0.0, True, True),
    "clip_max": (1.0, True, False),
    "kl_coef": (0.0, True, False),
    "sampler_cap": (0.0, False, True),
    "entropy_coef": (-math.inf, False, False),
    "top_entropy_quantile": (0.0, False, False),
    "off_policy_threshold": (0.0, True, False),
    "mirror_tau": (0.0, True, False),
    "length": (0.0, False, False),
}
OPTIONAL = ("clip_max", "off_policy_threshold", "length")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyObjective:
    """A policy-gradient loss: surrogate, ratio, KL, corrections and aggregation.

    With l a token's log-probability, r its importance ratio, A its advantage, the loss is
    sum_t w_t (keep_t c_t surrogate_t + kl_coef kl_t - entropy_coef keep_entropy_t H_t) where w_t is
    the aggregation weight, c_t the sampler correction, and keep_t says that neither the off-policy
    mask nor the entropy quantile drops the token (keep_entropy_t: the quantile alone).

    surrogate
        clip            -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); with clip_max and A < 0
                        never more than -clip_max A. A ratio equal to a bound is not clipped.
                        PPO; dual clip of arXiv:1912.09729; equal to INTELLECT-2's two-sided delta
                        (arXiv:2505.07291) when clip_max >= 1 + clip_high.
        cispo           -min(r, clip_max) A l, the ratio without gradient. arXiv:2506.13585 in
                        ScaleRL's one-sided form (arXiv:2510.13786). Needs clip_max.
        sapo            -A (4 / a) sigmoid(a (r - 1)), a = sapo_temperature[0] where A > 0, else
                        sapo_temperature[1]. arXiv:2511.20347.
        reinforce       -A l; the ratio has no part in it.
        mirror_descent  token level: -A l + mirror_tau / 2 (l - l_old)^2. Sequence level: for a
                        sequence of n tokens, -A l + mirror_tau / (2 n) (sum of l - l_old)^2 per
                        token, so that under "seq_mean_token_sum" a sequence adds
                        -A L + mirror_tau / 2 (L - L_old)^2. Kimi k1.5, arXiv:2501.12599, eq. 3.
    ratio_level
        token           r = exp(l - l_old)
        sequence        r = exp(mean over the sequence of l - l_old), the same for all its tokens,
                        with the gradient through every one of them. GSPO, arXiv:2507.18071.
    kl_estimator        with x = l_ref - l: k1 = -x, k2 = x^2 / 2, k3 = exp(x) - x - 1.
    kl_ratio_corrected  kl_t times r, gradient through both (DeepSeek-V3.2, arXiv:2512.02556).
    sampler_correction  c = exp(l_old - l_sampler), of the token or of the whole sequence's sum, no
                        gradient: "truncate" caps it at sampler_cap, "mask" makes it 0 above.
    top_entropy_quantile  share of the call's tokens, those of highest entropy, that the surrogate
                        and the entropy bonus act on. arXiv:2506.01939.
    off_policy_threshold  drops the surrogate of tokens with A < 0 in sequences whose mean of
                        l_sampler - l (l_old where there is no sampler) exceeds it. DeepSeek-V3.2.
    aggregation         w_t over N sequences, n_i counted tokens in sequence i, M tokens in all:
        token_mean               1 / M
        seq_mean_token_mean      1 / (N n_i)
        seq_mean_token_sum       1 / N
        seq_mean_token_sum_norm  1 / (N length), length a constant of the run (Dr. GRPO)
                        A call's normalizer takes the place of M, or of N in the other three.
    """

    surrogate: Literal["clip", "cispo", "sapo", "reinforce", "mirror_descent"] = "clip"
    ratio_level: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_max: float | None = None
    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_ratio_corrected: bool = False
    sampler_correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "none"
    sampler_cap: float = 2.0
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_threshold: float | None = None
    aggregation: Literal[
        "seq_mean_token_mean", "token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"
    ] = "token_mean"
    mirror_tau: float = 0.1
    sapo_temperature: tuple[float, float] = (1.0, 1.05)
    length: float | None = None
    spec: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, options in CHOICES.items():
            check.choice(name, getattr(self, name), options)
        if not isinstance(self.kl_ratio_corrected, bool):
            raise ValueError(f"kl_ratio_corrected must be a bool, got {self.kl_ratio_corrected!r}")
        for name in BOUNDS:
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL:
                object.__setattr__(self, name, _bounded(name, value, *BOUNDS[name]))
        if self.top_entropy_quantile > 1:
            raise ValueError(
                f"top_entropy_quantile must be at most 1, got {self.top_entropy_quantile!r}"
            )
        pair = self.sapo_temperature
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"sapo_temperature must be two numbers, got {pair!r}")
        pair = tuple(_bounded("sapo_temperature", value, 0.0, False, False) for value in pair)
        object.__setattr__(self, "sapo_temperature", pair)
        if self.surrogate == "cispo" and self.clip_max is None:
            raise ValueError("clip_max must be set for surrogate 'cispo', got None")
        if (self.aggregation == "seq_mean_token_sum_norm") != (self.length is not None):
            raise ValueError(
                "length must be set for aggregation 'seq_mean_token_sum_norm' and only there, "
                f"got length={self.length!r} with aggregation={self.aggregation!r}"
            )
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        object.__setattr__(self, "spec", json.dumps(values))

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def from_spec(spec: str) -> "PolicyObjective":
        """The objective whose `spec` this is, floats to the last bit."""
        return PolicyObjective(**json.loads(spec))

    @property
    def scope(self) -> Literal["token", "sequence", "batch"]:
        """What one token's coefficient depends on, aggregation's weights apart."""
        if self.top_entropy_quantile < 1:
            return "batch"
        return "sequence" if self._reads_sequences else "token"

    @property
    def idle_without_advantage(self) -> bool:
        """Whether a token (at sequence level: a sequence) of advantage 0 has no coefficient."""
        return self.surrogate != "mirror_descent" and self.kl_coef == 0 and self.entropy_coef == 0

    @property
    def needs_sequences(self) -> bool:
        """Whether a call must know which sequence a token belongs to."""
        return self._reads_sequences or self.aggregation != "token_mean"

    @property
    def _reads_sequences(self) -> bool:
        return (
            self.ratio_level == "sequence"
            or self.sampler_correction.startswith("sequence")
            or self.off_policy_threshold is not None
        )

    @property
    def counts(self) -> Literal["tokens", "sequences"]:
        """What a `normalizer` for this objective is a count of."""
        return "tokens" if self.aggregation == "token_mean" else "sequences"

    @staticmethod
    def grpo(*, kl_coef: float = 0.0, clip: float = 0.2) -> "PolicyObjective":
        """GRPO, arXiv:2402.03300 eq. 3."""
        return PolicyObjective(
            clip_low=clip, clip_high=clip, kl_coef=kl_coef, aggregation="seq_mean_token_mean"
        )

    @staticmethod
    def r1(kl_coef: float = 1e-3, clip: float = 10.0) -> "PolicyObjective":
        """DeepSeek-R1's GRPO: KL 0.001, clip 10 (Nature 645, Methods)."""
        return PolicyObjective.grpo(kl_coef=kl_coef, clip=clip)

    @staticmethod
    def dr_grpo(length: float) -> "PolicyObjective":
        """Dr. GRPO, arXiv:2503.20783; length is the configured completion budget, in tokens.

        Use with group_advantages(normalize="mean").
        """
        return PolicyObjective(aggregation="seq_mean_token_sum_norm", length=length)

    @staticmethod
    def dapo() -> "PolicyObjective":
        """DAPO, arXiv:2503.14476: clip 0.2 / 0.28, mean over all tokens, no KL."""
        return PolicyObjective(clip_low=0.2, clip_high=0.28, aggregation="token_mean")

    @staticmethod
    def bnpo() -> "PolicyObjective":
        """Clip 0.2, mean over all tokens of the batch (TRL's "bnpo")."""
        return PolicyObjective(aggregation="token_mean")

    @staticmethod
    def gspo() -> "PolicyObjective":
        """GSPO, arXiv:2507.18071: sequence ratio, clip 3e-4 / 4e-4."""
        return PolicyObjective(
            ratio_level="sequence",
            clip_low=3e-4,
            clip_high=4e-4,
            aggregation="seq_mean_token_mean",
        )

    @staticmethod
    def cispo(clip_max: float = 5.0) -> "PolicyObjective":
        """CISPO, arXiv:2506.13585, with the cap ScaleRL recommends (arXiv:2510.13786)."""
        return PolicyObjective(surrogate="cispo", clip_max=clip_max, aggregation="token_mean")

    @staticmethod
    def sapo() -> "PolicyObjective":
        """SAPO, arXiv:2511.20347: temperatures 1.0 and 1.05."""
        return PolicyObjective(surrogate="sapo", aggregation="seq_mean_token_mean")

    @staticmethod
    def rloo() -> "PolicyObjective":
        """RLOO, arXiv:2402.14740. Use with group_advantages(normalize="leave_one_out")."""
        return PolicyObjective(surrogate="reinforce", aggregation="seq_mean_token_sum")

    @staticmethod
    def kimi(tau: float) -> "PolicyObjective":
        """Kimi k1.5's mirror descent, arXiv:2501.12599. Use with normalize="mean" advantages."""
        return PolicyObjective(
            surrogate="mirror_descent",
            ratio_level="sequence",
            mirror_tau=tau,
            aggregation="seq_mean_token_sum",
        )


def _bounded(name: str, value: object, low: float, inclusive: bool, infinite: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
    value = float(value)
    above = value >= low if inclusive else value > low
    if not above or (math.isinf(value) and not infinite):
        sign = ">=" if inclusive else ">"
        finite = "" if infinite else " and finite"
        raise ValueError(f"{name} must be {sign} {low}{finite}, got {value!r}")
    return value
