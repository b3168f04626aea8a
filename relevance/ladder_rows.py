"""The rows of the comparison: which recipe with which settings, from which start, and how it is asked.

    ROWS["agrl"]                 recipe agrl, from the seed's post-CoT SFT checkpoint
    PRESETS["quick"]             rows, seeds and sizes of a whole ladder

Rows of the RAG task start from their own SFT checkpoint and are asked four ways: with the chunk, without, with a random chunk
of another pair, and by kind of chunk. Which rows there are follows the tables of the papers; sizes are ours.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the table."""

    name: str
    recipe: str
    title: str
    start: str | None = None
    """Row whose model it starts from; None starts from a fresh model."""
    settings: tuple[str, ...] = ()
    is_rag: bool = False
    """Trained and asked with chunks."""


def _rows() -> dict[str, Row]:
    rag = ("catalog.with_chunks=true", "catalog.omit_rate=0.3")
    rows = (
        Row(name="label_only", recipe="sft", title="label-only SFT", settings=("profile=label_only",)),
        Row(name="think_first", recipe="sft", title="think-first SFT", settings=("profile=think_first",)),
        Row(name="sft", recipe="sft", title="post-CoT SFT"),
        Row(name="dpo", recipe="dpo", title="+ DPO", start="sft"),
        Row(name="grpo", recipe="grpo", title="+ GRPO", start="sft"),
        Row(
            name="grpo_pr",
            recipe="grpo",
            title="+ GRPO, process reward",
            start="sft",
            settings=("reward.kind=shaped", "reward.gated=false"),
        ),
        Row(name="taosr1", recipe="taosr1", title="TaoSR1", start="sft"),
        Row(name="agrl", recipe="agrl", title="after TaoSR-AGRL", start="sft"),
        Row(
            name="agrl_no_replay",
            recipe="agrl",
            title="after TaoSR-AGRL, no replay",
            start="sft",
            settings=("replay.tau=-1",),
        ),
        Row(
            name="agrl_no_gate",
            recipe="agrl",
            title="after TaoSR-AGRL, no gate",
            start="sft",
            settings=("reward.gated=false",),
        ),
        Row(name="she", recipe="she", title="after TaoSR-SHE", start="sft"),
        Row(
            name="she_suffix",
            recipe="she",
            title="after TaoSR-SHE, suffix sums",
            start="sft",
            settings=("she.variant=suffix_sum",),
        ),
        Row(
            name="she_masked",
            recipe="she",
            title="after TaoSR-SHE, masked",
            start="sft",
            settings=("she.variant=masked",),
        ),
        Row(
            name="she_flat",
            recipe="she",
            title="after TaoSR-SHE, no curriculum",
            start="sft",
            settings=("she.use_curriculum=false",),
        ),
        Row(name="sft_rag", recipe="sft", title="SFT-RAG", settings=(*rag, "profile=dyknow"), is_rag=True),
        Row(
            name="grpo_rag",
            recipe="grpo",
            title="GRPO-RAG",
            start="sft_rag",
            settings=(*rag, "profile=dyknow", "rl.loss_type=grpo"),
            is_rag=True,
        ),
        Row(name="dyknow", recipe="dyknow", title="DyKnow-RAG, printed gate", start="sft_rag", is_rag=True),
        Row(
            name="dyknow_fixed",
            recipe="dyknow",
            title="DyKnow-RAG, fixed gate",
            start="sft_rag",
            settings=("dyknow.gate=fixed",),
            is_rag=True,
        ),
        Row(
            name="dyknow_centered",
            recipe="dyknow",
            title="DyKnow-RAG, centered gate (ours)",
            start="sft_rag",
            settings=("dyknow.gate=centered",),
            is_rag=True,
        ),
    )
    return {row.name: row for row in rows}


ROWS = _rows()


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A whole ladder."""

    name: str
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: tuple[str, ...] = ()
    """Of every row; a setting that a row's recipe does not have is left out there."""
    num_test: int = 4000
    num_texts: int = 400
    claims: str = field(default="")


# What lets a model from random weights learn the label (see `sft_loss`): short prompts, many small steps, every pair new, and a
# majority of .4. With 64 rows a step, rules and header it stays at the most frequent label for longer than the run.
_START = (
    "catalog.label_mix=0.2,0.3,0.1,0.4",
    "prompt.max_rules=0",
    "prompt.has_header=false",
    "sft.num_epochs=1",
    "sft.learning_rate=1.5e-3",
    "sft.micro_rows=16",
    "sft.batch_rows=16",
)
PRESETS = {
    "smoke": Preset(
        name="smoke",
        rows=("sft", "grpo", "agrl"),
        seeds=(0,),
        settings=(
            "catalog.num_train=160",
            "catalog.num_dev=40",
            "catalog.num_test=80",
            "model.num_layers=2",
            "model.hidden_size=64",
            "model.vocab_size=1024",
            "sft.num_epochs=1",
            "sft.learning_rate=2e-3",
            "sft.batch_rows=32",
            "rl.max_steps=2",
            "rl.max_completion_tokens=24",
            "engine.accumulation=2",
            "rl.prompts_per_step=4",
        ),
        num_test=80,
        num_texts=16,
        claims="no quality claim: it shows that every part runs",
    ),
    "quick": Preset(
        name="quick",
        rows=("label_only", "sft", "dpo", "grpo", "taosr1", "agrl", "she"),
        seeds=(0,),
        settings=(
            *_START,
            "model.num_layers=4",
            "model.hidden_size=192",
            "model.vocab_size=1536",
            "catalog.num_train=24000",
            "catalog.num_dev=400",
            "catalog.num_test=800",
            "dpo.num_prompts=1024",
            "num_prompts=256",
            "rl.max_steps=40",
            "rl.max_completion_tokens=64",
        ),
        num_test=800,
        num_texts=200,
        claims="one seed: intervals are over queries alone",
    ),
    "full": Preset(
        name="full",
        rows=tuple(ROWS),
        seeds=(0, 1, 2),
        settings=(*_START, "sft.learning_rate=1e-3", "catalog.num_train=40000"),
    ),
}
