"""Dense towers beside the tables of ids: language and vision models, precomputed vectors, layer-wise adapters.

Public names, imported on first use, so that a command that needs none of them does not load torch:

TextTowerConfig, ImageTowerConfig          Hugging Face models by local path (need the extra `hf`)
EmbeddingTowerConfig, TableTowerConfig     vectors by id, in a mapped file or in a dynamic table
ColumnTowerConfig                          vectors in a column of the data
WithTowers, take_over                      a ranker and the towers it lists
ByPart, Part, GroupedAdamW                 optimizers, schedules and learning rates by part
precompute, open_vectors                   run a frozen tower once, read its vectors by id
CutTowerConfig, CutEncoder                 train the top layers from kept states of the ones below
Distilled, read_scores                     learn from a teacher's scores too
InstructConfig                             a decoder that follows instructions about products
memory_report                              where the memory of a joint training goes
AdapterConfig, LayerwiseAdapters           side features inside a frozen decoder
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recis.towers.adapter_files import AdapterBaseError, load_adapters, save_adapters
    from recis.towers.adapters import AdapterConfig, LayerwiseAdapters
    from recis.towers.attention_sites import UnsupportedDecoderError
    from recis.towers.backbone import BackboneError
    from recis.towers.column import ColumnTower, ColumnTowerConfig
    from recis.towers.cut import CutEncoder, CutTower, CutTowerConfig
    from recis.towers.distill import Distilled, read_scores
    from recis.towers.image import ImageTower, ImageTowerConfig
    from recis.towers.instruct import InstructConfig, InstructDecoder
    from recis.towers.memory import memory_report
    from recis.towers.optimizer import ByPart, GroupedAdamW, Part
    from recis.towers.pooling import AttentionPool, FirstToken, LastToken, MeanPool, SummaryToken
    from recis.towers.precomputation import PrecomputeConfig, PrecomputeReport, precompute
    from recis.towers.ranker import TowerRanker, WithTowers, take_over
    from recis.towers.text import TextTower, TextTowerConfig
    from recis.towers.vector_files import VectorFile, VectorFileError, open_vectors
    from recis.towers.vectors import EmbeddingTower, EmbeddingTowerConfig, TableTower, TableTowerConfig

_HOME = {
    "AdapterBaseError": "recis.towers.adapter_files",
    "load_adapters": "recis.towers.adapter_files",
    "save_adapters": "recis.towers.adapter_files",
    "AdapterConfig": "recis.towers.adapters",
    "LayerwiseAdapters": "recis.towers.adapters",
    "UnsupportedDecoderError": "recis.towers.attention_sites",
    "BackboneError": "recis.towers.backbone",
    "ColumnTower": "recis.towers.column",
    "ColumnTowerConfig": "recis.towers.column",
    "CutEncoder": "recis.towers.cut",
    "CutTower": "recis.towers.cut",
    "CutTowerConfig": "recis.towers.cut",
    "Distilled": "recis.towers.distill",
    "read_scores": "recis.towers.distill",
    "ImageTower": "recis.towers.image",
    "ImageTowerConfig": "recis.towers.image",
    "InstructConfig": "recis.towers.instruct",
    "InstructDecoder": "recis.towers.instruct",
    "memory_report": "recis.towers.memory",
    "ByPart": "recis.towers.optimizer",
    "GroupedAdamW": "recis.towers.optimizer",
    "Part": "recis.towers.optimizer",
    "AttentionPool": "recis.towers.pooling",
    "FirstToken": "recis.towers.pooling",
    "LastToken": "recis.towers.pooling",
    "MeanPool": "recis.towers.pooling",
    "SummaryToken": "recis.towers.pooling",
    "PrecomputeConfig": "recis.towers.precomputation",
    "PrecomputeReport": "recis.towers.precomputation",
    "precompute": "recis.towers.precomputation",
    "TowerRanker": "recis.towers.ranker",
    "WithTowers": "recis.towers.ranker",
    "take_over": "recis.towers.ranker",
    "TextTower": "recis.towers.text",
    "TextTowerConfig": "recis.towers.text",
    "VectorFile": "recis.towers.vector_files",
    "VectorFileError": "recis.towers.vector_files",
    "open_vectors": "recis.towers.vector_files",
    "EmbeddingTower": "recis.towers.vectors",
    "EmbeddingTowerConfig": "recis.towers.vectors",
    "TableTower": "recis.towers.vectors",
    "TableTowerConfig": "recis.towers.vectors",
}

__all__ = [
    "AdapterBaseError",
    "load_adapters",
    "save_adapters",
    "AdapterConfig",
    "LayerwiseAdapters",
    "UnsupportedDecoderError",
    "BackboneError",
    "ColumnTower",
    "ColumnTowerConfig",
    "CutEncoder",
    "CutTower",
    "CutTowerConfig",
    "Distilled",
    "read_scores",
    "ImageTower",
    "ImageTowerConfig",
    "InstructConfig",
    "InstructDecoder",
    "memory_report",
    "ByPart",
    "GroupedAdamW",
    "Part",
    "AttentionPool",
    "FirstToken",
    "LastToken",
    "MeanPool",
    "SummaryToken",
    "PrecomputeConfig",
    "PrecomputeReport",
    "precompute",
    "TowerRanker",
    "WithTowers",
    "take_over",
    "TextTower",
    "TextTowerConfig",
    "VectorFile",
    "VectorFileError",
    "open_vectors",
    "EmbeddingTower",
    "EmbeddingTowerConfig",
    "TableTower",
    "TableTowerConfig",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'recis.towers' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
