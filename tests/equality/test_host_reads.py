"""How often a plan waits for the device: as often for 256 sequences as for 64."""

import collections
import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_ext.plan.rows import Trimming, even_batches, read_rows
from trl_ext.plan.shared_batches import largest, packed_positions, shared_batches, split_into
from trl_ext.schema import Sequences

WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_consecutive")


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


def test_reads_do_not_grow_with_the_sequences():
    """On a CPU what is read of the table that came over counts too: a few numbers for each micro-batch."""
    counts = []
    for n_prompts in (8, 32, 128):
        batch = rows(n_prompts)
        with Reads() as reads:
            plan(batch)
        counts.append(dict(reads.found))
    assert counts[0] == counts[1] == counts[2] and counts[0]["cpu"] == 1
    assert sum(counts[0].values()) < 80


def test_the_count_sees_what_waits():
    values = torch.arange(4.0)
    with Reads() as reads:
        int(values[1])
        values.tolist()
        values[values > 1]
        values.cpu()
        (values > 2).nonzero()
    assert reads.found == {"_local_scalar_dense": 1, "tolist": 1, "boolean index": 1, "cpu": 1, "nonzero": 1}
