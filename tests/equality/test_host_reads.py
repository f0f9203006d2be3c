"""How often a plan and a micro-batch wait for the device: as often for 256 sequences as for 16, at most ten times."""

import collections
import contextlib
from unittest import mock

import pytest
import torch
from harness import build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from grpo_kernels.head import products
from trl_ext.plan.rows import Trimming, even_batches, read_rows
from trl_ext.plan.shared_batches import largest, packed_positions, shared_batches, split_into
from trl_ext.schema import Sequences

WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim")


class Reads(TorchDispatchMode):
    """Counts what waits for a device: values read one by one, ``tolist``, ``numpy``, ``cpu`` and boolean indices."""

    def __enter__(self):
        self.found, self._patches = collections.Counter(), contextlib.ExitStack()
        for name in ("tolist", "cpu", "numpy"):
            self._patches.enter_context(mock.patch.object(torch.Tensor, name, self._counted(name)))
        return super().__enter__()

    def _counted(self, name):
        method = getattr(torch.Tensor, name)

        def counted(tensor, *args, **kwargs):
            self.found[name] += 1
            return method(tensor, *args, **kwargs)

        return counted

    def __exit__(self, *error):
        self._patches.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.found[name] += 1
        if name in ("index", "index_put_"):
            masks = [one for one in args[1] if one is not None and one.dtype == torch.bool]
            self.found["boolean index"] += len(masks)
        return func(*args, **(kwargs or {}))


class DeviceReads(Reads):
    """As ``Reads``, without what has been read already: what ``cpu()`` returns, and what is computed from it alone.

    A tensor that is made from Python's numbers counts as the host's too.
    """

    def __enter__(self):
        self._storages, self._alive = set(), []  # kept, so that no later tensor gets a storage of the same address
        return super().__enter__()

    def _keep(self, made):
        for tensor in tree_flatten(made)[0]:
            if isinstance(tensor, torch.Tensor):
                self._storages.add(tensor.untyped_storage().data_ptr())
                self._alive.append(tensor)

    def _is_read(self, tensor):
        return tensor.untyped_storage().data_ptr() in self._storages

    def _counted(self, name):
        method = getattr(torch.Tensor, name)

        def counted(tensor, *args, **kwargs):
            self.found[name] += not self._is_read(tensor)
            read = method(tensor, *args, **kwargs)
            if name == "cpu":
                read = read.clone()
                self._keep(read)
            return read

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
        name = func.overloadpacket.__name__
        if name != "lift_fresh" and not all(map(self._is_read, given)):  # lift_fresh: torch.tensor() has made it
            masks = args[1] if name in ("index", "index_put_") else ()
            counts = not any(self._is_read(one) for one in masks if one is not None)
            call = super().__torch_dispatch__ if counts else lambda func, types, args, kwargs: func(*args, **kwargs)
            made = call(func, types, args, kwargs or {})
            for tensor in tree_flatten(made)[0]:  # written to the device's values too, if it was the host's
                if isinstance(tensor, torch.Tensor):
                    self._storages.discard(tensor.untyped_storage().data_ptr())
            return made
        made = func(*args, **(kwargs or {}))
        self._keep(made)
        return made


def rows(n_prompts, n_answers=8, width=30):
    generator = torch.Generator().manual_seed(0)
    count = n_prompts * n_answers
    answers = torch.randint(1, width, (count,), generator=generator)
    prompts = torch.randint(1, width, (n_prompts,), generator=generator).repeat_interleave(n_answers)
    place = torch.arange(width)
    return {
        "prompt_ids": torch.randint(1, 99, (count, width), generator=generator),
        "prompt_mask": (place >= width - prompts[:, None]).long(),
        "completion_ids": torch.randint(1, 99, (count, width), generator=generator),
        "completion_mask": (place < answers[:, None]).long(),
        "advantages": torch.randn(count, generator=generator) * (torch.arange(count) % 3 > 0),
        "prompt_id": torch.arange(n_prompts).repeat_interleave(n_answers),
    }


def plan(batch, n_batches=4):
    """The steps of a plan: which rows run, in which micro-batches, cut to which columns; with prompts shared or not."""
    batch = Sequences(batch)
    table = read_rows(batch, batch.advantages != 0)
    indices = even_batches(table, n_batches)
    assert table.packable
    budget = largest(indices, table) * len(table.wanted_B)
    together = split_into(shared_batches(table, budget), n_batches, table)
    for chosen in (*indices, *together):
        packed_positions(chosen, table)
        Trimming(True, True).select(batch, chosen, table)


def test_reads_of_a_plan_do_not_grow_with_the_sequences():
    """On a CPU what is read of the table that came over counts too: a few numbers for each micro-batch."""
    counts = []
    for n_prompts in (2, 8, 32, 128):
        batch = rows(n_prompts)
        with Reads() as reads:
            plan(batch)
        counts.append(dict(reads.found))
    assert all(count == counts[0] for count in counts) and counts[0]["cpu"] == 1
    assert sum(counts[0].values()) < 80


def reads_of_a_step(trainer, reads):
    """Returns what the trainer's second step reads; it generates nothing."""
    step = trainer.training_step

    def counted(*args):
        if trainer.state.global_step != 1:
            return step(*args)
        with reads:
            return step(*args)

    trainer.training_step = counted
    trainer.train()
    return dict(reads.found)


@pytest.mark.parametrize("options", [{}, {"share_prompts": False}, {"beta": 0.1}], ids=["shared", "alone", "kl"])
def test_a_step_of_one_micro_batch_reads_ten_times_for_any_number_of_sequences(
    options, tiny_policy, tmp_path, monkeypatch
):
    """Two of them are of the plan, and one of the logged statistics; clipped rows are looked for on a CPU alone."""
    monkeypatch.setattr(products, "reads_are_free", lambda device: False)
    quiet = {"interference_every": 0, "num_iterations": 2, "max_steps": 2, "num_generations": 8, **options}
    counts = []
    for rows in (16, 256):
        trainer = build(tiny_policy, tmp_path / str(rows), per_device_train_batch_size=rows, **quiet)
        counts.append(reads_of_a_step(trainer, DeviceReads()))
        shares = trainer._components.micro_batches.limits.not_shared is None
        assert shares == options.get("share_prompts", True)
    assert counts[0] == counts[1] and 0 < sum(counts[0].values()) <= 10


def test_the_count_sees_what_waits():
    values = torch.arange(4.0)
    with Reads() as reads:
        int(values[1])
        values.tolist()
        values[values > 1]
        values.cpu()
        (values > 2).nonzero()
    assert reads.found == {"_local_scalar_dense": 1, "tolist": 1, "boolean index": 1, "cpu": 1, "nonzero": 1}
