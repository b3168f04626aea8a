"""A causal language model with its tokenizer, checked for what grading needs.

    lm = load_language_model("runs/sft/final")
    lm.label_ids, lm.token_bytes(ids), lm.num_tokens(text)

Checked on loading: an eos and a pad token, and labels that are single, distinct tokens behind a prompt. Adapters of PEFT are
merged, so scoring and generation see one ordinary model.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from recis.errors import ConfigError
from relevance.prompts import HEADER
from relevance.scoring import label_ids
from relevance.steps import byte_level_bytes, incremental_bytes

PROBE = f"{HEADER}\nquery: red shoes\nitem: blue shoes\nlabel:\n"


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """Model, tokenizer, and the ids that grading asks for."""

    model: Any
    tokenizer: Any
    label_ids: tuple[int, int, int, int]
    """Token ids of the labels 1 to 4."""
    eos_ids: tuple[int, ...]
    """Tokens that end a completion; the tokenizer's own first."""
    render: Callable[[str], str]
    """Wraps a prompt in the chat template, where one is used."""
    _bytes: dict[int, bytes] = field(default_factory=dict, repr=False)

    def encode(self, text: str) -> list[int]:
        """Return token ids without added special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def num_tokens(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a completion without its eos."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every token spells its bytes."""
        try:
            for token in self.tokenizer.get_vocab():
                if token not in self.tokenizer.all_special_tokens:
                    byte_level_bytes(token)
        except ValueError:
            return False
        return True

    def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes that each sampled token adds to the text; b"" for special tokens."""
        special = set(self.tokenizer.all_special_ids)
        if not self.is_byte_level:
            return incremental_bytes(self.decode, ids)
        for number in set(ids) - self._bytes.keys():
            token = "" if number in special else self.tokenizer.convert_ids_to_tokens(number)
            self._bytes[number] = byte_level_bytes(token or "")  # rows that only pad the unembedding spell nothing
        return [self._bytes[number] for number in ids]


def wrap(
    model: Any, tokenizer: Any, *, chat_template: bool = False, name: str = "the model", probe: str = PROBE
) -> LanguageModel:
    """Return a loaded model as one that grades.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; a missing pad token becomes the eos token.
        chat_template: render prompts with the tokenizer's chat template.
        name: how errors call the model.
        probe: a prompt of the task; the label digits are checked behind it.

    Raises:
        ConfigError: no eos token, or a chat template is asked for and there is none.
        DataError: a label is no single, distinct token behind a prompt.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{name}: its tokenizer has no eos token, so no answer could end; set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    render = _chat_renderer(tokenizer, name) if chat_template else _as_it_is
    declared = model.generation_config.eos_token_id
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    eos = (tokenizer.eos_token_id, *(number for number in declared if number != tokenizer.eos_token_id))

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return LanguageModel(
        model=model, tokenizer=tokenizer, label_ids=label_ids(encode, render(probe)), eos_ids=eos, render=render
    )


def load_language_model(
    path: str | Path, *, dtype: str = "float32", chat_template: bool = False, device: str | None = None
) -> LanguageModel:
    """Return the model of a folder, or of a hub name, in eval mode.

    Args:
        path: written by a recipe, or any causal language model; a PEFT adapter is merged into its base.
        dtype: "float32" or "bfloat16".
        chat_template: see `wrap`.
        device: None takes a GPU where there is one.

    Raises:
        ConfigError: the folder holds no model.
        DataError: see `wrap`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = Path(path)
    if where.is_dir() and not any((where / name).exists() for name in ("config.json", "adapter_config.json")):
        raise ConfigError(
            f"--model {path}: no config.json in this folder; give the folder `final` of a run, or a model"
        )
    if not where.exists() and (str(path).startswith(("/", ".")) or str(path).count("/") > 1):
        raise ConfigError(f"--model {path}: no such folder")
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if (where / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(str(path), dtype=kind).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=kind)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    model = cast(Any, model).to(place).eval()
    return wrap(model, tokenizer, chat_template=chat_template, name=f"model {path}")


def model_hash(path: str | Path) -> str:
    """Return the sha256 over the weight files of a folder, in hex; of its name where it is no folder."""
    digest = hashlib.sha256()
    folder = Path(path)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        digest.update(str(path).encode())
    for name in files:
        with name.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _as_it_is(prompt: str) -> str:
    return prompt


def _chat_renderer(tokenizer: Any, name: str) -> Callable[[str], str]:
    if tokenizer.chat_template is None:
        raise ConfigError(f"{name}: its tokenizer has no chat template; set model.chat_template=false, or give it one")

    def render(prompt: str) -> str:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    return render
