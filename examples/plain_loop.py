"""GRPO in a plain PyTorch loop that records the prompts' gradients: ``python examples/plain_loop.py``.

A small Llama of random weights learns to repeat its prompt, one of eight tokens, in half a minute on a laptop. Then
``python -m trl_ext report runs/plain_loop`` shows how the eight prompts' gradients interfere.
"""

import os
import sys

if __name__ == "__main__":  # the repository's root in place of this folder, whose math.py hides the standard library's
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_kernels import GradientRecorder, normalize_rewards

PROMPTS, ANSWERS, LENGTH, WORDS = 8, 8, 6, 16
MICRO_BATCH = 16  # answers of one forward and backward pass


def build_policy() -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, pad_token_id=0, eos_token_id=None, **sizes))


def reward(ids_BT: torch.Tensor) -> torch.Tensor:
    """The share of an answer's tokens that are its prompt."""
    return (ids_BT[:, 1:] == ids_BT[:, :1]).float().mean(1)


def log_probs(policy: LlamaForCausalLM, ids_BT: torch.Tensor) -> torch.Tensor:
    """(B,) log-probs of the answers."""
    logits = policy(input_ids=ids_BT).logits[:, :-1]
    return logits.log_softmax(-1).gather(2, ids_BT[:, 1:, None]).sum((1, 2))


def train(steps: int, every: int, folder: str) -> list[float]:
    """Returns each step's mean reward."""
    torch.manual_seed(0)
    policy = build_policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    recorder = GradientRecorder(policy, every=every)
    group_B = torch.arange(1, PROMPTS + 1).repeat_interleave(ANSWERS)
    mean_rewards = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            ids_BT = policy.generate(group_B[:, None], do_sample=True, top_k=0, max_new_tokens=LENGTH)
        reward_B = reward(ids_BT)
        advantage_B = normalize_rewards(reward_B.view(PROMPTS, ANSWERS), "std").flatten()
        optimizer.zero_grad()
        with recorder.step():
            for rows in torch.arange(len(group_B)).split(MICRO_BATCH):
                weight_B = -advantage_B[rows] / len(group_B)  # in front of each answer's log-prob
                recorder.rows(group_B[rows], reward_B[rows], advantage_B[rows], coefficients=weight_B)
                (weight_B * log_probs(policy, ids_BT[rows])).sum().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        recorder.save(folder, texts={group: f"repeat token {group}" for group in range(1, PROMPTS + 1)})
        mean_rewards.append(reward_B.mean().item())
        if metrics := recorder.metrics():
            cosine = metrics.get("interference/cos_mean", float("nan"))
            print(f"step {step}: reward {mean_rewards[-1]:.2f}, mean cosine of two prompts {cosine:+.2f}")
    return mean_rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--folder", default="runs/plain_loop")
    train(**vars(parser.parse_args()))
