"""One small file a logged step, for plots: the inner products of the prompts' gradients, rewards and metrics.

Shapes: B sequences, P prompts, in ascending order of prompt id.

``<run folder>/interference/step_00000010.npz``, readable with numpy alone (no pickle). Symmetric matrices are kept as
their upper triangle in float32: of sequences (B, B) up to ``MOST_SEQUENCES``, of prompts (P, P) beyond, so that a step
of 512 sequences or of 512 prompts is half a megabyte. A file appears whole or not at all: it is written under
another name and then renamed.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo_kernels.interference.inner_products import InnerProducts
from grpo_kernels.interference.step_gradients import PromptGroups, StepGradients, group_by_prompt

from .sequence_table import SequenceTable

FOLDER = "interference"
MOST_SEQUENCES = 512
TEXT_LENGTH = 200
_NAME = re.compile(r"step_(\d{8,})\.npz")


@dataclass(frozen=True)
class InterferenceRecord:
    """One logged step, as numpy arrays. ``step``: from 1, as TRL's log numbers the optimizer step that is done then.

    ``gram_BB`` (None above ``MOST_SEQUENCES``) and ``gram_PP``, float32: inner products of the contributions of
    sequences, and of the gradients of prompts. ``trace_P``: sum of a prompt's squared contributions, float32.
    ``prompt_id_P`` int64, ``prompt_B`` int64, ``reward_B`` (NaN: unscorable) and ``coefficient_B`` (or None) float64:
    as in ``StepGradients``. ``position_B`` int64, ``advantage_B``, ``weight_B``, ``length_B``, ``rewards_PG`` (whole
    groups) and ``function_rewards_BF``: as in ``SequenceTable``, None in files of earlier versions. ``what_if``: the
    step's table (``what_if.as_plain``), or None. ``gram_parts``: by part of the model, as ``gram_PP``, which is
    their sum; None where parts weren't asked for. ``scores_BB``, ``score_coefficient_B`` and ``made_at_B``: as
    ``gram_BB``, ``coefficient_B`` and ``advantage_B``, with what the extra pass scored (``what_if_dead``); None
    where nothing was. ``sigma_P``: population std of a prompt's rewards, NaN where none is scorable. ``prompt_key_P``:
    int64, the same for the same prompt in every step. ``prompt_text_P``: its first 200 characters, or None. ``task_P``:
    what the dataset's column ``task`` says of it, None without one.
    """

    step: int
    prompt_id_P: np.ndarray
    prompt_key_P: np.ndarray
    prompt_text_P: list[str] | None
    gram_PP: np.ndarray
    trace_P: np.ndarray
    sigma_P: np.ndarray
    gram_BB: np.ndarray | None
    prompt_B: np.ndarray
    reward_B: np.ndarray
    coefficient_B: np.ndarray | None
    metrics: dict[str, float]
    position_B: np.ndarray | None = None
    advantage_B: np.ndarray | None = None
    weight_B: np.ndarray | None = None
    length_B: np.ndarray | None = None
    rewards_PG: np.ndarray | None = None
    function_rewards_BF: np.ndarray | None = None
    what_if: dict[str, Any] | None = None
    gram_parts: dict[str, np.ndarray] | None = None
    scores_BB: np.ndarray | None = None
    score_coefficient_B: np.ndarray | None = None
    made_at_B: np.ndarray | None = None
    task_P: list[str] | None = None

    def sequences(self) -> SequenceTable | None:
        """The table of the step's sequences, rewards in float64; None where the file holds no advantages.

        Coefficients are those of the extra pass, where there was one.
        """
        if self.position_B is None or self.advantage_B is None or self.rewards_PG is None:
            return None
        row_B = np.searchsorted(self.prompt_id_P, self.prompt_B)
        functions_BF, length_B, weight_B = self.function_rewards_BF, self.length_B, self.weight_B
        if functions_BF is None or length_B is None:  # of an earlier version, which kept neither
            functions_BF, length_B = np.zeros((len(row_B), 0)), np.zeros(len(row_B), dtype=np.int64)
        coefficient_B = self.coefficient_B if self.scores_BB is None else self.score_coefficient_B
        square_B = np.zeros(len(row_B)) if self.gram_BB is None else np.diag(self.gram_BB)
        return SequenceTable(
            prompt_id=torch.from_numpy(self.prompt_B),
            prompt_key=torch.from_numpy(self.prompt_key_P[row_B]),
            position=torch.from_numpy(self.position_B),
            length=torch.from_numpy(length_B),
            advantage=torch.from_numpy(self.advantage_B),
            made_at=torch.from_numpy(self.advantage_B if self.made_at_B is None else self.made_at_B),
            weight=torch.ones(len(row_B)) if weight_B is None else torch.from_numpy(weight_B),
            group_rewards=torch.from_numpy(self.rewards_PG[row_B]).double(),
            function_rewards=torch.from_numpy(functions_BF),
            square=torch.from_numpy(square_B).double(),
            coefficient=None if coefficient_B is None else torch.from_numpy(coefficient_B),
        )


# in a file: float32, or int64
OF_SEQUENCES = {
    "position": "position_B",
    "advantage": "advantage_B",
    "weight": "weight_B",
    "length": "length_B",
    "group_rewards": "rewards_PG",
    "function_rewards": "function_rewards_BF",
}


def _sequence_columns(table: SequenceTable) -> dict[str, np.ndarray]:
    """What a file keeps of a step's sequences; of rewards of whole groups a row for each prompt."""
    prompts, row_B = table.prompt_id.unique(return_inverse=True)
    rewards_PG = table.group_rewards.new_empty(len(prompts), table.group_rewards.shape[1])
    rewards_PG[row_B] = table.group_rewards
    columns = {name: getattr(table, name) for name in OF_SEQUENCES} | {"group_rewards": rewards_PG}
    return {name: value.cpu().numpy() for name, value in columns.items()}


def _score_columns(scores_BB: torch.Tensor | InnerProducts | None, table: SequenceTable) -> dict[str, np.ndarray]:
    """What a file keeps of the extra pass; nothing where there was none, or beyond ``MOST_SEQUENCES``."""
    if not isinstance(scores_BB, torch.Tensor) or len(scores_BB) > MOST_SEQUENCES or not table.extra.any():
        return {}
    assert table.coefficient is not None
    columns = {"score_coefficient": table.coefficient.cpu().numpy(), "made_at": table.made_at.cpu().numpy()}
    return {"scores": _upper_triangle(scores_BB.cpu().numpy()), **columns}


@dataclass(frozen=True)
class MoreOfStep:
    """What a file also holds, where it is known.

    ``table``: of the step's sequences. ``scores``: their inner products, those of the extra pass too. ``what_if``: for
    JSON. ``grams_PP``: inner products of the prompts' gradients by part of the model. ``tasks``: one for each prompt.
    """

    table: SequenceTable | None = None
    scores: torch.Tensor | InnerProducts | None = None
    what_if: Mapping[str, Any] | None = None
    grams_PP: Mapping[str, torch.Tensor] | None = None
    tasks: Sequence[str] | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """By the names that they have in the file."""
        arrays: dict[str, np.ndarray] = {}
        if self.table is not None:
            arrays |= _sequence_columns(self.table) | _score_columns(self.scores, self.table)
        if self.grams_PP:
            arrays["part_names"] = _as_json(list(self.grams_PP))
            arrays["parts"] = np.stack([_upper_triangle(gram_PP.cpu().numpy()) for gram_PP in self.grams_PP.values()])
        if self.what_if is not None:
            arrays["what_if"] = _as_json(self.what_if)
        if self.tasks is not None:
            arrays["tasks"] = _as_json([task[:TEXT_LENGTH] for task in self.tasks])
        return arrays


def write_step(
    run_folder: str | os.PathLike[str],
    step: int,
    gradients: StepGradients,
    metrics: Mapping[str, float],
    prompt_keys: Sequence[int],
    prompt_texts: Sequence[str] | None = None,
    *,
    more: MoreOfStep | None = None,
    groups: PromptGroups | None = None,
) -> Path:
    """Writes one step's file, over one of the same step (a resumed run), and returns its path.

    ``prompt_keys`` and ``prompt_texts``: one for each prompt, in ascending order of prompt id. ``groups``: of
    ``gradients``, where they are made already.
    """
    if step < 0:
        raise ValueError(f"step={step} must not be negative")
    more = MoreOfStep() if more is None else more
    groups = group_by_prompt(gradients) if groups is None else groups
    n_prompts = len(groups.prompt_P)
    for name, values in (("prompt_keys", prompt_keys), ("prompt_texts", prompt_texts), ("tasks", more.tasks)):
        if values is not None and len(values) != n_prompts:
            raise ValueError(
                f"{name} has {len(values)} entries: expected one for each of the step's {n_prompts} prompts"
            )
    arrays = {
        "step": np.array(step),
        "prompt_key": np.asarray(prompt_keys, dtype=np.int64),
        "metrics": _as_json(dict(metrics)),
        **_gradient_arrays(gradients, groups),
        **more.arrays(),
    }
    if prompt_texts is not None:
        arrays["texts"] = _as_json([text[:TEXT_LENGTH] for text in prompt_texts])
    folder = Path(run_folder) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.npz"
    unfinished = folder / f".{path.name}.unfinished"  # one process writes: a killed one's is written over
    with open(unfinished, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    os.replace(unfinished, path)
    return path


def _gradient_arrays(gradients: StepGradients, groups: PromptGroups) -> dict[str, np.ndarray]:
    """Inner products, of sequences or beyond ``MOST_SEQUENCES`` of prompts, and what they are of."""
    arrays = {
        "prompt_id": groups.prompt_P.cpu().numpy(),
        "trace": groups.trace_P.cpu().numpy().astype(np.float32),
        "sigma": groups.sigma_P.cpu().numpy(),
        "prompt": gradients.prompt_B.cpu().numpy(),
        "reward": gradients.reward_B.double().cpu().numpy(),
    }
    if groups.coefficient_B is not None:
        arrays["coefficient"] = groups.coefficient_B.cpu().numpy()
    gram_BB = gradients.gram_BB
    if isinstance(gram_BB, torch.Tensor) and len(gram_BB) <= MOST_SEQUENCES:
        arrays["sequences"] = _upper_triangle(gram_BB.cpu().numpy())
    else:
        arrays["prompts"] = _upper_triangle(groups.gram_PP.cpu().numpy())
    return arrays


def read_interference(run_folder: str | os.PathLike[str]) -> list[InterferenceRecord]:
    """Every step of a run, in order. A file that can't be read is skipped, and a warning names it::

        records = read_interference("runs/demo")
        plt.plot([r.step for r in records], [r.metrics["interference/cos_mean"] for r in records])

    ``ValueError`` where the folder isn't one that such files were written to.
    """
    folder = Path(run_folder) / FOLDER
    if not folder.is_dir():
        raise ValueError(
            f"{os.fspath(run_folder)!r} is not the folder of a run that logged interference: no {FOLDER}/ in it"
        )
    records = []
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name):
            try:
                records.append(_read(path))
            except (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                warnings.warn(f"{path} is skipped, it can't be read: {error}", stacklevel=2)
    return sorted(records, key=lambda record: record.step)


def _read(path: Path) -> InterferenceRecord:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    prompt_B = arrays["prompt"]
    prompt_id_P, row_B = np.unique(prompt_B, return_inverse=True)
    gram_BB = None
    if "sequences" in arrays:
        gram_BB = _from_upper_triangle(arrays["sequences"], len(prompt_B))
        belongs_BP = np.eye(len(prompt_id_P))[row_B]
        gram_PP = (belongs_BP.T @ gram_BB.astype(np.float64) @ belongs_BP).astype(np.float32)
    else:
        gram_PP = _from_upper_triangle(arrays["prompts"], len(prompt_id_P))
    texts = _texts(arrays, "texts", len(prompt_id_P))
    metrics = _from_json(arrays["metrics"])
    extra: dict[str, np.ndarray] = {}
    if "scores" in arrays:
        extra = {"score_coefficient_B": arrays["score_coefficient"], "made_at_B": arrays["made_at"]}
        extra["scores_BB"] = _from_upper_triangle(arrays["scores"], len(prompt_B))
    _check(arrays, prompt_id_P, gram_PP, metrics)
    return InterferenceRecord(
        step=int(arrays["step"]),
        prompt_id_P=arrays["prompt_id"],
        prompt_key_P=arrays["prompt_key"],
        prompt_text_P=texts,
        gram_PP=gram_PP,
        trace_P=arrays["trace"],
        sigma_P=arrays["sigma"],
        gram_BB=gram_BB,
        prompt_B=prompt_B,
        reward_B=arrays["reward"],
        coefficient_B=arrays.get("coefficient"),
        metrics=metrics,
        what_if=_from_json(arrays["what_if"]) if "what_if" in arrays else None,
        gram_parts={
            name: _from_upper_triangle(values, len(prompt_id_P))
            for name, values in zip(_from_json(arrays["part_names"]), arrays["parts"], strict=True)
        }
        if "parts" in arrays
        else None,
        **{field: arrays[name] for name, field in OF_SEQUENCES.items() if name in arrays},
        **extra,
        task_P=_texts(arrays, "tasks", len(prompt_id_P)),
    )


def _texts(arrays: dict[str, np.ndarray], name: str, count: int) -> list[str] | None:
    texts = _from_json(arrays[name]) if name in arrays else None
    if texts is not None and (len(texts) != count or not all(isinstance(text, str) for text in texts)):
        raise ValueError(f"{name} has {len(texts)} entries: expected {count} texts")
    return texts


def _check(arrays: dict[str, np.ndarray], prompt_id_P: np.ndarray, gram_PP: np.ndarray, metrics) -> None:
    """Raises ``ValueError`` for a file whose parts don't fit one another."""
    n_sequences, n_prompts = len(arrays["prompt"]), len(prompt_id_P)
    counts = dict.fromkeys(("reward", "coefficient", "score_coefficient", "made_at"), n_sequences)
    counts |= dict.fromkeys(("prompt_id", "prompt_key", "trace", "sigma"), n_prompts)
    for name, count in counts.items():
        if name in arrays and (arrays[name].shape != (count,) or arrays[name].dtype.kind not in "iuf"):
            raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}: expected {count} numbers")
    sizes = {"group_rewards": n_prompts, "function_rewards": n_sequences}
    for name in OF_SEQUENCES:
        size, ndim = (sizes[name], 2) if name in sizes else (n_sequences, 1)
        if name in arrays and (len(arrays[name]) != size or arrays[name].ndim != ndim):
            raise ValueError(f"{name} is {arrays[name].shape}: expected {size} {'rows' if ndim == 2 else 'numbers'}")
    if not np.array_equal(arrays["prompt_id"], prompt_id_P):
        raise ValueError("prompt_id isn't that of its sequences")
    if not np.isfinite(gram_PP).all() or (np.diag(gram_PP) < 0).any():
        raise ValueError("the inner products aren't finite, or a squared norm is negative")
    if not isinstance(metrics, dict) or not all(isinstance(value, int | float) for value in metrics.values()):
        raise ValueError("metrics aren't numbers by name")


def _as_json(value) -> np.ndarray:
    """UTF-8 as bytes: numpy's own strings take four bytes a character, and lose NULs at the end."""
    return np.frombuffer(json.dumps(value, ensure_ascii=False).encode(errors="replace"), dtype=np.uint8)


def _from_json(array: np.ndarray):
    return json.loads(array.tobytes().decode())


def _upper_triangle(matrix: np.ndarray) -> np.ndarray:
    return matrix[np.triu_indices(len(matrix))].astype(np.float32)


def _from_upper_triangle(values: np.ndarray, size: int) -> np.ndarray:
    matrix = np.zeros((size, size), dtype=np.float32)
    matrix[np.triu_indices(size)] = values
    return matrix + np.triu(matrix, 1).T
