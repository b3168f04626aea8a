"""Vectors by id: every kind of file, the towers that read them, refresh, and each kind of file that is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from recis.embedding import TableConfig
from recis.errors import ConfigError, DataError
from recis.io.batch import Batch
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.optim import Sgd
from recis.towers.vector_files import VectorFileError, open_vectors
from recis.towers.vectors import EmbeddingTowerConfig, TableTowerConfig

IDS = torch.tensor([7, -3, 2**62])
VECTORS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def batch_of(ids: list[int]) -> Batch:
    sparse = KeyedJaggedTensor.from_jagged({"item": JaggedTensor.from_lists([[one] for one in ids])}, stride=len(ids))
    size = len(ids)
    return Batch(
        sparse=sparse, dense=torch.zeros(size, 0), dense_keys=(), dense_widths=(), labels=torch.zeros(size, 1),
        label_mask=None, label_weights=None, weights=torch.ones(size), group_ids=None,
        extras={"item_id": torch.tensor(ids, dtype=torch.int64)}, num_samples=size,
    )  # fmt: skip


@pytest.fixture
def npy(tmp_path):
    np.save(tmp_path / "v.npy", VECTORS.numpy())
    np.save(tmp_path / "i.npy", IDS.numpy())
    return tmp_path / "v.npy", tmp_path / "i.npy"


def tensors(path, vectors=VECTORS, ids=IDS, **metadata):
    save_file({"ids": ids, "vectors": vectors}, path, metadata=metadata or None)
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_safetensors(tmp_path, dtype):
    file = open_vectors(tensors(tmp_path / "v.safetensors", VECTORS.to(dtype), version="v1"), width=2, version="v1")
    vectors, found = file.read(torch.tensor([2**62, 0, 7, -3, 7]))
    assert vectors.tolist() == [[5, 6], [0, 0], [1, 2], [3, 4], [1, 2]]
    assert found.tolist() == [True, False, True, True, True]
    assert file.vectors.dtype == dtype


def test_npy_with_and_without_ids(npy):
    assert open_vectors(npy[0], ids=npy[1]).read(torch.tensor([-3]))[0].tolist() == [[3, 4]]
    plain = open_vectors(npy[0])
    vectors, found = plain.read(torch.tensor([2, 3, -1, 0]))
    assert vectors.tolist() == [[5, 6], [0, 0], [0, 0], [1, 2]]
    assert found.tolist() == [True, False, False, True]


def test_bad_files_are_refused(tmp_path, npy):
    good = tensors(tmp_path / "good.safetensors", version="v1")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-1])
    short = tmp_path / "short.npy"
    short.write_bytes(npy[0].read_bytes()[:-1])
    np.save(tmp_path / "int.npy", np.zeros((3, 2), dtype=np.int32))
    np.save(tmp_path / "flat.npy", np.zeros(3, dtype=np.float32))
    np.save(tmp_path / "two.npy", np.array([1, 2]))
    np.save(tmp_path / "float.npy", np.array([1.0, 2.0, 3.0]))
    np.save(tmp_path / "same.npy", np.array([1, 2, 1]))
    save_file({"ids": IDS}, tmp_path / "none.safetensors")
    (tmp_path / "x.txt").write_text("")
    wide = tensors(tmp_path / "wide.safetensors", VECTORS.double())
    cases: tuple[tuple[Path, dict[str, Any], str], ...] = (
        (good, {"width": 3}, "width 2; 3 is needed"),
        (good, {"version": "v2"}, "version 'v1'; 'v2' is needed"),
        (good, {"ids": npy[1]}, "own ids"),
        (cut, {}, "cut short"),
        (short, {}, r"no whole \.npy"),
        (tmp_path / "int.npy", {}, "int32"),
        (tmp_path / "flat.npy", {}, r"\(3,\)"),
        (npy[0], {"ids": tmp_path / "two.npy"}, "3 vectors and 2 ids"),
        (npy[0], {"ids": tmp_path / "float.npy"}, "int64"),
        (npy[0], {"ids": tmp_path / "same.npy"}, "value 1: an id has two vectors"),
        (tmp_path / "none.safetensors", {}, "no tensor 'vectors'"),
        (wide, {}, "F64"),
        (tmp_path / "x.txt", {}, "no folder of vectors"),
        (tmp_path / "absent.npy", {}, "No such file"),
        (tmp_path, {}, r"no MANIFEST\.json"),
    )
    for path, more, text in cases:
        with pytest.raises(VectorFileError, match=text):
            open_vectors(path, **more)


def test_a_folder_that_was_changed_is_refused(tmp_path):
    from recis.towers.precomputation import precompute

    class Ones:
        def version(self):
            return "v"

        def tokenize(self, texts):
            return [[len(text)] for text in texts]

        def encode(self, token_ids):
            return torch.ones(len(token_ids), 3)

    precompute(Ones(), [1, 2], ["a", "bb"], tmp_path)
    manifest = json.loads((tmp_path / "MANIFEST.json").read_text())
    for name, value, text in (
        ("num_rows", 3, "manifest says"),
        ("width", 4, "manifest says"),
        ("dtype", "float32", "manifest says"),
        ("format_version", 9, "of version 1"),
        ("bytes", {"ids.npy": 5}, "has 144 bytes; the manifest says 5"),
    ):
        (tmp_path / "MANIFEST.json").write_text(json.dumps({**manifest, name: value}))
        with pytest.raises(VectorFileError, match=text):
            open_vectors(tmp_path)
    (tmp_path / "MANIFEST.json").write_text("{")
    with pytest.raises(VectorFileError, match="not whole JSON"):
        open_vectors(tmp_path)


def test_embedding_tower_counts_or_refuses_what_is_missing(tmp_path):
    path = tensors(tmp_path / "v.safetensors", VECTORS.half())
    config = EmbeddingTowerConfig(name="text", column="item_id", path=str(path))
    tower = config.build()
    assert (tower.width, list(tower.parameters())) == (2, [])
    out = tower(batch_of([7, 1, -3, 1]))
    assert (out.dtype, out.tolist()) == (torch.float32, [[1, 2], [0, 0], [3, 4], [0, 0]])
    assert tower.num_missing == 2
    by_sparse = EmbeddingTowerConfig(name="text", column="item", path=str(path), missing="error", out_width=3).build()
    assert by_sparse(batch_of([7])).shape == (1, 3)
    assert by_sparse(batch_of([])).shape == (0, 3)
    with pytest.raises(DataError, match=r"row 1, column 'item', value 1: 2 of 3 ids have no vector"):
        by_sparse(batch_of([7, 1, 1]))
    with pytest.raises(ConfigError, match="did you mean 'item_id'"):
        EmbeddingTowerConfig(name="text", column="item_idd", path=str(path)).build()(batch_of([7]))
    with pytest.raises(ConfigError, match="'zeros' or 'error'"):
        EmbeddingTowerConfig(name="text", column="x", path="x", missing="skip")  # type: ignore[arg-type]


def test_refresh_takes_the_new_file_whole_or_keeps_the_old(tmp_path):
    one = tensors(tmp_path / "one.safetensors", version="1")
    two = tensors(tmp_path / "two.safetensors", VECTORS + 10, version="2")
    bad = tensors(tmp_path / "bad.safetensors", torch.zeros(3, 5), version="3")
    tower = EmbeddingTowerConfig(name="text", column="item_id", path=str(one)).build()
    with pytest.raises(VectorFileError, match="width 5; 2 is needed"):
        tower.refresh(bad)
    with pytest.raises(VectorFileError, match="version '2'; '9' is needed"):
        tower.refresh(two, version="9")
    assert (tower.version, tower(batch_of([7])).tolist()) == ("1", [[1, 2]])
    tower.refresh(two)
    assert (tower.version, tower(batch_of([7])).tolist()) == ("2", [[11, 12]])


def test_table_tower_holds_the_vectors_as_rows(tmp_path):
    one = tensors(tmp_path / "one.safetensors", version="1")
    two = tensors(tmp_path / "two.safetensors", VECTORS + 10, version="2")
    table = TableConfig(name="text", features=("item",), embedding_dim=2, optimizer=Sgd(lr=0.0))
    tower = TableTowerConfig(name="text", table=table, path=str(one)).build().eval()
    assert tower(batch_of([2**62, 5, 7])).tolist() == [[5, 6], [0, 0], [1, 2]]
    tower.refresh(two)
    assert (tower.version, tower(batch_of([-3])).tolist()) == ("2", [[13, 14]])
    wide = TableConfig(name="text", features=("item",), embedding_dim=3)
    with pytest.raises(VectorFileError, match="width 2; 3 is needed"):
        TableTowerConfig(name="text", table=wide, path=str(one)).build()
