"""Row optimizer configs: state vectors, signatures, numbers read from param groups, refusals."""

import pytest
import torch

from recis.errors import ConfigError
from recis.optim import Adagrad, Adam, AdamW, AdamWTF, Ftrl, RowOptimizer, RowWiseAdagrad, Sgd
from recis_kernels.row_rules import ADAGRAD, ADAMW, SGD, SGD_MOMENTUM

ALL = [
    (Sgd(lr=0.1), (), ()),
    (Sgd(lr=0.1, momentum=0.9), (("m", 5),), (0.0,)),
    (Adagrad(lr=0.1, h0=0.5), (("h", 5),), (0.5,)),
    (RowWiseAdagrad(lr=0.1), (("h", 1),), (0.0,)),
    (Adam(lr=0.1), (("m", 5), ("v", 5)), (0.0, 0.0)),
    (Adam(lr=0.1, bias_correction="row"), (("m", 5), ("v", 5), ("t", 1)), (0.0, 0.0, 0.0)),
    (AdamW(lr=0.1), (("m", 5), ("v", 5)), (0.0, 0.0)),
    (AdamWTF(lr=0.1), (("m", 5), ("v", 5)), (0.0, 0.0)),
    (Ftrl(lr=0.1), (("n", 5), ("z", 5)), (0.0, 0.0)),
]


@pytest.mark.parametrize(("optimizer", "spec", "initial"), ALL, ids=[repr(case[0]) for case in ALL])
def test_states(optimizer, spec, initial):
    assert optimizer.state_spec(5) == spec
    assert optimizer.initial_state() == initial
    assert len(optimizer.scalars(optimizer.param_group(), 3)) == len(optimizer.rule.scalars)


def test_scalars_follow_the_param_group():
    optimizer = AdamW(lr=0.1)
    group = optimizer.param_group() | {"lr": 0.2, "betas": (0.5, 0.6), "weight_decay": 0.0}
    assert optimizer.scalars(group, 7) == (0.2, 0.5, 0.6, 1e-8, 0.0, 7.0)
    assert optimizer.scalars(group | {"lr": torch.tensor(0.25)}, 7)[0] == 0.25
    with pytest.raises(ConfigError, match="AdamW: lr must be at least 0; got -1"):
        optimizer.scalars(group | {"lr": -1.0}, 7)


def test_what_fixes_the_row_layout_is_not_in_the_group():
    assert set(Adagrad(lr=0.1, h0=0.5).param_group()) == {"lr", "eps", "weight_decay"}
    assert set(Adam(lr=0.1).param_group()) == {"lr", "betas", "eps", "weight_decay"}


def test_tables_share_a_store_when_rows_look_alike():
    assert AdamW(lr=0.1).signature(8) == AdamW(lr=0.2, weight_decay=0.5, betas=(0.8, 0.9)).signature(8)
    distinct = [
        Sgd(lr=0.1),
        Sgd(lr=0.1, momentum=0.5),
        Adagrad(lr=0.1),
        Adagrad(lr=0.1, h0=1.0),
        RowWiseAdagrad(lr=0.1),
        Adam(lr=0.1),
        AdamW(lr=0.1),
        AdamW(lr=0.1, bias_correction="row"),
    ]
    assert len({optimizer.signature(8) for optimizer in distinct}) == len(distinct)


def test_rules():
    assert Sgd(lr=0.1).rule is SGD
    assert Sgd(lr=0.1, momentum=0.1).rule is SGD_MOMENTUM
    assert Adagrad(lr=0.1).rule is ADAGRAD
    assert AdamW(lr=0.1).rule == ADAMW
    assert AdamW(lr=0.1, bias_correction="row").rule.row_steps
    with pytest.raises(NotImplementedError, match="is a base"):
        _ = RowOptimizer(lr=0.1).rule


def test_momentum_cannot_appear_later():
    optimizer = Sgd(lr=0.1)
    with pytest.raises(ConfigError, match="set momentum in the TableConfig"):
        optimizer.scalars(optimizer.param_group() | {"momentum": 0.9}, 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Sgd(lr=-0.1), "Sgd: lr must be at least 0; got -0.1"),
        (lambda: Sgd(lr=float("nan")), "lr must be"),
        (lambda: Sgd(lr=0.1, momentum=1.0), r"momentum must be in \[0, 1\)"),
        (lambda: Sgd(lr=0.1, weight_decay=-1), "weight_decay must be"),
        (lambda: Adagrad(lr=0.1, eps=0.0), "eps must be above 0"),
        (lambda: Adagrad(lr=0.1, h0=-1.0), "h0 must be"),
        (lambda: RowWiseAdagrad(lr=float("inf")), "RowWiseAdagrad: lr must be"),
        (lambda: Adam(lr=0.1, betas=(0.9, 1.0)), "betas must be"),
        (lambda: Adam(lr=0.1, eps=0.0), "eps must be above 0"),
        (lambda: Adam(lr=0.1, bias_correction="id"), "bias_correction must be 'table' or 'row'; got 'id'"),  # type: ignore[arg-type]
        (lambda: Ftrl(lr=0.0), "lr must be above 0"),
        (lambda: Ftrl(lr=0.1, l1=-1.0), "l1 must be"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_adagrad_may_start_high_without_eps():
    assert Adagrad(lr=0.1, eps=0.0, h0=0.1).eps == 0.0
