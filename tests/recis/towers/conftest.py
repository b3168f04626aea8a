"""Tiny random models and a word tokenizer, made once: transformers takes seconds to import."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(40)))
SIZES = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}
DECODER = {**SIZES, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
BART = {f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in ("layers", "attention_heads", "ffn_dim")}


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """Return makers of tiny models: `qwen3`, `llama`, `bert` (changes of the config as keywords), and `tokenizer`."""
    transformers = pytest.importorskip("transformers")

    def made(config: str, model: str, sizes: dict[str, Any]) -> Any:
        def make(**changes: Any) -> Any:
            torch.manual_seed(0)
            return getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **changes})).eval()

        return make

    return SimpleNamespace(
        qwen3=made("Qwen3Config", "Qwen3ForCausalLM", DECODER),
        llama=made("LlamaConfig", "LlamaForCausalLM", DECODER),
        olmo2=made("Olmo2Config", "Olmo2ForCausalLM", {**DECODER, "head_dim": 4}),
        gemma3=made("Gemma3TextConfig", "Gemma3ForCausalLM", DECODER),
        gpt2=made("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 44, "n_embd": 16, "n_layer": 2, "n_head": 2}),
        phi3=made("Phi3Config", "Phi3ForCausalLM", {**SIZES, **LAYERS, "pad_token_id": 0}),
        bart=made("BartConfig", "BartForConditionalGeneration", {"vocab_size": 44, "d_model": 16, **BART}),
        bert=made("BertConfig", "BertModel", {**SIZES, **LAYERS}),
        tokenizer=lambda: word_tokenizer(WORDS),
        words=WORDS,
    )  # fmt: skip


def word_tokenizer(words: tuple[str, ...]) -> Any:
    """Return a tokenizer of whole words, with [CLS] and [SEP] around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="session")
def bert_folder(tiny, tmp_path_factory) -> Path:
    """A tiny encoder and its tokenizer in a folder."""
    folder = tmp_path_factory.mktemp("bert")
    tiny.bert().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen3_folder(tiny, tmp_path_factory) -> Path:
    """A tiny decoder and its tokenizer in a folder."""
    folder = tmp_path_factory.mktemp("qwen3")
    tiny.qwen3().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder
