"""Mirrored launches: what a kernel does to copies reaches the CPU tensors, with shared memory and addresses kept."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from kernel_device import Copies, mirrored, on_host

from recis_kernels import dispatch
from recis_kernels.dispatch import jit, tl

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")  # stands for the GPU: copies are copies there too


@jit
def _add_one_kernel(values_ptr, out_ptr, num_items, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_items
    tl.store(out_ptr + index, tl.load(values_ptr + index, mask=mask) + 1, mask=mask)


@jit
def _by_address_kernel(addresses_ptr, out_ptr):
    block = tl.load(addresses_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + tl.program_id(0), tl.load(block + 1))
    tl.store(block, -5.0)


@pytest.fixture
def launch_there():
    """A launch onto copies, and a list of the tensors it was given there."""
    given = []

    def launch(kernel, grid, *args, **options):
        given.append(args)
        dispatch.launch(kernel, grid, *args, **options)

    return mirrored(launch, CPU), given


def test_results_come_back(launch_there):
    launch, given = launch_there
    values, out = torch.arange(5.0), torch.empty(5)
    launch(_add_one_kernel, (1,), values, out, 5, BLOCK=8)
    assert out.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert given[0][1].data_ptr() != out.data_ptr()


def test_views_of_one_storage_stay_views_of_one(launch_there):
    launch, given = launch_there
    memory = torch.arange(10.0)
    launch(_add_one_kernel, (1,), memory[2:6], memory[4:8], 4, BLOCK=4)
    assert memory.tolist() == [0, 1, 2, 3, 3, 4, 5, 6, 8, 9]
    first, second = given[0][:2]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert (first.storage_offset(), second.storage_offset()) == (2, 4)


def test_addresses_are_those_of_the_copies(launch_there):
    launch, given = launch_there
    blocks = [torch.tensor([10.0, 11.0]), torch.tensor([20.0, 21.0])]
    addresses, out = torch.tensor([block.data_ptr() for block in blocks]), torch.empty(2)
    kept = addresses.clone()
    launch(_by_address_kernel, (2,), addresses, out)
    assert out.tolist() == [11.0, 21.0]
    assert [block.tolist() for block in blocks] == [[-5.0, 11.0], [-5.0, 21.0]]
    assert addresses.equal(kept)
    assert not (given[0][0] == addresses).any()


def test_a_table_of_addresses_and_counts_comes_back(launch_there):
    """As a hash index's: the count beside the address is what the kernel wrote, the address what it was."""
    launch, _ = launch_there
    block = torch.tensor([10.0, 11.0])
    table, out = torch.tensor([block.data_ptr(), 7]), torch.empty(1)
    launch(_by_address_kernel, (1,), table, out)
    launch(_add_one_kernel, (1,), table[1:], table[1:], 1, BLOCK=1)
    assert table.tolist() == [block.data_ptr(), 8]
    assert out.tolist() == [11.0]


@jit
def _place_kernel(addresses_ptr, places_ptr):
    tl.store(places_ptr, tl.load(addresses_ptr) + 4)


def test_addresses_that_a_kernel_writes_lead_to_the_originals(launch_there):
    """As the places of a hash index: one kernel finds them, the next one uses them."""
    launch, _ = launch_there
    block, places, out = torch.tensor([10.0, 11.0, 12.0]), torch.zeros(1, dtype=torch.int64), torch.empty(1)
    launch(_place_kernel, (1,), torch.tensor([block.data_ptr()]), places)
    assert places.tolist() == [block.data_ptr() + 4]
    launch(_by_address_kernel, (1,), places, out)
    assert out.tolist() == [12.0]
    assert block.tolist() == [10.0, -5.0, 12.0]


def test_pinned_addresses_stay():
    block = torch.ones(4)
    table = torch.tensor([block.data_ptr()])
    pinned = [(block.data_ptr(), block.data_ptr() + 16)]
    assert Copies(CPU, pinned).of(table).equal(table)
    assert not Copies(CPU).of(table).equal(table)


def test_ids_are_no_addresses():
    ids = torch.tensor([1 << 46, -1, (1 << 47) - 1, 2**63 - 1])
    assert Copies(CPU).of(ids).equal(ids)


def test_on_host_takes_things_apart():
    got = on_host({"a": (torch.ones(1, requires_grad=True), [2]), "b": "text"})
    assert not got["a"][0].requires_grad
    assert got["a"][1] == [2]
    assert got["b"] == "text"


def test_property_tests_are_skipped_by_name_without_hypothesis(tmp_path):
    """A file that imports hypothesis keeps its other tests where it is not installed."""
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\nimport no_hypothesis\nno_hypothesis.install()\n"
    )
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
        from hypothesis import HealthCheck, assume, given, settings
        from hypothesis import strategies as st
        from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

        class Machine(RuleBasedStateMachine):
            @initialize(n=st.integers(0, 3))
            def start(self, n): ...

            @rule(ids=st.lists(st.integers()).map(sorted) | st.none())
            def act(self, ids): ...

            @invariant()
            def holds(self): ...

        TestMachine = Machine.TestCase
        TestMachine.settings = settings(max_examples=2, suppress_health_check=[HealthCheck.too_slow])

        @settings(max_examples=3)
        @given(st.data())
        def test_property(data):
            raise AssertionError

        def test_plain():
            pass
        """)
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:hypothesispytest",
        "-p",
        "no:cacheprovider",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "1 passed, 2 skipped" in done.stdout, done.stdout + done.stderr
    assert "hypothesis is not installed" in done.stdout
