"""The dense part of a model dealt to the ranks: torch's `fully_shard` (FSDP2), each rank keeping 1/W of every parameter.

    rank r of W holds rows r c .. (r + 1) c - 1 of a parameter [n, ...], c = ceil(n / W): weights, gradient, optimizer state
    forward    a unit's weights are gathered before it runs      (all-gather)
    backward   gathered again, its gradients added and dealt     (reduce-scatter; a sum, because losses are divided already)

The optimizer gets a rank's rows as plain parameters that share memory with what is gathered from, so it knows of nothing.
Outside of a step and of an evaluation the model's parameters are shards; `whole` puts plain ones in their place for a while,
and takes away all that torch has hung on the modules, so that a model can be called, copied and saved on one rank alone.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from recis.distributed.dense import OrderedGradients, share_parameters
from recis.distributed.dense_messages import Gather, Reduce
from recis.distributed.dense_units import check_types, find_units, kept_whole
from recis.distributed.ranks import Ranks
from recis.errors import ConfigError

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_BASE, _MODULUS = 1_000_003, 2**31 - 1  # a running hash that float64 holds exactly
_WAY_OUT = "a larger parallel.unit_parameters makes it no unit, parallel.shard_dense=false deals nothing"


class DenseShards:
    """A dealt model: the gradients of its steps, its whole weights when they are asked for, its part of checkpoints.

    Args:
        model: built alike on all ranks, with at least one parameter that trains. Its parameters are replaced by shards.
        ranks: more than one.
        unit_parameters: numbers of the smallest submodule that is gathered by itself.

    Attributes:
        parameters: what trains, by name, in the model's order: this rank's rows [n_r, ...], or whole where it was kept whole.

    Raises:
        ConfigError: a unit trains parameters of several types; torch is older than 2.13.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, *, unit_parameters: int) -> None:
        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ConfigError(
                f"parallel.shard_dense needs torch 2.13, whose fully_shard adds gradients also where samples of ranks reach "
                f"other parameters; this is {torch.__version__}: update it, or set parallel.shard_dense=false"
            )
        self._model, self._ranks = model, ranks
        self._depth = 0  # of `whole`
        self._order = 0
        units = find_units(model, unit_parameters)
        check_types(model, units)
        share_parameters(model, ranks)
        marks = [dict(vars(value)) for value in model.parameters()]
        before = {module: [set(one) for one in _entries(module)] for module in model.modules()}
        self._types = {module: type(module) for module in (*units.values(), model)}
        kept = kept_whole(model)
        self._dealt_modules = self._deal([*units.values(), model], set(kept.values()))
        self._places = [
            (module, name, value)
            for module in model.modules()
            for name, value in module.named_parameters(recurse=False, remove_duplicate=False)
            if isinstance(value, DTensor)
        ]
        self._named = {
            name: value for name, value in model.named_parameters(remove_duplicate=False) if isinstance(value, DTensor)
        }
        self._marks = {id(value): own for value, own in zip(model.parameters(), marks, strict=True)}
        self.parameters = {
            name: _own(value, self._marks[id(value)]) for name, value in model.named_parameters() if value.requires_grad
        }
        self._reached = torch.zeros(len(self.parameters), dtype=torch.bool)
        self._kept = OrderedGradients([value for value in kept.values() if value.requires_grad], ranks)
        self._kept_places = [place for place, name in enumerate(self.parameters) if name in kept]
        self._watch_gradients()
        # what torch has hung on each module since: (a dict of the module, its new keys)
        self._hung = [
            (entries, [key for key in entries if key not in known])
            for module, knowns in before.items()
            for entries, known in zip(_entries(module), knowns, strict=True)
        ]
        self._taken: list[dict[Any, Any]] = []
        self._is_checked = False

    def _deal(self, modules: list[nn.Module], kept: set[nn.Parameter]) -> list[FSDPModule]:
        with self._ranks.named("group of the dense part"):  # of its own: its messages mix with nobody's
            group = dist.new_group(timeout=timedelta(seconds=self._ranks.timeout_s))
        device = next(self._model.parameters()).device.type
        mesh = DeviceMesh.from_group(cast(Any, group), device)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # outputs are not changed in place here
        dealt = []
        for number, module in enumerate(modules, 1):
            one = fully_shard(module, mesh=mesh, ignored_params=kept)
            one.set_gradient_divide_factor(1.0)  # the loss is divided by the weight of the global batch
            one.set_force_sum_reduction_for_comms(True)  # gloo knows no other sum
            one.set_reduce_scatter_unused_params(True)  # what one rank's samples do not reach another's may
            one.set_custom_all_gather(cast(Any, Gather(self._ranks, lambda number=number: self._note_gather(number))))
            one.set_custom_reduce_scatter(cast(Any, Reduce(self._ranks)))
            dealt.append(one)
        return dealt

    def _watch_gradients(self) -> None:
        """Note which gathered parameters autograd reaches: what nobody's backward reached keeps no gradient, not zeros."""
        for module in self._dealt_modules:
            module.unshard()
        for place, (_, value) in enumerate((n, v) for n, v in self._model.named_parameters() if v.requires_grad):
            value.register_post_accumulate_grad_hook(lambda _, place=place: self._note(place))
        self._let_go()

    def _note(self, place: int) -> None:
        self._reached[place] = True

    def _note_gather(self, number: int) -> None:
        self._order = (self._order * _BASE + number) % _MODULUS

    def _let_go(self) -> None:
        if self._depth:  # nothing is gathered, and the modules are as if nothing were dealt
            return
        for module in self._dealt_modules:
            module.reshard()

    # ---- a step

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn torch's error about weights that are used where they are not gathered into one that says what to do.

        Raises:
            ConfigError: that.
        """
        try:
            yield
        except RuntimeError as error:
            if "DTensor" not in str(error):
                raise
            names = [name for name, module in self._model.named_modules() if name and module in self._types]
            raise ConfigError(
                f"parallel.shard_dense: the model uses weights of one of its units {names} without calling it, where they "
                f"are not gathered ({' '.join(str(error).split())[:120]}); {_WAY_OUT}"
            ) from error

    def before_backward(self, *, is_last: bool) -> None:
        """Say whether the backward that follows is the step's last: then gradients travel, before they collect whole."""
        cast(FSDPModule, self._model).set_requires_gradient_sync(is_last)

    def take(self) -> None:
        """Take the gradients of the micro-batch whose backward has just run, as far as nobody else does."""
        if self._kept_places:
            self._kept.take()

    @property
    def reached(self) -> Tensor:
        """Which parameters had a gradient in this step, bool [number of parameters]."""
        return self._reached

    @property
    def order(self) -> Tensor:
        """What stands for the units that were gathered in this step and their order, float64 [1]."""
        return torch.tensor([self._order], dtype=torch.float64)

    def check_order(self, orders: Tensor) -> None:
        """Refuse a step in which ranks gathered other units, or in another order: they have computed with wrong weights.

        Args:
            orders: `order` of all ranks [W].

        Raises:
            ConfigError: there is a difference.
        """
        self._order = 0
        if bool((orders != orders[0]).any()):
            rank = int((orders != orders[0]).nonzero()[0])
            raise ConfigError(
                f"parallel.shard_dense: rank {rank} ran other units of the model than rank 0, or in another order; which units "
                f"run must not depend on the samples: {_WAY_OUT}"
            )

    def sum_up(self, reached: Tensor) -> None:
        """Set `.grad` of the parameters that `reached`, over all ranks, says had one anywhere.

        Raises:
            ConfigError: a gradient did not come out, because the model's output hides it from torch.
        """
        if self._kept_places:
            self._kept.sum_up(reached[self._kept_places])
        for place, (name, own) in enumerate(self.parameters.items()):
            dealt = self._named.get(name)
            if dealt is None:
                continue
            grad = cast(Any, dealt.grad)
            dealt.grad = None
            if bool(reached[place]) and grad is None:
                raise ConfigError(
                    f"parallel.shard_dense: no gradient of {name!r} came out of backward: the model returns something that "
                    "torch cannot look into; let forward return tensors, in lists, dicts or dataclasses, or set "
                    "parallel.shard_dense=false"
                )
            own.grad = grad.to_local() if bool(reached[place]) else None
        self._reached.zero_()

    def square_sum(self) -> Tensor:
        """Return the sum of squares of all gradients over all ranks, a float64 scalar: equal on every rank."""
        own = torch.zeros((), dtype=torch.float64)
        for name, value in self.parameters.items():
            counts = name in self._named or self._ranks.rank == 0  # what is kept whole counts once
            if value.grad is not None and counts:
                own += value.grad.double().square().sum().cpu()
        return self._ranks.total(own, "norm of the dense gradients")

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse, after the first update, an optimizer whose state does not follow the numbers of a parameter.

        Raises:
            ConfigError: it keeps a state of another shape.
        """
        if not self._is_checked:
            self._is_checked = True
            for name, own in self.parameters.items():
                for key, value in optimizer.state.get(own, {}).items():
                    _check_shape(name, own, key, value)

    # ---- whole weights

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let the model have whole, plain parameters inside; every rank enters. What is written to them is lost, but for
        what `scatter` takes."""
        if self._depth == 0:
            self._put_in()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._take_out()

    def _put_in(self) -> None:
        self._let_go()
        plain: dict[int, nn.Parameter] = {}
        for module, name, value in self._places:
            if id(value) not in plain:
                full = self._gathered(_local(value), value.shape[0], f"whole weights {name}")
                plain[id(value)] = nn.Parameter(full, requires_grad=value.requires_grad)
                vars(plain[id(value)]).update(self._marks[id(value)])
            setattr(module, name, plain[id(value)])
        self._taken = [dict(entries) for entries, _ in self._hung]
        for entries, keys in self._hung:
            for key in keys:
                del entries[key]
        for module, plain_type in self._types.items():
            self._types[module], module.__class__ = type(module), plain_type

    def _take_out(self) -> None:
        for module, dealt_type in self._types.items():
            self._types[module], module.__class__ = type(module), dealt_type
        for (entries, keys), before in zip(self._hung, self._taken, strict=True):
            now = dict(entries)
            entries.clear()  # hooks run in the order of their keys: torch's stand where they stood
            entries.update({key: now.get(key, value) for key, value in before.items() if key in now or key in keys})
            entries.update({key: value for key, value in now.items() if key not in before})
        self._taken = []
        for module, name, value in self._places:
            setattr(module, name, value)

    # ---- checkpoints

    def gather(self, state: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
        """Return named tensors of the model with shards as whole tensors; every rank calls it with the same names.

        Args:
            state: as `model.state_dict()` gives them.
            keep: whether this rank wants them; else it only takes part and gets {}.
        """
        found: dict[str, Tensor] = {}
        for name, value in state.items():
            full = value
            if isinstance(value, DTensor):
                full = self._gathered(_local(value), value.shape[0], f"dense tensor {name}")
            if keep:
                found[name] = full
        return found

    @torch.no_grad()
    def scatter(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's rows of whole tensors; the inverse of gather."""
        self._let_go()
        for name, value in self._named.items():
            if name in state:
                _local(value).copy_(state[name][self._rows(value.shape[0])])

    def gather_optimizer(self, saved: Mapping[str, Any], *, keep: bool = True) -> dict[str, Any]:
        """Return an optimizer's state by parameter name with whole tensors; every rank calls it.

        Args:
            saved: "state" by parameter name, and what else is passed through.
            keep: as for gather.

        Raises:
            ConfigError: as check_optimizer.
        """
        state: dict[str, dict[str, Any]] = {}
        for name, entries in saved["state"].items():
            state[name] = {}
            for key, value in entries.items():
                full = value
                if name in self._named and _check_shape(name, self.parameters[name], key, value):
                    full = self._gathered(value, self._named[name].shape[0], f"optimizer state of {name}")
                if keep:
                    state[name][key] = full
        return {**saved, "state": state} if keep else {}

    def own_optimizer(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return this rank's rows of what gather_optimizer returned, also where another W saved it."""
        state = {}
        for name, entries in saved["state"].items():
            dealt = self._named.get(name)
            state[name] = {
                key: value[self._rows(dealt.shape[0])].clone()
                if dealt is not None and isinstance(value, Tensor) and value.shape == dealt.shape
                else value
                for key, value in entries.items()
            }
        return {**saved, "state": state}

    def _gathered(self, own: Tensor, num_rows: int, what: str) -> Tensor:
        padded = own.new_zeros((-(-num_rows // self._ranks.world_size), *own.shape[1:]))
        padded[: own.shape[0]] = own
        return self._ranks.all_gather(padded, what).flatten(0, 1)[:num_rows]

    def _rows(self, num_rows: int) -> slice:
        chunk = -(-num_rows // self._ranks.world_size)
        first = min(self._ranks.rank * chunk, num_rows)
        return slice(first, min(first + chunk, num_rows))


def _local(value: Any) -> Tensor:
    """Return this rank's rows of a dealt tensor: the memory itself."""
    return value.detach().to_local()


def _own(value: nn.Parameter, marks: Mapping[str, Any]) -> nn.Parameter:
    """Return what the optimizer updates, with the marks that the parameter had (recis.towers.optimizer reads some)."""
    if not isinstance(value, DTensor):
        return value
    own = nn.Parameter(_local(value))
    vars(own).update(marks)
    return own


def _check_shape(name: str, own: Tensor, key: str, value: Any) -> bool:
    """Return whether a state is dealt like its parameter; a scalar is not."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return False
    if value.shape != own.shape:
        raise ConfigError(
            f"parallel.shard_dense: the optimizer keeps {key!r} {list(value.shape)} of {name!r}, of which this rank has "
            f"{list(own.shape)}; its state must have a number for each number of a parameter, or be a scalar: use another "
            "dense_optimizer, or set parallel.shard_dense=false"
        )
    return True


def _entries(module: nn.Module) -> list[dict[Any, Any]]:
    """Return the dicts in which a module keeps its attributes and its hooks."""
    return [vars(module), *(getattr(module, name) for name in _HOOKS)]
