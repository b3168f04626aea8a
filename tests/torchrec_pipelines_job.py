"""Two gloo ranks that train dynamic tables in each pipeline of TorchRec there is, or note why one does not run on a CPU.

    python torchrec_pipelines_job.py FOLDER     writes pipelines-0.pt and pipelines-1.pt into it

One process imports everything, then forks the ranks: an import of TorchRec takes seconds.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.train_pipeline import experimental_pipelines as experimental
from torchrec.distributed.train_pipeline import train_pipelines as pipelines
from torchrec.distributed.train_pipeline.gradient_accumulation import (
    GradientAccumulationConfig,
    GradientAccumulationWrapper,
)
from torchrec.distributed.train_pipeline.pipeline_stage import PipelineStage
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor as TorchRecKeyed
from torchrec_job import NUM_STEPS, batch, build

CPU = torch.device("cpu")
Make = Callable[[Any, Any], Any]


class Plain:
    """Steps without a pipeline."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer

    def progress(self, batches: Iterator[TorchRecKeyed]) -> Tensor:
        self.optimizer.zero_grad()
        loss, scores = self.model(next(batches))
        loss.backward()
        self.optimizer.step()
        return scores


def compiled(model: Any, optimizer: Any) -> Any:
    eager = pipelines.TorchCompileConfig(fullgraph=False, backend="eager")
    return pipelines.TrainPipelinePT2(model, optimizer, CPU, compile_configs=eager)


def compiled_backward(model: Any, optimizer: Any) -> Any:
    model._compiled_autograd_options = {"backend": "eager", "dynamic": True, "fullgraph": False}
    return pipelines.TrainPipelineSparseDistCompAutograd(model, optimizer, CPU)


def held_back(model: Any, optimizer: Any) -> Any:
    """Return a pipeline whose optimizer steps behind every second backward."""
    return GradientAccumulationWrapper(
        pipelines.TrainPipelineSparseDist(model, optimizer, CPU),
        optimizer,
        model,
        GradientAccumulationConfig(is_enabled=True, num_steps=2, num_warmup_steps=1),
    )


def staged(model: Any, optimizer: Any) -> Any:
    return pipelines.StagedTrainPipeline([PipelineStage("copy", lambda batch: batch, torch.cpu.current_stream())])  # pyright: ignore


WORKS: dict[str, Make] = {
    "plain": Plain,
    "TrainPipelineBase": lambda model, rows: pipelines.TrainPipelineBase(model, rows, CPU),
    "TrainPipelineSparseDistLite": lambda model, rows: pipelines.TrainPipelineSparseDistLite(model, rows, CPU),
    "TrainPipelineSparseDistT": lambda model, rows: experimental.TrainPipelineSparseDistT(model, rows, CPU),
    "TrainEvalHybridPipelineBase": lambda model, rows: experimental.TrainEvalHybridPipelineBase(model, rows, CPU),
}
COMPILED: dict[str, Make] = {  # of two steps: a step of other sizes is compiled anew, in seconds
    "plain of two steps": Plain,
    "TrainPipelinePT2": compiled,
    "TrainPipelineSparseDistCompAutograd": compiled_backward,
}
FAILS: dict[str, Make] = {
    "TrainPipelineFusedSparseDist": lambda model, rows: pipelines.TrainPipelineFusedSparseDist(model, rows, CPU),
    "EvalPipelineFusedSparseDist": lambda model, rows: pipelines.EvalPipelineFusedSparseDist(model, rows, CPU),
    "TrainPipelineSemiSync": lambda model, rows: pipelines.TrainPipelineSemiSync(model, rows, CPU, start_batch=0),
    "PrefetchTrainPipelineSparseDist": lambda model, rows: pipelines.PrefetchTrainPipelineSparseDist(model, rows, CPU),
    "StagedTrainPipeline": staged,
    "EvalPipelineCPUSparse": lambda model, rows: experimental.EvalPipelineCPUSparse(model, rows, CPU),
    "TrainPipelineSparseDistOptStash": lambda model, rows: experimental.TrainPipelineSparseDistOptStash(
        model, rows, CPU, "static"
    ),
    "TrainPipelineSparseDistEmbStash": lambda model, rows: experimental.TrainPipelineSparseDistEmbStash(
        model, rows, CPU, "static"
    ),
    "TrainPipelinePrefetchEMS": lambda model, rows: experimental.TrainPipelinePrefetchEMS(model, rows, CPU, "static"),
    "TrainPipelineSparseDistBwdOpt": lambda model, rows: experimental.TrainPipelineSparseDistBwdOpt(
        model, rows, CPU, "static"
    ),
    "GradientAccumulationWrapper": held_back,
}


def train(rank: int, make: Make, num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """Return what some steps gave."""
    model, optimizer = build([])
    pipeline = make(model, optimizer)
    batches = iter([batch(step, rank) for step in range(num_steps)])
    scores = [pipeline.progress(batches).detach().clone() for _ in range(num_steps)]
    module: Any = model.module
    return {
        "scores": scores,
        "rows": {table.name: table.export() for table in module.pooled.table_set},
        "dense": [value.detach().clone() for value in module.top.parameters()],
    }


def evaluate(rank: int) -> dict[str, Any]:
    """Return the scores of an evaluation by a pipeline and without; nothing is trained."""
    model, optimizer = build([])
    Plain(model, optimizer).progress(iter([batch(0, rank)]))
    model.eval()
    with torch.no_grad():
        plain = [model(batch(step, rank))[1] for step in range(3)]
        pipeline = pipelines.EvalPipelineSparseDist(model, optimizer, CPU)
        batches = iter([batch(step, rank) for step in range(3)])
        piped = [pipeline.progress(batches).clone() for _ in range(3)]
    module: Any = model.module
    return {"plain": plain, "piped": piped, "step": module.pooled.table_set.step}


def why_not(rank: int, make: Make) -> str:
    """Return what a pipeline that does not run says."""
    try:
        train(rank, make)
    except (RuntimeError, AssertionError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return "it runs"


def rank_main(rank: int, folder: Path) -> None:
    """Be one rank."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    config: Any = torch._dynamo.config
    found: dict[str, Any] = {"EvalPipelineSparseDist": evaluate(rank)}
    for name, make in WORKS.items():
        found[name] = train(rank, make)
    for name, make in COMPILED.items():
        if name == "TrainPipelineSparseDistCompAutograd":
            config.optimize_ddp = "python_reducer"  # torch asks for it, before DistributedDataParallel is built
        found[name] = train(rank, make, num_steps=2)
    config.optimize_ddp = True
    found["fails"] = {name: why_not(rank, make) for name, make in FAILS.items()}
    torch.save(found, folder / f"pipelines-{rank}.pt")
    sys.stdout.flush()
    os._exit(0)  # groups of pipelines that failed on their way are left to the system


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = []
    for rank in (0, 1):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            try:
                rank_main(rank, folder)
            finally:
                os._exit(1)  # an error was printed; nothing else may run twice
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    import torch._dynamo

    main(Path(sys.argv[1]))
