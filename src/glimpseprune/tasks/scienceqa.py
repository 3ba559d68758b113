"""ScienceQA, the questions with a picture: one of several choices, by its letter (Lu et al. 2022)."""

from glimpseprune.tasks import LETTER, Task

TASK = Task(
    data="data/scienceqa",
    prepare={"source": "official", "options": {"set": "scienceqa", "root": "scienceqa"}},
    datasets=("scienceqa",),
    suffix=LETTER,
    metrics=("choice",),
    max_new_tokens=16,
)
