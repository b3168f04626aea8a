"""Adapters in a file of their own: the round trip, and what is refused with the base left alone."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from recis.errors import CheckpointError
from recis.towers.adapter_files import AdapterBaseError, load_adapters, save_adapters
from recis.towers.adapters import AdapterConfig, LayerwiseAdapters

IDS = torch.tensor([[2, 5, 9, 7, 3]])
FEATURES = torch.linspace(-1, 1, 20).reshape(4, 5)


@pytest.fixture
def saved(tiny, tmp_path):
    """Return the file of trained adapters with LoRA, and the logits they gave."""
    model = tiny.qwen3()
    adapters = LayerwiseAdapters(model, AdapterConfig(side_width=5, num_queries=3, rank=2))
    adapters.add_lora(rank=2)
    with torch.no_grad():
        for group in adapters.param_groups():
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        with adapters.side(FEATURES):
            want = model(input_ids=IDS).logits
    path = tmp_path / "adapters.safetensors"
    save_adapters(adapters, path)
    return path, want


def test_round_trip_holds_the_adapters_alone(tiny, saved):
    path, want = saved
    assert len(load_file(path)) == 2 * 4 + 3 * 2 * 2  # Q, A, B, gamma of two layers; A, B of LoRA on q and v of three
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    model = tiny.qwen3()
    adapters = load_adapters(model, path)
    with torch.no_grad(), adapters.side(FEATURES):
        assert torch.equal(model(input_ids=IDS).logits, want)
    save_adapters(adapters, path.with_name("again.safetensors"))
    again = load_file(path.with_name("again.safetensors"))
    assert all(torch.equal(value, again[name]) for name, value in load_file(path).items())


def untouched(model) -> bool:
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    lora = any("lora" in name for name, _ in model.named_modules())
    return not hooked and not lora and all(value.requires_grad for value in model.parameters())


def test_another_base_is_refused(tiny, saved):
    path, _ = saved
    model = tiny.qwen3()
    with torch.no_grad():
        model.lm_head.weight[3, 2] += 1e-6
    with pytest.raises(AdapterBaseError, match=r"belong to a Qwen3ForCausalLM with hash [0-9a-f]{12}"):
        load_adapters(model, path)
    assert untouched(model)
    with pytest.raises(AdapterBaseError):
        load_adapters(tiny.llama(), path)


def test_damaged_files_are_refused(tiny, saved, tmp_path):
    path, _ = saved
    model = tiny.qwen3()
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)

    def write(change, **more):
        bad = tmp_path / f"bad{len(list(tmp_path.iterdir()))}.safetensors"
        save_file(change, bad, metadata={**metadata, **more})
        return bad

    missing = {name: value for name, value in tensors.items() if not name.endswith("1.gate")}
    wide = {**tensors, "layers.0.queries": torch.zeros(4, 16)}
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-7])
    for bad, text in (
        (write(missing), r"1 tensors do not fit, first layers\.1\.gate"),
        (write(wide), r"layers\.0\.queries: the file has \(4, 16\), the sizes ask for \(3, 16\)"),
        (write(tensors, format="other"), "no adapter file"),
        (write(tensors, version="2"), "version '2'"),
        (write(tensors, config="{}"), "metadata"),
        (write(tensors, lora_rank="x"), "metadata"),
        (cut, "cannot be read"),
        (tmp_path / "none.safetensors", "cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=text):
            load_adapters(model, bad)
        assert untouched(model), text
