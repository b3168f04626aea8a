"""TextTower: any Hugging Face encoder or decoder by local path as a dense feature of a ranker.

    text or token ids [B bags] -> backbone -> states [B, T, H] -> pooling [B, H] -> projection -> [B, out_width]

The column lies in `batch.extras` (FeatureSpec kind "extra"): strings, which are tokenised in the step, or token ids, which the
reader's threads or a job before the training made (`TextTower.tokenize`). Frozen layers stay in evaluation mode and, if
nothing in the backbone trains, run without gradient. Weights stay float32; bf16 means autocast.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recis.errors import ConfigError, DataError, nearest
from recis.jagged import JaggedTensor
from recis.towers.backbone import attention_of, freeze, layers_of, load_model, load_tokenizer
from recis.towers.lora import add_lora
from recis.towers.micro_batches import in_passes
from recis.towers.optimizer import set_lr_scale
from recis.towers.pooling import MeanPool
from recis.towers.weights import FrozenState, frozen_state, state_hash

if TYPE_CHECKING:
    from recis.io.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTowerConfig:
    """A text tower and the column it reads."""

    name: str
    """Of the dense feature it makes."""
    column: str
    """In batch.extras: strings, or token ids."""
    path: str
    """Folder of the model; nothing is fetched."""
    tokenizer_path: str | None = None
    """Folder of the tokenizer; None: `path`."""
    out_width: int | None = None
    """Width of the projection; None: the model's own width, no projection."""
    pooling: Callable[[int], MeanPool] = MeanPool
    """Makes the pooling from the model's width: a class of recis.towers.pooling, or your own."""
    max_tokens: int = 64
    """Tokens of a text that are read, special ones included; the rest is cut and counted."""
    frozen_layers: int | None = None
    """The embeddings and this many first layers do not train; None: nothing of the backbone does, 0: all does."""
    lora_rank: int = 0
    """Above 0: LoRA on the attention's query and value projections; the other backbone weights are frozen."""
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin")
    """Names of the linear layers that LoRA wraps, those that the model has."""
    lr_scale: float = 0.1
    """Learning rate of the backbone as a share of the run's; needs recis.towers.optimizer.GroupedAdamW."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    bf16: bool = False
    """Run the backbone in bfloat16 autocast."""
    dropout: bool = True
    """Whether the layers that train drop what their folder's config says; False runs them as in evaluation."""
    micro_batch_tokens: int | None = None
    """Token places of one pass through the backbone (see recis.towers.micro_batches); None: a batch is one pass."""
    seed: int = 0
    """Of projection and pooling weights."""

    def __post_init__(self) -> None:
        where = f"text tower {self.name!r}"
        if self.max_tokens < 3:
            raise ConfigError(f"{where}: max_tokens must be at least 3; got {self.max_tokens}")
        if self.out_width is not None and self.out_width < 1:
            raise ConfigError(f"{where}: out_width must be at least 1 or None; got {self.out_width}")
        if self.frozen_layers is not None and self.frozen_layers < 0:
            raise ConfigError(f"{where}: frozen_layers must not be negative; got {self.frozen_layers}")
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            raise ConfigError(f"{where}: micro_batch_tokens must be at least 1 or None; got {self.micro_batch_tokens}")
        if not self.lr_scale >= 0 or self.lora_rank < 0:
            raise ConfigError(
                f"{where}: lr_scale and lora_rank must not be negative; got {self.lr_scale}, {self.lora_rank}"
            )
        if self.gradient_checkpointing and not self.dropout:
            raise ConfigError(
                f"{where}: a backbone as in evaluation keeps its activations; with dropout=False set micro_batch_tokens "
                "in place of gradient_checkpointing"
            )
        if self.lora_rank and self.frozen_layers is not None:
            raise ConfigError(f"{where}: with LoRA the backbone's own weights are frozen; leave frozen_layers at None")

    def build(self) -> "TextTower":
        """Return the tower with the folder's weights."""
        return TextTower(self)


class TextTower(nn.Module):
    """forward(batch) -> [B, width].

    Attributes:
        name: of the dense feature.
        width: of the output.
        counts: int64 [2], texts tokenised here that were empty, and texts that were cut.
        num_missing: samples so far whose text was missing: they give zeros, behind the projection too.

    Raises:
        BackboneError: see load_model and load_tokenizer.
        ConfigError: the model takes fewer than max_tokens tokens.
    """

    counts: Tensor

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.config, self.name = config, config.name
        self.model = load_model(config.path)
        self.tokenizer = load_tokenizer(config.tokenizer_path or config.path, self.model)
        self._check_length()
        self.hidden_size: int = self.model.config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.pooling = config.pooling(self.hidden_size)
            self.width = self.hidden_size if config.out_width is None else config.out_width
            self.projection = nn.Identity() if config.out_width is None else nn.Linear(self.hidden_size, self.width)
            freeze(self.model, None if config.lora_rank else config.frozen_layers)
            if config.lora_rank:
                add_lora(self.model, rank=config.lora_rank, targets=config.lora_targets)
        set_lr_scale(self.model, config.lr_scale)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.trains_backbone = any(value.requires_grad for value in self.model.parameters())
        self._frozen: FrozenState | None = None
        self.num_missing, self._empty = 0, list(self.tokenizer("")["input_ids"])
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64), persistent=False)

    def _check_length(self) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        own = getattr(self.config.pooling, "has_own_token", False)
        if limit is not None and self.config.max_tokens + own > limit:
            raise ConfigError(
                f"text tower {self.name!r}: max_tokens {self.config.max_tokens}{' and the summary token' if own else ''} "
                f"is more than the {limit} positions of the model"
            )

    def train(self, mode: bool = True) -> "TextTower":
        """Switch dropout on or off; frozen layers, and all where the config says so, keep it off."""
        super().train(mode)
        if mode and not (self.trains_backbone and self.config.dropout):
            self.model.eval()
        elif mode and self.config.frozen_layers:
            self.model.get_input_embeddings().eval()
            for layer in layers_of(self.model)[: self.config.frozen_layers]:
                layer.eval()
        return self

    def frozen_state(self) -> FrozenState:
        """Return which entries of state_dict() come from the folder and never change; checkpoints hold their hash instead."""
        if self._frozen is None:
            self._frozen = frozen_state(self.model, prefix="model.")
        return self._frozen

    def version(self) -> str:
        """Return what names the vectors of `encode`: a hash over weights, pooling, tokenizer and max_tokens. Reads them all."""
        pooling = self.config.pooling
        told = (
            state_hash(self.model.state_dict()),
            state_hash(self.pooling.state_dict()),
            getattr(pooling, "__qualname__", repr(pooling)),
            self.tokenizer_hash(),
            self.config.max_tokens,
            self.config.bf16,
        )
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def tokenizer_hash(self) -> str:
        """Return 64 hex digits that change with the tokenizer, whatever it was last called with."""
        if not self.tokenizer.is_fast:
            return hashlib.sha256(str(self.tokenizer.get_vocab()).encode()).hexdigest()
        parts = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for name in ("truncation", "padding"):  # of the last call, or of the file: not what the tower does
            parts.pop(name, None)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, at most max_tokens; what is cut and what is empty is counted.

        May be called from the reader's threads (the counts are then not exact).
        """
        if not texts:
            return []
        limit = self.config.max_tokens
        found = self.tokenizer(list(texts), add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        too_long = [index for index, ids in enumerate(found) if len(ids) > limit]
        if too_long:  # again, so that the special tokens at the end stay
            cut = self.tokenizer([texts[index] for index in too_long], truncation=True, max_length=limit)["input_ids"]
            for index, ids in zip(too_long, cut, strict=True):
                found[index] = ids
        empty = sum(not text.strip() for text in texts)
        self.counts += torch.tensor([empty, len(too_long)])
        return found

    def forward(self, batch: "Batch") -> Tensor:
        """Return [B, width] float32.

        Raises:
            ConfigError: the batch has no such column.
            DataError: a string is no UTF-8, or a token id is none of the model's.
        """
        column = batch.extras.get(self.config.column)
        if not isinstance(column, JaggedTensor):
            raise ConfigError(
                f"text tower {self.name!r}: batch.extras has no jagged column {self.config.column!r}; "
                f"{nearest(self.config.column, batch.extras)}"
            )
        ids = self._token_ids(column)
        return self.project(self.encode(ids)) * self._counted(self._has_text(ids))[:, None]

    def _has_text(self, ids: JaggedTensor) -> Tensor:
        """Return bool [B]: which bags have a token and are not what the tokenizer makes of an empty text."""
        empty = torch.tensor(self._empty, device=ids.device)
        found = ids.lengths > 0
        same = ids.lengths == len(empty)
        if len(empty) and bool(same.any()):
            starts = ids.offsets[:-1][same]
            tokens = ids.flat_values[starts[:, None] + torch.arange(len(empty), device=ids.device)]
            found[same] = (tokens != empty).any(1)
        return found

    def _counted(self, found: Tensor) -> Tensor:
        """Return bool [B] on the model's device, and count where it is False: a missing text gives zeros."""
        self.num_missing += len(found) - int(found.sum())
        return found.to(next(self.model.parameters()).device)

    def project(self, pooled: Tensor) -> Tensor:
        """Return [B, width] of pooled states [B, H]; reads float16 as it comes from a cache."""
        return self.projection(pooled.float()).float()

    def encode(self, token_ids: Sequence[Sequence[int]] | JaggedTensor) -> Tensor:
        """Return pooled states [B, H] float32 of token ids, B bags."""
        if not isinstance(token_ids, JaggedTensor):
            lengths = torch.tensor([len(ids) for ids in token_ids], dtype=torch.int64)
            flat = torch.tensor([token for ids in token_ids for token in ids], dtype=torch.int64)
            token_ids = JaggedTensor(flat, lengths)
        device = next(self.model.parameters()).device
        num_texts = len(token_ids.lengths)
        if num_texts == 0:
            return torch.zeros(0, self.hidden_size, device=device)
        ids = token_ids.to_padded(max_length=None).long().to(device)
        lengths = token_ids.lengths.to(device)
        if ids.shape[1] > self.config.max_tokens:
            ids, lengths = ids[:, : self.config.max_tokens], lengths.clamp(max=self.config.max_tokens)
        trains = torch.is_grad_enabled() and (self.trains_backbone or self.pooling_trains)
        with nullcontext() if trains else torch.no_grad():
            if self.config.micro_batch_tokens is None:
                return self._pooled(ids, lengths).float()
            return in_passes(
                self._pooled, ids, lengths, max_tokens=self.config.micro_batch_tokens, recompute=trains
            ).float()

    @property
    def pooling_trains(self) -> bool:
        """Whether the pooling has weights of its own."""
        return any(value.requires_grad for value in self.pooling.parameters())

    def _pooled(self, ids: Tensor, lengths: Tensor) -> Tensor:
        device, config = ids.device.type, self.config
        attention = attention_of(device, bf16=config.bf16, gradient_checkpointing=config.gradient_checkpointing)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=config.bf16), attention:
            inputs: dict[str, Any] = {"input_ids": ids}
            if self.pooling.has_own_token:
                inputs = {"inputs_embeds": self._with_own_token(ids, lengths)}
                lengths = lengths + 1
            width = max(1, next(iter(inputs.values())).shape[1])
            if ids.shape[1] == 0 and "input_ids" in inputs:
                inputs = {"input_ids": ids.new_zeros(len(ids), 1)}
            mask = torch.arange(width, device=ids.device) < lengths[:, None]
            # a row of padding alone would be a softmax over nothing; it reads its padding, and pools to zeros
            attended = mask | ((torch.arange(width, device=ids.device) == 0) & (lengths == 0)[:, None])
            states = self.model(attention_mask=attended.long(), **inputs).last_hidden_state
            return self.pooling(states, mask)

    def _with_own_token(self, ids: Tensor, lengths: Tensor) -> Tensor:
        embedded = self.model.get_input_embeddings()(ids)
        room = embedded.new_zeros(len(ids), 1, self.hidden_size)
        embedded = torch.cat([embedded, room], dim=1)
        is_own = torch.arange(embedded.shape[1], device=ids.device) == lengths[:, None]
        token = self.pooling.get_parameter("token").to(embedded.dtype)
        return torch.where(is_own[:, :, None], token, embedded)

    def _token_ids(self, column: JaggedTensor) -> JaggedTensor:
        flat = column.flat_values
        if flat.dtype == torch.uint8:
            return self._tokenized(column)
        num_tokens = self.model.get_input_embeddings().num_embeddings
        # on a GPU reading the ids would stall the step, and the embedding's own assert stands guard
        if flat.device.type == "cpu" and flat.numel() and not (int(flat.min()) >= 0 and int(flat.max()) < num_tokens):
            worst = int(flat.max()) if int(flat.max()) >= num_tokens else int(flat.min())
            raise DataError(
                f"token ids must lie in [0, {num_tokens}) for this model",
                column=self.config.column,
                value=worst,
                option="tokenise with the tokenizer of the tower's own folder",
            )
        return column

    def _tokenized(self, column: JaggedTensor) -> JaggedTensor:
        texts = []
        for row, data in enumerate(column.to_strings()):
            try:
                texts.append(data.decode())
            except UnicodeDecodeError as error:
                raise DataError(f"is no UTF-8: {error}", row=row, column=self.config.column) from error
        found = self.tokenize(texts)
        lengths = torch.tensor([len(ids) for ids in found], dtype=torch.int64)
        return JaggedTensor(torch.tensor([token for ids in found for token in ids], dtype=torch.int64), lengths)
