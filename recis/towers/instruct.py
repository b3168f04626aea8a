"""A decoder that follows instructions about products, with side features through layer-wise adapters.

    prompt and answer, token ids -> one sequence, with the tokenizer's special tokens   [first] prompt [sep] answer [sep]
    loss_b = mean over the answer's tokens of -log p(token | what stands before it, side features of b)

Side features are rows of a dynamic table (entity ids of the product, one row each); a sample without any is left alone by the
adapters. The decoder is any that LayerwiseAdapters knows, by local path: it trains itself (`trains_base`, for a tiny one
that starts from nothing), or stays frozen below adapters and LoRA. The loss never holds [tokens, vocabulary] logits.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recis.embedding import EmbeddingCollection, TableConfig
from recis.errors import ConfigError, nearest
from recis.jagged import JaggedTensor
from recis.towers.adapters import AdapterConfig, LayerwiseAdapters
from recis.towers.backbone import BackboneError, load_tokenizer, transformers_library
from recis.towers.batching import length_batches
from recis.towers.weights import FrozenState, frozen_state
from recis_kernels.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from recis.io.batch import Batch

MAX_WASTE = 0.3  # of a pass; less makes passes of few samples, whose calls cost more than the padding


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructConfig:
    """A decoder, its adapters and the table of side features."""

    path: str
    """Folder of a Hugging Face decoder and its tokenizer; nothing is fetched."""
    side: TableConfig
    """Table with one unpooled feature: the product's entity ids."""
    prompt: str = "prompt"
    """Token ids in batch.extras."""
    answer: str = "answer"
    """Token ids in batch.extras; training needs them."""
    num_queries: int = 10
    """Of the adapters, as AdapterConfig has them; `rank` too."""
    rank: int = 64
    trains_base: bool = False
    """Whether the decoder's own weights train."""
    lora_rank: int = 0
    """Above 0: stage 2 of the adapters, LoRA on q and v of a frozen decoder."""
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.side.features) != 1:
            raise ConfigError(f"InstructConfig: the side table serves one feature; got {self.side.features}")
        if self.trains_base and self.lora_rank:
            raise ConfigError("InstructConfig: LoRA is for a frozen decoder; set trains_base=False or lora_rank=0")

    def build(self) -> "InstructDecoder":
        """Return the module with the folder's weights."""
        return InstructDecoder(self)


@dataclass(frozen=True, slots=True)
class Answers:
    """What a decoder wrote for B prompts.

    Attributes:
        tokens: of each prompt, without the last special token.
        log_probs: of each of those tokens, given the ones before.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]


class InstructDecoder(nn.Module):
    """forward(batch) -> mean loss of each answer [B]. Attributes: base, tokenizer, adapters, rows.

    Raises:
        BackboneError: the folder holds no whole causal decoder, or another's tokenizer.
        UnsupportedDecoderError: see LayerwiseAdapters.
    """

    def __init__(self, config: InstructConfig) -> None:
        super().__init__()
        self.config = config
        self.base = load_decoder(config.path)
        self.tokenizer = load_tokenizer(config.path, self.base)
        self.rows = EmbeddingCollection((config.side,), seed=config.seed)
        (self._feature,) = self.rows.features
        adapters = AdapterConfig(
            side_width=config.side.embedding_dim, num_queries=config.num_queries, rank=config.rank, seed=config.seed
        )
        self.adapters = LayerwiseAdapters(self.base, adapters)
        if config.lora_rank:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.adapters.add_lora(config.lora_rank)
        if config.trains_base:
            self.base.requires_grad_(True)
        self._frozen: FrozenState | None = None
        own = self.tokenizer("a")["input_ids"]
        first = (self.tokenizer.cls_token_id, self.tokenizer.bos_token_id)
        self._skip, self._ends = int(own[0] in first), own[-1] == self.end_token

    @property
    def end_token(self) -> int:
        """The special token that ends an answer: the tokenizer's separator, or its end of text."""
        separator, end = self.tokenizer.sep_token_id, self.tokenizer.eos_token_id
        found = end if separator is None else separator
        if found is None:
            raise BackboneError(f"{self.config.path}: the tokenizer has neither a separator nor an end of text")
        return found

    def frozen_state(self) -> FrozenState:
        """See TextTower.frozen_state."""
        if self._frozen is None:
            self._frozen = frozen_state(self.base, prefix="base.")
        return self._frozen

    def forward(self, batch: "Batch") -> Tensor:
        """Return [B] float32; 0 for an answer without a token.

        Samples of like length go through the decoder together, so that little of a pass is padding. Their lengths are read on
        the host: on a GPU the step waits for them.

        Raises:
            ConfigError: batch.extras lacks prompt or answer.
        """
        prompts, answers = self._column(batch, self.config.prompt), self._column(batch, self.config.answer)
        ids, lengths, first = joined(prompts, answers, skip=self._skip, end=None if self._ends else self.end_token)
        features, there = self._side(batch)
        if len(ids) == 0:
            return features.sum((1, 2)).float()
        states, targets, owners = [], [], []
        for rows in length_batches(lengths.tolist(), max_tokens=ids.numel(), max_waste=MAX_WASTE):
            part = torch.tensor(rows, dtype=torch.int64, device=ids.device)
            own, begin = lengths[part], first[part]
            tokens = ids[part, : max(1, int(own.max()))]
            mask = torch.arange(tokens.shape[1], device=ids.device) < own[:, None]
            with self.adapters.side(features[part], there[part]):
                hidden = self.base.base_model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
            places = torch.arange(tokens.shape[1] - 1, device=ids.device)
            told = (places >= begin[:, None] - 1) & (places < own[:, None] - 1)
            states.append(hidden[:, :-1][told])
            targets.append(tokens[:, 1:][told])
            owners.append(part[told.nonzero()[:, 0]])
        losses = linear_cross_entropy(
            torch.cat(states).float(), self._output_weight(), torch.cat(targets), reduction="none"
        )
        owner = torch.cat(owners)
        sums, counts = (
            losses.new_zeros(len(ids)).index_add(0, owner, own) for own in (losses, torch.ones_like(losses))
        )
        return sums / counts.clamp(min=1)

    @torch.no_grad()
    def write(self, batch: "Batch", *, max_tokens: int = 48) -> Answers:
        """Write an answer to each prompt, the likeliest token at every place, until the last special token or max_tokens.

        Raises:
            ConfigError: batch.extras lacks the prompts, or max_tokens is below 1.
        """
        if max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1; got {max_tokens}")
        prompts = self._column(batch, self.config.prompt)
        padded, lengths = prompts.to_padded(max_length=None).long(), prompts.lengths
        width = padded.shape[1]
        shift = (
            torch.arange(width) - (width - lengths)[:, None]
        )  # prompts end together: the next token is the same column
        ids = padded.gather(1, shift.clamp(min=0)).masked_fill(shift < 0, self._pad())
        end = self.end_token
        with self.adapters.side(*self._side(batch)):
            found: Any = self.base.generate(
                input_ids=ids,
                attention_mask=(shift >= 0).long(),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=self._pad(),
                eos_token_id=end,
                return_dict_in_generate=True,
                output_logits=True,
            )
        written = found.sequences[:, width:]
        logits = torch.stack(found.logits, dim=1).float()
        log_probs = logits.log_softmax(-1).gather(2, written[:, :, None]).squeeze(2)
        lengths = ((written == end).cumsum(1) == 0).sum(1).tolist()
        return Answers(
            [row[:length] for row, length in zip(written.tolist(), lengths, strict=True)],
            [row[:length] for row, length in zip(log_probs.tolist(), lengths, strict=True)],
        )

    def _side(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        """Return the batch's side features [B, n, D] and which of them there are, bool [B, n]; n is at least 1."""
        found = self.rows(batch.sparse)[self._feature]
        features = found.to_padded(max_length=None)
        if features.shape[1] == 0:
            features = features.new_zeros(len(features), 1, features.shape[2])
        return features, torch.arange(features.shape[1], device=features.device) < found.lengths[:, None]

    def _output_weight(self) -> Tensor:
        return self.base.get_output_embeddings().weight

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else pad

    @staticmethod
    def _column(batch: "Batch", name: str) -> JaggedTensor:
        column = batch.extras.get(name)
        if not isinstance(column, JaggedTensor):
            raise ConfigError(f"batch.extras has no token ids {name!r}; {nearest(name, batch.extras)}")
        return column


def joined(
    prompts: JaggedTensor, answers: JaggedTensor, *, skip: int = 1, end: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids [B, T], lengths [B], where the answer begins [B]) of prompts with their answers behind them.

    Args:
        prompts: B bags of token ids.
        answers: likewise.
        skip: tokens at an answer's beginning that are left out: the tokenizer's first special one.
        end: token put behind each answer; None where the tokenizer did.
    """
    left, right = prompts.lengths.long(), (answers.lengths.long() - skip).clamp(min=0)
    lengths = left + right + (end is not None)
    ids = torch.zeros(len(left), max(1, int(lengths.max()) if len(left) else 1), dtype=torch.int64, device=left.device)
    for column, own, begin, first in ((prompts, left, torch.zeros_like(left), 0), (answers, right, left, skip)):
        padded = column.to_padded(max_length=None).long()[:, first:]
        places = torch.arange(padded.shape[1], device=ids.device)
        there = places < own[:, None]
        rows = there.nonzero()[:, 0]
        ids[rows, (begin[:, None] + places)[there]] = padded[there]
    if end is not None and len(left):
        ids[torch.arange(len(left), device=ids.device), lengths - 1] = end
    return ids, lengths, left


def instruct_loss(losses: Tensor, batch: "Batch") -> Tensor:
    """Return the sum of answers' losses [B] by the samples' weights: TrainConfig.loss of an InstructDecoder."""
    return (losses * batch.weights).sum()


def load_decoder(path: str | Path) -> Any:
    """Return the causal decoder of a folder in float32, in evaluation mode.

    Raises:
        BackboneError: the folder holds none, or a weight is missing.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise BackboneError(f"{folder}: no config.json here; a local folder with config and weights is needed")
    try:
        loaded: Any = transformers_library().AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, output_loading_info=True, dtype="float32"
        )
        model, report = loaded
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BackboneError(f"{folder}: the decoder cannot be loaded: {error}") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        first = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))[0]
        raise BackboneError(f"{folder}: weights are missing or of another shape, first {first}")
    return model.eval()
