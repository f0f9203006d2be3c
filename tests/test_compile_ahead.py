"""The normalisation kernel compiles for GPUs that aren't here: PTX for sm_80 and sm_90, in a process of its own."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CODE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from grpo_kernels.normalize import METHODS
from grpo_kernels.normalize_triton import _normalize_kernel
signature = {"p_rewards": "*fp32", "p_advantages": "*fp32", "p_batch": "*fp32", "n_groups": "i32",
             "n_generations": "i32", "eps": "fp32", "alpha": "fp32"}
kinds = sorted({(method.centre, method.scale) for method in METHODS.values()})
for centre, scale in kinds:
    constants = {"CENTRE": centre, "SCALE": scale, "BLOCK_P": 128, "BLOCK_G": 8}
    source = ASTSource(fn=_normalize_kernel, signature={**signature, **dict.fromkeys(constants, "constexpr")},
                       constexprs=constants)
    for capability in (80, 90):
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert f".target sm_{capability}" in kernel.asm["ptx"]
print(len(kinds))
"""


def test_the_kernel_compiles_without_a_gpu(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) == 8
