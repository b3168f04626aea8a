"""Kept states of the cut: the tower above them equals the whole tower, in output and gradients, and old states are refused."""

import copy
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recis.cli import main
from recis.errors import ConfigError, DataError
from recis.io.batch import Batch
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.towers.cut import CutEncoder, CutTowerConfig
from recis.towers.pooling import LastToken, MeanPool, SummaryToken
from recis.towers.precomputation import PrecomputeConfig, precompute
from recis.towers.text import TextTowerConfig
from recis.towers.vector_files import VectorFileError, open_vectors

IDS = [5, -7, 9, 11]
TEXTS = ["w1 w2 w3", "w9", "", "w1 w2 w3"]


def batch_of(ids, texts) -> Batch:
    size = len(ids)
    return Batch(
        sparse=KeyedJaggedTensor.from_jagged({}, stride=size), dense=torch.zeros(size, 0), dense_keys=(),
        dense_widths=(), labels=torch.zeros(size, 1), label_mask=None, label_weights=None, weights=torch.ones(size),
        group_ids=None, extras={"item": torch.tensor(ids), "title": JaggedTensor.from_strings(texts)}, num_samples=size,
    )  # fmt: skip


def whole(folder, **changes) -> TextTowerConfig:
    given = {"name": "text", "column": "title", "path": str(folder), "out_width": 3, "frozen_layers": 1}
    return TextTowerConfig(**{**given, **changes})


def cut(folder, path, **changes) -> CutTowerConfig:
    return CutTowerConfig(tower=whole(folder, column="item", **changes), path=str(path))


@pytest.fixture(scope="module", params=["bert_folder", "qwen3_folder"])
def made(request, tmp_path_factory):
    """(folder of the model, folder of the states)."""
    folder, out = request.getfixturevalue(request.param), tmp_path_factory.mktemp("states") / "out"
    report = precompute(CutEncoder(whole(folder).build()), IDS, TEXTS, out, PrecomputeConfig(part_rows=1))
    assert (report.num_ids, report.num_rows) == (4, 3)  # equal texts are run once
    return folder, out


@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("pooling", [MeanPool, LastToken])
def test_output_and_gradients_are_those_of_the_whole_tower(made, pooling, limit):
    full = whole(made[0], pooling=pooling).build().train()
    top = cut(*made, pooling=pooling, micro_batch_tokens=limit).build().train()
    for tower in (full, top):
        for module in tower.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    batch = batch_of([5, 9, 5, -7], ["w1 w2 w3", "", "w1 w2 w3", "w9"])
    results = []
    for tower in (full, top):
        out = tower(batch)
        (out * torch.arange(12.0).view(4, 3)).sum().backward()
        trained = {name: value.grad for name, value in tower.named_parameters() if value.requires_grad}
        results.append((out.detach(), trained))
    (want, want_grads), (got, got_grads) = results
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)  # states are kept in float16
    assert got_grads.keys() == want_grads.keys()  # the same names: a checkpoint of one serves the other
    for name, value in want_grads.items():
        torch.testing.assert_close(got_grads[name], value, rtol=2e-2, atol=1e-2, msg=name)


def test_layers_below_the_cut_are_not_run(made):
    top = cut(*made).build()
    names = {name for name, _ in top.named_parameters()}
    assert not any("layer.0." in name or "layers.0." in name for name in names)
    assert any("layer.1." in name or "layers.1." in name for name in names)


def test_an_id_without_states(made):
    top = cut(*made).build().eval()
    with torch.no_grad():
        out = top(batch_of([5, 404, 9], ["", "", ""]))
        assert out[1:].tolist() == [[0.0] * 3] * 2  # 9 has states, of an empty text
        assert bool(out[0].any())
    assert top.num_missing == 2
    strict = CutTowerConfig(tower=whole(made[0], column="item"), path=str(made[1]), missing="error").build()
    with pytest.raises(DataError, match="1 of 2 ids have no states") as caught:
        strict(batch_of([5, 404], ["", ""]))
    assert (caught.value.row, caught.value.value) == (1, 404)


def test_other_weights_below_the_cut_are_refused(made, tiny, tmp_path):
    other = tmp_path / "other"
    model = copy.deepcopy(whole(made[0]).build().model)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(other)
    tiny.tokenizer().save_pretrained(other)
    with pytest.raises(VectorFileError, match="states have version"):
        cut(other, made[1]).build()
    with pytest.raises(VectorFileError, match="states have version"):
        cut(*made, max_tokens=16).build()
    top = whole(made[0]).build()
    with torch.no_grad():  # what trains above the cut does not make the states stale
        next(value for value in top.model.parameters() if value.requires_grad).add_(1.0)
    assert CutEncoder(top).version() == CutEncoder(whole(made[0]).build()).version()


def test_states_and_vectors_are_not_taken_for_each_other(made, tmp_path):
    with pytest.raises(VectorFileError, match=r"is no recis-vectors of version 1; it says 'recis-states'"):
        open_vectors(made[1])
    precompute(whole(made[0]).build().eval(), IDS, TEXTS, tmp_path / "vectors")
    with pytest.raises(VectorFileError, match="is no recis-states"):
        cut(made[0], tmp_path / "vectors").build()


def test_bad_settings(bert_folder):
    for layers in (None, 0):
        with pytest.raises(ConfigError, match="a cut needs frozen_layers of at least 1"):
            cut(bert_folder, "x", frozen_layers=layers)
    with pytest.raises(ConfigError, match="a learned token enters below the cut"):
        cut(bert_folder, "x", pooling=SummaryToken)


def test_the_command_keeps_states(bert_folder, tmp_path, capsys):
    table = pa.table({"id": pa.array(IDS, pa.int64()), "text": TEXTS})
    pq.write_table(table, tmp_path / "texts.parquet")
    command = ["towers", "precompute", "--tower", str(bert_folder), "--data", str(tmp_path / "texts.parquet")]
    assert main([*command, "--out", str(tmp_path / "states"), "--cut", "1"]) == 0
    assert "4 ids, 3 distinct texts, 3 of them encoded now" in capsys.readouterr().out
    assert cut(bert_folder, tmp_path / "states").build().file.lengths(torch.arange(3)).sort().values.tolist() == [
        2,
        3,
        5,
    ]
    assert main([*command, "--out", str(tmp_path / "none"), "--cut", "3"]) == 2
    assert "has 2 layers; 3 cannot be frozen" in capsys.readouterr().err


def test_the_commands_parser_loads_no_torch():
    code = (
        "import sys, recis.cli, recis.towers, recis.towers.cli; assert 'torch' not in sys.modules, 'torch was loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
