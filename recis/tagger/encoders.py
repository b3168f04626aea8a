"""Turn words into vectors: a pretrained encoder by path, or a small one that needs nothing; both also read spelling.

    small       hashed word and character n-grams -> two-way LSTM
    pretrained  pieces of each word through any Hugging Face encoder, mean per word, joined with the hashed vectors

Words stand in windows that the encoder can read; a word of more than MAX_PIECES pieces is cut.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recis.tagger.conditions import shape_of

MAX_PIECES = 16
OVERLAP_WORDS = 64
CELLS = 1 << 16  # of the hashed n-grams


@dataclass(frozen=True, slots=True)
class WordBatch:
    """Words of B texts, T at most."""

    lengths: Tensor  # [B] int64
    grams: Tensor  # [G] int64, cells of the n-grams of all B * T places, row after row
    gram_offsets: Tensor  # [B * T] int64
    pieces: Tensor  # [B, P] int64, with the model's marks for begin and end; [B, 0] for the small encoder
    piece_word: Tensor  # [B, P] int64, word of each piece, T for what is no word


class WordEncoder(nn.Module):
    """Words -> vectors [B, T, dim]."""

    def __init__(
        self,
        *,
        dim: int = 128,
        gram_dim: int = 64,
        dropout: float = 0.3,
        path: str | Path | None = None,
        with_weights: bool = True,
    ) -> None:
        """Build the small encoder (no path), or a pretrained one from a local folder; nothing is fetched.

        with_weights=False reads only the encoder's settings, for a caller that loads weights of its own.
        """
        super().__init__()
        self.grams = nn.EmbeddingBag(CELLS, gram_dim, mode="mean")
        nn.init.normal_(self.grams.weight, std=0.1)
        self.dropout = nn.Dropout(dropout)
        self.model: Any = None
        self.tokenizer: Any = None
        if path is None:
            self.lstm = nn.LSTM(gram_dim, dim // 2, batch_first=True, bidirectional=True)
            self.dim = dim + gram_dim
            self.window = 512
        else:
            from transformers import AutoConfig, AutoModel, AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
            if with_weights:
                self.model = AutoModel.from_pretrained(str(path), local_files_only=True)
            else:
                self.model = AutoModel.from_config(AutoConfig.from_pretrained(str(path), local_files_only=True))
            self.dim = self.model.config.hidden_size + gram_dim
            self.window = min(512, self.model.config.max_position_embeddings) - 2  # begin and end take two places

    def forward(self, batch: WordBatch) -> Tensor:
        num_texts, width = len(batch.lengths), len(batch.gram_offsets) // max(1, len(batch.lengths))
        spelled = self.grams(batch.grams, batch.gram_offsets).view(num_texts, width, -1)
        if self.model is None:
            packed = nn.utils.rnn.pack_padded_sequence(
                self.dropout(spelled), batch.lengths, batch_first=True, enforce_sorted=False
            )
            states, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=width)
        else:
            hidden = self.model(input_ids=batch.pieces, attention_mask=(batch.pieces != self.pad).long())
            states = mean_per_word(hidden.last_hidden_state, batch.piece_word, width)
        return self.dropout(torch.cat([states, spelled], dim=-1))

    def batch(self, words: Sequence[Sequence[str]], pieces: Sequence[Sequence[Sequence[int]]]) -> WordBatch:
        """Lay texts side by side; pieces are what `pieces_of` gave for them."""
        width = max(map(len, words))
        cells: list[int] = []
        offsets: list[int] = []
        for text in words:
            for word in text:
                offsets.append(len(cells))
                cells += gram_cells(word)
            offsets += [len(cells)] * (width - len(text))
        rows: list[list[int]] = []
        owners: list[list[int]] = []
        if self.tokenizer is not None:
            for text in pieces:
                flat = [piece for word in text for piece in word]
                rows.append([self.tokenizer.cls_token_id, *flat, self.tokenizer.sep_token_id])
                owner = [number for number, word in enumerate(text) for _ in word]
                owners.append([width, *owner, width])
            longest = max(map(len, rows))
            rows = [row + [self.pad] * (longest - len(row)) for row in rows]
            owners = [row + [width] * (longest - len(row)) for row in owners]
        return WordBatch(
            lengths=torch.tensor([len(text) for text in words]),
            grams=torch.tensor(cells, dtype=torch.int64),
            gram_offsets=torch.tensor(offsets, dtype=torch.int64),
            pieces=torch.tensor(rows, dtype=torch.int64),
            piece_word=torch.tensor(owners, dtype=torch.int64),
        )

    def pieces_of(self, words: Sequence[str]) -> list[list[int]]:
        """Return the piece ids of each word; [[]] * words for the small encoder."""
        if self.tokenizer is None:
            return [[] for _ in words]
        found = self.tokenizer(list(words), add_special_tokens=False)["input_ids"] if words else []
        return [ids[:MAX_PIECES] or [self.tokenizer.unk_token_id] for ids in found]

    def windows(self, pieces: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """Return word ranges that fit the encoder, neighbours overlapping by OVERLAP_WORDS words."""
        sizes = [max(1, len(word)) for word in pieces]
        found: list[tuple[int, int]] = []
        start = 0
        while True:
            end, room = start, self.window
            while end < len(sizes) and sizes[end] <= room:
                room -= sizes[end]
                end += 1
            found.append((start, end))
            if end >= len(sizes):
                return found
            start = max(start + 1, end - OVERLAP_WORDS)

    @property
    def pad(self) -> int:
        """Piece id that fills a row up."""
        return self.tokenizer.pad_token_id or 0


def gram_cells(word: str) -> list[int]:
    """Return the hash cells of a word: itself, its shape, and its character n-grams of 2 to 5 with ends marked."""
    marked = f"^{word}$"
    grams = [f"word {word}", f"shape {shape_of(word)}"]
    grams += [marked[at : at + size] for size in (2, 3, 4, 5) for at in range(len(marked) - size + 1)]
    return [zlib.crc32(gram.encode()) % CELLS for gram in grams]


def mean_per_word(states: Tensor, piece_word: Tensor, width: int) -> Tensor:
    """Return [B, width, D] from pieces [B, P, D]; what is no word goes to place `width`, which is cut off."""
    num_texts, _, dim = states.shape
    index = piece_word[:, :, None].expand(-1, -1, dim)
    total = states.new_zeros(num_texts, width + 1, dim).scatter_add(1, index, states)
    count = states.new_zeros(num_texts, width + 1).scatter_add(
        1, piece_word, torch.ones_like(piece_word, dtype=states.dtype)
    )
    return (total / count.clamp(min=1)[:, :, None])[:, :width]
