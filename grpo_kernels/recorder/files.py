"""Writes and reads one small file per logged step: inner products of gradients, rewards and metrics, for plots.

Shapes: B sequences; P prompts in ascending order of prompt id; G completions of one prompt; F reward functions.

The path is ``<run folder>/interference/step_00000010.npz``; numpy alone can read it (no pickle). Of symmetric matrices
it holds the upper triangle in float32: (B, B) of sequences up to ``MAX_SEQUENCES``, else (P, P) of prompts, so that a
step of 512 sequences or prompts takes half a megabyte. It is written under another name and renamed, so that no reader
sees half a file.
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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from grpo_kernels.interference.inner_products import InnerProducts
from grpo_kernels.interference.step_gradients import PromptGroups, StepGradients, group_by_prompt

from .sequence_table import SequenceTable

if TYPE_CHECKING:
    from .what_if_step import WhatIfTable

FOLDER = "interference"
MAX_SEQUENCES = 512
TEXT_LENGTH = 200
_NAME = re.compile(r"step_(\d{8,})\.npz")


@dataclass(frozen=True)
class InterferenceRecord:
    """One logged step, as numpy arrays. A field is None if the step, or an earlier version of this file, lacks it.

    Attributes:
        step: the number of completed optimizer steps, as in TRL's log.
        prompt_id_P, prompt_key_P: int64; the key is the same for the same prompt in every step.
        prompt_text_P: the first 200 characters of each prompt.
        gram_PP: float32 inner products of the prompts' gradients.
        trace_P: float32 sum of a prompt's squared per-sequence gradients.
        sigma_P: population std of a prompt's rewards, NaN if none is scorable.
        gram_BB: float32 inner products of the per-sequence gradients; None above ``MAX_SEQUENCES``.
        prompt_B, reward_B, coefficient_B: as in ``StepGradients``.
        metrics: the step's metrics by name.
        position_B, advantage_B, weight_B, length_B, function_rewards_BF: as in ``SequenceTable``.
        rewards_PG: the rewards of whole groups.
        what_if: the comparison with other normalisations.
        gram_parts: by part of the model, (P, P) inner products, which sum to ``gram_PP``.
        scores_BB, score_coefficient_B, score_advantage_B: as ``gram_BB``, ``coefficient_B`` and ``advantage_B``, with
            the sequences that the extra pass scored (``what_if_dead``).
        task_P: each prompt's entry in the dataset's column ``task``.
        started: when the recorder was made, in seconds since the epoch; a resumed run keeps it. 0: unknown.
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
    what_if: WhatIfTable | None = None
    gram_parts: dict[str, np.ndarray] | None = None
    scores_BB: np.ndarray | None = None
    score_coefficient_B: np.ndarray | None = None
    score_advantage_B: np.ndarray | None = None
    task_P: list[str] | None = None
    started: float = 0.0

    def sequences(self) -> SequenceTable | None:
        """Returns the step's sequences, with rewards in float64; None if the file holds no advantages.

        The coefficients include those of the extra pass, if there was one.
        """
        if self.position_B is None or self.advantage_B is None or self.rewards_PG is None:
            return None
        row_B = np.searchsorted(self.prompt_id_P, self.prompt_B)
        functions_BF, length_B, weight_B = self.function_rewards_BF, self.length_B, self.weight_B
        if functions_BF is None or length_B is None:  # a file of an earlier version
            functions_BF, length_B = np.zeros((len(row_B), 0)), np.zeros(len(row_B), dtype=np.int64)
        coefficient_B = self.coefficient_B if self.scores_BB is None else self.score_coefficient_B
        square_B = np.zeros(len(row_B)) if self.gram_BB is None else np.diag(self.gram_BB)
        return SequenceTable(
            prompt_id=torch.from_numpy(self.prompt_B),
            prompt_key=torch.from_numpy(self.prompt_key_P[row_B]),
            position=torch.from_numpy(self.position_B),
            length=torch.from_numpy(length_B),
            advantage=torch.from_numpy(self.advantage_B),
            score_advantage=torch.from_numpy(
                self.advantage_B if self.score_advantage_B is None else self.score_advantage_B
            ),
            weight=torch.ones(len(row_B)) if weight_B is None else torch.from_numpy(weight_B),
            group_rewards=torch.from_numpy(self.rewards_PG[row_B]).double(),
            function_rewards=torch.from_numpy(functions_BF),
            square=torch.tensor(square_B, dtype=torch.float64),
            coefficient=None if coefficient_B is None else torch.from_numpy(coefficient_B),
        )


# field of InterferenceRecord -> name in the file, of arrays that are stored unchanged
REQUIRED = {
    "prompt_id_P": "prompt_id",
    "prompt_key_P": "prompt_key",
    "trace_P": "trace",
    "sigma_P": "sigma",
    "prompt_B": "prompt",
    "reward_B": "reward",
}
OF_SEQUENCES = {
    "position_B": "position",
    "advantage_B": "advantage",
    "weight_B": "weight",
    "length_B": "length",
    "rewards_PG": "group_rewards",
    "function_rewards_BF": "function_rewards",
}
OF_SCORES = {"score_coefficient_B": "score_coefficient", "score_advantage_B": "made_at"}
OPTIONAL = {"coefficient_B": "coefficient", **OF_SEQUENCES, **OF_SCORES}

Arrays = dict[str, np.ndarray]  # by name in the file


def _sequence_arrays(table: SequenceTable) -> Arrays:
    """Returns the sequences' columns; group rewards have one row per prompt."""
    prompts, row_B = table.prompt_id.unique(return_inverse=True)
    rewards_PG = table.group_rewards.new_empty(len(prompts), table.group_rewards.shape[1])
    rewards_PG[row_B] = table.group_rewards
    columns = {name: getattr(table, name) for name in OF_SEQUENCES.values()} | {"group_rewards": rewards_PG}
    return {name: value.cpu().numpy() for name, value in columns.items()}


def _score_arrays(scores_BB: torch.Tensor | InnerProducts | None, table: SequenceTable) -> Arrays:
    """Returns the extra pass's scores; empty if there was no such pass, or above ``MAX_SEQUENCES``."""
    if not isinstance(scores_BB, torch.Tensor) or len(scores_BB) > MAX_SEQUENCES or not table.extra.any():
        return {}
    assert table.coefficient is not None
    columns = {"score_coefficient": table.coefficient.cpu().numpy(), "made_at": table.score_advantage.cpu().numpy()}
    return {"scores": _upper_triangle(scores_BB), **columns}


@dataclass(frozen=True)
class StepExtras:
    """What a file holds in addition to gradients and metrics; None: the file lacks it.

    Attributes:
        table: the step's sequences.
        scores: their inner products, with those of the extra pass.
        what_if: the comparison with other normalisations.
        grams_PP: by part of the model, the inner products of the prompts' gradients.
        tasks: each prompt's task.
        started: as in ``InterferenceRecord``.
    """

    table: SequenceTable | None = None
    scores: torch.Tensor | InnerProducts | None = None
    what_if: WhatIfTable | None = None
    grams_PP: Mapping[str, torch.Tensor] | None = None
    tasks: Sequence[str] | None = None
    started: float = 0.0

    def arrays(self) -> Arrays:
        """Returns the arrays by name in the file."""
        arrays: Arrays = {"started": np.array(self.started)}
        if self.table is not None:
            arrays |= _sequence_arrays(self.table) | _score_arrays(self.scores, self.table)
        if self.grams_PP:
            arrays["part_names"] = _as_json(list(self.grams_PP))
            arrays["parts"] = np.stack([_upper_triangle(gram_PP) for gram_PP in self.grams_PP.values()])
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
    more: StepExtras | None = None,
    groups: PromptGroups | None = None,
) -> Path:
    """Writes one step's file, replaces that of an earlier run, and returns its path.

    Args:
        run_folder: the run's folder.
        step: the number of completed optimizer steps.
        gradients: the step.
        metrics: the step's metrics.
        prompt_keys, prompt_texts: one per prompt, in ascending order of prompt id.
        more: additional contents.
        groups: ``gradients`` grouped by prompt, if the caller has them.
    """
    groups = group_by_prompt(gradients) if groups is None else groups
    arrays = {
        "step": np.array(step),
        "prompt_key": np.asarray(prompt_keys, dtype=np.int64),
        "metrics": _as_json(dict(metrics)),
        **_gradient_arrays(gradients, groups),
        **(StepExtras() if more is None else more).arrays(),
    }
    if prompt_texts is not None:
        arrays["texts"] = _as_json([text[:TEXT_LENGTH] for text in prompt_texts])
    folder = Path(run_folder) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.npz"
    unfinished = folder / f".{path.name}.unfinished"  # only one rank writes; a killed run's file is overwritten
    with open(unfinished, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    os.replace(unfinished, path)
    return path


def _gradient_arrays(gradients: StepGradients, groups: PromptGroups) -> Arrays:
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
    if isinstance(gram_BB, torch.Tensor) and len(gram_BB) <= MAX_SEQUENCES:
        arrays["sequences"] = _upper_triangle(gram_BB)
    else:
        arrays["prompts"] = _upper_triangle(groups.gram_PP)
    return arrays


def read_interference(run_folder: str | os.PathLike[str]) -> list[InterferenceRecord]:
    """Reads all logged steps of a run, in order.

    It skips a file that it can't read, and those of an earlier run in the same folder, and warns about them::

        records = read_interference("runs/demo")
        plt.plot([r.step for r in records], [r.metrics["interference/cos_mean"] for r in records])

    Raises:
        ValueError: the run's folder has no such files.
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
    latest = max((record.started for record in records), default=0.0)
    of_run = [record for record in records if record.started == latest]
    if len(of_run) < len(records):
        warnings.warn(f"{folder}: {len(records) - len(of_run)} files of an earlier run are skipped", stacklevel=2)
    return sorted(of_run, key=lambda record: record.step)


def _read(path: Path) -> InterferenceRecord:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    columns = {field: arrays[name] for field, name in REQUIRED.items()}
    columns |= {field: arrays[name] for field, name in OPTIONAL.items() if name in arrays}
    n_sequences, n_prompts = len(arrays["prompt"]), len(arrays["prompt_id"])
    for field, array in columns.items():
        axes = field.rsplit("_", 1)[1]
        if array.ndim != len(axes) or len(array) != (n_prompts if axes[0] == "P" else n_sequences):
            raise ValueError(
                f"{field} has shape {array.shape} in a step of {n_sequences} sequences, {n_prompts} prompts"
            )
    grams: Arrays = {}
    for field, name in (("gram_BB", "sequences"), ("scores_BB", "scores")):
        if name in arrays:
            grams[field] = _from_upper_triangle(arrays[name], n_sequences)
    gram_BB = grams.pop("gram_BB", None)
    return InterferenceRecord(
        step=int(arrays["step"]),
        prompt_text_P=_json(arrays, "texts"),
        gram_BB=gram_BB,
        gram_PP=_from_upper_triangle(arrays["prompts"], n_prompts) if gram_BB is None else _by_prompt(gram_BB, columns),
        metrics=_json(arrays, "metrics"),
        what_if=_json(arrays, "what_if"),
        gram_parts=_gram_parts(arrays, n_prompts),
        task_P=_json(arrays, "tasks"),
        started=float(arrays.get("started", 0.0)),
        **{"coefficient_B": None, **columns},
        **grams,
    )


def _by_prompt(gram_BB: np.ndarray, columns: Arrays) -> np.ndarray:
    """Sums per-sequence inner products (B, B) over each prompt's sequences, to (P, P)."""
    belongs_BP = (columns["prompt_B"][:, None] == columns["prompt_id_P"]).astype(np.float64)
    return (belongs_BP.T @ gram_BB.astype(np.float64) @ belongs_BP).astype(np.float32)


def _gram_parts(arrays: Arrays, n_prompts: int) -> Arrays | None:
    if "parts" not in arrays:
        return None
    pairs = zip(_json(arrays, "part_names"), arrays["parts"], strict=True)
    return {name: _from_upper_triangle(values, n_prompts) for name, values in pairs}


def _as_json(value: Any) -> np.ndarray:
    """Encodes JSON as UTF-8 bytes. A numpy string would take four bytes per character, and drop trailing NULs."""
    return np.frombuffer(json.dumps(value, ensure_ascii=False).encode(errors="replace"), dtype=np.uint8)


def _json(arrays: Arrays, name: str) -> Any:
    return json.loads(arrays[name].tobytes().decode()) if name in arrays else None


def _upper_triangle(matrix: torch.Tensor) -> np.ndarray:
    values = matrix.cpu().numpy()
    return values[np.triu_indices(len(values))].astype(np.float32)


def _from_upper_triangle(values: np.ndarray, size: int) -> np.ndarray:
    matrix = np.zeros((size, size), dtype=np.float32)
    matrix[np.triu_indices(size)] = values
    return matrix + np.triu(matrix, 1).T
