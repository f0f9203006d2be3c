# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tutorial: one run, looked at
#
# A small policy learns sums, on a CPU, in under a minute after its first warm-up. Then we ask the run three questions:
# did it learn, how much of the work was worth doing, and do the prompts get in one another's way?
#
# As a notebook: `jupytext --to notebook docs/tutorial.py`.

# %%
import tempfile
from pathlib import Path

import numpy as np
from datasets import Dataset

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer, read_interference
from trl_ext.tasks.small_policy import small_policy

# %% [markdown]
# ## Data and reward
#
# A prompt is a list of messages; other columns go to the reward function by their names. The reward gives a number to
# each answer.

# %%
sums = [(a, b) for a in range(1, 11) for b in range(1, 11)]
data = Dataset.from_dict(
    {
        "prompt": [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in sums],
        "answer": [str(a + b) for a, b in sums],
    }
)


def is_right(completions, answer, **other_columns):
    return [float(reply[0]["content"].strip() == right) for reply, right in zip(completions, answer, strict=True)]


# %% [markdown]
# ## A run
#
# Sixteen prompts a step, eight answers each. Interference is logged at every second step here, by default at every
# tenth.

# %%
from transformers import PrinterCallback
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

folder = Path(tempfile.mkdtemp()) / "std"
options = CurvatureGRPOConfig(
    output_dir=str(folder),
    normalization="std",
    num_generations=8,
    per_device_train_batch_size=128,
    max_completion_length=4,
    learning_rate=2e-4,
    max_steps=12,
    interference_every=2,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
policy = small_policy(42)
trainer = CurvatureGRPOTrainer(str(policy), is_right, args=options, train_dataset=data)
trainer.remove_callback(PrinterCallback)
trainer.train()
history = [entry for entry in trainer.state.log_history if "reward" in entry]

# %% [markdown]
# ## Did it learn?
#
# `loss` is about 0 all the time, by construction. The reward is what to watch.

# %%
for entry in history[::3]:
    print(f"step {entry['step']:>2}: reward {entry['reward']:.2f}, loss {entry['loss']:+.4f}")

# %% [markdown]
# ## How much of the work was worth doing?
#
# A prompt whose eight answers all got the same reward has no gradient, and isn't run. As the policy gets better there
# are more of these.

# %%
for entry in history[::3]:
    print(
        f"step {entry['step']:>2}: {entry['normalization/zero_variance_frac']:.0%} of the prompts teach nothing, "
        f"{entry['compute/flops_saved_frac']:.0%} of the backbone's work was left out"
    )

# %% [markdown]
# ## Do the prompts get in one another's way?
#
# Cosines of the gradients of pairs of prompts. First how far they can be trusted: `sketch_check` should be about 1.
# `alignment` is without the noise of few answers; it is missing until enough steps were logged.

# %%
names = ("live_prompts", "sketch_check", "alignment", "cos_mean", "cos_std", "conflict_frac")
print("step  " + "  ".join(names))
for entry in history:
    if "interference/cos_mean" in entry:
        values = [entry.get(f"interference/{name}") for name in names]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        print(
            f"{entry['step']:>4}  " + "  ".join(cell.rjust(len(name)) for cell, name in zip(cells, names, strict=True))
        )

# %% [markdown]
# The run's folder keeps the inner products themselves, with the prompts' texts: which two pulled apart
# most at the last of these steps?

# %%
record = read_interference(folder)[-1]
live = record.gram_PP.diagonal() > 0
gram = record.gram_PP[live][:, live]
norm = np.sqrt(gram.diagonal())
cosine = gram / norm[:, None] / norm
texts = [text for text, has_gradient in zip(record.prompt_text_P, live, strict=True) if has_gradient]
p, q = np.unravel_index(cosine.argmin(), cosine.shape)
print(f"cosine {cosine[p, q]:.2f}:\n  {texts[p]}\n  {texts[q]}")

# %% [markdown]
# ## The page
#
# `python -m trl_ext report FOLDER` makes one HTML file of all this, with a heatmap of the cosines at each logged step.
# Give it several folders, of several normalisations say, and they are laid over one another.
