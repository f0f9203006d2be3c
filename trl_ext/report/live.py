"""While a run goes: the heatmap and the key curves as one image, where TRL's ``report_to`` says.

Every ``EVERY``-th step that logs interference, on the main process. A backend that isn't there, or fails, is said once
and left out from then on; training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from transformers import TrainerCallback

from trl_ext.recorder.recorder import InterferenceRecorder

logger = get_logger(__name__)
IMAGE_BACKENDS = ("wandb", "trackio", "tensorboard")  # of ``report_to``
EVERY = 5
TAG = "interference/overview"
KEY_CURVES = {
    "reward": "reward",
    "interference/near_orthogonal_frac": "share of |cosine| < 0.1",
    "interference/reliability": "reliability",
    "curvature/speedup_constant": "C",
}


def draw_overview(matrix: np.ndarray, step: int, logs: list[dict[str, Any]]) -> np.ndarray:
    """(height, width, 3) uint8: the cosines (L, L) of this step's live prompts, and curves up to now."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .numbers import cluster_order

    figure = Figure(figsize=(8, 3.6), layout="constrained", dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes, curve_axes = figure.subplots(1, 2)
    order = cluster_order(matrix)
    image = axes.imshow(matrix[np.ix_(order, order)], vmin=-1, vmax=1, cmap="RdBu", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="cosine")
    axes.set_title(f"step {step}: {len(matrix)} live prompts", fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    for (name, label), line in zip(KEY_CURVES.items(), ("-", "--", "-.", ":"), strict=True):
        points = [(log["step"], log[name]) for log in logs if isinstance(log.get(name), int | float)]
        if points:
            curve_axes.plot(*zip(*points, strict=True), line, label=label)
    curve_axes.set_xlabel("optimizer step")
    if curve_axes.lines:
        curve_axes.legend(fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


class LiveImages(TrainerCallback):
    """Sends ``draw_overview`` to the backends of ``report_to``. ``callbacks`` gives the trainer's."""

    def __init__(self, interference: InterferenceRecorder, callbacks: Callable[[], Iterable[TrainerCallback]]) -> None:
        self.interference, self.callbacks = interference, callbacks
        interference.keeps_latest = bool(set(interference.run.report_to) & set(IMAGE_BACKENDS))
        self._left_out: set[str] = set()
        self._seen = 0

    def on_step_end(self, args, state, control, **kwargs):
        latest = self.interference.latest
        if latest is None or not state.is_world_process_zero:
            return
        self.interference.latest = None
        self._seen += 1
        backends = [name for name in IMAGE_BACKENDS if name in (args.report_to or ())]
        backends = [name for name in backends if name not in self._left_out]
        if (self._seen - 1) % EVERY or not backends or len(latest) < 2:
            return
        try:
            image = draw_overview(latest, state.global_step, state.log_history)
        except Exception as error:
            self._left_out |= set(backends)
            logger.warning(f"Images of interference aren't drawn: {type(error).__name__}: {error}")
            return
        for name in backends:
            try:
                getattr(self, f"_to_{name}")(image, state.global_step)
            except Exception as error:
                self._left_out.add(name)
                logger.warning(f"Images of interference don't go to {name}: {type(error).__name__}: {error}")

    def _to_wandb(self, image: np.ndarray, step: int) -> None:
        import wandb

        if wandb.run is not None:
            wandb.log({TAG: wandb.Image(image), "train/global_step": step})

    def _to_trackio(self, image: np.ndarray, step: int) -> None:
        import trackio

        trackio.log({TAG: trackio.Image(image)}, step=step)

    def _to_tensorboard(self, image: np.ndarray, step: int) -> None:
        for callback in self.callbacks():
            if type(callback).__name__ == "TensorBoardCallback" and callback.tb_writer is not None:
                callback.tb_writer.add_image(TAG, image, step, dataformats="HWC")
