"""TextTower: poolings by hand, padding that says nothing, what trains, bad folders, odd texts."""

import shutil

import pytest
import torch

from recis.errors import ConfigError, DataError
from recis.io.batch import Batch
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.towers.backbone import BackboneError
from recis.towers.optimizer import GroupedAdamW, lr_scale
from recis.towers.pooling import AttentionPool, FirstToken, LastToken, MeanPool, SummaryToken
from recis.towers.text import TextTowerConfig
from recis.towers.vector_files import open_vectors
from recis.towers.weights import weights_hash

POOLINGS = (MeanPool, FirstToken, LastToken, SummaryToken, AttentionPool)
TEXTS = ["w1 w2 w3", "", "w9", "w4 w4 w5 w6 w7 w8"]


def batch_of(column) -> Batch:
    size = len(column.lengths)
    return Batch(
        sparse=KeyedJaggedTensor.from_jagged({}, stride=size), dense=torch.zeros(size, 0), dense_keys=(),
        dense_widths=(), labels=torch.zeros(size, 1), label_mask=None, label_weights=None, weights=torch.ones(size),
        group_ids=None, extras={"title": column}, num_samples=size,
    )  # fmt: skip


def strings(texts) -> Batch:
    return batch_of(JaggedTensor.from_strings(texts))


def config(folder, **changes) -> TextTowerConfig:
    return TextTowerConfig(**{"name": "text", "column": "title", "path": str(folder), **changes})


def test_poolings_by_hand():
    states = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [9.0, 9.0]], [[5.0, 5.0]] * 3])
    mask = torch.tensor([[True, True, False], [False] * 3])
    assert MeanPool(2)(states, mask).tolist() == [[2, 1], [0, 0]]
    assert FirstToken(2)(states, mask).tolist() == [[1, 0], [0, 0]]
    assert LastToken(2)(states, mask).tolist() == [[3, 2], [0, 0]]
    pool = AttentionPool(2)
    assert pool(states, mask).tolist() == [[2, 1], [0, 0]]
    with torch.no_grad():
        pool.weight.copy_(torch.tensor([100.0, 0.0]))
    out = pool(states, mask)
    torch.testing.assert_close(out, torch.tensor([[3.0, 2.0], [0.0, 0.0]]))
    out.sum().backward()
    assert pool.weight.grad is not None
    assert torch.isfinite(pool.weight.grad).all()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["bert_folder", "qwen3_folder"])
def test_a_texts_vector_does_not_depend_on_its_neighbours(request, kind, pooling):
    tower = config(request.getfixturevalue(kind), pooling=pooling, out_width=3, max_tokens=32).build().eval()
    with torch.no_grad():
        together = tower(strings(TEXTS))
        alone = torch.cat([tower(strings([text])) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.shape == (4, 3)
    blind = kind == "qwen3_folder" and pooling is FirstToken  # a decoder's first token has seen nothing of the text
    assert len(together.unique(dim=0)) == (2 if blind else 4)
    assert together[1].tolist() == [0.0] * 3  # a missing text is masked, whatever the projection's bias is
    assert tower(strings([])).shape == (0, 3)
    ids = JaggedTensor.from_lists(tower.tokenize(TEXTS))
    torch.testing.assert_close(tower(batch_of(ids)), together)


def test_bags_without_tokens_pool_to_zeros(bert_folder):
    tower = config(bert_folder).build().eval()
    out = tower(batch_of(JaggedTensor.from_lists([[5, 6], [], [7]])))
    assert out.isfinite().all()
    assert out[1].tolist() == [0.0] * 16
    assert tower.num_missing == 1  # [7] is a text, if one without special tokens
    assert out[2].any()
    assert tower(batch_of(JaggedTensor.from_lists([[], []]))).tolist() == [[0.0] * 16] * 2
    summary = config(bert_folder, pooling=SummaryToken, max_tokens=32).build().eval()
    assert summary.encode([[], []]).any()  # it still has its own token; as a feature it is masked
    assert not summary(batch_of(JaggedTensor.from_lists([[], []]))).any()
    assert summary.num_missing == 2


def test_a_text_of_100_000_characters_is_cut_and_counted(bert_folder):
    tower = config(bert_folder, max_tokens=8).build().eval()
    long = "w5 " * 33_334
    assert tower.tokenize([long, "", "w5"]) == [[2, *[9] * 6, 3], [2, 3], [2, 9, 3]]
    assert tower.counts.tolist() == [1, 1]
    with torch.no_grad():
        assert tower(strings([long, "x" * 100_000])).isfinite().all()
    assert tower.encode([[9] * 50]).equal(tower.encode([[9] * 8]))


def test_everything_frozen_runs_without_gradient_and_without_dropout(bert_folder):
    tower = config(bert_folder, out_width=4).build().train()
    one, two = tower(strings(TEXTS)), tower(strings(TEXTS))
    assert torch.equal(one, two)
    one.sum().backward()
    trained = {name for name, value in tower.named_parameters() if value.requires_grad}
    assert trained == {"projection.weight", "projection.bias"}
    assert all(value.grad is not None and value.grad.any() for value in tower.projection.parameters())


def test_without_dropout_training_gives_what_evaluation_gives(bert_folder):
    for dropout in (True, False):
        tower = config(bert_folder, frozen_layers=1, dropout=dropout).build()
        for module in tower.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        evaluated, trained = tower.eval()(strings(TEXTS)), tower.train()(strings(TEXTS))
        assert torch.equal(evaluated, trained) is not dropout
        trained.sum().backward()
        assert any(value.grad is not None for value in tower.model.parameters())
    with pytest.raises(ConfigError, match="set micro_batch_tokens in place of gradient_checkpointing"):
        config(bert_folder, gradient_checkpointing=True, dropout=False)


def test_freeze_depth_trains_the_layers_above_alone(bert_folder):
    tower = config(bert_folder, frozen_layers=1, lr_scale=0.25).build().train()
    trained = {name for name, value in tower.named_parameters() if value.requires_grad}
    assert trained
    assert all(name.startswith("model.encoder.layer.1.") for name in trained)
    before = {name: value.clone() for name, value in tower.named_parameters()}
    parameters = [value for value in tower.parameters() if value.requires_grad]
    optimizer = GroupedAdamW(lr=0.1).build(parameters)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025]
    tower(strings(TEXTS)).square().sum().backward()
    optimizer.step()
    assert {name for name, value in tower.named_parameters() if not torch.equal(value, before[name])} <= trained
    whole = config(bert_folder, frozen_layers=0).build()
    assert all(value.requires_grad for value in whole.parameters())
    with pytest.raises(ConfigError, match="has 2 layers; 3 cannot be frozen"):
        config(bert_folder, frozen_layers=3).build()


def test_the_last_norm_of_a_decoder_trains_with_its_top_layers(qwen3_folder):
    tower = config(qwen3_folder, frozen_layers=2).build()
    trained = {name for name, value in tower.named_parameters() if value.requires_grad}
    assert {name.split(".")[1] for name in trained} == {"layers", "norm"}
    assert {name.split(".")[2] for name in trained if ".layers." in name} == {"2"}


def test_groups_of_learning_rates_keep_the_order_of_parameters(bert_folder):
    tower = config(bert_folder, frozen_layers=1, lr_scale=0.1, out_width=2).build()
    parameters = [value for value in tower.parameters() if value.requires_grad]
    optimizer = GroupedAdamW(lr=1.0).build(parameters)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.0]
    flat = [value for group in optimizer.param_groups for value in group["params"]]
    assert [id(value) for value in flat] == [id(value) for value in parameters]
    assert {lr_scale(value) for value in tower.projection.parameters()} == {1.0}


@pytest.mark.parametrize("kind", ["bert_folder", "qwen3_folder"])
def test_lora_trains_beside_a_frozen_backbone(request, kind):
    folder = request.getfixturevalue(kind)
    plain, tower = config(folder).build().eval(), config(folder, lora_rank=2).build().eval()
    assert torch.equal(plain(strings(TEXTS)), tower(strings(TEXTS)).detach())
    trained = {name for name, value in tower.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert weights_hash(tower.model) == weights_hash(plain.model)
    version = tower.version()
    tower(strings(TEXTS)).square().sum().backward()
    with torch.no_grad():
        for value in tower.parameters():
            if value.grad is not None:
                value -= value.grad
    assert tower.version() != version


def test_gradient_checkpointing_changes_no_gradient(bert_folder):
    def grads(checkpointed):
        tower = config(bert_folder, frozen_layers=0, gradient_checkpointing=checkpointed).build().train()
        tower.model.config.hidden_dropout_prob = 0.0
        for module in tower.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        tower(strings(TEXTS)).square().sum().backward()
        return {name: value.grad for name, value in tower.named_parameters() if value.grad is not None}

    torch.testing.assert_close(grads(True), grads(False), rtol=1e-4, atol=1e-6)


def test_a_pass_that_trains_in_bfloat16_takes_plain_attention(bert_folder):
    fused = []
    cases = (
        (True, True, False, False),
        (True, False, False, True),
        (False, True, False, True),
        (True, True, True, True),
    )
    for bf16, grad, again, want in cases:
        tower = config(bert_folder, frozen_layers=1, bf16=bf16, gradient_checkpointing=again).build().train()
        tower.model.encoder.layer[1].register_forward_hook(
            lambda *_: fused.append(torch.backends.cuda.flash_sdp_enabled())
        )
        with torch.set_grad_enabled(grad):
            out = tower(strings(TEXTS))
        if again:
            out.sum().backward()
        assert fused.pop() is want
    assert torch.backends.cuda.flash_sdp_enabled()


def test_bfloat16_stays_near_and_gives_float32(bert_folder):
    one, two = config(bert_folder).build().eval(), config(bert_folder, bf16=True).build().eval()
    a, b = one(strings(TEXTS)), two(strings(TEXTS))
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_the_version_follows_weights_and_settings(bert_folder):
    tower = config(bert_folder).build()
    same = config(bert_folder, name="other", out_width=5).build()
    assert tower.version() == same.version()  # the projection trains beside the vectors
    others = [config(bert_folder, **change).build() for change in ({"max_tokens": 9}, {"pooling": FirstToken})]
    versions = [tower.version(), *(other.version() for other in others)]
    with torch.no_grad():
        tower.model.get_input_embeddings().weight[3, 3] += 1
    versions.append(tower.version())
    assert len(set(versions)) == 4


def test_bad_folders_are_refused(tiny, bert_folder, tmp_path):
    def changed(name):
        folder = tmp_path / name
        shutil.copytree(bert_folder, folder)
        return folder

    cut, less, small, no_tokenizer = map(changed, ("cut", "less", "small", "no_tokenizer"))
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    from safetensors.torch import load_file, save_file

    state = load_file(less / "model.safetensors")
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, less / "model.safetensors", metadata={"format": "pt"})
    tiny.bert(vocab_size=20).save_pretrained(small)
    for path in no_tokenizer.glob("token*"):
        path.unlink()
    for folder, text in (
        (tmp_path / "absent", "no config.json"),
        (cut, "damaged|cannot be loaded"),
        (less, r"1 weights are missing.*encoder\.layer\.1\.output\.dense\.weight"),
        (small, "tokens go up to 43, the model 'bert' has 20"),
        (no_tokenizer, "no tokenizer here"),
    ):
        with pytest.raises(BackboneError, match=text):
            config(folder).build()


def test_bad_settings_and_columns(bert_folder):
    with pytest.raises(ConfigError, match="max_tokens 65 is more than the 64 positions"):
        config(bert_folder, max_tokens=65).build()
    with pytest.raises(ConfigError, match="and the summary token"):
        config(bert_folder, max_tokens=64, pooling=SummaryToken).build()
    for changes in (
        {"max_tokens": 2}, {"out_width": 0}, {"frozen_layers": -1}, {"lr_scale": -1.0}, {"lora_rank": 2, "frozen_layers": 1}
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="text tower 'text'"):
            config(bert_folder, **changes)
    tower = config(bert_folder).build()
    with pytest.raises(DataError, match="value 44: token ids must lie in"):
        tower(batch_of(JaggedTensor.from_lists([[44, 3]])))
    with pytest.raises(DataError, match="row 1, column 'title': is no UTF-8"):
        tower(strings([b"w1", b"\xff"]))
    with pytest.raises(ConfigError, match="did you mean 'title'"):
        config(bert_folder, column="titel").build()(strings(["a"]))


def test_the_command_writes_what_the_tower_gives(bert_folder, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from command import recis

    pq.write_table(
        pa.table({"item": [5, 6, 7, 8], "title": ["w1 w2", None, "w3", "w1 w2"]}), tmp_path / "items.parquet"
    )
    argv = ["towers", "precompute", "--tower", bert_folder, "--data", tmp_path / "items.parquet", "--id-column", "item"]
    done = recis(*argv, "--text-column", "title", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "4 ids, 3 distinct texts, 3 of them encoded now" in done.out
    tower = config(bert_folder).build().eval()
    file = open_vectors(tmp_path / "out", version=tower.version())
    want = tower.encode(tower.tokenize(["w1 w2", "", "w3", "w1 w2"]))
    torch.testing.assert_close(file.read(torch.tensor([5, 6, 7, 8]))[0], want, rtol=2e-3, atol=2e-3)
    done = recis(*argv, "--text-column", "text", "--out", tmp_path / "other")
    assert done.code == 2
    assert "no column 'text'" in done.err


def test_the_version_does_not_depend_on_what_was_tokenised_before(bert_folder):
    tower = config(bert_folder, max_tokens=8).build()
    before = tower.version()
    tower.tokenize(["w1 " * 20])  # is cut, which leaves its mark in the library's tokenizer
    tower.tokenizer(["w1", "w2 w3"], padding=True)
    assert tower.version() == before
    assert config(bert_folder, max_tokens=9).build().version() != before
