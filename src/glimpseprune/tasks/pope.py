"""POPE: is there such a thing in the picture (Li et al. 2023); random, popular and adversarial things are its kinds.

Beside the accuracy its rows have precision, recall and F1 of "yes", and how often that is said.
"""

from glimpseprune.tasks import SHORT, Task

TASK = Task(
    data="data/pope",
    prepare={"source": "official", "options": {"set": "pope", "root": "pope"}},
    datasets=("pope",),
    suffix=SHORT,
    metrics=("pope",),
    max_new_tokens=16,
)
