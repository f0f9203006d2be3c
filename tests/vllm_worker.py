"""Runs with a colocated vLLM on a CPU, for test_vllm.py: ``python vllm_worker.py SPEC``, a JSON file.

vLLM's CPU build packs the weights of Linear layers into a layout of its own when it loads them, so that TRL's weight
sync finds nothing to load into; and starts a process of its own for the engine, from which no patch would keep it. Both
are of that build: GPUs have neither.
"""

import functools
import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")

import torch
from harness import build, prompts
from safetensors.torch import save_file
from trl import GRPOTrainer
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient

from trl_ext import CurvatureGRPOTrainer

OPTIONS = {
    "per_device_train_batch_size": 16,
    "max_grad_norm": 0.0,
    "generation_kwargs": None,
    "seed": 3,
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_max_model_length": 64,
    "model_init_kwargs": {"dtype": "float32"},
}
KEPT = ("completion_ids", "completion_mask", "sampling_per_token_logps", "old_per_token_logps", "advantages")


def keep_weights_unpacked():
    """vLLM's Linear layers multiply by the weights that are there."""
    from vllm.model_executor.layers import linear, utils

    def dispatch(layer, remove_weight):
        layer.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias)

    for module in (linear, utils):
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            module.dispatch_cpu_unquantized_gemm = dispatch


@contextmanager
def server(model, folder):
    """The options of a run that asks ``vllm_server.py``, which runs in this context. TRL's client is the real one, but
    for the transfer of weights, which needs a GPU: they go through a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    weights = os.path.join(folder, "weights.safetensors")

    def send(client, metadata, named_params):
        os.makedirs(folder, exist_ok=True)
        save_file({name: weight.detach().clone().contiguous() for name, weight in named_params}, weights)
        client._post(f"{client.base_url}/update_weights", json={"update_info": {"file": weights}})

    VLLMClient.init_communicator = lambda client, device: client.get_world_size()
    VLLMClient.update_named_params = send
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "vllm_server.py")
    process = subprocess.Popen([sys.executable, program, model, str(port)])
    try:
        yield {"vllm_mode": "server", "vllm_server_base_url": f"http://127.0.0.1:{port}", "vllm_server_timeout": 120}
    finally:
        process.kill()
        process.wait()


def reward(completion_ids, **kwargs):
    return [(sum(ids) % 5) / 4 for ids in completion_ids]


def keep_batches(trainer):
    """The columns ``KEPT`` of every batch that is scored while the trainer trains."""
    batches, score = [], trainer._generate_and_score_completions

    def keep(inputs):
        output = score(inputs)
        batches.append({name: output[name].clone() for name in KEPT if name in output})
        return output

    trainer._generate_and_score_completions = keep
    return batches


def train(spec):
    own_server = spec["options"].pop("server", False)
    if own_server:
        with server(spec["model"], spec["folder"]) as options:
            return train({**spec, "options": {**spec["options"], **options}})
    # TRL leaves the dtype to vLLM, which takes half precision for a float32 model; vLLM 0.22 would compile for minutes
    chosen = {"dtype": spec["dtype"]} if spec["dtype"] else {}
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, enforce_eager=True, **chosen)
    trainer_class = {"ours": CurvatureGRPOTrainer, "trl": GRPOTrainer}[spec["trainer"]]
    options = {**OPTIONS, **spec["options"]}
    trainer = build(spec["model"], spec["folder"], reward, prompts(32), trainer_class=trainer_class, **options)
    batches = keep_batches(trainer)
    trainer.train()
    of_server = options["vllm_mode"] == "server"
    dtype = None if of_server else str(trainer.vllm_generation.llm.llm_engine.model_config.dtype)
    torch.save({"logs": trainer.state.log_history, "batches": batches, "dtype": dtype}, spec["out"])


if __name__ == "__main__":
    keep_weights_unpacked()
    with open(sys.argv[1]) as file:
        train(json.load(file))
