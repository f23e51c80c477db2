import copy
import inspect

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.kernels import chunked_logprob
from trl.trainer import utils

import r1kernels
from r1kernels import dropin
from r1kernels.check import IGNORE
from tests.dropin.heads import assert_each_no_worse, evaluate, full, make
from tests.numerics import assert_no_worse, relative_error

OUTPUTS = ("log_probs", *chunked_logprob.OPTIONAL_OUTPUTS)
NAMES = ("logp", *chunked_logprob.OPTIONAL_OUTPUTS)
HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"temperature": 1.3, "softcap": 5.0},
    "scaled": {"temperature": 0.7, "softcap": 8.0, "logit_scale": 0.6},
}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    "name",
    [
        "add_fused_lm_head",
        "entropy_from_logits",
        "selective_log_softmax",
        "selective_log_softmax_and_entropy",
    ],
)
def test_signatures(name):
    theirs, ours = (inspect.signature(getattr(x, name)).parameters for x in (utils, dropin))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


def test_signature_of_the_function():
    theirs = inspect.signature(chunked_logprob.ChunkedLogProbFunction.forward).parameters
    ours = inspect.signature(dropin.ChunkedLogProbFunction.apply).parameters
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in theirs.values()
    ][1:]


def chunked(cls, temperature=1.0, softcap=None, logit_scale=1.0):
    def fn(hidden, weight, targets, bias):
        out = cls.apply(
            hidden, weight, bias, targets, temperature, 128, softcap, logit_scale, OUTPUTS
        )
        assert not any(x.requires_grad for x in out[2:])
        return dict(zip(NAMES, out, strict=True))

    return fn


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_function(dtype, head, bias, frozen):
    inputs = make((37,), 24, 501, dtype, bias)
    options = HEADS[head]
    truth = evaluate(full(**options, wanted=NAMES), inputs, torch.float64, frozen)
    theirs = evaluate(
        chunked(chunked_logprob.ChunkedLogProbFunction, **options), inputs, None, frozen
    )
    ours = evaluate(chunked(dropin.ChunkedLogProbFunction, **options), inputs, None, frozen)
    assert ours["is_top1"].any() and not ours["is_top1"].all()
    if dtype == torch.bfloat16:
        # Rounded logits tie where the real ones do not.
        ours["is_top1"] = truth["is_top1"] = theirs["is_top1"]
    assert_each_no_worse(ours, theirs, truth)


def test_outputs_that_are_not_asked_for_are_none():
    hidden, weight, targets, bias = make((5,), 8, 17, torch.float32)
    for asked in ((), ("entropy",), ("mean_logits",), ("is_top1",), ("log_sum_sq_probs",)):
        out = dropin.ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, 1.0, 8, None, 1.0, asked
        )
        given = [name for name, x in zip(NAMES, out, strict=True) if x is not None]
        assert given == ["logp", *asked]


def test_the_first_of_equal_logits_is_the_top_one():
    weight = torch.randn(40, 8)
    weight[30] = weight[3]
    hidden = 5 * weight[3].expand(2, 8)
    out = [
        cls.apply(hidden, weight, None, torch.tensor([3, 30]), 1.0, 16)[4].tolist()
        for cls in (chunked_logprob.ChunkedLogProbFunction, dropin.ChunkedLogProbFunction)
    ]
    assert out == [[True, False]] * 2


def test_rows_that_do_not_count_and_no_rows():
    hidden, weight, targets, _ = make((6,), 8, 17, torch.float32)
    targets[2] = IGNORE
    for rows in (slice(None), slice(0, 0)):
        out = dropin.ChunkedLogProbFunction.apply(
            hidden[rows], weight, None, targets[rows], 1.0, 8, 4.0
        )
        for x in out:
            assert x.shape == targets[rows].shape
            assert not x[targets[rows] == IGNORE].any()


def test_autocast_computes_in_its_dtype():
    hidden, weight, targets, _ = make((9,), 16, 50, torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dropin.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32)
    rounded = dropin.ChunkedLogProbFunction.apply(
        hidden.bfloat16(), weight.bfloat16(), None, targets, 1.0, 32
    )
    assert torch.equal(out[0], rounded[0])
    out[0].sum().backward()
    assert weight.grad.dtype == torch.float32


def test_a_trainable_weight_under_zero3_is_refused():
    hidden, weight, targets, _ = make((4,), 8, 17, torch.float32)
    weight = torch.nn.Parameter(weight)
    weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3"):
        dropin.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8)
    weight.requires_grad_(False)
    assert (
        dropin.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8)[0]
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("K", [0, 3])
def test_selective_log_softmax(dtype, masked, K):
    logits = (torch.randn(2, 5, 40) * 4).to(dtype)
    index = torch.randint(0, 40, (2, 5, K) if K else (2, 5))
    mask = (torch.rand(index.shape) > 0.4).long() if masked else None

    def run(fn, x):
        x = x.detach().clone().requires_grad_()
        out = fn(x, index, 0.8, mask)
        (grad,) = torch.autograd.grad((out * torch.arange(out.numel()).view_as(out)).sum(), x)
        return out, grad

    truth = run(utils.selective_log_softmax, logits.double())
    theirs = run(utils.selective_log_softmax, logits)
    ours = run(dropin.selective_log_softmax, logits)
    for name, *three in zip(("logp", "dlogits"), ours, theirs, truth, strict=True):
        assert_no_worse(*three, name=name)
    # TRL's GPU kernel takes int32.
    assert dropin.selective_log_softmax(logits, index.int(), 0.8, mask).equal(ours[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_entropy(dtype):
    logits = (torch.randn(2, 5, 40) * 4).to(dtype)
    index = torch.randint(0, 40, (2, 5))
    three = []
    for module, x in ((dropin, logits), (utils, logits), (utils, logits.double())):
        x = x.detach().clone().requires_grad_()
        logp, entropy = module.selective_log_softmax_and_entropy(x, index, temperature=0.8)
        plain = module.entropy_from_logits(x, chunk_size=3)
        total = (logp * 0.3).sum() + (entropy * 0.2).sum() + plain.sum()
        three.append((logp, entropy, plain, *torch.autograd.grad(total, x)))
    for name, *parts in zip(("logp", "entropy", "plain", "dlogits"), *three, strict=True):
        assert_no_worse(*parts, name=name)


def test_entropy_without_gradient_and_masked():
    logits, mask = torch.randn(3, 9, requires_grad=True), torch.tensor([1, 0, 1])
    logp, entropy = dropin.selective_log_softmax_and_entropy(
        logits, torch.zeros(3, dtype=torch.int64), entropy_requires_grad=False, row_mask=mask
    )
    assert logp.requires_grad and not entropy.requires_grad
    assert logp[1] == 0 and entropy[1] == 0 and entropy[0] > 0


def tiny(kind):
    torch.manual_seed(1)
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    if kind == "gemma2":
        return Gemma2ForCausalLM(
            Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0, sliding_window=16)
        )
    if kind == "cohere":
        return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25))
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            output_router_logits=True,
        )
    )


@pytest.mark.parametrize("side", ["left", "right", "shifted"])
@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "cohere", "qwen3_moe"])
def test_fused_head_of_a_model(kind, side):
    model = tiny(kind)
    twin = copy.deepcopy(model)
    utils.add_fused_lm_head(model, 0.7, outputs=OUTPUTS)
    dropin.add_fused_lm_head(twin, 0.7, outputs=OUTPUTS)
    ids = torch.randint(0, 61, (3, 9))
    column = torch.arange(9)
    length = torch.tensor([9, 5, 7])[:, None]
    mask = column >= 9 - length if side == "left" else column < length
    labels = {"labels": ids.masked_fill(~mask, IGNORE)}
    if side == "shifted":
        labels = {"shift_labels": torch.where(mask, ids.roll(-1, 1), IGNORE)}
    found = []
    for lm in (model, twin):
        out = lm(ids, attention_mask=mask.long(), fused_lm_head=True, **labels)
        (out.loss + 0.1 * out.entropy.mean()).backward()
        found.append((out, [p.grad for p in lm.parameters()]))
    (theirs, their_grads), (ours, our_grads) = found
    assert theirs.keys() == ours.keys() and (ours.aux_loss is None) == (kind != "qwen3_moe")
    for name, value in theirs.items():
        assert relative_error(ours[name].float(), value.float()) < 1e-5, name
    for a, b in zip(our_grads, their_grads, strict=True):
        assert relative_error(a, b) < 2e-5
    # Without the flag it is the model's own forward.
    assert torch.equal(twin(ids).logits, model(ids).logits)


CHARACTERS = "0123456789+=? "


def tokenizer():
    words = {word: at for at, word in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=words, merges=[])),
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
    )


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters()})


COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    # Adam would divide the smallest gradients by themselves, rounding and all.
    "optim": "sgd",
    "learning_rate": 0.3,
    "max_steps": 3,
    "logging_steps": 1,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def logged(trainer):
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def assert_same_run(theirs, ours):
    (rows, steps), (our_rows, our_steps) = theirs, ours
    assert len(steps) == len(our_steps) == 3
    for theirs, ours in zip(rows, our_rows, strict=True):
        assert ours.keys() == theirs.keys()
        for name in set(ours) - {"step_time", "sampling_time", "mfu"}:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-6), name
    assert any(row["grad_norm"] > 0 for row in rows)
    for theirs, ours in zip(steps, our_steps, strict=True):
        scale = max(grad.abs().max() for grad in theirs.values())
        for name, grad in theirs.items():
            assert (ours[name] - grad).abs().max() < 1e-5 * scale, name


def train(kind, folder, **options):
    """The logged rows and every step's gradients of a short run."""
    # From a folder: the reference model is loaded from where the policy came from.
    tiny(kind).save_pretrained(folder / "model")
    gradients = Gradients()
    trainer = GRPOTrainer(
        model=str(folder / "model"),
        processing_class=tokenizer(),
        reward_funcs=lambda completions, **_: [sum(map(str.isdigit, x)) for x in completions],
        train_dataset=Dataset.from_dict({"prompt": ["1+1=", "23+4=?", "7=", "100+200="] * 4}),
        callbacks=[gradients],
        args=GRPOConfig(
            output_dir=str(folder / "out"),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=10,
            **COMMON,
            **options,
        ),
    )
    return logged(trainer), gradients.steps


@pytest.mark.parametrize(
    "kind, options",
    [
        ("qwen2", {}),
        ("qwen2", {"beta": 0.1, "entropy_coef": 0.05, "temperature": 0.7, "num_iterations": 2}),
        ("gemma2", {"loss_type": "grpo", "top_entropy_quantile": 0.5}),
    ],
    ids=["plain", "kl_entropy_bonus", "softcap_entropy_mask"],
)
def test_a_patched_trainer_is_the_same_trainer(kind, options, tmp_path):
    rows, steps = train(kind, tmp_path / "theirs", **options)
    original = utils.selective_log_softmax
    with r1kernels.patch("trl") as places:
        assert "trl.trainer.grpo_trainer.add_fused_lm_head" in places
        assert "trl.trainer.utils._ChunkedLogProbFunction" in places
        our_rows, our_steps = train(kind, tmp_path / "ours", **options)
    assert utils.selective_log_softmax is original
    assert all(("kl" in row) == ("beta" in options) for row in our_rows)
    assert_same_run((rows, steps), (our_rows, our_steps))


def train_offline(name, folder):
    prompts, right, wrong = (
        ["1+1=", "23+4=", "7+8="] * 4,
        ["2", "27", "15"] * 4,
        ["3", "2", "1"] * 4,
    )
    torch.manual_seed(0)
    gradients = Gradients()
    given = {
        "model": tiny("gemma2"),
        "processing_class": tokenizer(),
        "callbacks": [gradients],
    }
    options = {"output_dir": str(folder), "per_device_train_batch_size": 4, **COMMON}
    if name == "sft":
        data = Dataset.from_dict({"prompt": prompts, "completion": right})
        trainer = SFTTrainer(args=SFTConfig(**options), train_dataset=data, **given)
    else:
        data = Dataset.from_dict({"prompt": prompts, "chosen": right, "rejected": wrong})
        given["ref_model"] = tiny("gemma2")
        trainer = DPOTrainer(args=DPOConfig(**options), train_dataset=data, **given)
    return logged(trainer), gradients.steps


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_other_trainers(name, tmp_path):
    theirs = train_offline(name, tmp_path / "theirs")
    with r1kernels.patch("trl"):
        ours = train_offline(name, tmp_path / "ours")
    assert_same_run(theirs, ours)
