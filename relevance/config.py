"""The settings of every recipe: frozen dataclasses, one per part, and one per recipe that puts them together.

    override(GrpoRun(), ["rl.learning_rate=1e-5", "catalog.num_train=4000"])          what `--set a.b=c` does
    real_defaults(GrpoRun())            the knobs that a real model wants instead of the tiny one's

Source per field: P = stated by DyKnow-RAG (arXiv:2510.11122, same team), S = TaoSR1 as told by others, L = the library's own
default, unmarked = ours. Everything of AGRL and SHE is a reconstruction: see `methods` and `step_advantages`.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from recis.errors import ConfigError, nearest
from relevance.catalog import CatalogConfig
from relevance.curriculum import PoolConfig
from relevance.labels import find_profile
from relevance.preferences import PreferenceConfig
from relevance.prompts import PromptConfig
from relevance.replay import ReplayConfig
from relevance.rewards import RewardConfig
from relevance.tiny import ModelConfig

VERIFIERS = ("gold", "ebrm", "rm")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a run uses the machine and what it keeps."""

    per_device_rows: int = 16
    """Rows of a micro-batch."""
    accumulation: int = 4
    """Micro-batches per step; rows per rank and step = per_device_rows * accumulation."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 = autocast."""
    own_head: bool = True
    """Log-probabilities by our kernel instead of TRL's head."""
    gradient_checkpointing: bool = False
    use_vllm: bool = False
    vllm_mode: Literal["colocate", "server"] = "colocate"  # L
    vllm_memory_share: float = 0.3  # L
    save_steps: int = 50
    keep: int = 3
    """Checkpoints kept; at least 2, so that a kill during a save leaves a whole one."""
    sample_every: int = 25
    """Steps between files of sampled completions; 0 writes none."""

    def __post_init__(self) -> None:
        if min(self.per_device_rows, self.accumulation, self.save_steps) < 1 or self.keep < 2 or self.sample_every < 0:
            raise ConfigError(
                "engine: per_device_rows, accumulation and save_steps at least 1, keep at least 2, sample_every at least 0; "
                f"got {self.per_device_rows}, {self.accumulation}, {self.save_steps}, {self.keep}, {self.sample_every}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning on rationales."""

    learning_rate: float = 5e-4
    warmup_share: float = 0.05  # P
    num_epochs: float = 2.0  # P
    batch_rows: int = 64
    """Rows of a step, of all ranks together."""
    micro_rows: int = 32
    """Rows of one forward pass, fewer where a rank's share of batch_rows is no multiple of it; batch_rows is one."""
    max_grad_norm: float = 1.0  # P
    label_weight: float | None = None
    """Weight of the label token beside 1 of a rationale's; None = 1 with --model, 10 for a tiny model made here."""
    prompt_weight: float | None = None
    """Weight of a prompt's token; None = 0 with --model, 0.3 for a tiny model made here: it has no language yet."""

    def __post_init__(self) -> None:
        if self.micro_rows < 1 or self.batch_rows % self.micro_rows or self.num_epochs <= 0:
            raise ConfigError(
                f"sft: batch_rows must be a multiple of micro_rows and num_epochs above 0; got {self.batch_rows}, "
                f"{self.micro_rows}, {self.num_epochs}"
            )
        for name, weight in (("label_weight", self.label_weight), ("prompt_weight", self.prompt_weight)):
            if weight is not None and not 0 <= weight < float("inf"):
                raise ConfigError(f"sft.{name} must be a finite number of at least 0, or null; got {weight}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoConfig:
    """Preference pairs from the model's own samples, and the loss on them."""

    num_prompts: int = 2000
    """Prompts that are sampled, after class balance where the recipe balances."""
    num_samples: int = 8
    temperature: float = 0.99  # P
    top_k: int = 100  # P
    beta: float = 0.1  # L
    learning_rate: float = 5e-6
    num_epochs: float = 1.0
    loss_types: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] = (1.0,)
    limits: PreferenceConfig = field(default_factory=PreferenceConfig)

    def __post_init__(self) -> None:
        if len(self.loss_types) != len(self.loss_weights):
            raise ConfigError(f"dpo: one weight per loss type; got {self.loss_types} and {self.loss_weights}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RlConfig:
    """What all recipes of reinforcement learning share."""

    temperature: float = 0.99  # P
    top_k: int = 100  # P
    num_generations: int = 8  # 16 with a real model, P
    prompts_per_step: int = 8
    """Must be rows per step and rank / num_generations, times the ranks; 64 with a real model."""
    learning_rate: float = 2e-5  # 1e-6 with a real model, P
    warmup_share: float = 0.05  # P
    clip_low: float = 0.2  # P
    clip_high: float = 0.2  # P
    kl_coef: float = 0.02  # P
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"  # L
    max_grad_norm: float = 1.0  # P
    std_ddof: int = 0  # P
    std_eps: float = 1e-6
    advantage_clamp: float | None = 2.0  # P
    label_weight: float = 1.0
    rationale_weight: float = 1.0
    refill_rounds: int = 2
    max_completion_tokens: int = 96
    num_iterations: int = 1  # L
    max_steps: int = 200

    def __post_init__(self) -> None:
        if self.num_generations < 2:
            raise ConfigError(
                f"rl.num_generations must be at least 2: a group of one has no baseline; got {self.num_generations}"
            )
        if not 0 <= self.refill_rounds <= 10:
            raise ConfigError(f"rl.refill_rounds lies in 0..10; got {self.refill_rounds}")
        if self.temperature <= 0 or self.max_steps < 1 or self.prompts_per_step < 1:
            raise ConfigError(
                f"rl: temperature above 0, max_steps and prompts_per_step at least 1; got {self.temperature}, "
                f"{self.max_steps}, {self.prompts_per_step}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterConfig:
    """Which prompts TaoSR1 trains on; S for the rule, ours for the numbers."""

    gamma: int | None = None
    """Keep groups with 0 < right < gamma; None = the group size."""
    balance: bool = True
    """Under-sample labels to the rarest before anything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SheConfig:
    """Step rewards after TaoSR-SHE; all ours."""

    variant: Literal["per_step", "suffix_sum", "masked"] = "per_step"
    lam: float = 0.5
    after_error: float = 0.5
    verifiers: tuple[str, ...] = ("gold", "rm")
    """Asked in this order, an earlier one overrides: gold, ebrm, rm."""
    ebrm_run: str | None = None
    """Folder of `recis ebrm train`, for the verifier ebrm."""
    rm_accuracy: float = 0.9
    """Of the noisy oracle that stands in for a reward model."""
    min_balanced_accuracy: float = 0.8
    min_entropy_bits: float = 0.54
    use_curriculum: bool = True
    num_logged: int = 8
    """Rollouts per prompt whose accuracy decides the stage."""

    def __post_init__(self) -> None:
        for name in self.verifiers:
            if name not in VERIFIERS:
                raise ConfigError(f"she.verifiers: no verifier {name!r}; {nearest(name, VERIFIERS)}")
        if not self.verifiers or ("ebrm" in self.verifiers and self.ebrm_run is None):
            raise ConfigError(
                "she.verifiers needs at least one verifier, and she.ebrm_run names the model of the verifier ebrm"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DyknowConfig:
    """Two prompts per query; P as printed, but for what is marked."""

    gate: Literal["printed", "fixed", "centered"] = "printed"
    """fixed is the paper's ablation, centered ours."""
    fixed_alpha: float = 2.0
    fixed_beta: float = 0.05
    is_gap_of_batch: bool = False
    """The text has both; ours: per query."""
    lx_coef: float = 1.0
    accuracy_low: float = 0.01
    accuracy_high: float = 0.9
    clamp_lx: float | None = None
    pool: PoolConfig = field(default_factory=PoolConfig)
    ebrm_run: str | None = None
    """Folder of `recis ebrm train`: the pool is ordered by |p - P(label 4)| instead of by confidence. Ours."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every recipe has."""

    profile: str = "compact"
    """Blocks of an answer, see `labels.PROFILES`."""
    seed: int = 0
    catalog: CatalogConfig = field(default_factory=CatalogConfig)
    """The generated task, where no --data is given."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    """Of the run itself for `sft`; for the others of the start that they train where no --model is given."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    max_missing: float = 0.5
    """Largest share of train pairs that may lack gold that the recipe uses."""
    rules: str | None = None
    """module:attribute of a RuleBase for --data; None has no rules there. The generated task has its own."""

    def __post_init__(self) -> None:
        find_profile(self.profile)


@dataclass(frozen=True, kw_only=True)
class SftRun(RunConfig):
    """`relevance train sft`."""


@dataclass(frozen=True, kw_only=True)
class DpoRun(RunConfig):
    """`relevance train dpo`."""

    dpo: DpoConfig = field(default_factory=DpoConfig)


@dataclass(frozen=True, kw_only=True)
class RlRun(RunConfig):
    """Shared by the recipes that sample while they train."""

    rl: RlConfig = field(default_factory=RlConfig)

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        if find_profile(self.profile).is_label_last:
            raise ConfigError(
                f"profile {self.profile!r} has its label at the end: it is for sft and greedy scoring only"
            )
        rows = self.engine.per_device_rows * self.engine.accumulation
        if rows % self.rl.num_generations:
            raise ConfigError(
                f"engine.per_device_rows x engine.accumulation = {rows} must be a multiple of rl.num_generations "
                f"{self.rl.num_generations}: each group lies whole on one rank"
            )
        if self.rl.num_iterations != 1:
            raise ConfigError(
                "rl.num_iterations must be 1: TRL does not save the completions it would use again, so a resumed run would "
                f"differ; got {self.rl.num_iterations}"
            )


@dataclass(frozen=True, kw_only=True)
class GrpoRun(RlRun):
    """`relevance train grpo`: the plain baseline, without filter, balance or refill."""

    rl: RlConfig = field(default_factory=lambda: RlConfig(refill_rounds=0))
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass(frozen=True, kw_only=True)
class TaosrRun(RlRun):
    """`relevance train taosr1`."""

    dpo: DpoConfig = field(default_factory=DpoConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)


@dataclass(frozen=True, kw_only=True)
class AgrlRun(RlRun):
    """`relevance train agrl`, after TaoSR-AGRL."""

    reward: RewardConfig = field(default_factory=lambda: RewardConfig(kind="shaped"))
    replay: ReplayConfig = field(default_factory=ReplayConfig)


@dataclass(frozen=True, kw_only=True)
class SheRun(RlRun):
    """`relevance train she`, after TaoSR-SHE."""

    she: SheConfig = field(default_factory=SheConfig)
    num_prompts: int = 2000
    """Train prompts that are sampled beforehand for diversity and curriculum."""

    def __post_init__(self) -> None:
        RlRun.__post_init__(self)
        _refuse_weights(self.rl, "she gives every step an advantage of its own")


@dataclass(frozen=True, kw_only=True)
class DyknowRun(RlRun):
    """`relevance train dyknow`: DyKnow-RAG as printed."""

    profile: str = "dyknow"
    catalog: CatalogConfig = field(default_factory=lambda: CatalogConfig(omit_rate=0.3, with_chunks=True))
    rl: RlConfig = field(default_factory=lambda: RlConfig(loss_type="grpo"))  # P
    dyknow: DyknowConfig = field(default_factory=DyknowConfig)

    def __post_init__(self) -> None:
        RlRun.__post_init__(self)
        if self.rl.num_generations % 2:
            raise ConfigError(
                f"rl.num_generations must be even: half of the rollouts read the chunk; got {self.rl.num_generations}"
            )
        _refuse_weights(self.rl, "dyknow weighs whole rollouts")


def _refuse_weights(rl: RlConfig, why: str) -> None:
    """Refuse weights of label and rationale where they would change nothing."""
    if not rl.label_weight == rl.rationale_weight == 1.0:
        raise ConfigError(
            f"rl.label_weight {rl.label_weight:g} and rl.rationale_weight {rl.rationale_weight:g} have no effect: {why}; "
            "leave both at 1, or use grpo, taosr1 or agrl"
        )


Run = TypeVar("Run", bound=RunConfig)


def real_defaults(config: Run) -> Run:
    """Return a config with the learning rates, lengths and group sizes of a real model (0.6B and up); sources as above."""
    lora = config.model.lora_rank > 0
    changes: dict[str, object] = {
        "sft": replace(config.sft, learning_rate=1e-4 if lora else 1e-5),
        "prompt": replace(config.prompt, max_prompt_tokens=4096),
        "engine": replace(config.engine, precision="bf16", gradient_checkpointing=True),
    }
    if isinstance(config, RlRun):
        changes["rl"] = replace(
            config.rl, num_generations=16, prompts_per_step=64, learning_rate=1e-6, max_completion_tokens=512
        )
        changes["engine"] = replace(
            config.engine, precision="bf16", gradient_checkpointing=True, per_device_rows=16, accumulation=64
        )
    if isinstance(config, DpoRun | TaosrRun):
        changes["dpo"] = replace(config.dpo, learning_rate=5e-7)
    return replace(config, **changes)  # type: ignore[arg-type]
