"""Scores from the prompt alone: shared prefixes, files with bad rows, rationales, exports, and the commands around them."""

import json
from dataclasses import replace
from hashlib import sha256

import pyarrow.parquet as pq
import pytest
import torch
from tiny_lm import load_micro, save_micro, small_task

from relevance.cli import main
from relevance.data import Item, Pair
from relevance.export import COLUMNS, distillation_loss, export, folds_by_query, teacher_columns
from relevance.files import Score, read_rows, write_rows
from relevance.language_model import load_language_model, wrap
from relevance.prefill import score_prompts
from relevance.rollouts import SamplingConfig, sample_completions
from relevance.serve import Scorer, score_file
from relevance.task import file_task

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_micro(tmp_path_factory.mktemp("serve"), small_task())


@pytest.fixture(scope="module")
def lm(folder):
    return load_micro(folder)


@pytest.fixture(scope="module")
def scorer(folder):
    return Scorer.load(folder, rules="catalog", device="cpu")


class TestPrefill:
    def test_equals_one_prompt_at_a_time_with_full_logits(self, lm):
        task = small_task()
        prompts = [task.prompt(pair) for pair in task.train[:20]]
        groups = [pair.query_id for pair in task.train[:20]]
        got = score_prompts(lm, prompts, groups, batch_tokens=60)
        with torch.no_grad():
            want = torch.stack(
                [
                    lm.model(input_ids=torch.tensor([lm.encode(prompt)])).logits[0, -1, list(lm.label_ids)].softmax(0)
                    for prompt in prompts
                ]
            )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.sum(1), torch.ones(20))

    @pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
    def test_batch_size_order_and_grouping_change_nothing(self, lm, batch_tokens):
        task = small_task()
        pairs = list(task.train[:19])
        want = score_prompts(lm, [task.prompt(pair) for pair in pairs])
        order = torch.randperm(19).tolist()
        shuffled = [pairs[place] for place in order]
        prompts, groups = [task.prompt(pair) for pair in shuffled], [pair.query_id for pair in shuffled]
        got = score_prompts(lm, prompts, groups, batch_tokens=batch_tokens)
        torch.testing.assert_close(got, want[order], rtol=1e-4, atol=1e-5)

    def test_is_the_same_whatever_is_generated_behind_it(self, lm):
        prompt = small_task().prompt(small_task().train[0])
        probs = score_prompts(lm, [prompt])[0]
        for limit in (1, 6):
            config = SamplingConfig(temperature=0.0, max_completion_tokens=limit)
            forced = sample_completions(lm, [prompt], config=config, forced=["2"])[0][0]
            assert forced.text.startswith("2")
            torch.testing.assert_close(score_prompts(lm, [prompt])[0], probs)


class TestRollouts:
    def test_same_seed_same_completions_and_another_seed_others(self, lm):
        prompts = [small_task().prompt(pair) for pair in small_task().train[:3]]
        config = SamplingConfig(max_completion_tokens=6)
        first = sample_completions(lm, prompts, num_samples=2, config=config, seed=1)
        assert first == sample_completions(lm, prompts, num_samples=2, config=config, seed=1)
        assert first != sample_completions(lm, prompts, num_samples=2, config=config, seed=2)
        assert [len(row) for row in first] == [2, 2, 2]
        assert all(lm.decode(done.ids) == done.text for row in first for done in row)


class TestModels:
    def test_tokens_spell_the_text(self, lm):
        text = "4<category>near</category><rule>C01</rule> é42"
        ids = lm.encode(text)
        assert b"".join(lm.token_bytes(ids)) == text.encode()
        assert len(lm.encode("42")) == 2
        assert len(lm.encode("<category>")) == len(lm.encode("C01")) == 1
        assert lm.token_bytes([lm.eos_ids[0]]) == [b""]

    def test_labels_that_merge_are_refused(self, lm):
        class Merging:
            eos_token_id, pad_token_id, padding_side, chat_template = 0, 0, "left", None

            def __call__(self, text, **_):
                return {"input_ids": [len(text)]}

        with pytest.raises(ValueError, match="label 1 as one token"):
            wrap(lm.model, Merging())

    def test_a_model_without_a_chat_template(self, folder):
        with pytest.raises(ValueError, match="no chat template"):
            load_language_model(folder, chat_template=True, device="cpu")

    def test_a_chat_template_is_rendered_once_and_checked(self, folder):
        lm = load_micro(folder)
        lm.tokenizer.chat_template = "{% for m in messages %}user:\n{{ m.content }}{% endfor %}grade:{{ '\\n' }}"
        found = wrap(lm.model, lm.tokenizer, chat_template=True)
        assert found.render("label:\n") == "user:\nlabel:\ngrade:\n"

    def test_no_model_there(self, tmp_path):
        with pytest.raises(ValueError, match=r"no config\.json"):
            load_language_model(tmp_path)


class TestScorer:
    def test_scores(self, scorer):
        pairs = small_task().test[:6]
        scores = scorer.score(pairs)
        assert [score.id for score in scores] == [pair.id for pair in pairs]
        for score in scores:
            assert score.label == max(range(4), key=score.p.__getitem__) + 1
            assert score.tier in ("Good", "Mid", "Bad")
            assert score.rationale is None
        assert scorer.score([]) == []

    def test_a_rationale_continues_the_label(self, scorer):
        for score in scorer.score(small_task().test[:3], rationale=True):
            assert score.rationale is not None
            assert score.rationale[0] == str(score.label)

    def test_one_chunk_in_one_pass_and_without_it_the_plain_prompt(self, scorer):
        task = replace(small_task("dyknow", with_chunks=True), with_chunk=True)
        shown, plain = replace(scorer, task=task), replace(scorer, task=replace(task, with_chunk=False))
        pair = task.test[0]
        assert pair.chunk is not None
        assert task.prompt(pair).count("context: ") == 1
        bare = replace(pair, chunk=None)
        assert task.prompt(bare) == task.prompt(pair, with_chunk=False)
        torch.testing.assert_close(shown.probs([bare]), plain.probs([pair]))


class TestFiles:
    def bad_file(self, path):
        good = list(small_task().test[:5])
        long = Pair(id="long", query_id="q", query="boots " * 4000, item_id="i", item=Item(title="x"))
        write_rows(path, [*good, long])
        with path.open("a") as file:
            file.write('{"id": "cut", "query_id": "q"\n')
            file.write(json.dumps({"id": "no-item", "query_id": "q", "query": "boots", "item_id": "i"}) + "\n")
        return good

    def test_bad_rows_are_listed_and_the_rest_is_scored(self, scorer, tmp_path):
        good = self.bad_file(tmp_path / "pairs.jsonl")
        done = score_file(scorer, tmp_path / "pairs.jsonl", tmp_path / "scores.parquet")
        assert (done.num_scored, done.num_bad) == (5, 3)
        scores = read_rows(tmp_path / "scores.parquet", Score)
        assert [score.id for score in scores] == [pair.id for pair in good]
        reasons = [json.loads(line) for line in done.errors.read_text().splitlines()]
        assert [row["row"] for row in reasons] == [5, 6, 7]
        assert "tokens before the item" in reasons[0]["reason"]
        assert "not a JSON object" in reasons[1]["reason"]
        assert "'item'" in reasons[2]["reason"]

    def test_a_stopped_file_goes_on_behind_its_last_block(self, scorer, tmp_path, monkeypatch):
        monkeypatch.setattr("relevance.serve.BLOCK_ROWS", 4)
        write_rows(tmp_path / "pairs.jsonl", small_task().test[:12])
        asked, own = [], Scorer.score

        def score(self, pairs, *, rationale=False):
            asked.append([pair.id for pair in pairs])
            if len(asked) == 3:
                raise KeyboardInterrupt
            return own(self, pairs, rationale=rationale)

        monkeypatch.setattr(Scorer, "score", score)
        with pytest.raises(KeyboardInterrupt):
            score_file(scorer, tmp_path / "pairs.jsonl", tmp_path / "scores.jsonl")
        done = score_file(scorer, tmp_path / "pairs.jsonl", tmp_path / "scores.jsonl")
        assert done.num_scored == 12
        assert [ids[0] for ids in asked] == ["test-0", "test-4", "test-8", "test-8"]
        assert not (tmp_path / "scores.jsonl.parts").exists()

    def test_nothing_to_score(self, scorer, tmp_path):
        (tmp_path / "empty.jsonl").write_text("")
        with pytest.raises(ValueError, match="no rows"):
            score_file(scorer, tmp_path / "empty.jsonl", tmp_path / "out.jsonl")
        with pytest.raises(ValueError, match="no such file"):
            score_file(scorer, tmp_path / "none.jsonl", tmp_path / "out.jsonl")


class TestExport:
    def test_columns_by_hand(self):
        columns = teacher_columns(torch.tensor([[0.0, 0.5, 0.25, 0.25]]))[0]
        want = [-20.0, -0.6931, -1.3863, -1.3863, 0.5 * 2 + 0.25 * 3 + 0.25 * 4, 1.0397]
        torch.testing.assert_close(columns, torch.tensor(want), rtol=0, atol=1e-4)

    def test_queries_of_training_are_refused(self, scorer, tmp_path):
        pairs = small_task().test[:4]
        leaky = replace(scorer, settings={"train_queries": [sha256(pairs[2].query.encode()).hexdigest()[:16]]})
        with pytest.raises(ValueError, match="trained on"):
            export(leaky, pairs, tmp_path / "t.parquet")
        assert export(leaky, pairs, tmp_path / "t.parquet", allow_leak=True) == 4
        assert set(COLUMNS) <= set(pq.read_schema(tmp_path / "t.parquet").names)

    def test_folds_keep_queries_whole(self):
        pairs = small_task().train
        folds = folds_by_query(pairs)
        by_query = {}
        for pair, fold in zip(pairs, folds.tolist(), strict=True):
            assert by_query.setdefault(pair.query, fold) == fold
        assert len(set(folds.tolist())) > 1

    def test_a_ranker_learns_from_columns_and_soft_targets(self):
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(1, 5, (256,), generator=generator)
        teacher = torch.randn(256, 4, generator=generator) * 0.5
        teacher[torch.arange(256), labels - 1] += 2.0
        logp = teacher.log_softmax(1)
        features = torch.cat([torch.randn(256, 4, generator=generator), teacher_columns(logp.exp())], dim=1)
        student = torch.nn.Linear(features.shape[1], 4)
        optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
        found = []
        for _ in range(60):
            loss = distillation_loss(student(features), labels, logp)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss))
        assert found[-1] < 0.6 * found[0]

    def test_without_a_teacher_it_is_cross_entropy_and_at_the_teacher_the_kl_is_zero(self):
        logits, labels = torch.randn(8, 4), torch.randint(1, 5, (8,))
        plain = distillation_loss(logits, labels, torch.randn(8, 4), w=0.0)
        torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(logits, labels - 1))
        assert float(distillation_loss(logits, labels, logits.log_softmax(1), w=1.0)) == pytest.approx(0.0, abs=1e-6)
        with pytest.raises(ValueError, match="w in"):
            distillation_loss(logits, labels, logits, w=2.0)


class TestCommands:
    def test_score_and_eval(self, folder, tmp_path, capsys):
        pairs = small_task().test
        write_rows(tmp_path / "pairs.jsonl", pairs)
        source, model = str(tmp_path / "pairs.jsonl"), str(folder)
        assert main(["score", "--model", model, "--in", source, "--out", str(tmp_path / "scores.jsonl")]) == 0
        assert len(read_rows(tmp_path / "scores.jsonl", Score)) == len(pairs)
        capsys.readouterr()
        more = ["--data", source, "--texts", "2", "--bootstrap", "20", "--json"]
        assert main(["eval", "--model", model, *more]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["num_pairs"] == len(pairs)
        assert report["interval"]["macro_f1"][0] <= report["interval"]["macro_f1"][1]
        assert {"parse_rate", "ece", "greedy_agreement"} <= report.keys()

    def test_bad_rows_give_exit_code_3(self, folder, tmp_path, capsys):
        TestFiles().bad_file(tmp_path / "pairs.jsonl")
        source, out = str(tmp_path / "pairs.jsonl"), str(tmp_path / "s.jsonl")
        assert main(["score", "--model", str(folder), "--in", source, "--out", out]) == 3
        assert "bad rows" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "code", "says"),
        [
            (["score", "--model", "/nowhere/model", "--in", "a.jsonl", "--out", "b.jsonl"], 2, "no such folder"),
            (["curves", "/nowhere"], 2, "train.jsonl"),
            (["train", "sft", "--resume"], 2, "needs --out"),
            (["train", "sft", "--data", "none.jsonl", "--out", "x"], 2, "no such file"),
            (["ladder", "--preset", "huge"], 2, "no preset"),
            ([], 2, ""),
        ],
    )
    def test_refusals(self, arguments, code, says, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(arguments) == code
        assert says in capsys.readouterr().err
        assert not (tmp_path / "x").exists()

    def test_data_writes_pairs_that_can_be_trained_on(self, tmp_path):
        out = tmp_path / "pairs.parquet"
        sizes = ["--set", "num_train=16", "--set", "num_dev=8", "--set", "num_test=8"]
        assert main(["data", "--out", str(out), "--chunks", *sizes]) == 0
        task = file_task(out, profile="compact")
        assert (len(task.train), len(task.dev), len(task.test)) == (16, 8, 8)
        assert task.train[0].chunk is not None

    def test_out_of_memory_says_what_to_lower(self, monkeypatch, capsys):
        def full(args):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

        monkeypatch.setattr("relevance.cli._curves", full)
        assert main(["curves", "x"]) == 1
        assert "lower engine.per_device_rows" in capsys.readouterr().err
