"""The free-form benchmark of Visual-CoT: twelve sets, answers in prose, a judge (Shao et al. 2024).

The published protocol is this file and a judge, ``tasks=viscot judge.base_url=... judge.model=...`` (published:
Qwen2.5-32B-Instruct-GPTQ-Int8): greedy answers of up to 1,024 tokens, graded by the prompt that both papers print
(Shao et al., appendix E.4; arXiv 2508.01548, figure 5), at temperature 0. A set is a kind of question; ``all`` is the
mean over questions, ``mean of the sets`` what the papers' last column has. Where the published script takes a reply
without a score for 0, here it is missing.
"""

from glimpseprune.judge import Prompt
from glimpseprune.tasks import JUDGE, Task

GROUPS = {
    "document and text": ("docvqa", "textcap", "textvqa", "dude", "sroie"),
    "chart": ("infographicsvqa",),
    "general": ("flickr30k", "visual7w"),
    "relation": ("gqa", "openimages", "vsr"),
    "fine-grained": ("cub",),
}

TASK = Task(
    data="data/viscot",
    prepare={"source": "viscot", "options": {"root": "viscot"}},
    datasets=("viscot",),
    metrics=(JUDGE,),
    max_new_tokens=1024,
    prompt=Prompt(
        system="You are responsible for proofreading the answers, you need to give a score to the model's answer by "
        "referring to the standard answer, based on the given question. The full score is 1 point and the minimum "
        'score is 0 points. Please output the score in the form "score: <score>". The evaluation criteria require '
        "that the closer the model's answer is to the standard answer, the higher the score.",
        user="question: {question}\nstandard answer: {references}\nmodel's answer: {prediction}",
    ),
    groups={"mean of the sets": tuple(kind for kinds in GROUPS.values() for kind in kinds), **GROUPS},
)
