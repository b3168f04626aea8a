"""The encoder of item titles in recipes: all-MiniLM-L6-v2 where it is installed, else a small one learned from the titles.

The small one (2 layers, hidden 128, its own WordPiece vocabulary) learns that two random halves of a title belong together:

    loss = -log softmax over the titles of a batch of <half a, half b> / 0.05              (InfoNCE, arXiv:1807.03748)

so words that stand in the same titles come near each other. It takes about a minute for some thousand titles.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from recis.errors import ConfigError
from recis.towers.backbone import transformers_library

SMALL_DONE = "trained.ok"  # written last, so that a killed training is not taken for one
_BATCH = 128
_MAX_TOKENS = 32


def title_encoder(titles: Sequence[str], folder: Path, *, name: str = "auto", seed: int = 0) -> Path:
    """Return the folder of an encoder for these titles.

    Args:
        titles: what the small one learns from.
        folder: where the small one is written, or was written before.
        name: "minilm", "small", "auto" (MiniLM where it is installed), or the folder of a Hugging Face encoder.
        seed: of the small one.

    Raises:
        ConfigError: MiniLM is asked for and not installed, or `name` is no folder.
    """
    from recis.ebrm.scorer import has_minilm, minilm_path

    if name == "minilm" or (name == "auto" and has_minilm()):
        return minilm_path()
    if name in ("small", "auto"):
        if not (folder / SMALL_DONE).exists():
            fresh_encoder(titles, folder, seed=seed)
            learn_halves(titles, folder, seed=seed)
        return folder
    if not (Path(name) / "config.json").is_file():
        raise ConfigError(f"encoder {name!r}: give minilm, small, auto, or the folder of a Hugging Face encoder")
    return Path(name)


def fresh_encoder(texts: Sequence[str], folder: Path, *, hidden: int = 128, num_layers: int = 2, seed: int = 0) -> None:
    """Write an untrained BERT encoder and a WordPiece vocabulary learned from some texts into a folder."""
    transformers = transformers_library()
    from recis.ebrm.encoder import train_wordpiece

    tokenizer = train_wordpiece(texts)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden // 32),
        intermediate_size=4 * hidden,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.BertModel(config, add_pooling_layer=False)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def learn_halves(titles: Sequence[str], folder: Path, *, seed: int = 0, steps: int = 300) -> list[float]:
    """Train the encoder of a folder on the halves of titles, write it back, and return the loss of each step."""
    from recis.towers.text import TextTowerConfig

    tower = TextTowerConfig(
        name="title", column="title", path=str(folder), max_tokens=_MAX_TOKENS, frozen_layers=0, lr_scale=1.0
    ).build()
    rng = random.Random(seed)
    words = [own for title in dict.fromkeys(titles) if len(own := title.split()) > 1]
    if not words:
        raise ConfigError("no title has two words; an encoder cannot be learned from them")
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        picked = rng.sample(words, min(_BATCH, len(words)))
        halves = [_halves(own, rng) for own in picked]
        vectors = tower.encode(tower.tokenize([half for pair in halves for half in pair]))
        left, right = F.normalize(vectors, dim=1).view(len(picked), 2, -1).unbind(1)
        loss = F.cross_entropy(left @ right.T / 0.05, torch.arange(len(picked)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tower.model.save_pretrained(folder)
    (folder / SMALL_DONE).write_text("")
    return losses


def _halves(words: list[str], rng: random.Random) -> tuple[str, str]:
    mixed = rng.sample(words, len(words))
    middle = len(mixed) // 2
    return " ".join(mixed[:middle]), " ".join(mixed[middle:])


def fresh_decoder(
    texts: Sequence[str], folder: Path, *, hidden: int = 128, num_layers: int = 3, max_tokens: int = 160, seed: int = 0
) -> None:
    """Write an untrained Llama decoder and a WordPiece vocabulary learned from some texts into a folder."""
    transformers = transformers_library()
    from recis.ebrm.encoder import train_wordpiece

    tokenizer = train_wordpiece(texts)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden // 32),
        num_key_value_heads=max(1, hidden // 32),
        intermediate_size=3 * hidden,
        max_position_embeddings=max_tokens,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
