"""What a model allows: which padding may be cut, and whether its prompts may be shared. Found once, by running it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from trl_ext.compat import RunSettings
from trl_ext.probe_model import is_sharded
from trl_ext.sharing.hooks import let_share

from .padding import trimmed_columns
from .probe_sharing import why_not_shared, without_adapters
from .random_layers import noise_by_row_length, random_layers
from .rows import Trimming

NEFTUNE = "NEFTune is active"


class ModelLimits:
    """``trimming`` and ``not_shared`` (why prompts aren't shared, or None), the same on every rank.

    ``add_patch`` takes what changes the models while the trainer uses them (``model_patches.py``).
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
        """Runs a few tokens through the model, once; a sharded one when its engine has it, on every rank at once.

        ``model``: as it is wrapped now; None: the one that was given first."""
        if self._probed:
            self._look_for_noise()
            return
        self._probed, model = True, self._run.accelerator.unwrap_model(self._model if model is None else model)
        prompts, completions = trimmed_columns(model, self._run.accelerator, self._run.say_once, prepared=True)
        reason = why_not_shared(self._run, model, prompts, prepared=True)
        answers = torch.tensor([[prompts, completions, reason is None]], device=self._run.accelerator.device)
        trim_prompts, trim_completions, share = self._run.accelerator.gather(answers.int()).amin(0).bool().tolist()
        self.trimming = Trimming(trim_prompts, trim_completions, self._run.pad_to_multiple_of)
        self.not_shared = reason or (None if share else "the model can't run so on another process")
        if self.not_shared is None:
            for one in (model, self._ref_model):
                if one is not None:
                    self._add_patch(partial(let_share, without_adapters(one)))

    def _look_for_noise(self) -> None:
        """Training may have switched NEFTune on since the model was probed."""
        if not noise_by_row_length(self._model):
            return
        if self.trimming.prompts or self.trimming.completions or self.not_shared is None:
            self._run.say_once(
                "Rows keep the length that TRL gives them, and prompts aren't shared: NEFTune's noise depends on the "
                "length of a row."
            )
        self.trimming, self.not_shared = Trimming(), NEFTUNE

    def name_random_layers(self) -> None:
        """Says once that regrouping gives random numbers to other tokens, where the model draws any."""
        if self._named_random_layers:
            return
        self._named_random_layers = True
        found = random_layers(self._model)
        if found is not None:
            self._run.say_once(
                f"The model draws random numbers in training ({found}), and which ones a token gets depends on where "
                "its sequence is in its micro-batch: gradients are those of skip_zero_advantage=False on average, not "
                "each time."
            )
