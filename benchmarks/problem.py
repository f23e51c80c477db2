"""Synthetic rollouts for the linear head, and their float64 truth.

Half of the tokens are peaked: their target's weight row points along their hidden state, so that
the target's probability reaches 1 - 1e-6. The others are diffuse. The old log-probabilities lie
0.01 to 1 nat from the current ones.
"""

import torch

from benchmarks.shapes import Shape

MODES = ("forward", "forward_backward", "frozen", "masked_50", "zero_50", "entropy")
GPU_MODES = (*MODES[:-1], "zero_80", "entropy")
CLIP = 0.2
ENTROPY_COEF = 0.01
ROWS_DRAWN = 2048
ROWS_CHECKED = 512
VOCAB_CHECKED = 4096
CHUNK = 256


def build(
    shape: Shape,
    dtype: str,
    seed: int = 0,
    *,
    device: str = "cpu",
    drawn: int = ROWS_DRAWN,
    peaked_every: int = 2,
    truth: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> dict:
    """Tensors of one problem: inputs, the streams of every mode, and logp, lse, entropy in float64.

    Beyond `drawn` tokens the sequences repeat, which no implementation knows and the truth makes
    use of. One token of every `peaked_every` is peaked. The same arguments give the same problem
    in every process; `truth` is (logp, lse, entropy) where they are known, on the CPU, else they
    are computed.
    """
    generator = torch.Generator().manual_seed(seed)
    large = generator if device == "cpu" else torch.Generator(device).manual_seed(seed)
    T, D, V, S = min(shape.T, drawn), shape.D, shape.V, shape.S
    B, copies = T // S, shape.T // T
    assert T % S == 0 and shape.T % T == 0

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=large, device=device)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator)

    hidden_TD = normal(T, D)
    weight_VD = normal(V, D).mul_(1.5 / D**0.5)
    drawn_T = torch.randperm(max(V, T), generator=generator)[:T]
    targets_T = (drawn_T % V).to(device)
    # A row of the weight points along one hidden state alone.
    peaked_T = ((torch.arange(T) % peaked_every == 0) & (drawn_T < V)).to(device)
    logit_T = (8.0 + 18.0 * uniform(T)).to(device)
    norm_T = hidden_TD.square().sum(-1)
    weight_VD[targets_T[peaked_T]] = ((logit_T / norm_T).unsqueeze(1) * hidden_TD)[peaked_T]
    hidden_TD, weight_VD = (x.to(getattr(torch, dtype)) for x in (hidden_TD, weight_VD))

    if truth is None:
        truth = tuple(x.cpu() for x in token_truth(hidden_TD, weight_VD, targets_T))
    logp_T, lse_T, entropy_T = truth

    sign_B = torch.where(torch.arange(B) % 2 == 0, 1.0, -1.0)
    sign_T = sign_B.repeat_interleave(S)
    advantages_B = sign_B * (0.5 + uniform(B))
    drift_T = torch.exp(uniform(T) * 4.605 - 4.605)
    current_T = logp_T.float()
    # A drift in this direction is never clipped: every row of the dense modes has a coefficient.
    unclipped_T = current_T + sign_T * drift_T

    def zeroed(zero_B: torch.Tensor, clipped: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages and logp_old that leave no coefficient to some sequences and `clipped` tokens.

        A ratio below 1 - CLIP needs room below logp_old = 0, which peaked tokens do not have.
        """
        left_B = torch.where(zero_B, 0.0, advantages_B)
        left_T = left_B.repeat_interleave(S)
        clippable_T = (left_T > 0) | ((left_T < 0) & (current_T < -0.6))
        order_T = torch.where(clippable_T, uniform(T), 2.0).argsort()
        to_clip_T = torch.zeros(T, dtype=torch.bool)
        to_clip_T[order_T[:clipped]] = True
        return left_B, torch.where(to_clip_T, current_T - sign_T * 0.5, unclipped_T).clamp(max=0.0)

    zero_50 = zeroed(torch.arange(B) % 4 == 3, T // 4)
    zero_80 = zeroed(torch.arange(B) % 4 >= 2, round(0.3 * T))
    mask_T = torch.ones(T)
    prompt_T = (torch.arange(T) % S) < S // 2
    tokens = {
        "hidden": hidden_TD,
        "targets": targets_T,
        "advantages": advantages_B,
        "advantages_zero_50": zero_50[0],
        "advantages_zero_80": zero_80[0],
        "logp_old": unclipped_T.clamp(max=0.0),
        "logp_old_zero_50": zero_50[1],
        "logp_old_zero_80": zero_80[1],
        "mask": mask_T,
        "mask_half": torch.where(prompt_T, 0.0, mask_T),
        "truth_logp": logp_T,
        "truth_lse": lse_T,
        "truth_entropy": entropy_T,
    }
    repeated = {name: torch.cat([tensor] * copies).to(device) for name, tensor in tokens.items()}
    return repeated | {"shape": shape, "dtype": dtype, "copies": copies, "weight": weight_VD}


def streams(problem: dict, mode: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """(advantages [B], logp_old [T], mask [T], entropy coefficient) of one mode."""
    zero = f"_{mode}" if mode.startswith("zero") else ""
    return (
        problem["advantages" + zero],
        problem["logp_old" + zero],
        problem["mask_half" if mode == "masked_50" else "mask"],
        ENTROPY_COEF if mode == "entropy" else 0.0,
    )


def rows_with_coefficient(problem: dict, mode: str) -> torch.Tensor:
    """[T] bool: rows whose policy coefficient is not zero."""
    advantages_B, logp_old_T, mask_T, _ = streams(problem, mode)
    advantages_T = advantages_B.repeat_interleave(len(mask_T) // len(advantages_B))
    ratio_T = (problem["truth_logp"] - logp_old_T).exp()
    clipped_T = ((advantages_T > 0) & (ratio_T > 1 + CLIP)) | (
        (advantages_T < 0) & (ratio_T < 1 - CLIP)
    )
    return (mask_T > 0) & (advantages_T != 0) & ~clipped_T


def clipped_loss(logp_T, entropy_T, advantages_B, logp_old_T, mask_T, entropy_coef):
    """Token-mean clipped surrogate with an entropy bonus.

    What every provider's gradient is checked against.
    """
    advantages_T = advantages_B.repeat_interleave(logp_T.shape[0] // advantages_B.shape[0]).to(
        logp_T
    )
    ratio_T = torch.exp(logp_T - logp_old_T.to(logp_T))
    clipped_T = ratio_T.clamp(1 - CLIP, 1 + CLIP)
    loss_T = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
    if entropy_coef:
        loss_T = loss_T - entropy_coef * entropy_T
    return (loss_T * mask_T.to(logp_T)).sum() / mask_T.sum()


def token_truth(hidden_TD, weight_VD, targets_T):
    """(logp, lse, entropy), each [T] float64, from float64 logits made in row chunks."""
    weight_VD = weight_VD.double()
    parts = []
    for start in range(0, hidden_TD.shape[0], CHUNK):
        logits_CV = hidden_TD[start : start + CHUNK].double() @ weight_VD.T
        lse_C = logits_CV.logsumexp(-1)
        target_C1 = targets_T[start : start + CHUNK].unsqueeze(1)
        logits_CV -= lse_C.unsqueeze(1)
        logp_C = logits_CV.gather(1, target_C1).squeeze(1)
        p_CV = logits_CV.exp()
        entropy_C = -(p_CV * logits_CV).sum(-1)
        # The others' mass, without the target: log(1 - p) stays exact where p is nearly 1.
        rest_C = p_CV.scatter_(1, target_C1, 0.0).sum(-1)
        parts.append((torch.where(rest_C < 0.5, torch.log1p(-rest_C), logp_C), lse_C, entropy_C))
    logp_T, lse_T, entropy_T = (torch.cat(column) for column in zip(*parts, strict=True))
    return logp_T, lse_T, entropy_T


def upstream(problem: dict, mode: str, objective: str, logp_T, entropy_T):
    """(dloss/dlogp, dloss/dentropy), each [T], at given log-probabilities and entropies."""
    advantages_B, logp_old_T, mask_T, entropy_coef = streams(problem, mode)
    logp_T, entropy_T = logp_T.clone().requires_grad_(), entropy_T.clone().requires_grad_()
    if objective == "ce":
        loss = -(logp_T * mask_T.to(logp_T)).sum() / mask_T.sum()
    else:
        loss = clipped_loss(logp_T, entropy_T, advantages_B, logp_old_T, mask_T, entropy_coef)
    return torch.autograd.grad(loss, (logp_T, entropy_T), allow_unused=True, materialize_grads=True)


def gradient_truth(
    problem: dict, mode: str, objective: str, vocab_checked: int = VOCAB_CHECKED
) -> dict:
    """dhidden of some rows and dweight of some vocabulary rows, float64.

    objective is "policy", or "ce" for the mean cross entropy of the rows in the mask.
    """
    entropy_coef = streams(problem, mode)[3]
    g_T, h_T = upstream(problem, mode, objective, problem["truth_logp"], problem["truth_entropy"])

    hidden_TD, weight_VD = problem["hidden"].double(), problem["weight"].double()
    T, V = hidden_TD.shape[0], weight_VD.shape[0]
    device = hidden_TD.device
    generator = torch.Generator().manual_seed(1)
    rows_R = torch.randperm(T, generator=generator)[:ROWS_CHECKED].sort().values.to(device)
    some_K = torch.cat(
        [
            problem["targets"][:: max(1, 2 * T // vocab_checked)],
            torch.randperm(V, generator=generator).to(device),
        ]
    )
    vocab_K = some_K[:vocab_checked].unique()

    def dlogits(hidden_RD, rows, columns):
        """Gradient of the logits at rows x columns."""
        logp_RK = hidden_RD @ weight_VD[columns].T - problem["truth_lse"][rows].unsqueeze(1)
        p_RK = logp_RK.exp()
        picked_RK = (columns.unsqueeze(0) == problem["targets"][rows].unsqueeze(1)).double()
        out_RK = g_T[rows].unsqueeze(1) * (picked_RK - p_RK)
        if entropy_coef and objective == "policy":
            entropy_R1 = problem["truth_entropy"][rows].unsqueeze(1)
            out_RK -= h_T[rows].unsqueeze(1) * p_RK * (logp_RK + entropy_R1)
        return out_RK

    everywhere_V = torch.arange(V, device=device)
    dhidden_RD = torch.cat(
        [dlogits(hidden_TD[rows], rows, everywhere_V) @ weight_VD for rows in rows_R.split(CHUNK)]
    )
    dweight_KD = torch.zeros(len(vocab_K), hidden_TD.shape[1], dtype=torch.float64, device=device)
    for rows in torch.arange(T // problem["copies"], device=device).split(1024):
        dweight_KD += problem["copies"] * (
            dlogits(hidden_TD[rows], rows, vocab_K).T @ hidden_TD[rows]
        )
    return {"rows": rows_R, "dhidden": dhidden_RD, "vocab": vocab_K, "dweight": dweight_KD}


def eager_errors(problem: dict, mode: str, truth: dict | None) -> dict:
    """Errors of plain torch in the inputs' dtype, a chunk of rows at a time.

    What the "eager" provider's are, at sizes whose logits no memory holds: logits rounded to the
    dtype, float32 log_softmax, dlogits rounded to the dtype, products of that dtype.
    """
    hidden_TD, weight_VD, targets_T = problem["hidden"], problem["weight"], problem["targets"]
    dtype, trains_weight = weight_VD.dtype, mode != "frozen"
    entropy_coef = streams(problem, mode)[3]
    columns_K = truth["vocab"] if truth else targets_T[:0]
    everywhere_V = torch.arange(len(weight_VD), device=weight_VD.device)

    def scores(rows):
        """(log-probabilities [C, V] in float32, entropy [C])."""
        logp_CV = (hidden_TD[rows] @ weight_VD.T).float().log_softmax(-1)
        return logp_CV, -(logp_CV.exp() * logp_CV).sum(-1)

    def dlogits(logp_CK, entropy_C, rows, columns):
        picked_CK = (columns.unsqueeze(0) == targets_T[rows].unsqueeze(1)).float()
        p_CK = logp_CK.exp()
        out_CK = g_T[rows].unsqueeze(1) * (picked_CK - p_CK)
        if entropy_coef:
            out_CK -= h_T[rows].unsqueeze(1) * p_CK * (logp_CK + entropy_C.unsqueeze(1))
        return out_CK.to(dtype)

    chunks = torch.arange(len(targets_T), device=weight_VD.device).split(CHUNK)
    logp, entropy, sampled = [], [], []
    for rows in chunks:
        logp_CV, entropy_C = scores(rows)
        logp.append(logp_CV.gather(1, targets_T[rows].unsqueeze(1)).squeeze(1))
        entropy.append(entropy_C)
        sampled.append(logp_CV[:, columns_K])
    logp_T, entropy_T = torch.cat(logp), torch.cat(entropy)
    out = errors(problem, mode, None, logp_T, None, None)
    if truth is None:
        return out
    g_T, h_T = upstream(problem, mode, "policy", logp_T, entropy_T)
    parts = []
    for rows in truth["rows"].split(CHUNK):
        parts.append(dlogits(*scores(rows), rows, everywhere_V) @ weight_VD)
    out["dhidden"] = relative_error(torch.cat(parts), truth["dhidden"])
    if trains_weight:
        dlogits_TK = torch.cat(
            [
                dlogits(logp_CK, entropy_T[rows], rows, columns_K)
                for logp_CK, rows in zip(sampled, chunks, strict=True)
            ]
        )
        out["dweight"] = relative_error(dlogits_TK.T @ hidden_TD, truth["dweight"])
    return out


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """||value - truth|| / ||truth|| in float64; NaN where the value has one."""
    return ((value.double() - truth).norm() / truth.norm()).item()


def errors(problem: dict, mode: str, truth: dict | None, logp_T, dhidden_TD, dweight_VD) -> dict:
    """Errors against float64 by output; None for what the provider does not return."""
    kept_T = streams(problem, mode)[2] > 0
    truth_T = problem["truth_logp"]
    near_one_T = kept_T & (truth_T > -0.01)

    def row_error(rows_T):
        if logp_T is None or not rows_T.any():
            return None
        return relative_error(logp_T[rows_T], truth_T[rows_T])

    out = {
        "logp": row_error(kept_T),
        "logp_near_one": row_error(near_one_T),
        "dhidden": None,
        "dweight": None,
    }
    if truth is not None and dhidden_TD is not None:
        out["dhidden"] = relative_error(dhidden_TD[truth["rows"]], truth["dhidden"])
    if truth is not None and dweight_VD is not None:
        out["dweight"] = relative_error(dweight_VD[truth["vocab"]], truth["dweight"])
    return out
