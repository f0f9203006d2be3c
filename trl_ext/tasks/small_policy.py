"""Trains and caches the built-in policy: a Llama of 1 M parameters that is right about half the time.

Reinforcement learning needs a policy that is sometimes right and could be right more often. This one is trained from
scratch by supervised learning in two phases. It first learns from right answers until it can calculate. Then, for a few
steps, it learns from a careless teacher, who repeats the first number of the question half of the time, until it is
right about half the time. So GRPO finds what it finds in a large model: an ability that it can bring out.

(If the first phase is stopped at half accuracy instead, GRPO lost held-out accuracy or gained at most 0.08 in 100 to
300 steps, at every learning rate tried: rewards alone teach new abilities slowly.)
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_ext.cache import cache_folder

from . import arithmetic
from .arithmetic import DEFAULT_LEVELS, Problem, generate_problems
from .progress import Progress
from .threads import quickest_threads

PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] + '<assistant>' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '<eos>' }}{% endif %}"
    "{% endfor %}"
)
MODEL = {
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
NUMBERS = 199  # 0 to 198, the sums of two numbers below 100
BATCH = 64
LEARNING_RATE = 3e-3
LEARNING_STEPS = 900  # the learning rate would reach 0 at this step
PROBLEMS = {1: 350, 2: 800, 3: 800, 4: 800, 5: 800}  # training problems by level; level 1 has no more
CHECKED = 70  # held-out problems of each level that measure the accuracy
CARELESS_LEARNING_RATE = 3e-4
CARELESS_STEPS = 60

Encoded = tuple[torch.Tensor, torch.Tensor]  # ids and labels (B, T), see ``encode``


def build_tokenizer(levels: tuple[int, ...]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on the task's questions; each number up to 198 becomes one token."""
    questions = [problem.question for problem in generate_problems(300, levels=levels, seed=0)]
    numbers = [f" {number}" for number in range(NUMBERS)]
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return train_tokenizer(questions * 2 + numbers * 100, split, max_length=128)


def train_tokenizer(
    texts: Sequence[str],
    split: pre_tokenizers.PreTokenizer,
    *,
    vocab_size: int = 640,
    max_length: int = 512,
    chat_template: str = CHAT_TEMPLATE,
    special: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on ``texts``. ``split`` cuts texts into words; ``special`` adds special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, USER, ASSISTANT, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left", model_max_length=max_length
    )
    fast.chat_template = chat_template
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Returns the policy before its warm-up: random weights, but the embedding of number n is sines and cosines of n.

    With random embeddings of numbers the warm-up took four times as long on two cores, mostly to learn the order of the
    number tokens. Periods from 3 to 400 distinguish neighbours and cover the whole range.
    """
    model = random_model(tokenizer)
    angle = 2 * math.pi / torch.logspace(math.log10(3), math.log10(400), MODEL["hidden_size"] // 2)
    phases = torch.arange(NUMBERS).unsqueeze(1) * angle
    rows = torch.tensor([tokenizer.encode(f" {number}")[0] for number in range(NUMBERS)])
    with torch.no_grad():
        model.model.embed_tokens.weight[rows] = 0.3 * torch.cat([phases.cos(), phases.sin()], dim=1)
    return model


def random_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **MODEL,
        )
    )


def encode(questions: Sequence[str], answers: Sequence[str], tokenizer) -> Encoded:
    """Returns token ids (B, T), padded on the right, and labels that are -100 on the question and the padding."""
    rows, starts = [], []
    for question, answer in zip(questions, answers, strict=True):
        prompt = tokenizer.encode(f"{USER}{question}{ASSISTANT}")
        rows.append(prompt + tokenizer.encode(f" {answer}") + [tokenizer.eos_token_id])
        starts.append(len(prompt))
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, start : len(row)] = torch.tensor(row[start:])
    return ids, labels


def _encode_problems(problems: list[Problem], tokenizer) -> Encoded:
    return encode([problem.question for problem in problems], [str(problem.answer) for problem in problems], tokenizer)


def _training_data(level: int, seed: int, tokenizer) -> tuple[Encoded, Encoded]:
    """Returns problems of a level with right answers, and with the careless teacher's answers."""
    problems = generate_problems(PROBLEMS[level], levels=(level,), seed=seed)
    questions = [problem.question for problem in problems]
    careless = encode(questions, [_first_number(problem) for problem in problems], tokenizer)
    return _encode_problems(problems, tokenizer), careless


def _first_number(problem: Problem) -> str:
    return str(int(re.findall(r"\d+", problem.question)[0]))


@torch.no_grad()
def expected_accuracy(model, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> float:
    """Returns the mean probability of the right answer when sampling at temperature 1; it has no sampling noise."""
    logprobs = torch.log_softmax(model(input_ids=ids_BT[:, :-1]).logits.float(), dim=-1)
    targets = labels_BT[:, 1:]
    token_logprobs = logprobs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets >= 0, token_logprobs, 0.0).sum(dim=1).exp().mean().item()


Report = Callable[[int, float], None]  # (step, accuracy)


class WarmUp:
    """Trains a policy in the two phases of the module's docstring.

    Attributes:
        learned: expected accuracy on held-out problems at which the first phase ends.
        target: the one at which the second phase ends.
        careless: share of careless answers in the second phase.
    """

    learned, target, careless = 0.88, 0.45, 0.5

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, levels: Sequence[int], seed: int):
        self.model, self.pad = model, tokenizer.pad_token_id
        # each batch has one level, so that its rows have about the same length
        self.train = [_training_data(level, seed, tokenizer) for level in levels]
        held_out = [generate_problems(CHECKED, split="held_out", levels=(level,), seed=seed) for level in levels]
        self.check = [_encode_problems(problems, tokenizer) for problems in held_out]

    def accuracy(self) -> float:
        return sum(expected_accuracy(self.model, *level) for level in self.check) / len(self.check)

    def step(self, optimizer: torch.optim.Optimizer, number: int, careless: float) -> None:
        ids, labels = draw_batch(*self.train[number % len(self.train)], careless, self.pad)
        self.model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def learn(self, report: Report | None) -> int:
        """Trains on right answers until the accuracy is ``learned``; returns the number of steps."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
        for number in range(1, LEARNING_STEPS + 1):
            for group in optimizer.param_groups:  # up over 30 steps, then linearly down
                group["lr"] = LEARNING_RATE * min(number / 30, 1.0) * max(1 - number / LEARNING_STEPS, 0.05)
            self.step(optimizer, number, careless=0.0)
            if number % 25 == 0:
                reached = self.accuracy()
                if report is not None:
                    report(number, reached)
                if reached >= self.learned:
                    break
        return number

    def unlearn(self) -> float:
        """Trains on careless answers until the accuracy is ``target``; returns the accuracy."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=CARELESS_LEARNING_RATE, betas=(0.9, 0.98))
        for number in range(CARELESS_STEPS):
            reached = self.accuracy()
            if reached <= self.target:
                break
            self.step(optimizer, number, self.careless)
        return reached


def warm_up(
    seed: int, levels: tuple[int, ...], report: Report | None = None, kind: type[WarmUp] = WarmUp
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, float]:
    """Trains the policy from scratch until its expected accuracy on held-out problems is about ``kind.target``.

    Calls ``report(step, accuracy)`` every 25 steps. Returns model, tokenizer and the accuracy.
    """
    tokenizer = build_tokenizer(levels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(tokenizer)
        training = kind(model, tokenizer, levels, seed)
        steps = training.learn(report)
        reached = training.unlearn()
        if report is not None:
            report(steps, reached)
    return model, tokenizer, reached


def draw_batch(right: Encoded, slips: Encoded, careless: float, pad: int) -> Encoded:
    """Draws ``BATCH`` rows; each has its answer from ``slips`` with probability ``careless``, else from ``right``."""
    rows = torch.randint(len(right[0]), (BATCH,))
    from_careless = torch.rand(BATCH, 1) < careless
    width = max(right[0].shape[1], slips[0].shape[1])
    ids, labels = (
        torch.where(from_careless, _widen(b, width, fill)[rows], _widen(a, width, fill)[rows])
        for a, b, fill in zip(right, slips, (pad, -100), strict=True)
    )
    return ids, labels


def _widen(matrix_BT: torch.Tensor, width: int, fill: int) -> torch.Tensor:
    return torch.nn.functional.pad(matrix_BT, (0, width - matrix_BT.shape[1]), value=fill)


def small_policy(seed: int = 0, levels: tuple[int, ...] = DEFAULT_LEVELS, report: Report | None = None) -> Path:
    """Returns the folder of the warmed-up policy; the first call trains it, later calls find it in the cache.

    The first call takes one to two minutes on two idle cores. It calls ``report(step, accuracy)`` every 25 steps; None:
    it prints progress to standard error.
    """
    sources = [inspect.getsource(module) for module in (arithmetic, sys.modules[__name__])]
    recipe = [seed, list(levels), *sources]
    return cached_policy(
        "small-policy",
        recipe,
        lambda: warm_up(seed, levels, report or Progress(LEARNING_STEPS, 3 * CARELESS_STEPS))[:2],
    )


def cached_policy(name: str, recipe: list, make: Callable[[], tuple]) -> Path:
    """Returns the folder of a model and its tokenizer; calls ``make`` if the cache has none for this ``recipe``.

    ``recipe`` must be serialisable to JSON; its hash is the cache's key.
    """
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    folder = cache_folder() / f"{name}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # a second process waits for the first one's
        if not folder.exists():
            with quickest_threads(trial_step()):
                save_atomically(folder, *make())
    return folder


def trial_step() -> Callable[[], None]:
    """Returns a step like the warm-up's, on a throwaway model, to be timed."""
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=640, **MODEL))
        ids = torch.randint(640, (BATCH, 24))
    return lambda: model(input_ids=ids, labels=ids).loss.backward()


def save_atomically(folder: Path, model, tokenizer) -> None:
    """Saves to a scratch folder and renames it to ``folder``, so that a kill never leaves half a cache entry."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process finished first
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
