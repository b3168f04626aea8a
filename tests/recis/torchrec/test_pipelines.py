"""TorchRec's other pipelines around dynamic tables, on two gloo ranks: those that run change no bit, the others say why not."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.torchrec
ROOT = Path(__file__).parents[3]
RUN = (
    "TrainPipelineBase",
    "TrainPipelineSparseDistLite",
    "TrainPipelineSparseDistT",
    "TrainEvalHybridPipelineBase",
)
COMPILED = ("TrainPipelinePT2", "TrainPipelineSparseDistCompAutograd")
SAY = {  # of torch: what TorchRec hands it on a CPU is no stream of an accelerator
    "TrainPipelineFusedSparseDist": "RuntimeError: unknown parameter type",
    "EvalPipelineFusedSparseDist": "RuntimeError: unknown parameter type",
    "TrainPipelineSemiSync": "RuntimeError: unknown parameter type",
    "PrefetchTrainPipelineSparseDist": "AssertionError: Invalid PrefetchPipelinedForward usage",
    "StagedTrainPipeline": "AttributeError: 'Stream' object has no attribute 'device'",
    "EvalPipelineCPUSparse": "RuntimeError: pin_memory=True requires",
    "TrainPipelineSparseDistOptStash": "RuntimeError: torch.cuda.Stream requires CUDA",
    "TrainPipelineSparseDistEmbStash": "RuntimeError: torch.cuda.Stream requires CUDA",
    "TrainPipelinePrefetchEMS": "RuntimeError: torch.cuda.Stream requires CUDA",
    # of ours: gradients of rows would be lost, or wait unused
    "TrainPipelineSparseDistBwdOpt": "RuntimeError: the rows' optimizer is stepped while backward runs",
    "GradientAccumulationWrapper": "a training lookup follows a backward whose gradients no update has used",
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """Run the job of two ranks once; on a GPU the pipelines that fail here may run."""
    pytest.importorskip("torchrec")
    if torch.accelerator.is_available():
        pytest.skip("pins what TorchRec's pipelines do where there is no accelerator")
    made = tmp_path_factory.mktemp("pipelines")
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tests"))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, str(ROOT / "tests" / "torchrec_pipelines_job.py"), str(made)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(made / f"pipelines-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("name", [*RUN, *COMPILED])
def test_a_pipeline_changes_no_bit(ranks, name):
    for found in ranks:
        plain, piped = found["plain of two steps" if name in COMPILED else "plain"], found[name]
        assert len(plain["scores"]) == (2 if name in COMPILED else 5)
        for key in ("scores", "dense"):
            assert all(torch.equal(one, other) for one, other in zip(plain[key], piped[key], strict=True)), key
        for table, fields in plain["rows"].items():
            assert fields["ids"].numel()
            for field, values in fields.items():
                assert torch.equal(values, piped["rows"][table][field]), (table, field)


def test_evaluation_in_a_pipeline(ranks):
    for found in ranks:
        evaluated = found["EvalPipelineSparseDist"]
        assert evaluated["step"] == 1  # of the one step that was trained before
        for one, other in zip(evaluated["plain"], evaluated["piped"], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "text"), SAY.items(), ids=list(SAY))
def test_a_pipeline_that_cannot_run_says_why(ranks, name, text):
    """What docs/torchrec.md says of them; one that runs one day, in another TorchRec, makes this fail."""
    for found in ranks:
        assert text in found["fails"][name]
