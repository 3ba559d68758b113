"""ChartQA: questions by people and made from captions, its two kinds (Masry et al. 2022)."""

from glimpseprune.tasks import SHORT, Task

TASK = Task(
    data="data/chartqa",
    prepare={"source": "official", "options": {"set": "chartqa", "root": "chartqa"}},
    datasets=("chartqa",),
    suffix=SHORT,
    metrics=("relaxed_accuracy", "exact_match"),
    max_new_tokens=16,
    groups={"human and augmented": ("human", "augmented")},
)
