"""Layer-wise adapters: the closed gate, the equations by plain loops, causality, what trains, and giving the base back."""

import math

import pytest
import torch

from recis.errors import ConfigError
from recis.towers.adapters import AdapterConfig, LayerAdapter, LayerwiseAdapters
from recis.towers.attention_sites import UnsupportedDecoderError, find_sites
from recis.towers.weights import weights_hash

CONFIG = AdapterConfig(side_width=5, num_queries=3, rank=2)
DECODERS = ("qwen3", "llama", "olmo2", "gemma3")
IDS = torch.tensor([[2, 5, 9, 7, 3], [2, 6, 6, 8, 3]])


def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def open_gates(adapters: LayerwiseAdapters, value: float = 0.5) -> None:
    with torch.no_grad():
        for layer in adapters.layers:
            layer.get_parameter("gate").fill_(value)


@pytest.fixture(params=DECODERS)
def model(request, tiny):
    return getattr(tiny, request.param)()


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e6])
def test_closed_gates_change_no_bit(model, scale):
    with torch.no_grad():
        want = logits(model)
        adapters = LayerwiseAdapters(model, CONFIG)
        with adapters.side(torch.randn(2, 4, 5) * scale):
            assert torch.equal(logits(model), want)


def test_open_gates_depend_on_the_side_features(model):
    adapters = LayerwiseAdapters(model, CONFIG)
    open_gates(adapters)
    with torch.no_grad():
        base = logits(model)
        features = torch.randn(2, 4, 5)
        with adapters.side(features):
            one = logits(model)
        with adapters.side(features + torch.tensor([0.0, 1.0])[:, None, None]):  # other features for the second sample
            two = logits(model)
    assert torch.equal(one[0], two[0])
    assert not torch.allclose(one[1], two[1], atol=1e-5)
    assert not torch.allclose(one, base, atol=1e-5)


def test_only_gates_have_gradient_while_they_are_closed(model):
    adapters = LayerwiseAdapters(model, CONFIG)
    with adapters.side(torch.randn(2, 4, 5)):
        logits(model).square().sum().backward()
    for name, parameter in adapters.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == name.endswith("gate"), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_open_gates_train_all_parts_and_the_base_keeps_its_bits(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = LayerwiseAdapters(model, CONFIG)
    old = {name: value.clone() for name, value in adapters.state_dict().items()}
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=0.05), weight_decay=0.01)
    losses = []
    for _ in range(6):
        with adapters.side(torch.ones(4, 5)):
            loss = torch.nn.functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    assert not any(torch.equal(value, old[name]) for name, value in adapters.state_dict().items())


def test_later_tokens_do_not_reach_earlier_ones(model):
    adapters = LayerwiseAdapters(model, CONFIG)
    open_gates(adapters)
    changed = IDS.clone()
    changed[:, 3:] = 11
    with torch.no_grad(), adapters.side(torch.randn(2, 4, 5)):
        one, two = logits(model), logits(model, changed)
    torch.testing.assert_close(one[:, :3], two[:, :3], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one[:, 3:], two[:, 3:], atol=1e-5)


def test_cached_decoding_gives_what_one_pass_gives(tiny):
    model = tiny.qwen3()
    adapters = LayerwiseAdapters(model, CONFIG)
    open_gates(adapters)
    with torch.no_grad(), adapters.side(torch.randn(2, 4, 5)):
        want = logits(model)
        head = model(input_ids=IDS[:, :3], use_cache=True)
        rest = [head.logits]
        for at in range(3, IDS.shape[1]):
            head = model(input_ids=IDS[:, at : at + 1], past_key_values=head.past_key_values, use_cache=True)
            rest.append(head.logits)
    torch.testing.assert_close(torch.cat(rest, dim=1), want, rtol=1e-4, atol=1e-5)


def test_off_and_remove_give_the_base_back(model):
    with torch.no_grad():
        want, digest = logits(model), weights_hash(model)
    flags = {name: index % 2 == 0 for index, (name, _) in enumerate(model.named_parameters())}
    for name, value in model.named_parameters():
        value.requires_grad_(flags[name])
    names = [name for name, _ in model.named_modules()]
    adapters = LayerwiseAdapters(model, CONFIG)
    open_gates(adapters)
    adapters.add_lora(rank=2)
    with torch.no_grad():
        for group in adapters.param_groups():
            for parameter in group["params"]:
                parameter.add_(0.1)
        assert adapters.base_hash() == digest
        with adapters.side(torch.randn(4, 5)):
            changed = logits(model)
            with adapters.off():
                assert torch.equal(logits(model), want)
            assert torch.equal(logits(model), changed)
        assert not torch.allclose(changed, want, atol=1e-5)
        adapters.remove()
        assert torch.equal(logits(model), want)
    assert weights_hash(model) == digest
    assert [name for name, _ in model.named_modules()] == names
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_lora_starts_without_effect_and_trains_beside_the_adapters(tiny):
    model = tiny.qwen3()
    adapters = LayerwiseAdapters(model, CONFIG)
    open_gates(adapters)
    features = torch.randn(2, 4, 5)
    with torch.no_grad(), adapters.side(features):
        want = logits(model)
    adapters.add_lora()
    with torch.no_grad(), adapters.side(features):
        assert torch.equal(logits(model), want)
    groups = adapters.param_groups()
    assert [group["lr"] for group in groups] == [1e-3, 2e-4]
    assert len(groups[1]["params"]) == 2 * 2 * 3  # A and B on q and v of three layers
    assert all(16 in parameter.shape for parameter in groups[1]["params"])
    with adapters.side(features):
        logits(model).square().sum().backward()
    assert all(parameter.grad is not None for group in groups for parameter in group["params"])


def rotate_free(site, adapter: LayerAdapter, hidden, features, head: int, sample: int, place: int):
    """Return what one head adds at one place, in float64 by loops: the equations at the head of the module."""
    module = site.module
    heads_per_kv = site.num_heads // site.num_kv_heads
    dim, hidden_size = site.head_dim, site.hidden_size
    queries, down, up = (value.detach().double() for value in (adapter.queries, adapter.down, adapter.up))
    values = features[sample].double() @ down @ up
    prompts = []
    for query in queries:
        scores = [float(query @ value) / math.sqrt(hidden_size) for value in values]
        top = [math.exp(score - max(scores)) for score in scores]
        prompts.append(query + sum(share / sum(top) * value for share, value in zip(top, values, strict=True)))

    def normed(name, vector):
        norm = getattr(module, name, None)
        if norm is None:
            return vector
        weight = norm.weight.detach().double()
        return weight * vector / torch.sqrt(vector.square().mean() + norm.variance_epsilon)

    kv = head // heads_per_kv
    q = normed(
        "q_norm", module.q_proj.weight.detach().double()[head * dim : (head + 1) * dim] @ hidden[sample, place].double()
    )
    rows = slice(kv * dim, (kv + 1) * dim)
    keys = [normed("k_norm", module.k_proj.weight.detach().double()[rows] @ prompt) for prompt in prompts]
    scores = [float(q @ key) / math.sqrt(dim) for key in keys]
    top = [math.exp(score - max(scores)) for score in scores]
    found = [
        share / sum(top) * (module.v_proj.weight.detach().double()[rows] @ p)
        for share, p in zip(top, prompts, strict=True)
    ]
    return math.tanh(float(adapter.gate[head].detach())) * sum(found)


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_the_sum_before_the_output_projection_is_the_equation(tiny, name):
    model = getattr(tiny, name)()
    adapters = LayerwiseAdapters(model, AdapterConfig(side_width=5, num_queries=3, rank=2, first_layer=2))
    site, adapter = adapters.sites[0], adapters.layers[0]
    assert site.layer == 2
    assert isinstance(adapter, LayerAdapter)
    with torch.no_grad():
        adapter.gate.copy_(torch.tensor([0.3, -0.8, 0.0, 2.0]))
        for norm in ("q_norm", "k_norm"):  # their weights start at 1, which would hide one that was left out
            if hasattr(site.module, norm):
                getattr(site.module, norm).weight.uniform_(0.5, 2.0)
    seen: dict[str, torch.Tensor] = {}
    last = site.out_projection.register_forward_hook(lambda module, inputs, output: seen.update(sum=inputs[0]))
    site.query_projection.register_forward_pre_hook(lambda module, inputs: seen.update(hidden=inputs[0]))
    features = torch.randn(2, 4, 5)
    with torch.no_grad():
        logits(model)
        without = seen["sum"]
        with adapters.side(features):
            logits(model)
    last.remove()
    added = (seen["sum"] - without).unflatten(-1, (site.num_heads, site.head_dim))
    for sample, place in ((0, 0), (1, 4)):
        for head in range(site.num_heads):
            want = rotate_free(site, adapter, seen["hidden"], features, head, sample, place)
            torch.testing.assert_close(added[sample, place, head].double(), want, rtol=1e-4, atol=1e-5)


def test_a_sample_without_side_features_gives_the_bases_output(tiny):
    model = tiny.qwen3()
    adapters = LayerwiseAdapters(model, CONFIG)
    open_gates(adapters)
    features = torch.randn(2, 4, 5)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    with torch.no_grad():
        want = logits(model)
        with adapters.side(features, mask):
            one = logits(model)
        with adapters.side(features[:1, :2].expand(2, -1, -1)):
            two = logits(model)
        with adapters.side(features + 5 * ~mask[:, :, None], mask):
            three = logits(model)
    assert torch.equal(one[1], want[1])
    torch.testing.assert_close(one[0], two[0])
    assert torch.equal(one, three)
    with adapters.side(features, mask):
        logits(model).sum().backward()
    assert all(
        bool(torch.isfinite(parameter.grad).all()) for parameter in adapters.parameters() if parameter.grad is not None
    )


def test_bfloat16_base(tiny):
    model = tiny.qwen3().to(torch.bfloat16)
    adapters = LayerwiseAdapters(model, CONFIG)
    with torch.no_grad():
        want = logits(model)
        with adapters.side(torch.randn(4, 5)):
            assert torch.equal(logits(model), want)
            open_gates(adapters)
            assert not torch.equal(logits(model), want)


@pytest.mark.parametrize(("first", "projectors", "queries"), [(0, 11_272_192, 1_310_720), (1, 10_919_936, 1_269_760)])
def test_parameter_counts_of_a_7b_decoder(tiny, first, projectors, queries):
    with torch.device("meta"):
        model = tiny.llama(
            hidden_size=4096, intermediate_size=8, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
            head_dim=128,
        )  # fmt: skip
    adapters = LayerwiseAdapters(model, AdapterConfig(side_width=1408, first_layer=first))
    assert adapters.num_parameters() == {"projectors": projectors, "queries": queries, "gates": 32 * (32 - first)}
    assert sum(value.numel() for value in adapters.parameters()) == sum(adapters.num_parameters().values())


@pytest.mark.parametrize("name", ["gpt2", "phi3", "bart", "bert"])
def test_unsupported_decoders_are_refused_untouched(tiny, name):
    model = getattr(tiny, name)()
    with pytest.raises(UnsupportedDecoderError, match=type(model).__name__):
        LayerwiseAdapters(model, CONFIG)
    assert all(value.requires_grad for value in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_attention_with_a_weight_of_its_own_is_refused(tiny):
    model = tiny.llama()
    model.model.layers[1].self_attn.g_proj = torch.nn.Linear(16, 24)
    with pytest.raises(UnsupportedDecoderError, match=r"layers\.1\.self_attn.*g_proj"):
        find_sites(model)
    with pytest.raises(UnsupportedDecoderError, match="Linear has no config"):
        find_sites(torch.nn.Linear(2, 2))


def test_bad_side_features_and_settings(tiny):
    model = tiny.llama()
    for changes in ({"side_width": 0}, {"side_width": 2, "rank": 0}, {"side_width": 2, "first_layer": -1}):
        with pytest.raises(ConfigError):
            AdapterConfig(**changes)
    with pytest.raises(ConfigError, match="leaves no layer"):
        LayerwiseAdapters(model, AdapterConfig(side_width=5, first_layer=3))
    adapters = LayerwiseAdapters(model, CONFIG)
    with pytest.raises(ConfigError, match="adapters already"):
        LayerwiseAdapters(model, CONFIG)
    good = torch.zeros(2, 4, 5)
    for features, mask, text in (
        (torch.zeros(2, 4, 6), None, r"\[B, n, 5\]"),
        (torch.zeros(0, 5), None, "at least 1"),
        (torch.full((1, 5), math.nan), None, "finite"),
        (good, torch.ones(2, 3, dtype=torch.bool), "mask"),
        (good, torch.ones(2, 4), "mask"),
    ):
        with pytest.raises(ValueError, match=text), adapters.side(features, mask):
            pass
    with pytest.raises(ValueError, match="3 samples, and 2"), adapters.side(torch.zeros(3, 4, 5)):
        logits(model)
    assert adapters._side is None
    with torch.no_grad():
        want = logits(model)
    adapters.remove()
    with torch.no_grad():
        assert torch.equal(logits(model), want)


def test_gradient_checkpointing_gives_the_same_gradients(tiny):
    def grads(checkpointed: bool):
        model = tiny.qwen3()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        adapters = LayerwiseAdapters(model, CONFIG)
        open_gates(adapters)
        torch.manual_seed(1)
        with adapters.side(torch.randn(2, 4, 5)):
            logits(model).square().sum().backward()
        return [value.grad for value in adapters.parameters()]

    torch.testing.assert_close(grads(True), grads(False))
