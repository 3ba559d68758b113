"""DocVQA: scanned documents (Mathew et al. 2021). Answers of its test split are kept by an evaluation server."""

from glimpseprune.tasks import SHORT, Task

TASK = Task(
    data="data/docvqa",
    split="val",
    prepare={"source": "official", "options": {"set": "docvqa", "root": "docvqa"}},
    datasets=("docvqa",),
    suffix=SHORT,
    metrics=("anls", "exact_match"),
    max_new_tokens=32,
)
