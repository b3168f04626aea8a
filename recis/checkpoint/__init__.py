"""Checkpoints: crash-safe, hashed, elastic, incremental.

Boundary, Saver, save      the state of training at the end of a step, and how it is written
Target, load, load_latest  what is loaded into, and how
latest, as_checkpoint      the newest whole checkpoint of a run
compact                    a chain of deltas as one full checkpoint
verify, inspect            faults, and contents
"""

from recis.checkpoint.chain import as_checkpoint, latest, resolve_chain
from recis.checkpoint.delta import compact
from recis.checkpoint.folder import clean, rotate
from recis.checkpoint.load import ALL_PARTS, Loaded, Target, load, load_latest
from recis.checkpoint.manifest import Manifest, list_checkpoints, rank_slices, read_manifest
from recis.checkpoint.save import Boundary, Saver, save
from recis.checkpoint.verify import inspect, verify

__all__ = [
    "Boundary",
    "Saver",
    "save",
    "Target",
    "Loaded",
    "ALL_PARTS",
    "load",
    "load_latest",
    "latest",
    "as_checkpoint",
    "resolve_chain",
    "compact",
    "verify",
    "inspect",
    "clean",
    "rotate",
    "Manifest",
    "read_manifest",
    "list_checkpoints",
    "rank_slices",
]
