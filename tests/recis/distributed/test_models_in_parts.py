"""Every model of the zoo over parts of a step, some of them without a sample, against the step as a whole."""

from dataclasses import replace

import pytest
import torch

from recis.distributed.config import Parallel
from recis.models.synthetic import SyntheticClicks
from recis.optim import Sgd
from recis.recipes import zoo
from recis.trainer import DenseSgd, Trainer

MODELS = ("dlrm", "deepfm", "dcn", "din", "mmoe", "ple", "bst")


@pytest.mark.parametrize("name", MODELS)
def test_parts_add_up_to_the_step(name, tmp_path):
    """Eleven samples in 16 parts: the loss is that of one part and rows move alike, up to the order of sums.

    Plain SGD: an adaptive rule turns the sign of a gradient near 0 into a whole step.
    """
    made = {}
    for parts in (1, 16):
        config = getattr(zoo, name)(data=None, out=tmp_path, num_samples=22)
        num_tasks = len(config.tasks) or 1
        source = SyntheticClicks(num_samples=22, batch_size=11, num_tasks=num_tasks, seed=0)
        tables = tuple(replace(table, optimizer=Sgd(lr=0.1)) for table in config.model.tables)
        config = replace(
            config,
            model=replace(config.model, tables=tables),
            dense_optimizer=DenseSgd(lr=0.1),
            train_data=source,
            eval_data=None,
            max_steps=2,
            parallel=Parallel(parts=parts),
        )
        trainer = Trainer(config, None, quiet=True)
        trainer.train()
        made[parts] = trainer
    whole, cut = made[1], made[16]
    assert cut.parallel is not None
    assert whole.state.samples == cut.state.samples == 22
    assert cut.state.loss == pytest.approx(whole.state.loss, rel=1e-5)
    for table, other in zip(whole.tables.values(), cut.tables.values(), strict=True):
        ours, theirs = table.export(), other.export()
        assert torch.equal(ours["ids"], theirs["ids"])
        assert torch.equal(ours["count"], theirs["count"])
        torch.testing.assert_close(theirs["weight"], ours["weight"], rtol=1e-5, atol=1e-7)
