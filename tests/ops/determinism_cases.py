"""Every public op on every path, as functions from nothing to tensors that must repeat bitwise.

Run as a script it prints a digest of each, for a comparison between processes.
"""

import hashlib
import sys

import torch

from r1kernels import (
    PolicyObjective,
    group_advantages,
    linear_logp,
    linear_loss,
    linear_policy_loss,
    policy_loss,
    token_logp,
    use_backend,
)
from r1kernels.check import IGNORE

# Whole blocks: native GEMMs give the same bits on any number of threads.
ALIGNED = (128, 64, 4096)
ODD = {"reference": (33, 24, 290), "native": (33, 24, 4400), "triton": (20, 24, 70)}
LENGTHS = (0.1, 0.4, 0.3, 0.2)


class Inputs:
    def __init__(self, shape: tuple[int, int, int]):
        T, D, V = shape
        generator = torch.Generator().manual_seed(3)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        self.hidden, self.weight, self.bias = normal(T, D), normal(V, D) / D**0.5, normal(V)
        self.targets = torch.randint(0, V, (T,), generator=generator)
        self.some_targets = torch.where(torch.arange(T) % 3 == 1, IGNORE, self.targets)
        self.temperature = torch.rand(T, generator=generator) + 0.5
        self.prior = -torch.rand(T, generator=generator) * 8
        ends = torch.tensor(LENGTHS).cumsum(0).mul(T).round().long()
        self.cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
        self.advantages = torch.tensor([1.0, -0.5, 0.0, -1.5])
        self.mask = (torch.arange(T) % 4 != 2).float()
        self.streams = {
            name: self.prior + 0.1 * normal(T) for name in ("logp_old", "logp_ref", "logp_sampler")
        }


def calls(shape: tuple[int, int, int]) -> dict:
    """name -> function that returns results and gradients."""
    given = Inputs(shape)
    options = {
        "plain": {"prior": given.prior},
        "all": {
            "bias": given.bias,
            "temperature": given.temperature,
            "softcap": 8.0,
            "logit_scale": 1.3,
            "entropy": True,
        },
    }

    def leaves(*frozen: int) -> list[torch.Tensor]:
        tensors = given.hidden, given.weight, given.bias
        return [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(tensors)]

    def graded(out, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        out = [x for x in out if isinstance(x, torch.Tensor)]
        total = sum((x * (i + 1)).sum() for i, x in enumerate(out) if x.requires_grad)
        wanted = [x for x in inputs if x.requires_grad]
        return out + [
            x for x in torch.autograd.grad(total, wanted, allow_unused=True) if x is not None
        ]

    def logp(kind: str, targets: torch.Tensor, *frozen: int):
        def run() -> list[torch.Tensor]:
            hidden, weight, bias = inputs = leaves(*frozen)
            more = options[kind] | ({"bias": bias} if "bias" in options[kind] else {})
            out = linear_logp(hidden, weight, targets, **more)
            # The Jacobian of a frozen head serves losses without lse.
            return [*graded(out[:2], inputs), out.lse] if frozen else graded(out, inputs)

        return run

    def forward() -> list[torch.Tensor]:
        with torch.no_grad():
            out = linear_logp(given.hidden, given.weight, given.targets, **options["plain"])
        return [out.logp, out.lse]

    def kept() -> list[torch.Tensor]:
        T, _, V = shape
        inputs = leaves()
        ids = torch.stack([given.targets, (given.targets + 1) % V, (given.targets + 5) % V], 1)
        offsets = torch.arange(0, 3 * T + 1, 3)
        sets = ids.sort(1).values.flatten(), offsets
        out = linear_logp(*inputs[:2], given.targets, bias=inputs[2], entropy=True, kept=sets)
        return graded(out, inputs)

    def tokens(**more):
        def run() -> list[torch.Tensor]:
            logits = (given.hidden @ given.weight.T).requires_grad_()
            return graded(token_logp(logits, given.some_targets, **more), [logits])

        return run

    def fused(objective: PolicyObjective, **more):
        def run() -> list[torch.Tensor]:
            inputs = leaves()[:2]
            out = linear_policy_loss(
                *inputs, given.targets, given.advantages, objective,
                cu_seqlens=given.cu_seqlens, **given.streams, **more,
            )  # fmt: skip
            return graded([out.loss, out.logp, *out.metrics.values()], inputs)

        return run

    def own_loss() -> list[torch.Tensor]:
        inputs = leaves()
        loss = linear_loss(
            *inputs[:2],
            given.some_targets,
            lambda logp, entropy, rows: rows * logp - 0.1 * entropy,
            bias=inputs[2],
            entropy=True,
            workspace_mb=1,
        )
        return graded([loss], inputs)

    def losses(objective: PolicyObjective):
        def run() -> list[torch.Tensor]:
            logp, entropy = given.prior.clone().requires_grad_(), -given.prior
            out = policy_loss(
                logp, given.advantages, objective, entropy=entropy, mask=given.mask,
                cu_seqlens=given.cu_seqlens, **given.streams,
            )  # fmt: skip
            return graded([out.loss, *out.metrics.values()], [logp])

        return run

    def advantages() -> list[torch.Tensor]:
        ids = torch.arange(shape[0]) % 5
        return [group_advantages(given.prior, ids, normalize=x) for x in ("std", "leave_one_out")]

    return {
        "linear_logp forward": forward,
        "linear_logp frozen": logp("plain", given.targets, 1, 2),
        "linear_logp frozen, entropy": logp("all", given.some_targets, 1, 2),
        "linear_logp recompute": logp("plain", given.targets, 2),
        "linear_logp recompute, all": logp("all", given.some_targets),
        "linear_logp kept": kept,
        "token_logp": tokens(),
        "token_logp all": tokens(temperature=given.temperature, softcap=5.0, entropy=True),
        "linear_policy_loss token": fused(PolicyObjective.r1()),
        "linear_policy_loss masked": fused(PolicyObjective.sapo(), mask=given.mask),
        "linear_policy_loss in chunks": fused(PolicyObjective.dapo(), workspace_mb=1),
        "linear_policy_loss skip_mass": fused(PolicyObjective.cispo(), skip_mass=0.01),
        "linear_policy_loss sequence": fused(PolicyObjective.gspo()),
        "linear_policy_loss two passes": fused(PolicyObjective.gspo(), workspace_mb=1),
        "linear_policy_loss entropy": fused(PolicyObjective(entropy_coef=0.1)),
        "linear_policy_loss batch": fused(
            PolicyObjective(surrogate="reinforce", top_entropy_quantile=0.5)
        ),
        "linear_loss": own_loss,
        "policy_loss": losses(PolicyObjective(kl_coef=0.1, entropy_coef=0.1)),
        "policy_loss sequence": losses(PolicyObjective.gspo()),
        "group_advantages": advantages,
    }


def digest(tensors: list[torch.Tensor]) -> str:
    out = hashlib.sha256()
    for x in tensors:
        out.update(x.detach().cpu().contiguous().numpy().tobytes())
    return out.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    with use_backend(sys.argv[1]):
        for name, run in calls(ODD[sys.argv[1]]).items():
            print(name, digest(run()), sep="\t")
