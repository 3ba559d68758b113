"""easy-VQA: the shape and colour of one figure (``data/sources/easy_vqa.py``)."""

from glimpseprune.tasks import Task

TASK = Task(
    data="data/easy_vqa",
    prepare={"source": "easy_vqa"},
    datasets=("easy_vqa",),
    metrics=("exact_match",),
    max_new_tokens=16,
)
