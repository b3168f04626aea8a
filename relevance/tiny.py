"""The offline default model: a small Qwen3-style language model with random weights, and its byte-level tokenizer.

    make_tiny(folder, texts, ModelConfig())        writes tokenizer and model; nothing is downloaded

A digit never merges with a neighbour, so each label is one token; tags and rule ids are ordinary added tokens, because special
ones vanish when a completion is decoded. The model is saved before it is trained: TRL loads its reference model from the folder
that the config names. Sizes are ours; the architecture is Qwen3's, arXiv:2505.09388.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recis.errors import ConfigError
from relevance.labels import TAGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model to train: a folder or hub name, or, without one, the size of the tiny model."""

    path: str | None = None
    """A Hugging Face causal language model; None makes a tiny one."""
    num_layers: int = 6
    hidden_size: int = 256
    vocab_size: int = 4096
    """Largest vocabulary of the tiny model's tokenizer; small corpora give less."""
    context: int = 1024
    lora_rank: int = 0
    """Rank of LoRA adapters on attention and MLP, never on the head; 0 trains all weights."""
    chat_template: bool = False
    """Render prompts with the tokenizer's chat template."""

    def __post_init__(self) -> None:
        if self.hidden_size % 64 or self.num_layers < 1:
            raise ConfigError(
                f"model: hidden_size must be a multiple of 64 (heads of 32, two of them for keys) and num_layers at least 1; "
                f"got {self.hidden_size}, {self.num_layers}"
            )
        if self.vocab_size < 400 or self.lora_rank < 0 or self.context < 64:
            raise ConfigError(
                f"model: vocab_size at least 400 (256 bytes and the tags), lora_rank at least 0, context at least 64; got "
                f"{self.vocab_size}, {self.lora_rank}, {self.context}"
            )


def make_tokenizer(texts: Iterable[str], *, vocab_size: int, rule_ids: Iterable[str] = ()) -> "PreTrainedTokenizerFast":
    """Return a byte-level BPE tokenizer learned from texts, with the tags and rule ids as whole tokens.

    Args:
        texts: prompts and completions of the train part.
        vocab_size: upper limit, added tokens included.
        rule_ids: become tokens of their own.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    added = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")] + sorted(rule_ids)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    learner = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, learner)
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_tiny(
    folder: str | Path, texts: Iterable[str], config: ModelConfig, *, rule_ids: Iterable[str] = (), seed: int = 0
) -> Path:
    """Write a fresh tiny model with its tokenizer into a folder and return the folder.

    Args:
        folder: made where it is missing.
        texts: what the tokenizer is learned from.
        config: sizes.
        rule_ids: see `make_tokenizer`.
        seed: of the weights.
    """
    import torch
    from transformers import Qwen3ForCausalLM

    tokenizer = make_tokenizer(texts, vocab_size=config.vocab_size, rule_ids=rule_ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(_qwen3(config, tokenizer))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    target = Path(folder)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def _qwen3(config: ModelConfig, tokenizer: Any) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),  # no rows without a token: sampled, they would spell nothing
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.hidden_size // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
