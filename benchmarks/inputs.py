"""What both sides of a comparison start from: one tokenizer, one model folder, one file of rows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VOCABULARY = 16384
SEQUENCE = 512
BATCH = 8
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML with generation marks; nothing follows the turn's end, so that every side trains the same tokens."""

SHAPE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
"""33.8 M parameters with the vocabulary and tied embeddings."""

SMALL_SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
"""7.4 M parameters, for processors without bf16 instructions."""

LARGE_SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
"""1.24 B parameters, for a GPU: Llama 3.2 1B's, whose vocabulary is larger than the tokenizer's."""


def data_folder() -> Path:
    folder = os.environ.get("LITRECIPES_DATA")
    if not folder or not Path(folder).is_dir():
        raise SystemExit("benchmarks: set LITRECIPES_DATA to the folder that holds dolly/ and books/")
    return Path(folder)


def dolly_rows() -> list[dict[str, str]]:
    lines = (data_folder() / "dolly" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return [{"instruction": r["instruction"].strip(), "response": r["response"].strip()} for r in rows]


def preference_pairs() -> list[dict[str, Any]]:
    """hh-rlhf's helpful pairs as messages (``prompt``, ``chosen``, ``rejected``), without those that are no pairs."""
    from llm_modules.data.preferences import preference_pair
    from llm_modules.data.sources import Row

    path = data_folder() / "hh_rlhf" / "helpful-base.jsonl"
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            pair = preference_pair(Row(json.loads(line), path.name, number))
        except ValueError:
            continue
        found.append({"prompt": pair.prompt, "chosen": [pair.chosen], "rejected": [pair.rejected]})
    return found


def maths_questions() -> list[dict[str, str]]:
    """gsm8k's training questions of at most 400 characters, with their worked answers."""
    lines = (data_folder() / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{"prompt": row["question"], "reference": row["answer"]} for row in rows if len(row["question"]) <= 400]


def book_text() -> str:
    return "\n\n".join(p.read_text(encoding="utf-8") for p in sorted((data_folder() / "books").glob("*.txt")))


def write_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """A byte-level BPE tokenizer trained on ``texts``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from llm_modules.tokenizer import SPECIAL_TOKENS, wrap_tokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS), min_frequency=0, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = wrap_tokenizer(bpe)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = SEQUENCE
    tokenizer.save_pretrained(folder)


def write_weights(folder: Path, shape: dict[str, int]) -> None:
    """A Llama with seeded random weights beside its tokenizer, as a HF folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        **{"num_key_value_heads": shape["num_attention_heads"], "vocab_size": VOCABULARY} | shape,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(1234)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.float().save_pretrained(folder)
