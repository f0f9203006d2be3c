"""What each number of a report is, in a line; the code that computes it says it exactly.

"Paper" is arXiv 2601.23135. Cosines are those of the gradients of two live prompts, as trained.
"""

# section -> metric -> definition
DEFINITIONS = {
    "learning": {
        "reward": "mean reward of the sampled answers of a batch (with resampling: of all that were drawn)",
        "eval_accuracy": "share of right answers to held-out problems, sampled as in training",
        "grad_norm": "norm of the gradient before clipping",
        "phase": "1: prompts' gradients are near-orthogonal; 2: they begin to interfere; 3: they interfere. From moving "
        "averages of near_orthogonal_frac and cos_std; missing where few prompts are live or alignment isn't known to 0.5",
    },
    "normalisation": {
        "normalization/scale_mean, scale_min, scale_max": "what a group's centred rewards are divided by, over the live "
        "groups of a batch, in units of reward",
        "normalization/zero_variance_frac": "share of groups whose answers all got the same reward, up to `tolerance`",
        "normalization/advantage_abs_mean, advantage_max": "mean and largest absolute advantage",
    },
    "what_if": {
        "cosine": "of the step that the normalisation would have taken with the one that was taken",
        "length": "of its step along the step that was taken, median over steps",
        "rate": "best learning rate over std's: what its steps gain on other prompts over their squared length, pooled over "
        "steps, if the curvature is the same in all directions; 95 % by resampling steps; missing where nothing can be told",
        "spread": "std over steps of the log of that length: up to 0.15 a rate, above a schedule",
    },
    "noise": {
        "noise/between": "variance of the prompts' true gradients, estimated without bias, so that it may be below 0",
        "noise/within": "variance of one prompt's gradient over its answers",
        "noise/advised_generations": "answers to a prompt at which as many rollouts give the least noise",
    },
    "answers": {
        "completions/repetition": "share of an answer's runs of four tokens that occurred in it before",
        "entropy_live": "entropy over the answers that were run, those of live prompts",
    },
    "interference": {
        "interference/cos_mean, cos_std": "over pairs of live prompts; the sketch's own variance is taken out of the std",
        "interference/near_orthogonal_frac": "share of pairs with an absolute cosine below 0.1",
        "interference/conflict_frac": "share of pairs with a cosine below minus twice the sketch's error (at least 0.001)",
        "interference/alignment": "mean inner product of two prompts' gradients over their mean squared length, rollout "
        "noise removed, pooled over up to 20 logged steps; missing where the signal isn't clearly above 0",
        "interference/sketch_rmse": "the error of one cosine, predicted from how far the sketch's two halves disagree",
    },
    "curvature": {
        "sigma": "population std of a prompt's rewards; the paper takes it for the curvature of the prompt's objective",
        "measured curvature": "mean over a prompt's answers of (reward - mean) times the squared component of the "
        "answer's score along the prompt's gradient, that answer left out of it",
        "curvature/speedup_constant": "C = 8/3 of the mean sigma so far (paper, Theorem 3.2; rewards in [0, 1]), for "
        "rewards of 0 and 1 without the bias of small groups",
        "curvature/directional_corr": "Pearson correlation over prompts of sigma and measured curvature",
        "curvature/fisher_variance_corr": "Pearson correlation over prompts of the mean squared score and the variance of "
        "the rewards (paper, Table 1)",
    },
    "theory": {
        "theory/m_bound_p95": "95th percentile over pairs of the M that Assumption 4 of the paper needs",
        "theory/negative_pairs_frac": "share of pairs with a negative inner product, which satisfy it for no M",
        "theory/r1, r2": "largest ratio of two prompts' gradient norms, and of their sigmas (Assumption 5)",
    },
    "compute": {
        "compute/answers_per_live_group": "answers generated for each group whose answers got different rewards",
        "compute/tokens_run": "prompt and completion tokens that went through the model, all processes together",
        "compute/sequences_skipped_frac": "share of sequences without a gradient, which don't run",
        "compute/flops_saved_frac": "share of the backbone's token positions that TRL would run and that didn't run",
        "compute/seconds_...": "of an optimizer step: generation, rewards, old and reference log-probs; training is the rest",
    },
}
PAPER = "https://arxiv.org/abs/2601.23135"
