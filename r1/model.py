"""A causal language model as the trainer sees it: packed tokens in, hidden states out, one head."""

from __future__ import annotations

import contextlib
import copy
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from r1 import attention, folders, kernels, toy
from r1.folders import load_tokenizer
from r1kernels.host_store import HostStore
from r1kernels.model_shape import position_limit
from r1kernels.offloaded_checkpoint import checkpoint_layers
from r1kernels.shared_prefixes import SharedPrefixes
from r1kernels.stream_model import stream_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from r1.config import Long, Model

# largest difference, relative to the largest value: of the model's logits from our head's, and of a
# packed sequence from one alone
HEAD_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class Head:
    """What turns a hidden state into logits: softcap(logit_scale * (hidden @ weight.T + bias))."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] float32. For sampling and checks; training never makes them."""
        z = torch.nn.functional.linear(hidden, self.weight, self.bias).float() * self.logit_scale
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z


class CausalLM:
    """A transformers model, its tokenizer, and the two halves the kernels want.

    `module` is the transformers model (parameters, train/eval); its attention takes a plan, so it
    is called through `hidden` and not directly. `kernels` says what of other libraries runs in it.
    """

    def __init__(self, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.module = module
        self.tokenizer = tokenizer
        self.text_config = module.config.get_text_config()
        # whether every layer sees all of a sequence's past
        self.sees_all = True
        self.kernels: dict[str, str] = {}
        self._way: tuple[str, Long | None] = "plain", None
        self._checkpointed = self._stream = None

    def use(self, mode: str, settings: Long) -> None:
        """Compute `hidden`, with and without gradients, this way from now on.

        Args:
            mode: one of `r1kernels.memory.MODES`; with "+offload" the inputs of layers wait in
                host memory, but for settings.device_gib of them.
            settings: the [long] section.

        Raises: ValueError that names the module when "stream" does not recognise the model.
        """
        way, _, offload = mode.partition("+")
        if self._checkpointed is not None:
            self._checkpointed.undo()
        self._checkpointed = self._stream = None
        self._way = mode, settings
        if way == "plain":
            return
        kept = int((settings.device_gib or 0) * 2**30) if offload else 2**62
        if way == "checkpoint":
            self._checkpointed = checkpoint_layers(
                self.module, device_bytes=kept, save_attention=settings.save_attention
            )
        else:
            self._stream = stream_model(
                self.module,
                chunk_size=settings.chunk_size,
                store=HostStore(kept) if offload else None,
                save_attention=settings.save_attention,
            )

    def frozen_copy(self) -> CausalLM:
        """A copy without gradients that computes hidden states the same way."""
        copied = CausalLM(copy.deepcopy(self.module), self.tokenizer)
        copied.module.requires_grad_(False).eval()
        if self._stream is not None:
            copied.use(*self._way)
        return copied

    @property
    def shares_prefixes(self) -> bool:
        """Whether batches may have shared prompts once."""
        return self.sees_all and self._stream is None

    @property
    def device(self) -> torch.device:
        return self.head_module.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head_module.weight.dtype

    @property
    def head_module(self) -> torch.nn.Linear:
        return self.module.get_output_embeddings()

    @property
    def max_length(self) -> int:
        """Longest sequence, prompt and completion together."""
        return position_limit(self.text_config) or 2**31 - 1

    @property
    def head(self) -> Head:
        config, linear = self.text_config, self.head_module
        scale = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(linear.weight, linear.bias, softcap, float(scale) / float(divisor))

    def hidden(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Hidden states before the head of packed sequences that do not see each other.

        Args:
            tokens: [T] int64.
            cu_seqlens: [B + 1] integers from 0 to T, strictly rising.

        Returns: [T, D] in the model's dtype; row t predicts token t + 1 of its sequence.
        Raises: ValueError when the sequences do not tile the tokens, or one is empty or longer than
            max_length.
        """
        bounds = cu_seqlens.tolist()
        if tokens.ndim != 1 or bounds[0] != 0 or bounds[-1] != len(tokens):
            raise ValueError(
                f"cu_seqlens must run from 0 to T: tokens {tuple(tokens.shape)}, "
                f"got {bounds[:1]}..{bounds[-1:]}"
            )
        lengths = [stop - start for start, stop in pairwise(bounds)]
        if not lengths or min(lengths) < 1 or max(lengths) > self.max_length:
            raise ValueError(
                f"sequences must have 1 to {self.max_length} tokens, got lengths {lengths[:8]}"
            )
        if self._stream is not None:
            return self._stream(tokens, cu_seqlens=torch.tensor(bounds))
        return self.run(tokens, attention.PackedPlan(lengths, tokens.device))

    def shared_hidden(self, tokens: Tensor, layout: SharedPrefixes) -> Tensor:
        """Hidden states before the head that predict the completions of a batch whose prompts are
        there once, [R, D] in the order of `layout.rows`.

        Args:
            tokens: [T] int64.
            layout: of these tokens, on the model's device.

        Raises: ValueError when the layout is of other tokens, a sequence is longer than max_length
            or a layer does not see all of it.
        """
        layout.check_tokens("tokens", tokens)
        if layout.longest > self.max_length:
            raise ValueError(
                f"sequences must have 1 to {self.max_length} tokens, got one of {layout.longest}"
            )
        return layout.head_rows(self.run(tokens, attention.SharedPlan(layout)))

    def run(self, tokens_T: Tensor, plan) -> Tensor:
        """Hidden states [T, D] of one row of tokens that attend as `plan` says."""
        out = self.module.base_model(
            input_ids=tokens_T[None], position_ids=plan.positions[None], use_cache=False, plan=plan
        )
        return out.last_hidden_state[0]

    def sync_state(self) -> dict[str, Tensor]:
        """Every weight by name, the head under its own name even where it is tied to the embedding.

        A sampler may keep a packed copy of the head that the embedding's name does not reach.
        """
        state = {name: tensor.detach() for name, tensor in self.module.state_dict().items()}
        state.setdefault("lm_head.weight", self.head_module.weight.detach())
        return state

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write weights, configurations and tokenizer as a transformers model folder."""
        with folders.no_progress_bars():
            self.module.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load(
    config: Model,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    template: str = "{question}",
) -> CausalLM:
    """Load a causal language model, or build the embedded one.

    Args:
        config: the [model] section; path "toy" builds a new embedded model with random weights, a
            run directory stands for its newest checkpoint.
        device: where the weights go.
        seed: of the embedded model's weights; the global generator is left as it was.
        template: chat template of the embedded model's tokenizer.

    Raises: FileNotFoundError for a folder that is not there; ValueError for a model that is not a
        causal language model, has no end-of-sequence token, has dropout in its attention, or
        whose layers or head have a form that is not supported.
    """
    attention.register()
    dtype = getattr(torch, config.dtype)
    if config.path == "toy":
        lm = CausalLM(*toy.build_model(config.toy, template, dtype, attention.NAME, seed))
    else:
        lm = _load_folder(config, dtype)
    lm.module.to(device)
    where = torch.device(device)
    lm.kernels["Liger"] = kernels.apply_liger(lm.module, config.kernels, where)
    lm.kernels["attention"] = kernels.select_attention(config.kernels, where, dtype)
    _check(lm, config.path)
    return lm


def _load_folder(config: Model, dtype: torch.dtype) -> CausalLM:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    path = folders.resolve(config.path)
    try:
        # a download takes minutes, and its bar is all there is to see
        with folders.no_progress_bars() if Path(path).is_dir() else contextlib.nullcontext():
            module = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=attention.NAME,
                trust_remote_code=config.trust_remote_code,
            )
    except OSError as error:
        raise FileNotFoundError(
            f"model.path {config.path!r} is no model folder or hub id: {error}"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"corrupt weights of model.path {config.path!r}: {error}") from error
    if not getattr(module, "_supports_attention_backend", False):
        raise ValueError(
            f"{type(module).__name__} does not take other attention functions: not supported"
        )
    return CausalLM(module, load_tokenizer(path, trust_remote_code=config.trust_remote_code))


def _check(lm: CausalLM, path: str) -> None:
    if lm.tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path!r} has no end-of-sequence token")
    if dropout := getattr(lm.text_config, "attention_dropout", None):
        # old and new log-probabilities have to be those of one function
        raise ValueError(
            f"model.path {path!r}: attention_dropout is {dropout}, which is not supported: set it "
            "to 0 in its config.json"
        )
    # spread over the vocabulary: the first tokens may be special, with embeddings of zero
    tokens_T = torch.arange(1, 5, device=lm.device) * (lm.text_config.vocab_size // 5)
    plan = attention.PackedPlan([4], lm.device)
    was_training = lm.module.training
    lm.module.eval()
    with torch.no_grad():
        hidden_TD = lm.run(tokens_T, plan)
        ours_TV = lm.head.logits(hidden_TD)
        second_TD = lm.run(
            torch.cat([tokens_T.flip(0), tokens_T]), attention.PackedPlan([4, 4], lm.device)
        )[4:]
        theirs_TV = (
            lm.module(
                input_ids=tokens_T[None],
                position_ids=plan.positions[None],
                use_cache=False,
                plan=plan,
            )
            .logits[0]
            .float()
        )
    lm.module.train(was_training)
    lm.sees_all = not plan.restricted
    leak = (second_TD - hidden_TD).abs().max() / hidden_TD.abs().max().clamp_min(1e-6)
    if not leak <= HEAD_TOLERANCE[lm.dtype]:
        raise ValueError(
            f"{type(lm.module).__name__}: a packed sequence changes the next one by {leak:.1e} "
            "relative: it has layers other than attention that mix tokens, which are not supported"
        )
    gap = (ours_TV - theirs_TV).abs().max() / theirs_TV.abs().max().clamp_min(1e-6)
    if not gap <= HEAD_TOLERANCE[lm.dtype]:
        raise ValueError(
            f"{type(lm.module).__name__}: its logits are not head(hidden states), they differ by "
            f"{gap:.1e} relative: its head has a form that is not supported"
        )
