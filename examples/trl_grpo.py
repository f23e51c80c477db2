"""TRL's GRPOTrainer, plain and patched: the same losses from the same seeds."""

import tempfile
import time

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer

import r1kernels

words = {word: at for at, word in enumerate(["<pad>", "<eos>", *map(chr, range(32, 127))])}
chars = Tokenizer(models.BPE(vocab=words, merges=[]))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=chars, pad_token="<pad>", eos_token="<eos>")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 8192}
OPTIONS = {"max_steps": 3, "num_iterations": 2, "logging_steps": 1, "max_completion_length": 24}
OPTIONS |= {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}


def train(folder):
    set_seed(0)
    trainer = GRPOTrainer(
        model=Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        reward_funcs=lambda completion_ids, **_: [len(ids) + ids[0] % 7 for ids in completion_ids],
        args=GRPOConfig(folder, num_generations=4, per_device_train_batch_size=8, **OPTIONS),
        train_dataset=Dataset.from_dict({"prompt": ["1 + 1 =", "Count to three:"] * 8}),
        processing_class=tokenizer,
    )
    began = time.perf_counter()
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    found = ", ".join(f"{row['loss']:.6f} ({row['grad_norm']:.5f})" for row in rows)
    return f"{time.perf_counter() - began:.2f} s, losses (gradient norms) {found}"


with tempfile.TemporaryDirectory() as folder:
    print("TRL:    ", train(folder))
    with r1kernels.patch("trl") as places:
        print("patched:", train(folder), f"({len(places)} places, e.g. {places[0]})")
