"""Inner products by columns against those of the matrix; what a process of eight holds and moves for a large step."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import make_scores
from memory import PeakMemory
from one_of_eight import one_of_eight

from grpo_kernels.interference.inner_products import ColumnProducts, MatrixProducts, squared_norms
from grpo_kernels.interference.metrics import interference_metrics
from grpo_kernels.interference.noise import gradient_noise
from grpo_kernels.interference.step_gradients import StepGradients
from grpo_kernels.interference.what_if import candidates, what_if


class Crew:
    """Threads in place of processes: every one calls ``reduce`` as often as the others."""

    def __init__(self, size):
        self.barrier, self.parts, self.size = threading.Barrier(size), [None] * size, size

    def reduce_of(self, rank):
        def reduce(values):
            self.parts[rank] = values
            self.barrier.wait()
            total = torch.stack(self.parts).sum(0)
            self.barrier.wait()
            return total

        return reduce

    def run(self, work):
        """What each returned."""

        def one(rank):
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))


def spread(vectors, crew, dropped=None):
    """The columns of each of a crew, the last ones narrower."""
    width = -(-vectors.shape[1] // crew.size)
    square_B = squared_norms(vectors)

    def columns(rank):
        options = {"first": rank * width, "dropped_B": dropped}
        return ColumnProducts(vectors[:, rank * width : (rank + 1) * width], square_B, crew.reduce_of(rank), **options)

    return [columns(rank) for rank in range(crew.size)]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    numbers=st.integers(1, 40),
    processes=st.integers(1, 3),
    seed=st.integers(0, 1000),
    drops=st.booleans(),
)
def test_products_of_columns_are_those_of_the_matrix(sizes, numbers, processes, seed, drops):
    generator = torch.Generator().manual_seed(seed)
    row_B = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    row_B = row_B[torch.randperm(len(row_B), generator=generator)]
    vectors = torch.randn(len(row_B), numbers, generator=generator)
    factors = torch.randn(3, len(row_B), generator=generator, dtype=torch.float64)
    dropped = torch.rand(len(row_B), generator=generator) < 0.3 if drops else None
    kept = vectors if dropped is None else vectors * ~dropped[:, None]
    matrix = MatrixProducts(kept.double() @ kept.double().T)
    index_PG = torch.stack([torch.arange(len(row_B)), torch.arange(len(row_B)).flip(0)], dim=1)

    def answers(products):
        return [
            products.squares(),
            products.within(index_PG),
            products.of_sums(row_B, len(sizes), factors[0], factors[1:]),
            products.squared_along(row_B, len(sizes), factors[0], factors[1]),
            products.of_totals(factors),
        ]

    crew = Crew(processes)
    columns = spread(vectors, crew, dropped)
    for found in crew.run(lambda rank: answers(columns[rank])):
        for answer, expected in zip(found, answers(matrix), strict=True):
            # sent in float32; a sum whose terms cancel is as exact as they are
            size = max(expected.abs().max().item(), matrix.gram_BB.abs().max().item())
            torch.testing.assert_close(answer, expected, rtol=1e-6, atol=1e-6 * size)

    blocks = [slice(0, numbers // 3), slice(numbers // 3, numbers)]
    sums = torch.zeros(len(sizes), numbers).index_add_(0, row_B, kept).double()
    want = torch.stack([sums[:, block] @ sums[:, block].T for block in blocks])
    for found in crew.run(lambda rank: columns[rank].of_blocks(row_B, len(sizes), blocks)):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def scores():
    generator = torch.Generator().manual_seed(4)
    score = torch.randn(8, 6, 30, generator=generator, dtype=torch.float64)
    reward = (torch.rand(8, 6, generator=generator) < 0.5).double()
    return make_scores(score, reward)


def factor(gram_BB):
    """Vectors of these inner products."""
    values, vectors = torch.linalg.eigh(gram_BB)
    return (vectors * values.clamp(min=0).sqrt()).float()


def test_every_figure_is_that_of_the_matrix(scores):
    """Interference, curvature, theory, what-if and noise, on three processes."""
    reward_B = scores.rewards_PG[scores.prompt_B, scores.position_B]

    def figures(gram_BB):
        step = StepGradients(gram_BB, scores.prompt_B, reward_B, scores.coefficient_B, 6)
        of_step = replace(scores, gram_BB=gram_BB)
        table = what_if(of_step, candidates(["mean", "std", "batch_std", "loo"]))
        noise = gradient_noise(of_step)
        rows = {f"{name}/{key}": value for name, row in table.rows.items() for key, value in vars(row).items()}
        return interference_metrics(step, sketch_rmse=0.02), rows, vars(noise), table.mutual_MM

    crew = Crew(3)
    columns = spread(factor(scores.gram_BB), crew)
    expected = figures(scores.gram_BB)
    assert len(expected[0]) > 15 and len(expected[1]) == 4 * 6
    for found in crew.run(lambda rank: figures(columns[rank])):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("known", [True, False], ids=["coefficients", "no coefficients"])
def test_a_process_of_eight_holds_64_megabytes_at_most(known, monkeypatch):
    """Sketch, features and all that is made of them, as allocations of tensors; what-if and noise with it."""
    memory = PeakMemory()
    one_of_eight(known, monkeypatch, memory)
    assert 20e6 < memory.peak <= 64e6
