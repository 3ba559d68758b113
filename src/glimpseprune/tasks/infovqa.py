"""InfographicVQA (Mathew et al. 2022). Answers of its test split are kept by an evaluation server."""

from glimpseprune.tasks import SHORT, Task

TASK = Task(
    data="data/infovqa",
    split="val",
    prepare={"source": "official", "options": {"set": "infographicvqa", "root": "infographicvqa"}},
    datasets=("infographicvqa", "infovqa"),
    suffix=SHORT,
    metrics=("anls", "exact_match"),
    max_new_tokens=32,
)
