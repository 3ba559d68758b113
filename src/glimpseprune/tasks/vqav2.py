"""VQAv2: photographs, ten answers to each question (Goyal et al. 2017)."""

from glimpseprune.tasks import SHORT, Task

TASK = Task(
    data="data/vqav2",
    split="val",
    prepare={"source": "official", "options": {"set": "vqav2", "root": "vqav2"}},
    datasets=("vqav2",),
    suffix=SHORT,
    metrics=("vqa_accuracy",),
    max_new_tokens=16,
)
