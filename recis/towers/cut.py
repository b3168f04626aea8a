"""Train the top layers of a text tower without running the layers below them again: their states are kept on disk.

    once       token ids -> embeddings and layers 0 .. n - 1 -> states [T, H] of every text, float16, by id     `precompute`
    each step  ids -> kept states -> layers n .. -> pooling -> projection                                       `CutTower`

The cut lies above the frozen layers (`TextTowerConfig.frozen_layers`), so what is kept never goes stale; the folder's version
is a hash over the weights below the cut, the tokenizer and max_tokens, and a tower with others refuses it. A CutTower has the
trained weights of the TextTower of the same config under the same names, so checkpoints go from one to the other.

Backbones whose layers are one ModuleList and take hidden states first (BERT and its like, Llama, Qwen3) work; the layers
below the cut are replaced by ones that hand the kept states on, and nothing else of the model is touched.
"""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from recis.errors import ConfigError, DataError
from recis.towers.backbone import attention_of, layers_of
from recis.towers.micro_batches import first_of_each, passes_over
from recis.towers.text import TextTower, TextTowerConfig
from recis.towers.vector_files import STATES_FORMAT, VectorFileError, read_arrays, read_lengths, read_manifest
from recis.towers.vectors import one_id_per_sample
from recis.towers.weights import state_hash

if TYPE_CHECKING:
    from recis.io.batch import Batch


@dataclass(frozen=True, slots=True)
class StateFile:
    """Kept states.

    Attributes:
        path, version: as VectorFile.
        ids: [N] int64, ascending; rows: [N], the text of each id.
        starts: [R + 1] int64, where each text's states begin.
        states: [starts[-1], H] float16 or float32, mapped.
    """

    path: Path
    version: str
    ids: Tensor
    rows: Tensor
    starts: Tensor
    states: Tensor

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return (texts [L], found [L] bool) of ids [L]; the text of an id that is not there is 0."""
        if len(self.ids) == 0:
            return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        place = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        found = self.ids[place] == ids
        return torch.where(found, self.rows[place], 0), found

    def lengths(self, texts: Tensor) -> Tensor:
        """Return the tokens [L] of texts [L]."""
        return self.starts[texts + 1] - self.starts[texts]

    def read(self, texts: Tensor, width: int) -> Tensor:
        """Return states [L, width, H] float32 of texts [L], none longer than width; zeros behind each."""
        lengths = self.lengths(texts)
        places = torch.arange(width)
        inside = places < lengths[:, None]
        rows = torch.where(inside, self.starts[texts][:, None] + places, 0)
        return self.states[rows].float() * inside[:, :, None]


def open_states(path: str | Path, *, width: int, version: str) -> StateFile:
    """Open a folder of states that a CutEncoder's precompute wrote.

    Raises:
        VectorFileError: it is damaged, or its width or version is another.
    """
    path = Path(path)
    manifest = read_manifest(path, STATES_FORMAT)
    ids, rows, states = read_arrays(path)
    lengths = read_lengths(path)
    if states.shape[1] != width or len(states) != int(lengths.sum()):
        raise VectorFileError(
            f"states are {tuple(states.shape)}; {int(lengths.sum())} tokens of width {width} are needed", file=str(path)
        )
    if manifest["version"] != version:
        raise VectorFileError(
            f"states have version {manifest['version'][:12]!r}; {version[:12]!r} is needed",
            file=str(path),
            option="make them again: other weights below the cut, tokenizer or max_tokens",
        )
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return StateFile(path, manifest["version"], ids, rows, starts, states)


class CutEncoder:
    """What `precompute` runs for a CutTower: the layers of a TextTower below its cut, a state per token.

    Raises:
        ConfigError: the tower has no frozen layers below trained ones.
    """

    per_token = True

    def __init__(self, tower: TextTower) -> None:
        self.tower, self.cut = tower.eval(), cut_of(tower.config)

    def version(self) -> str:
        """Return what names the states: a hash over the weights below the cut, the tokenizer and max_tokens."""
        return cut_version(self.tower)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """See TextTower.tokenize."""
        return self.tower.tokenize(texts)

    @torch.no_grad()
    def encode(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Return states [sum of the lengths, H]."""
        lengths = torch.tensor([len(ids) for ids in token_ids])
        mask = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        ids[mask] = torch.tensor([token for own in token_ids for token in own], dtype=torch.int64)
        device = next(self.tower.model.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.tower.config.bf16):
            states = _states_below(self.tower.model, self.cut, ids.to(device), mask.to(device))
        return states[mask].float()


@dataclass(frozen=True, slots=True, kw_only=True)
class CutTowerConfig:
    """A text tower whose lower layers were run once."""

    tower: TextTowerConfig
    """The tower; frozen_layers says where the cut is. Its `column` names ids here, one per sample."""
    path: str
    """Folder of the states."""
    missing: Literal["zeros", "error"] = "zeros"
    """What an id without states gives: zeros, counted in `num_missing` as a missing text is, or an error."""
    pass_tokens: int = 16_384
    """Token places of one pass, where the tower's micro_batch_tokens says nothing; memory of training is that of a batch."""

    def __post_init__(self) -> None:
        cut_of(self.tower)
        if self.missing not in ("zeros", "error"):
            raise ConfigError(
                f"cut tower {self.tower.name!r}: missing must be 'zeros' or 'error'; got {self.missing!r}"
            )

    @property
    def name(self) -> str:
        """Of the dense feature."""
        return self.tower.name

    def build(self) -> "CutTower":
        """Return the tower with its states open."""
        return CutTower(self)


class CutTower(TextTower):
    """forward(batch) -> [B, width]. Attributes: file (the open states), num_missing, and those of TextTower.

    Raises:
        VectorFileError: see open_states.
    """

    def __init__(self, config: CutTowerConfig) -> None:
        super().__init__(config.tower)
        self.cut_config = config
        cut = cut_of(config.tower)
        self.frozen_state()  # of all the folder's weights, before those below the cut are let go
        self.file = open_states(config.path, width=self.hidden_size, version=cut_version(self))
        self._given = _skip_below(self.model, cut)

    def forward(self, batch: "Batch") -> Tensor:
        """Return [B, width].

        Raises:
            ConfigError: the batch has no such ids.
            DataError: an id has no states, under missing="error".
        """
        ids = one_id_per_sample(batch, self.config.column, self.name).cpu()
        texts, found = self.file.find(ids)
        num_missing = int((~found).sum())
        if num_missing and self.cut_config.missing == "error":
            row = int((~found).nonzero()[0])
            raise DataError(
                f"{num_missing} of {len(ids)} ids have no states in {self.file.path}",
                row=row,
                column=self.config.column,
                value=int(ids[row]),
                option='missing="zeros" counts them',
            )
        has = self._counted(found & (self.file.lengths(texts) > len(self._empty)))
        return self.project(self.pooled(texts)) * has[:, None]

    def pooled(self, texts: Tensor) -> Tensor:
        """Return pooled states [B, H] float32 of texts [B], numbers of the file; equal ones are computed once."""
        device = next(self.model.parameters()).device
        if len(texts) == 0:
            return torch.zeros(0, self.hidden_size, device=device)
        _, place = torch.unique(texts, return_inverse=True)
        rows = first_of_each(place)
        trains = torch.is_grad_enabled() and (self.trains_backbone or self.pooling_trains)
        limit = self.config.micro_batch_tokens

        def run(chosen: Tensor, lengths: Tensor, width: int) -> Tensor:
            states = self.file.read(texts[chosen], width).to(device)
            return self._from_states(states, lengths.to(device))

        with nullcontext() if trains else torch.no_grad():
            return passes_over(
                run,
                rows,
                self.file.lengths(texts),
                place,
                self.cut_config.pass_tokens if limit is None else limit,
                trains and limit is not None,
            ).float()

    def _from_states(self, states: Tensor, lengths: Tensor) -> Tensor:
        device, config = states.device.type, self.config
        attention = attention_of(device, bf16=config.bf16, gradient_checkpointing=config.gradient_checkpointing)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=config.bf16), attention:
            if states.shape[1] == 0:
                states = states.new_zeros(len(states), 1, self.hidden_size)
            places = torch.arange(states.shape[1], device=states.device)
            mask = places < lengths[:, None]
            attended = mask | ((places == 0) & (lengths == 0)[:, None])  # as in TextTower
            self._given.states = states
            try:
                found = self.model(attention_mask=attended.long(), inputs_embeds=states).last_hidden_state
            finally:
                self._given.states = None
            return self.pooling(found, mask)


def cut_of(config: TextTowerConfig) -> int:
    """Return how many layers lie below the cut.

    Raises:
        ConfigError: none are frozen, all of the backbone is, or the pooling puts a token of its own into the text.
    """
    if not config.frozen_layers:
        raise ConfigError(
            f"text tower {config.name!r}: a cut needs frozen_layers of at least 1 below the trained ones; got "
            f"{config.frozen_layers} (a wholly frozen tower is precomputed as vectors)"
        )
    if getattr(config.pooling, "has_own_token", False):
        raise ConfigError(
            f"text tower {config.name!r}: a learned token enters below the cut; use another pooling than SummaryToken"
        )
    return config.frozen_layers


def cut_version(tower: TextTower) -> str:
    """Return the hash that names a tower's states below its cut."""
    cut = cut_of(tower.config)
    layers = layers_of(tower.model)
    above = {id(value) for layer in layers[cut:] for value in (*layer.parameters(), *layer.buffers())}
    trained = {id(value) for value in tower.model.parameters() if value.requires_grad}  # a last norm behind the layers
    below = {
        name: value
        for name, value in tower.model.state_dict(keep_vars=True).items()
        if id(value) not in above and id(value) not in trained
    }
    told = (cut, state_hash(below), tower.tokenizer_hash(), tower.config.max_tokens, tower.config.bf16)
    return hashlib.sha256(repr(told).encode()).hexdigest()


class _Reached(Exception):
    """Carries the states out of the model at the cut."""

    def __init__(self, states: Tensor) -> None:
        super().__init__("the cut")
        self.states = states


def _states_below(model: Any, cut: int, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the states [B, T, H] that layer `cut` would read; the layers from there on are not run."""

    def stop(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    hook = layers_of(model)[cut - 1].register_forward_hook(stop)
    try:
        model(input_ids=ids, attention_mask=mask.long())
    except _Reached as reached:
        return reached.states
    finally:
        hook.remove()
    raise ConfigError(f"{type(model).__name__}: its layers are not called as modules, so it cannot be cut")


class _Skipped(nn.Module):
    """Stands where a layer was; hands on what it gets, or `states` where there are some."""

    def __init__(self, layer: nn.Module, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple
        self.states: Tensor | None = None
        self.attention_type = getattr(layer, "attention_type", None)  # some decoders choose the mask by it

    def forward(self, hidden_states: Tensor, *given: Any, **named: Any) -> Any:
        out = hidden_states if self.states is None else self.states
        return (out,) if self.as_tuple else out


def _skip_below(model: Any, cut: int) -> _Skipped:
    """Replace the layers below the cut and return the last of them, which the states are given to."""
    layers = layers_of(model)
    kinds: list[bool] = []
    hook = layers[0].register_forward_hook(lambda module, inputs, output: kinds.append(isinstance(output, tuple)))
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device))
    hook.remove()
    for number in range(cut):
        layers[number] = _Skipped(layers[number], kinds[0])
    last = layers[cut - 1]
    assert isinstance(last, _Skipped)
    return last
