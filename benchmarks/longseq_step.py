"""One optimizer step of GRPO on tokens that are there already: ours, and TRL's trainer's.

The makers in `STEPS` take (model, tokens, part) and return a callable for one step; `part(name)`
times a part of it.
"""

import functools
from collections.abc import Callable

import torch

from benchmarks.dropin_suite import grpo_trainer
from benchmarks.longseq_problem import OBJECTIVE, Tokens
from benchmarks.longseq_providers import find
from benchmarks.peers import load
from r1kernels.check import IGNORE

LEARNING_RATE = 1e-3
MAX_NORM = 1.0


def _optimizer(model) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=parameters[0].is_cuda)


def _update(model, optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _ours(provider: str, model, tokens: Tokens, part: Callable) -> Callable:
    """Layers by one of our providers, log-probabilities and loss by the fused head."""
    from r1kernels import linear_logp, linear_policy_loss

    hidden, optimizer = find(provider).apply(model, None), _optimizer(model)
    weight_VD = model.get_output_embeddings().weight
    counted_T = torch.where(tokens.mask_T > 0, tokens.targets_T, IGNORE)

    def step() -> None:
        with part("old log-probabilities"), torch.no_grad():
            hidden_TD = hidden(tokens)
            targets_T = counted_T.to(hidden_TD.device)
            logp_old_T = linear_logp(hidden_TD, weight_VD, targets_T).logp
            del hidden_TD
        with part("layers, forward"):
            hidden_TD = hidden(tokens)
        with part("head and loss"):
            loss = linear_policy_loss(
                hidden_TD,
                weight_VD,
                tokens.targets_T,
                tokens.advantages_B,
                OBJECTIVE,
                logp_old=logp_old_T,
                mask=tokens.mask_T,
                cu_seqlens=tokens.cu_seqlens,
            ).loss
        with part("backward"):
            loss.backward()
        with part("optimizer"):
            _update(model, optimizer)

    return step


def _trl(model, tokens: Tokens, part: Callable) -> Callable:
    """GRPOTrainer's own loss on a batch of one completion, with transformers' checkpointing."""
    grpo = load("trl", "trl.trainer", "grpo_trainer")
    model.gradient_checkpointing_enable()
    optimizer, trainer = _optimizer(model), grpo_trainer(grpo)
    trainer.model = model
    grpo.add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
    ids_BS = tokens.ids_T[None]
    mask_T = (tokens.mask_T > 0).to(ids_BS.device)
    # TRL's mask is of tokens, ours of the rows that predict them.
    P = int(mask_T.long().argmax()) + 1
    labels_BS = ids_BS.clone()
    labels_BS[:, :P] = -100
    batch = {
        "prompt_ids": ids_BS[:, :P],
        "prompt_mask": torch.ones_like(ids_BS[:, :P]),
        "completion_ids": ids_BS[:, P:],
        "completion_mask": torch.ones_like(ids_BS[:, P:]),
        "advantages": tokens.advantages_B.to(ids_BS.device),
        "num_items_in_batch": torch.tensor(ids_BS.shape[1] - P, device=ids_BS.device),
    }

    def step() -> None:
        with part("old log-probabilities"), torch.no_grad():
            old = model(ids_BS, labels=labels_BS, fused_lm_head=True).log_probs[:, P - 1 :]
            batch["old_per_token_logps"] = old
        with part("forward and loss"):
            loss = trainer._compute_loss(model, batch)
        with part("backward"):
            loss.backward()
        with part("optimizer"):
            _update(model, optimizer)

    return step


# Parts of the step that run in r1kernels alone.
OUR_PARTS = {
    "stream": ("old log-probabilities", "layers, forward", "head and loss", "backward"),
    "checkpoint": ("head and loss",),
}
# By name: what makes the step, and the attention of its model.
STEPS = {name: (functools.partial(_ours, name), find(name).attention) for name in OUR_PARTS} | {
    "trl": (_trl, "sdpa")
}
