"""What a run prints at its end: held-out accuracy before and after, over all tasks and by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Logs = Sequence[Mapping[str, float]]  # a trainer's ``state.log_history``


def held_out_logs(logs: Logs) -> tuple[str, Logs]:
    """Returns what is measured on held-out questions, and the logs that have it; the first is before training.

    The measure is ``accuracy``, or ``reward`` (its mean) where the user's own reward function logs no accuracy.
    """
    name = "accuracy" if any("eval_accuracy" in log for log in logs) else "reward"
    return name, [log for log in logs if f"eval_{name}" in log]


def held_out_lines(logs: Logs) -> list[str]:
    """Returns lines of text; none where nothing was evaluated."""
    name, evaluated = held_out_logs(logs)
    if not evaluated:
        return []
    before, after = evaluated[0][f"eval_{name}"], evaluated[-1][f"eval_{name}"]
    first = f"\nHeld-out {name}: {before:.3f} before, {after:.3f} after ({after - before:+.3f})"
    return [first, *_lines_by_task(logs, evaluated[0], evaluated[-1])]


def _lines_by_task(logs: Logs, first: Mapping[str, float], last: Mapping[str, float]) -> list[str]:
    """Mean rewards of each of several tasks, before and after, and each task's mean share of the gradient."""
    before, after = "eval_tasks/", "/reward"
    names = [key[len(before) : -len(after)] for key in last if key.startswith(before) and key.endswith(after)]
    if len(names) < 2:
        return []
    lines = ["By task (mean reward):" + " " * 5 + "before   after   share of the gradient"]
    for name in names:
        rewards = [log.get(f"eval_tasks/{name}/reward") for log in (first, last)]
        shares = [log[f"tasks/{name}/heard"] for log in logs if f"tasks/{name}/heard" in log]
        cells = [*rewards, sum(shares) / len(shares) if shares else None]
        texts = ("-" if cell is None else f"{cell:.3f}" for cell in cells)
        lines.append(f"  {name[:23]:<23} " + "".join(text.rjust(8) for text in texts))
    return lines
