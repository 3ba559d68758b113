"""The embedded task: numbers on coloured tags, and where the tags are (``data/sources/tags.py``)."""

from glimpseprune.tasks import Task

TASK = Task(
    data="data/tags",
    prepare={"source": "tags"},
    datasets=("tags",),
    metrics=("exact_match",),
    max_new_tokens=64,
)
