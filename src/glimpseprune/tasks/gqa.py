"""GQA: compositional questions on photographs (Hudson & Manning 2019); scores are reported on testdev_balanced."""

from glimpseprune.tasks import SHORT, Task

TASK = Task(
    data="data/gqa",
    prepare={"source": "official", "options": {"set": "gqa", "root": "gqa"}},
    datasets=("gqa",),
    suffix=SHORT,
    metrics=("exact_match",),
    max_new_tokens=16,
)
