"""The paper behind the trainer, for TRL's model cards."""

PAPER = {
    "title": "Why GRPO Needs Normalization: A Local-Curvature Perspective on Adaptive Gradients",
    "id": "2601.23135",
    # docstyle-ignore
    "citation": """\
@article{ge2026normalization,
    title        = {{Why GRPO Needs Normalization: A Local-Curvature Perspective on Adaptive Gradients}},
    author       = {Cheng Ge and Caitlyn Heqi Yin and Hao Liang and Jiawei Zhang},
    year         = 2026,
    eprint       = {arXiv:2601.23135},
}""",
}
