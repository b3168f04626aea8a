"""Dense towers beside the tables of ids: language and vision models, precomputed vectors, layer-wise adapters.

TextTowerConfig, ImageTowerConfig          Hugging Face models by local path (need the extra `hf`)
EmbeddingTowerConfig, TableTowerConfig     vectors by id, in a mapped file or in a dynamic table
WithTowers, take_over                      a ranker and the towers it lists
GroupedAdamW                               learning rates per group of weights
AdapterConfig, LayerwiseAdapters           side features inside a frozen decoder
precompute, open_vectors                   run a frozen tower once, read its vectors by id
"""

from recis.towers.adapter_files import AdapterBaseError, load_adapters, save_adapters
from recis.towers.adapters import AdapterConfig, LayerwiseAdapters
from recis.towers.attention_sites import UnsupportedDecoderError
from recis.towers.backbone import BackboneError
from recis.towers.image import ImageTower, ImageTowerConfig
from recis.towers.optimizer import GroupedAdamW
from recis.towers.pooling import AttentionPool, FirstToken, LastToken, MeanPool, SummaryToken
from recis.towers.precompute import PrecomputeConfig, PrecomputeReport, precompute
from recis.towers.ranker import TowerRanker, WithTowers, take_over
from recis.towers.text import TextTower, TextTowerConfig
from recis.towers.vector_files import VectorFile, VectorFileError, open_vectors
from recis.towers.vectors import EmbeddingTower, EmbeddingTowerConfig, TableTower, TableTowerConfig

__all__ = [
    "TextTower",
    "TextTowerConfig",
    "ImageTower",
    "ImageTowerConfig",
    "EmbeddingTower",
    "EmbeddingTowerConfig",
    "TableTower",
    "TableTowerConfig",
    "WithTowers",
    "TowerRanker",
    "take_over",
    "GroupedAdamW",
    "MeanPool",
    "FirstToken",
    "LastToken",
    "SummaryToken",
    "AttentionPool",
    "AdapterConfig",
    "LayerwiseAdapters",
    "save_adapters",
    "load_adapters",
    "precompute",
    "PrecomputeConfig",
    "PrecomputeReport",
    "VectorFile",
    "open_vectors",
    "AdapterBaseError",
    "BackboneError",
    "UnsupportedDecoderError",
    "VectorFileError",
]
