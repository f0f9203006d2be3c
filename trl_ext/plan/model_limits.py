"""Finds, by running the model once, which padding can be trimmed and whether prompts can be shared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from trl_ext.checkpointed_layers import without_adapters
from trl_ext.compat import RunSettings
from trl_ext.probe_model import is_sharded
from trl_ext.sharing.hooks import add_sharing_hooks

from .padding import trimmed_columns
from .probe_sharing import why_not_shared
from .random_layers import noise_by_row_length, random_layers
from .rows import Trimming

NEFTUNE = "NEFTune is active"


class ModelLimits:
    """What the model allows, the same on every rank.

    Attributes:
        trimming: which columns of padding can be trimmed.
        not_shared: why prompts can't be shared, or None if they can.

    ``add_patch`` registers the hooks for shared prompts with the trainer's patches (``model_patches.py``).
    """

    def __init__(
        self,
        run: RunSettings,
        model: torch.nn.Module,
        ref_model: torch.nn.Module | None,
        add_patch: Callable[[Callable[[], Callable[[], None]]], None],
    ) -> None:
        unwrap = run.accelerator.unwrap_model
        self._run, self._add_patch = run, add_patch
        self._model = unwrap(model)
        self._ref_model = None if ref_model is None else unwrap(ref_model)
        self.trimming = Trimming()
        self.not_shared: str | None = "the model hasn't been probed yet"
        self._probed = self._named_random_layers = False
        if not is_sharded(run.accelerator):
            self.probe()

    def probe(self, model: torch.nn.Module | None = None) -> None:
        """Runs a few tokens through the model, at the first call. A later call only checks for NEFTune.

        A sharded model can be probed only after its engine has wrapped it, by all ranks at the same time.

        Args:
            model: the wrapped model; None: the model given to ``__init__``.
        """
        if self._probed:
            self._check_neftune()
            return
        self._probed, model = True, self._run.accelerator.unwrap_model(self._model if model is None else model)
        prompts, completions = trimmed_columns(model, self._run.log_once)
        reason = why_not_shared(self._run, model, prompts)
        answers = torch.tensor([[prompts, completions, reason is None]], device=self._run.accelerator.device)
        trim_prompts, trim_completions, share = self._run.accelerator.gather(answers.int()).amin(0).bool().tolist()
        self.trimming = Trimming(trim_prompts, trim_completions, self._run.pad_to_multiple_of)
        self.not_shared = reason or (None if share else "the model can't run packed rows on another rank")
        if self.not_shared is None:
            for patched in (model, self._ref_model):
                if patched is not None:
                    self._add_patch(partial(add_sharing_hooks, without_adapters(patched)))

    def _check_neftune(self) -> None:
        """Turns trimming and sharing off if NEFTune, which starts with training, has been activated since the probe."""
        if not noise_by_row_length(self._model):
            return
        if self.trimming.prompts or self.trimming.completions or self.not_shared is None:
            self._run.log_once(
                "Rows keep the length that TRL gives them, and prompts aren't shared: NEFTune's noise depends on the "
                "length of a row."
            )
        self.trimming, self.not_shared = Trimming(), NEFTUNE

    def name_random_layers(self) -> None:
        """Warns once if the model draws random numbers, which regrouping assigns to other tokens."""
        if self._named_random_layers:
            return
        self._named_random_layers = True
        found = random_layers(self._model)
        if found is not None:
            self._run.log_once(
                f"The model draws random numbers in training ({found}), and which ones a token gets depends on where "
                "its sequence is in its micro-batch: gradients are those of skip_zero_advantage=False on average, not "
                "each time."
            )
