"""LoRA through peft: SFT and GRPO train adapters alone, and the second run builds on what the first has learned."""

import json

import pytest
import torch
from tiny_lm import MICRO, MICRO_RL, load_micro, save_micro, small_task

from relevance.engine import peft_config
from relevance.prefill import score_prompts
from relevance.recipes import recipe_function
from relevance.tiny import ModelConfig
from relevance.training_run import open_run

pytest.importorskip("peft", reason="LoRA needs peft: pip install recis[peft]")
pytestmark = pytest.mark.filterwarnings("ignore")
LORA = ["model.lora_rank=4", "sft.learning_rate=0.02"]


def run_recipe(recipe, out, settings, model):
    run = open_run(recipe, out=out, settings=settings, model=str(model), say=lambda line: None)
    return recipe_function(recipe)(run)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_micro(tmp_path_factory.mktemp("lora") / "base", small_task())


@pytest.fixture(scope="module")
def sft(base, tmp_path_factory):
    return run_recipe("sft", tmp_path_factory.mktemp("lora-sft") / "run", [*MICRO, *LORA], base)


def probs(path):
    lm, task = load_micro(path), small_task()
    return score_prompts(lm, [task.prompt(pair) for pair in task.test[:8]])


def test_the_head_gets_no_adapter():
    config = peft_config(ModelConfig(lora_rank=4))
    assert (config.r, config.lora_alpha) == (4, 8)
    assert "lm_head" not in config.target_modules
    assert peft_config(ModelConfig()) is None


def test_sft_saves_an_adapter_that_changes_the_model_and_leaves_its_base_alone(base, sft):
    stored = json.loads((sft / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(base)
    assert not (sft / "model.safetensors").exists()
    assert float((probs(sft) - probs(base)).abs().max()) > 0.01
    whole, before = load_micro(sft).model.state_dict(), load_micro(base).model.state_dict()
    changed = {name for name in before if not torch.equal(whole[name], before[name])}
    assert changed
    assert all("proj" in name for name in changed)


def test_grpo_on_an_adapter_starts_from_what_it_learned(base, sft, tmp_path):
    """With a learning rate of 0 the second run ends where the first did; its reference is the merged start too."""
    out = tmp_path / "run"
    settings = [*MICRO_RL, "model.lora_rank=2", "rl.learning_rate=0", "rl.max_steps=1", "rl.kl_coef=0.1"]
    final = run_recipe("grpo", out, settings, sft)
    stored = json.loads((final / "adapter_config.json").read_text())
    assert (stored["base_model_name_or_path"], stored["r"]) == (str(out / "start"), 2)
    torch.testing.assert_close(probs(final), probs(sft), rtol=0, atol=1e-5)
    log = [json.loads(line) for line in (out / "rl" / "train.jsonl").read_text().splitlines()]
    assert log[0]["kl"] == pytest.approx(0.0, abs=1e-5)


def test_grpo_moves_the_adapter_alone(tmp_path):
    """A model that answers with single labels is right by chance, so groups differ and the adapter learns."""
    from safetensors.torch import load_file

    label_only = ["profile=label_only", "sft.num_epochs=8", "sft.learning_rate=5e-3"]
    start = recipe_function("sft")(
        open_run("sft", out=tmp_path / "sft", settings=[*MICRO, *label_only], say=lambda line: None)
    )
    settings = [*MICRO_RL, "profile=label_only", "model.lora_rank=2", "rl.learning_rate=0.05", "rl.max_steps=2"]
    final = run_recipe("grpo", tmp_path / "run", [*settings, "rl.max_completion_tokens=2"], start)
    weights = load_file(final / "adapter_model.safetensors")
    assert all(bool(value.isfinite().all()) for value in weights.values())
    assert max(float(value.abs().max()) for name, value in weights.items() if "lora_B" in name) > 0
    assert all("lora_" in name for name in weights)
