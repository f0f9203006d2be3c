"""The product with the log-sum-exp in its epilogue: a process of its own interprets it, another compiles it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parents[2] / "benchmarks"

# rows, words and hidden sizes that divide by no block, several tiles a program; out's padding holds NaN
INTERPRETED = """
import json, torch
import epilogue_product as product

class Bound:
    def __getitem__(self, grid):
        sizes = {"BLOCK_N": 16, "BLOCK_V": 128, "BLOCK_H": 16, "GROUP": 2}
        return lambda *arguments: product._product_kernel[grid](*arguments, **sizes)

errors = []
for seed, (N, H, V) in enumerate([(37, 40, 300), (64, 64, 256), (5, 16, 129), (1, 7, 2)]):
    torch.manual_seed(seed)
    hidden, weight, targets = 3 * torch.randn(N, H), torch.randn(V, H), torch.randint(0, V, (N,))
    out = torch.full((N, V + 16), float("nan"))
    found = product.logits_with_statistics(hidden, weight, targets, out[:, :V], Bound())
    assert out[:, V:].isnan().all()
    z = hidden.double() @ weight.double().T
    logp = z.log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1)
    logprob = logp.gather(1, targets[:, None])[:, 0]
    pairs = [(out[:, :V], z), (found.high + found.log_total, z.logsumexp(1)), (found.logprob, logprob)]
    errors += [float((a - b).abs().max() / z.abs().max()) for a, b in [*pairs, (found.entropy, entropy)]]
print(json.dumps(errors))
"""


def run(*arguments, folder, interpret):
    path = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    own = {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(folder), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **own}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_statistics_agree_with_float64(tmp_path):
    errors = json.loads(run("-c", INTERPRETED, folder=tmp_path, interpret="1"))
    assert len(errors) == 16
    assert max(errors) < 1e-6


@pytest.mark.nightly
def test_it_compiles_for_every_target_and_one_configuration_fits_each(tmp_path):
    rows = [
        line.split() for line in run(str(FOLDER / "epilogue_product.py"), folder=tmp_path, interpret="0").splitlines()
    ]
    rows = [row for row in rows if row[0].startswith(("sm_", "gfx"))]
    assert {row[0] for row in rows} == {"sm_80", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942"}
    smallest = [row for row in rows if row[3] == "2"]
    assert len(smallest) == 6
    for target, *_, spills, shared in smallest:
        assert int(spills) == 0, target
        assert int(shared) <= (64 << 10) + 16, target
