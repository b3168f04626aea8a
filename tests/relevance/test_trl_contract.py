"""What the trainer relies on in TRL 1.16.0, and what it adds, on a model of a few thousand weights with given completions."""

import math

import pytest
import torch
from datasets import Dataset
from tiny_lm import batch_of, give_completions, load_micro, make_trainer, save_micro, small_task
from trl import GRPOConfig, GRPOTrainer

from relevance.methods import GroupSignalConfig, Method, group_signal, outside, two_group_signal
from relevance.oracle import oracle
from relevance.replay import ReplayConfig
from relevance.rewards import Rewards, outcome

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def right_or_wrong(task, right):
    """Return rollout number -> the oracle's answer, or one with another label, after a pattern of bits."""

    def text(number, pair):
        good = oracle(pair, task.profile, with_chunk=False)
        if right[number % len(right)]:
            return good
        other = str(int(good[0]) % 4 + 1)
        return other + good[1:-11] + other + "</verdict>"

    return text


def trainer_for(lm, tmp_path, method, right, *, ids, reserve=(), profile_task=None, **options):
    """Return a trainer that answers right and wrong in turn, rows in the order of ids and reserve."""
    task = profile_task or small_task()
    size = options.get("group_size", 4)
    order = [name for name in (*ids, *reserve) for _ in range(size)]
    write = right_or_wrong(task, right)
    return make_trainer(
        lm,
        task,
        method,
        tmp_path,
        pair_ids=ids,
        reserve=reserve,
        completions=lambda number: write(number, task.by_id[order[number % len(order)]]),
        **options,
    )


def grads(trainer, batch):
    """Return the gradient of the loss of a batch as one vector."""
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, batch).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


PLAIN = Method(reward=outcome, signal=group_signal())


class TestHead:
    def test_same_log_probs_entropies_and_gradients_as_trls_head(self, folder, tmp_path):
        found = []
        for own_head in (True, False):
            lm = load_micro(folder)
            trainer = trainer_for(
                lm, tmp_path, PLAIN, (1, 0, 0, 0), ids=("train-0", "train-1"), own_head=own_head, temperature=0.7
            )
            batch = batch_of(trainer, ("train-0", "train-1"))
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
            logps, entropy, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, batch["completion_ids"].shape[1], compute_entropy=True
            )
            found.append((logps.detach(), entropy.detach(), grads(trainer, batch)))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    def test_the_temperature_is_inside(self, lm, tmp_path):
        trainer = trainer_for(lm, tmp_path, PLAIN, (1, 0, 0, 0), ids=("train-0",), rows=4, temperature=0.5)
        batch = batch_of(trainer, ("train-0",))
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        width = batch["completion_ids"].shape[1]
        got, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1] / 0.5
        want = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None]).squeeze(-1)
        torch.testing.assert_close(got, want * batch["completion_mask"], rtol=1e-4, atol=1e-5)


class TestAdvantages:
    @pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
    def test_per_token_advantages_that_are_constant_give_the_gradient_of_scalar_ones(self, lm, tmp_path, loss_type):
        ids = ("train-0", "train-1")
        trainer = trainer_for(lm, tmp_path, PLAIN, (1, 0, 0, 1), ids=ids, loss_type=loss_type)
        batch = batch_of(trainer, ids)
        assert batch["advantages"].ndim == 1
        spread = batch | {"advantages": batch["advantages"][:, None] * batch["completion_mask"]}
        torch.testing.assert_close(grads(trainer, spread), grads(trainer, batch), rtol=1e-6, atol=1e-6)

    def test_they_are_trls_with_its_ddof_and_eps(self, lm, tmp_path):
        method = Method(reward=outcome, signal=group_signal(GroupSignalConfig(ddof=1, eps=1e-4, limit=None)))
        trainer = trainer_for(lm, tmp_path, method, (1, 0, 0, 0), ids=("train-0", "train-1"))
        inputs = [trainer._row_of(name) for name in ("train-0", "train-1") for _ in range(4)]
        theirs = GRPOTrainer._generate_and_score_completions(trainer, inputs)["advantages"]
        ours = batch_of(trainer, ("train-0", "train-1"))["advantages"]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert ours[0] == pytest.approx(1.5, abs=1e-3)

    def test_an_unscorable_row_has_advantage_zero_and_is_counted(self, lm, tmp_path):
        def reward(parsed, pairs):
            total = torch.tensor([1.0, 0.0, 0.0, float("nan")], dtype=torch.float64).repeat(len(pairs) // 4)
            return Rewards(total=total, parts={"own": total}, correct=total == 1)

        trainer = trainer_for(
            lm, tmp_path, Method(reward=reward, signal=group_signal()), (1, 0, 0, 0), ids=("train-0",), rows=4
        )
        batch = batch_of(trainer, ("train-0",))
        torch.testing.assert_close(
            batch["advantages"], torch.tensor([1.4142, -0.7071, -0.7071, 0.0]), rtol=0, atol=1e-3
        )
        assert trainer._metrics["train"]["unscorable"] == [1.0]


class TestDeadGroups:
    METHOD = Method(reward=outcome, signal=group_signal(), is_dead=outside(), refill_rounds=1)

    def test_masked_is_removed_under_dapo(self, lm, tmp_path):
        # the second group is all right: dead, and its replacement (train-2) is all right too
        right = (1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
        trainer = trainer_for(lm, tmp_path, self.METHOD, right, ids=("train-0", "train-1"), reserve=("train-2",))
        batch = batch_of(trainer, ("train-0", "train-1"))
        assert batch["tool_mask"].sum(1).gt(0).tolist() == [True] * 4 + [False] * 4
        removed = {
            key: value[:4] if value.ndim else value
            for key, value in batch.items()
            if key not in ("tool_mask", "num_items_in_batch")
        }
        removed["num_items_in_batch"] = removed["completion_mask"].sum()
        torch.testing.assert_close(grads(trainer, batch), grads(trainer, removed), rtol=1e-5, atol=1e-6)
        numbers = trainer._metrics["train"]
        assert (numbers["groups/dead"], numbers["groups/refilled"], numbers["groups/dropped"]) == ([0.5], [0.0], [1.0])

    def test_under_grpo_the_rows_that_live_are_scaled_up(self, lm, tmp_path):
        right = (1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
        trainer = trainer_for(
            lm, tmp_path, self.METHOD, right, ids=("train-0", "train-1"), reserve=("train-2",), loss_type="grpo"
        )
        batch = batch_of(trainer, ("train-0", "train-1"))
        alone = {
            key: value[:4] if value.ndim else value
            for key, value in batch.items()
            if key not in ("tool_mask", "loss_scale")
        }
        assert float(batch["loss_scale"]) == 2.0
        torch.testing.assert_close(grads(trainer, batch), grads(trainer, alone), rtol=1e-5, atol=1e-6)

    def test_a_fresh_group_takes_the_dead_ones_place(self, lm, tmp_path):
        right = (1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0)
        trainer = trainer_for(lm, tmp_path, self.METHOD, right, ids=("train-0", "train-1"), reserve=("train-2",))
        batch = batch_of(trainer, ("train-0", "train-1"))
        graded = trainer.last_graded
        assert [pair.id for pair in graded.pairs[::4]] == ["train-0", "train-2"]
        assert "tool_mask" not in batch
        assert trainer.reserve.taken == 1
        lm_prompt = lm.encode(small_task().prompt(small_task().by_id["train-2"]))
        kept = batch["prompt_ids"][4][batch["prompt_mask"][4].bool()]
        assert kept.tolist() == lm_prompt
        assert int(batch["num_items_in_batch"]) == int(batch["completion_mask"].sum())

    def test_a_reserve_without_a_prompt_for_every_rank_is_refused_before_the_first_step(self, lm, tmp_path):
        with pytest.raises(ValueError, match="0 prompts to refill dead groups from leave none for some of 1 ranks"):
            trainer_for(lm, tmp_path, self.METHOD, (1, 0), ids=("train-0",), rows=4)

    def test_all_dead_is_a_zero_loss_with_a_warning(self, lm, tmp_path):
        trainer = trainer_for(lm, tmp_path, self.METHOD, (1, 1, 1, 1), ids=("train-0",), reserve=("train-2",), rows=4)
        with pytest.warns(UserWarning, match="every group is dead"):
            batch = batch_of(trainer, ("train-0",))
        assert not grads(trainer, batch).any()

    def test_trl_itself_keeps_them_in_its_denominator(self, lm, tmp_path):
        method = Method(reward=outcome, signal=group_signal())
        trainer = trainer_for(lm, tmp_path, method, (1, 0, 0, 0, 1, 1, 1, 1), ids=("train-0", "train-1"))
        batch = batch_of(trainer, ("train-0", "train-1"))
        assert not batch["advantages"][4:].any()
        assert int(batch["num_items_in_batch"]) == int(batch["completion_mask"].sum())


class TestReplay:
    METHOD = Method(
        reward=outcome, signal=group_signal(), replay=ReplayConfig(tau=0.0, max_guided_groups=1.0, anneal_share=0.0)
    )

    def trainer(self, lm, tmp_path, **options):
        # 4 wrong rollouts, of which two are sampled again under guidance and are right
        return trainer_for(lm, tmp_path, self.METHOD, (0, 0, 0, 0, 1, 1), ids=("train-0",), rows=4, **options)

    def test_guided_rows_replace_the_worst_and_the_prompt_stays_plain(self, lm, tmp_path):
        trainer = self.trainer(lm, tmp_path)
        batch = batch_of(trainer, ("train-0",))
        assert trainer.last_graded.is_guided.tolist() == [True, True, False, False]
        assert trainer.last_graded.rewards.correct.tolist() == [True, True, False, False]
        plain = lm.encode(small_task().prompt(small_task().by_id["train-0"]))
        assert all(
            row[mask.bool()].tolist() == plain
            for row, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        )
        assert trainer._metrics["train"]["replay/accuracy"] == [1.0]

    def test_behaviour_is_that_of_the_guided_prompt_and_plain_rows_have_ratio_1(self, lm, tmp_path):
        trainer = self.trainer(lm, tmp_path)
        batch = batch_of(trainer, ("train-0",))
        old = batch["old_per_token_logps"]
        assert old[2:].isnan().all()
        pair, task = small_task().by_id["train-0"], small_task()
        hint = torch.tensor([lm.encode(task.guided(pair, 1)) + batch["completion_ids"][0].tolist()])
        width = batch["completion_ids"].shape[1]
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, hint, torch.ones_like(hint), width)
        torch.testing.assert_close(old[0], logps[0].detach(), rtol=1e-5, atol=1e-5)
        grads(trainer, batch)
        plain = batch | {key: value[2:] for key, value in batch.items() if value.ndim}
        without = {key: value for key, value in plain.items() if key != "old_per_token_logps"}
        torch.testing.assert_close(grads(trainer, plain), grads(trainer, without), rtol=0, atol=0)

    def test_with_behaviour_stored_the_loss_does_not_depend_on_the_hint(self, lm, tmp_path):
        trainer = self.trainer(lm, tmp_path)
        batch = batch_of(trainer, ("train-0",))
        first = grads(trainer, batch)
        trainer.job = None  # neither task nor hint is at hand any more
        torch.testing.assert_close(grads(trainer, batch), first, rtol=0, atol=0)

    def test_no_gradient_reaches_masked_tokens(self):
        logps = torch.tensor([[-1.0, -1.2, -0.5, -0.7, -0.9]], requires_grad=True)
        mask = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]])
        ratio = torch.exp(logps - logps.detach())
        (-(ratio * mask).sum() / mask.sum()).backward()
        assert logps.grad is not None
        assert logps.grad[0, :2].tolist() == [0.0, 0.0]
        assert (logps.grad[0, 2:] < 0).all()

    def test_the_reference_is_that_of_the_new_completion_under_the_plain_prompt(self, lm, tmp_path):
        trainer = self.trainer(lm, tmp_path, beta=0.1)
        batch = batch_of(trainer, ("train-0",))
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch["completion_ids"].shape[1]
        )
        torch.testing.assert_close(batch["ref_per_token_logps"], logps.detach(), rtol=1e-5, atol=1e-5)


class TestTwoPrompts:
    METHOD = Method(reward=outcome, signal=two_group_signal(), has_two_prompts=True)
    IDS = ("train-0", "train-1")

    @pytest.fixture(scope="class")
    def rag(self, tmp_path_factory):
        task = small_task("label_only", with_chunks=True)
        return task, save_micro(tmp_path_factory.mktemp("rag"), task)

    def trainer(self, rag, tmp_path, right=(1, 0, 1, 1), **options):
        task, folder = rag
        lm = load_micro(folder)
        order = [name for name in self.IDS for _ in range(4)]

        def text(number):
            label = task.by_id[order[number % 8]].label
            return str(label if right[number % len(right)] else label % 4 + 1)

        trainer = make_trainer(
            lm, task, self.METHOD, tmp_path, pair_ids=self.IDS, completions=text, loss_type="grpo", **options
        )
        return trainer, lm, task

    def test_half_of_each_group_reads_the_chunk(self, rag, tmp_path):
        trainer, lm, task = self.trainer(rag, tmp_path)
        batch = batch_of(trainer, self.IDS)
        for row in range(8):
            pair = task.by_id[self.IDS[row // 4]]
            shown = lm.encode(task.prompt(pair, with_chunk=row % 4 >= 2))
            assert batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist() == shown
        # without the chunk 1 of 2 right, with it 2 of 2: gap .5, alpha .0284, beta 3.523; z over 3 of 4 is .577, -1.732
        weights = batch["lx_weight"]
        torch.testing.assert_close(
            weights[:4], torch.tensor([0.0284 * 0.5774, -3.523 * 1.7321, 0, 0]), rtol=5e-3, atol=1e-4
        )

    def test_transfer_gradient_by_hand_for_any_padding(self, rag, tmp_path):
        trainer, lm, task = self.trainer(rag, tmp_path)
        batch = batch_of(trainer, self.IDS)
        trainer.model.zero_grad()
        trainer._transfer_loss(trainer.model, batch).backward()
        got = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        trainer.model.zero_grad()
        total = torch.zeros(())
        for row in (0, 1, 4, 5):
            pair = task.by_id[self.IDS[row // 4]]
            prompt = lm.encode(task.prompt(pair, with_chunk=True))
            answer = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
            logits = trainer.model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            pi = logits.softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
            total = total + batch["lx_weight"][row] * pi.mean()
        (0.5 * total / 4).backward()
        want = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)

    def test_split_into_micro_batches_changes_nothing(self, rag, tmp_path):
        trainer, _, _ = self.trainer(rag, tmp_path)
        batch = batch_of(trainer, self.IDS)
        whole = grads(trainer, batch)
        trainer.current_gradient_accumulation_steps = 2
        trainer.args.gradient_accumulation_steps = trainer.args.steps_per_generation = 2
        parts = [{k: v[i : i + 4] if v.ndim else v for k, v in batch.items()} for i in (0, 4)]
        torch.testing.assert_close(sum(grads(trainer, part) for part in parts), whole, rtol=1e-4, atol=1e-6)

    def test_terms_do_not_see_each_others_prompt(self, rag, tmp_path):
        trainer, _, _ = self.trainer(rag, tmp_path)
        batch = batch_of(trainer, self.IDS)
        whole, lx = grads(trainer, batch), grads(trainer, batch | {"advantages": torch.zeros(8)})
        spoilt = batch | {"prompt_ids": batch["prompt_ids"].roll(1, 1)}
        torch.testing.assert_close(grads(trainer, spoilt | {"advantages": torch.zeros(8)}), lx, rtol=0, atol=0)
        mute = {key: value for key, value in batch.items() if not key.startswith("lx_")}
        torch.testing.assert_close(grads(trainer, mute) + lx, whole, rtol=1e-4, atol=1e-6)

    def test_without_a_row_to_transfer_the_term_is_zero(self, rag, tmp_path):
        trainer, _, _ = self.trainer(rag, tmp_path)
        batch = batch_of(trainer, self.IDS) | {"lx_weight": torch.zeros(8)}
        assert float(trainer._transfer_loss(trainer.model, batch)) == 0.0


class TestLossNumbers:
    """Clip, dual clip, reductions and k3 on given log-probs; no model is asked."""

    @pytest.fixture(scope="class")
    def trainer(self, folder, tmp_path_factory):
        lm = load_micro(folder)
        return trainer_for(lm, tmp_path_factory.mktemp("loss"), PLAIN, (1, 0), ids=("train-0",), rows=4)

    def loss(self, trainer, logps, lengths, advantages, *, old=None, ref=None, beta=0.0, loss_type="grpo", **args):
        width = logps.shape[1]
        mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
        batch = {
            "prompt_ids": torch.zeros(len(lengths), 1, dtype=torch.long),
            "prompt_mask": torch.ones(len(lengths), 1, dtype=torch.long),
            "completion_ids": torch.zeros(len(lengths), width, dtype=torch.long),
            "completion_mask": mask,
            "advantages": torch.tensor(advantages),
            "num_items_in_batch": torch.tensor(args.pop("num_items", sum(lengths))),
        }
        if old is not None:
            batch["old_per_token_logps"] = old
        if ref is not None:
            batch["ref_per_token_logps"] = ref
        trainer.loss_type, trainer.beta, trainer.max_completion_length = loss_type, beta, 100
        trainer.epsilon_low, trainer.epsilon_high = 0.2, args.pop("high", 0.2)
        trainer.args.delta = args.pop("delta", None)
        steps = args.pop("steps", 1)
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = steps
        own = type(trainer)._get_per_token_logps_and_entropies
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps * mask, torch.zeros_like(logps), None)
        try:
            return GRPOTrainer._compute_loss(trainer, trainer.model, batch)
        finally:
            trainer._get_per_token_logps_and_entropies = own.__get__(trainer)

    @pytest.mark.parametrize(
        ("ratio", "advantage", "high", "delta", "term"),
        [
            (1.5, 1.0, 0.2, None, 1.2),
            (1.5, -1.0, 0.2, None, -1.5),
            (0.5, 1.0, 0.2, None, 0.5),
            (0.5, -1.0, 0.2, None, -0.8),
            (1.5, 1.0, 0.28, None, 1.28),
            (9.0, -1.0, 0.2, 1.4, -1.4),
        ],
    )
    def test_clip(self, trainer, ratio, advantage, high, delta, term):
        logps = torch.tensor([[-1.0]])
        loss = self.loss(
            trainer,
            logps,
            [1],
            [advantage],
            old=logps - math.log(ratio),
            high=high,
            **({"delta": delta} if delta else {}),
        )
        assert float(loss) == pytest.approx(-term, abs=5e-4)

    @pytest.mark.parametrize(
        ("loss_type", "weights"), [("grpo", (0.5, -0.5)), ("dapo", (0.1, -0.9)), ("dr_grpo", (0.05, -0.45))]
    )
    def test_weights_of_short_right_and_long_wrong_answers(self, trainer, loss_type, weights):
        logps = torch.full((2, 90), -1.0, requires_grad=True)
        self.loss(trainer, logps, [10, 90], [1.0, -1.0], loss_type=loss_type).backward()
        assert logps.grad is not None
        torch.testing.assert_close(-logps.grad.sum(1), torch.tensor(weights), rtol=0, atol=5e-4)

    @pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
    def test_only_bnpo_depends_on_the_split(self, trainer, loss_type):
        logps = torch.full((2, 90), -1.0, requires_grad=True)
        self.loss(trainer, logps, [10, 90], [1.0, -1.0], loss_type=loss_type).backward()
        assert logps.grad is not None
        whole = logps.grad.clone()
        logps.grad.zero_()
        for row, length, advantage in ((0, 10, 1.0), (1, 90, -1.0)):
            self.loss(
                trainer, logps[row : row + 1], [length], [advantage], loss_type=loss_type, steps=2, num_items=100
            ).backward()
        is_same = torch.allclose(logps.grad, whole, atol=1e-6)
        assert is_same == (loss_type != "bnpo")

    @pytest.mark.parametrize(("d", "k3"), [(-1.0, 0.3679), (0.1, 0.00517), (1.0, 0.7183), (0.0, 0.0)])
    def test_k3(self, trainer, d, k3):
        logps = torch.tensor([[-1.0, -2.0]])
        loss = self.loss(trainer, logps, [1], [0.0], ref=logps + d, beta=1.0)
        assert float(loss) == pytest.approx(k3, abs=5e-6 if k3 < 0.1 else 5e-4)

    def test_kl_and_ratio_use_the_mask_of_the_loss(self, trainer):
        logps = torch.full((1, 3), -1.0, requires_grad=True)
        self.loss(trainer, logps, [2], [1.0], ref=logps.detach() + 1.0, beta=1.0).backward()
        assert logps.grad is not None
        assert logps.grad[0, 2] == 0.0
        assert (logps.grad[0, :2] != 0).all()


def test_group_of_one_and_split_groups_are_refused(lm, tmp_path):
    with pytest.raises(ValueError, match="num_generations"):
        trainer_for(lm, tmp_path, PLAIN, (1, 0), ids=("train-0",), rows=6, group_size=4)
    with pytest.raises(ValueError, match="at least 2"):
        trainer_for(lm, tmp_path, PLAIN, (1, 0), ids=("train-0",), rows=4, group_size=1)


def test_infinite_reward_is_named(lm, tmp_path):
    def reward(parsed, pairs):
        total = torch.full((len(pairs),), torch.inf, dtype=torch.float64)
        return Rewards(total=total, parts={}, correct=total > 1)

    trainer = trainer_for(lm, tmp_path, Method(reward=reward, signal=group_signal()), (1,), ids=("train-0",), rows=4)
    with pytest.raises(ValueError, match="pair 'train-0': the reward is infinite"):
        batch_of(trainer, ("train-0",))


def test_a_loss_that_is_not_finite_is_skipped_once_and_stops_the_second_time(lm, tmp_path):
    from relevance.trainer import NonFiniteLoss

    trainer = trainer_for(lm, tmp_path, PLAIN, (1, 0, 0, 0), ids=("train-0",), rows=4)
    batch = batch_of(trainer, ("train-0",)) | {"advantages": torch.full((4,), torch.nan)}
    with pytest.warns(UserWarning, match="not finite"):
        loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    assert float(loss) == 0.0
    assert all(not p.grad.any() for p in trainer.model.parameters())
    trainer.state.global_step = 5
    with pytest.raises(NonFiniteLoss, match="as at step 0"):
        trainer._compute_loss(trainer.model, batch)


def test_empty_and_truncated_completions_are_faults_with_reward_zero(lm, tmp_path):
    trainer = trainer_for(lm, tmp_path, PLAIN, (1,), ids=("train-0",), rows=4)
    eos = lm.eos_ids[0]
    good = lm.encode(oracle(small_task().by_id["train-0"], small_task().profile))
    graded = trainer.grader.grade(["", lm.decode(good), lm.decode(good)], [[eos], good, [*good, eos]], ["train-0"] * 3)
    assert [parsed.errors[0].kind if parsed.errors else "" for parsed in graded.parsed] == ["empty", "truncated", ""]
    assert graded.rewards.total.tolist() == [0.0, 0.0, 1.0]


def test_the_reference_needs_a_model_on_disk(lm):
    from relevance.engine import check_on_disk

    check_on_disk(lm)
    lm.model.config._name_or_path = ""
    with pytest.raises(ValueError, match="save the model"):
        check_on_disk(lm)


def test_plain_grpo_is_trls_own_trainer(folder, tmp_path):
    """Same completions, same seed, three steps: losses and weights to 1e-5, with TRL's ddof and eps and no clamp."""
    task, ids = small_task(), tuple(f"train-{n}" for n in range(6))
    order = [name for name in ids for _ in range(4)]
    write = right_or_wrong(task, (1, 0, 0, 1, 0))

    def text(number):
        return write(number, task.by_id[order[number % len(order)]])

    def reward(completions, pair_id, **_):
        return [
            float(task.read(said).ok and task.read(said).label == task.by_id[name].label)
            for said, name in zip(completions, pair_id, strict=True)
        ]

    method = Method(reward=outcome, signal=group_signal(GroupSignalConfig(ddof=1, eps=1e-4, limit=None)))
    options = {"beta": 0.02, "learning_rate": 1e-3, "max_completion_length": 16}
    ours = make_trainer(
        load_micro(folder), task, method, tmp_path, pair_ids=ids, completions=text, own_head=False, **options
    )
    lm = load_micro(folder)
    args = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, use_bias_correction_kl=False,
        shuffle_dataset=False, gradient_checkpointing=False, bf16=False, report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True, **options,
    )  # fmt: skip
    rows = [{"prompt": task.prompt(task.by_id[name]), "pair_id": name} for name in ids]
    theirs = GRPOTrainer(
        model=lm.model,
        reward_funcs=reward,  # type: ignore[arg-type]
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=lm.tokenizer,
    )
    give_completions(theirs, lm, text)
    for trainer in (ours, theirs):
        trainer.args.max_steps = 3
        torch.manual_seed(0)
        trainer.train()
    found = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, theirs)]
    assert len(found[0]) == 3
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    for mine, other in zip(ours.model.parameters(), lm.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
