"""The demo on a tiny catalogue, a run of the command line that is killed and resumed, and the text models it trains."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from recis.cli import main
from recis.ebrm import EBRM, QEScorer
from recis.ebrm.composed_queries import ComposeConfig
from recis.ebrm.datasets import synthetic_eval, synthetic_set
from recis.ebrm.demo import DemoConfig, demo
from recis.ebrm.descent import StepConfig
from recis.ebrm.evaluate import roc_auc
from recis.ebrm.synthetic import SyntheticConfig, make_data
from recis.ebrm.text_models import (
    BiEncoder,
    bi_encoder_scores,
    cross_encoder_scores,
    fit_bi_encoder,
    fit_cross_encoder,
    text_table,
)

TINY = SyntheticConfig(num_items=40, num_queries=40, num_impressions=1_000, num_candidates=8, seed=1)
COMPOSED = ComposeConfig(num_queries=20)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _needs_encoders():
    pytest.importorskip("transformers", reason="encoders need transformers")


def test_demo_compares_explains_and_overrules(tmp_path):
    said: list[str] = []
    config = DemoConfig(catalogue=TINY, composed=COMPOSED, pretrain_epochs=1, epochs=1)
    overruled = demo(config, tmp_path / "run", say=said.append)
    told = "\n".join(said)
    for name in ("EBRM", "QI cross-encoder", "bi-encoder", "BM25", "hand rules"):
        assert any(line.startswith(f"{name} ") and line.count("0.") >= 3 for line in told.splitlines()), name
    assert overruled.measured == pytest.approx(overruled.predicted, abs=1e-6)
    assert abs(overruled.measured - overruled.before) > 1e-3
    assert f"{overruled.predicted:.6f}" in told
    model = EBRM.load(tmp_path / "run")
    assert [rule.override.owner for rule in model.overrides.rules()] == ["demo"]
    query, entity = overruled.rule.query, overruled.rule.entity
    assert query is not None
    assert entity is not None
    assert (tmp_path / "run" / "items.jsonl").is_file()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["model_version"] == model.version


def test_demo_refuses_a_folder_in_use(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["ebrm", "demo", "--out", str(tmp_path), "--no-serve"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_killed_command_goes_on_to_the_same_model(tmp_path, capsys, monkeypatch):
    """`recis ebrm train` on a folder of files: killed inside stage B, resumed, against a run that was left alone."""
    from recis.ebrm import train as stage_b

    make_data(TINY).write(tmp_path / "data")
    words = [
        "ebrm",
        "train",
        "--data",
        f"{tmp_path}/data",
        "--composed",
        "0",
        "--pretrain-epochs",
        "4",
        "--epochs",
        "4",
    ]
    assert main([*words, "--out", f"{tmp_path}/straight"]) == 0

    class Killed(BaseException): ...

    calls: list[int] = []

    def dying(model: Any, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return loss(model, *rest)

    loss = stage_b._loss
    with monkeypatch.context() as patch:
        patch.setattr(stage_b, "_loss", dying)
        patch.setattr("recis.ebrm.resume.Progress.is_due", lambda self: True)  # saves at every step
        with pytest.raises(Killed):
            main([*words, "--out", f"{tmp_path}/killed"])
    assert main([*words, "--out", f"{tmp_path}/killed"]) == 2
    assert "is not empty; give a new folder, or --resume" in capsys.readouterr().err
    assert main(["ebrm", "train", "--out", f"{tmp_path}/killed", "--resume", "--seed", "7"]) == 2
    assert "seed was 0 when the run" in capsys.readouterr().err
    assert main(["ebrm", "train", "--out", f"{tmp_path}/killed", "--resume"]) == 0
    one, other = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("straight", "killed"))
    assert one == other
    assert not (tmp_path / "killed" / "training").exists()
    assert main(["ebrm", "train", "--out", f"{tmp_path}/killed", "--resume"]) == 2
    assert "no unfinished training" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small_data():
    made = make_data(TINY)
    return synthetic_set(made, composed=None), synthetic_eval(made, "test")


def test_text_models_learn_and_are_reproducible(small_data):
    data, _ = small_data
    table = text_table(data.train, data.texts)
    assert len(table) == len(data.train)
    assert table.pairs[3] == (data.train.queries[int(data.train.query[3])], data.texts[int(data.train.item[3])])
    config = StepConfig(epochs=1, lr=1e-3, batch_pairs=64)

    def cross() -> np.ndarray:
        encoder: Any = QEScorer.small(data.corpus(), seed=2, max_tokens=48)
        fit_cross_encoder(encoder, data.train, data.texts, config)
        return cross_encoder_scores(encoder, data.train, data.texts)

    scores = cross()
    assert np.array_equal(scores, cross())
    assert roc_auc(scores, data.train.label) > 0.55

    encoder: Any = QEScorer.small(data.corpus(), seed=2, max_tokens=48)
    model = BiEncoder(encoder)
    before = roc_auc(bi_encoder_scores(model, data.train, data.texts), data.train.label)
    fit_bi_encoder(model, data.train, data.texts, config)
    after = bi_encoder_scores(model, data.train, data.texts)
    assert roc_auc(after, data.train.label) > before
    with torch.inference_mode():
        one_by_one = model(list(table.pairs[:5])).double().numpy()
    np.testing.assert_allclose(one_by_one, after[:5], atol=1e-4)
