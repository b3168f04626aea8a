"""Runs of the recipes by one process and by two, forked from a process that has imported everything: `two_ranks.py FOLDER`.

    FOLDER/base, rag           start models, without and with chunks
    FOLDER/one, two/CASE       every case by one process, and by two over gloo
    FOLDER/sharded/CASE        by two that hold half of each weight: FSDP2
    FOLDER/two/killed          rank 1 died by SIGKILL in its third step; two fresh ranks went on with it
    FOLDER/GROUP-RANK.json     what a rank saw per case: groups, weights, files that it wrote; or what stopped it

Completions are given, as a function of the pair and of the rollout's number in its group, so that one process and two can be
held against each other; in cases of DRAWN the number is a random one. Plain os.fork: torch has run in none of the parents.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

RL = (
    "engine.per_device_rows=4",
    "rl.num_generations=4",
    "rl.prompts_per_step=4",
    "rl.max_completion_tokens=8",
    "rl.max_steps=3",
    "rl.learning_rate=1e-3",
    "rl.refill_rounds=0",
)
SHE = ("num_prompts=32", "she.num_logged=4")
DPO = ("dpo.num_prompts=32", "dpo.num_samples=4", "dpo.limits.max_oracle_share=1", "dpo.limits.max_label_ratio=100")
POOL = ("dyknow.pool.size=24", "rl.max_steps=2")
CASES: dict[str, tuple[str, ...]] = {  # case -> settings; the recipe is the name up to "_", and "+" goes on with a run
    "sft": ("sft.batch_rows=8", "sft.micro_rows=4", "sft.num_epochs=1"),
    "dpo": (*DPO, "engine.per_device_rows=2", "dpo.learning_rate=1e-3"),
    "grpo": RL,
    "grpo_lora": (*RL, "model.lora_rank=2"),
    "agrl": (*RL, "replay.tau=0.3", "replay.anneal_share=0"),
    "she": (*RL, *SHE),
    "dyknow": (*RL, *POOL),
    "dyknow_batch": (*RL, *POOL, "dyknow.is_gap_of_batch=true", "dyknow.gate=centered"),
    "taosr1": (*RL, *DPO, "engine.per_device_rows=4", "rl.refill_rounds=2"),
    "agrl_drawn": (*RL, "rl.refill_rounds=1", "replay.tau=0.3", "engine.save_steps=2", "rl.max_steps=4"),
    "agrl_killed": (*RL, "rl.refill_rounds=1", "replay.tau=0.3", "engine.save_steps=2", "rl.max_steps=4"),
    "grpo_late": RL,
    "grpo_late+": RL,
    "sft_whole": (),
    "grpo_nan": RL,
    "dpo_refused": ("dpo.num_prompts=0",),
}
DRAWN = ("agrl_drawn", "agrl_killed")
TWO_ONLY = ("taosr1", "agrl_drawn", "grpo_late", "grpo_late+", "dpo_refused", "sft_whole", "grpo_nan")
"""What refills draws other prompts on two ranks than on one, and what is drawn has other random numbers."""
STOPPED = ("grpo_late", "dpo_refused", "sft_whole")
"""Rank 0 is late, rank 1 is not; rank 0 finds no answers to prefer; FSDP is asked for where accelerate leaves it out."""
SHARDED = ("sft", "grpo_lora", "agrl", "dyknow", "grpo_nan", "grpo_late", "grpo_late+")
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What `accelerate launch` sets for relevance/accelerate/eight_gpus_fsdp.yaml."""
ROWS = 16
"""Rows of a step of all ranks."""


class Given:
    """Answers to the prompts of a task."""

    def __init__(self, task: Any, encode: Any, *, is_drawn: bool) -> None:
        self.task, self.is_drawn = task, is_drawn
        self.known: dict[tuple[int, ...], tuple[Any, str]] = {}
        for pair in (*task.train, *task.dev):
            prompts = {"plain": task.prompt(pair, with_chunk=False)}
            if pair.chunk is not None:
                prompts["chunk"] = task.prompt(pair, with_chunk=True)
            prompts |= {"guided": task.guided(pair, 1), "told": task.guided(pair, 2)}
            self.known |= {tuple(encode(prompt)): (pair, kind) for kind, prompt in prompts.items()}

    def text(self, pair: Any, kind: str, number: int) -> str:
        """Return an answer: two pairs of five always fail without guidance, one never fails, the others do at times."""
        import torch

        from relevance.oracle import oracle

        number = int(torch.randint(64, ())) if self.is_drawn else number
        good = oracle(pair, self.task.profile, with_chunk=kind == "chunk")
        luck = hashlib.blake2b(f"{pair.id}|{kind}|{number}".encode(), digest_size=1).digest()[0]
        temper = int(pair.id.rpartition("-")[2]) % 5
        is_right = luck % 2 == 0 if temper > 2 else temper == 2
        if kind in ("guided", "told"):
            is_right = number % 2 == 0
        if luck & 4:
            good = good.replace("<category>match", "<category>near")
        if is_right:
            return good
        other = str(int(good[0]) % 4 + 1)
        return other + good[1:].replace(f"<verdict>{good[0]}", f"<verdict>{other}")


class Watch:
    """What a rank saw."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.of_case: dict[str, Any] = {}

    def start(self, case: str) -> None:
        """Begin a case."""
        self.of_case[case] = {
            "asked": [],
            "trained": [],
            "guided": [],
            "fresh": [],
            "written": [],
            "sampled": 0,
            "said": [],
        }

    @property
    def now(self) -> dict[str, Any]:
        """What is seen of the last case."""
        return list(self.of_case.values())[-1]

    def on_event(self, event: str, args: tuple[Any, ...]) -> None:
        """Note files that Python opens for writing below the folder; torch.save's own writer is not among them."""
        if event == "open" and self.of_case and isinstance(args[1], str) and set(args[1]) & set("wax+"):
            path = Path(os.fsdecode(args[0])) if not isinstance(args[0], int) else None
            if path is not None and path.is_relative_to(self.folder):
                self.now["written"].append(path.name)


def watch_trainers(watch: Watch) -> None:
    """Let trainers tell which pairs they train on and what they end with."""
    import torch
    from torch.distributed.tensor import DTensor

    from relevance.trainer import RelevanceGRPOTrainer as Trainer

    generate, rollout, train = Trainer._generate_and_score_completions, Trainer._rollout, Trainer.train

    def generated(self: Any, inputs: Any) -> Any:
        watch.now["rollouts"] = 0
        batch = generate(self, inputs)
        watch.now["trained"].append([pair.id for pair in self.last_graded.pairs])
        watch.now["guided"].append(int(self.last_graded.is_guided.sum()))
        return batch

    def rolled(self: Any, inputs: Any) -> Any:
        watch.now["rollouts"] += 1
        pairs = [row["pair_id"] for row in inputs[:: self.grader.group_size]]
        watch.now["asked" if watch.now["rollouts"] == 1 else "fresh"].append(pairs)
        return rollout(self, inputs)

    def trained(self: Any, *args: Any, **options: Any) -> Any:
        out = train(self, *args, **options)
        model = self.accelerator.unwrap_model(self.model)
        watch.now["weights"] = [repr(float(p.double().sum())) for p in model.parameters()]
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        watch.now["held"] = sum(part.numel() for part in parts)
        watch.now["taken"] = self.reserve.taken
        watch.now["wrapper"] = type(self.model_wrapped).__name__
        if self.accelerator.num_processes > 1:
            import torch.distributed as dist

            backend: Any = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
            watch.now["patience_s"] = backend.options._timeout.total_seconds()
        return out

    Trainer._generate_and_score_completions = generated
    Trainer._rollout = rolled
    Trainer.train = trained


def give(given: Given, watch: Watch, lm: Any) -> None:
    """Let trainers and stages take given answers."""
    import trl

    from relevance import rollouts, sampling_stage

    def turn(self: Any, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        seen: Counter[tuple[int, ...]] = Counter()
        rows = []
        for ids in map(tuple, prompt_ids):
            rows.append([*lm.encode(given.text(*given.known[ids], seen[ids])), lm.eos_ids[0]])
            seen[ids] += 1
        return rows, None

    def samples(own: Any, prompts: Any, *, num_samples: int = 1, **_: Any) -> Any:
        watch.now["sampled"] += 1
        texts = [[given.text(*given.known[tuple(own.encode(p))], k) for k in range(num_samples)] for p in prompts]
        return [
            [rollouts.Completion(text=t, ids=(*own.encode(t), own.eos_ids[0]), terminated=True) for t in row]
            for row in texts
        ]

    trl.GRPOTrainer._generate_single_turn = turn
    sampling_stage.sample_completions = samples


def settings_of(case: str, num_ranks: int) -> list[str]:
    """Return the settings under which a step has ROWS rows on all ranks together."""
    from tiny_lm import MICRO

    own = [setting for setting in (*MICRO, *CASES[case]) if not setting.startswith("engine.accumulation")]
    last = dict(setting.split("=", 1) for setting in own)
    rows = int(last["engine.per_device_rows"])
    total = 8 if case == "dpo" else ROWS
    return [*own, f"engine.accumulation={total // rows // num_ranks}"]


def shard() -> None:
    """Let accelerate shard on the CPU: it reads its FSDP settings on GPUs only, and would train whole copies here."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    own = PartialState.__init__

    def connect(self: Any, *args: Any, **options: Any) -> None:
        own(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = connect  # type: ignore[method-assign]


def spoil_a_loss() -> Any:
    """Let the second step's loss be NaN on rank 1 alone; the return value undoes it."""
    import trl

    own = trl.GRPOTrainer._compute_loss

    def loss(self: Any, model: Any, inputs: Any) -> Any:
        found = own(self, model, inputs)
        is_bad = self.state.global_step == 1 and self.accelerator.process_index == 1
        return found * float("nan") if is_bad else found

    trl.GRPOTrainer._compute_loss = loss
    return lambda: setattr(trl.GRPOTrainer, "_compute_loss", own)


def train_case(case: str, folder: Path, group: str, num_ranks: int, watch: Watch, *, resume: bool = False) -> None:
    """Train one case in this process."""
    from relevance import engine
    from relevance.ranks import is_main
    from relevance.recipes import recipe_function
    from relevance.training_run import open_run

    recipe, resume = case.partition("_")[0], resume or case.endswith("+")
    start = folder / ("rag" if recipe == "dyknow" else "base")
    watch.start(case)
    run = open_run(
        recipe,
        model=None if resume else str(start),
        out=folder / group / case.rstrip("+"),
        settings=[] if resume else settings_of(case, num_ranks),
        resume=resume,
        max_minutes=600.0 if case == "grpo_late" else None,
        say=watch.now["said"].append,
    )
    lm = run.load(start)
    give(Given(run.task_of(lm), lm.encode, is_drawn=case in DRAWN), watch, lm)
    own, undo = engine.Limits.is_over, spoil_a_loss() if case == "grpo_nan" else lambda: None
    if case == "grpo_late":
        engine.Limits.is_over = lambda self: is_main()  # type: ignore[method-assign]
    if case == "sft_whole":
        os.environ |= FSDP
    try:
        recipe_function(recipe)(run)
    finally:
        if case == "sft_whole":
            for name in FSDP:
                del os.environ[name]
        engine.Limits.is_over = own  # type: ignore[method-assign]
        undo()


def rank_main(folder: Path, name: str, cases: list[str], rank: int, num_ranks: int, port: int) -> int:
    """Run cases as one rank and write what it saw; the return value is the exit code."""
    warnings.filterwarnings("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    if num_ranks == 1:
        del os.environ["WORLD_SIZE"], os.environ["RANK"], os.environ["LOCAL_RANK"]
    if name == "sharded":
        os.environ |= FSDP
        shard()
    watch = Watch(folder)
    sys.addaudithook(watch.on_event)
    watch_trainers(watch)
    found: dict[str, Any] = {"cases": watch.of_case}
    try:
        for case in cases:
            if name == "killed":
                die_in_step(3, rank=1)
            group = name if name in ("one", "sharded") else "two"
            try:
                train_case(case, folder, group, num_ranks, watch, resume=name == "resumed")
            except Exception as stopped:
                if case not in STOPPED:
                    raise
                watch.now["stopped"] = f"{type(stopped).__name__}: {stopped}"
    except BaseException as error:
        found["error"] = f"{type(error).__name__}: {error}"
        import traceback

        traceback.print_exc()
    (folder / f"{name}-{rank}.json").write_text(json.dumps(found))
    return int("error" in found)


def die_in_step(step: int, *, rank: int) -> None:
    """Let a rank be killed in the loss of a step."""
    from relevance.trainer import RelevanceGRPOTrainer as Trainer

    loss = Trainer._compute_loss

    def fatal(self: Any, model: Any, inputs: Any) -> Any:
        if self.accelerator.process_index == rank and self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(self, model, inputs)

    Trainer._compute_loss = fatal


def fork(function: Any, *args: Any) -> int:
    """Return the id of a child that runs the function and exits with what it returns."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int(function(*args) or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def wait_for(children: list[int], *, timeout_s: float = 240.0) -> list[int]:
    """Return the exit codes of children, in order; those that hang are killed."""
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout_s
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


def start_models(folder: Path) -> None:
    """Write the two models that all cases start from."""
    from tiny_lm import MICRO

    from relevance.training_run import open_run

    for name, recipe in (("base", "sft"), ("rag", "dyknow")):
        settings = [setting for setting in MICRO if recipe == "sft" or not setting.startswith("rl.")]
        run = open_run(recipe, out=folder / f"start-{name}", settings=settings, say=lambda line: None)
        run.base_model()
        (run.folder / "base").rename(folder / name)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(folder: Path) -> dict[str, list[int]]:
    """Run everything and return the exit codes per group."""
    import relevance.engine  # noqa: F401  # what costs seconds is loaded before the forks

    codes = {"start": wait_for([fork(start_models, folder)])}
    compared = [case for case in CASES if case not in ("agrl_killed", *TWO_ONLY)]
    both = [*compared, *TWO_ONLY]
    port, other, third = free_port(), free_port(), free_port()
    one = fork(rank_main, folder, "one", compared, 0, 1, port)
    two = [fork(rank_main, folder, "two", both, rank, 2, port) for rank in range(2)]
    killed = [fork(rank_main, folder, "killed", ["agrl_killed"], rank, 2, other) for rank in range(2)]
    codes["killed"] = wait_for(killed)
    resumed = [fork(rank_main, folder, "resumed", ["agrl_killed"], rank, 2, other) for rank in range(2)]
    codes |= {"resumed": wait_for(resumed), "one": wait_for([one]), "two": wait_for(two)}
    sharded = [fork(rank_main, folder, "sharded", list(SHARDED), rank, 2, third) for rank in range(2)]
    codes["sharded"] = wait_for(sharded)
    (folder / "codes.json").write_text(json.dumps(codes))
    return codes


if __name__ == "__main__":
    home = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(home), str(home / "kernels"), str(home / "tests")]
    main(Path(sys.argv[1]).resolve())
