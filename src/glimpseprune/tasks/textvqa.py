"""TextVQA: text in photographs, ten answers to each question (Singh et al. 2019)."""

from glimpseprune.tasks import SHORT, Task

TASK = Task(
    data="data/textvqa",
    split="val",
    prepare={"source": "official", "options": {"set": "textvqa", "root": "textvqa"}},
    datasets=("textvqa",),
    suffix=SHORT,
    metrics=("vqa_accuracy",),
    max_new_tokens=16,
)
