"""lmms-eval on our models: what it asks in our terms, and the real program on a task of this test's own.

The second half needs lmms-eval (requirements/lmms-eval.txt) and is skipped where it is not installed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from conftest import PICTURES, TINY
from glimpseprune import pruners
from glimpseprune.checkpoint import GlimpsePrune
from glimpseprune.config import UserError
from glimpseprune.data import shards
from glimpseprune.data.sources import tags
from glimpseprune.evaluate import EvaluateConfig, run
from glimpseprune.integrations._asked import Decoding, Turn, arguments, decoding, require_options, turn
from glimpseprune.lookup import names
from test_evaluate import OPTIONS

ROOT = Path(__file__).parent.parent
PRUNER = str(ROOT / "data" / "demo-pruner")
KNOWN = ("repetition_penalty", "max_new_tokens")
COUNT = 18


@pytest.fixture(scope="module")
def questions() -> list[Any]:
    return list(tags.samples(tags.Options(count={"test": COUNT}), "test"))


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [part if isinstance(part, dict) else text(part) for part in parts]}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def image(url: Any = "picture") -> dict[str, Any]:
    return {"type": "image", "url": url}


# ----------------------------------------------------------------------------------------------- what lmms-eval asks


def test_a_turn_is_a_question_on_its_images():
    assert turn([user(image("a"), image("b"), "how", " many?")], "t") == Turn("how many?", ["a", "b"])
    system = [{"role": "system", "content": [text("Be short.")]}, user(image(), "why?")]
    assert turn(system, "t") == Turn("why?", ["picture"], "Be short.")
    assert turn([user("\n", image(), "why?")], "t").question == "\nwhy?"  # no text stands before it
    assert turn([user("look: ", image(), "why?")], "t", images_first=True) == Turn("look: why?", ["picture"])


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([user(image(), "a?"), {"role": "assistant", "content": "b"}, user("c?")], "user, assistant, user: one turn"),
        ([{"role": "assistant", "content": "b"}], "are of assistant"),
        ([], "are of nobody"),
        ([user("no picture?")], "has no image"),
        ([user({"type": "video", "url": "v"}, "a?")], "has video"),
        ([user(image(), {"type": "audio", "url": "v"})], "has audio"),
        ([user("first ", image(), "then?")], "give images_first=true"),
    ],
)
def test_what_is_no_turn_is_refused_by_name(messages, said):
    with pytest.raises(UserError, match=f"^mme, document 7: .*{said}"):
        turn(messages, "mme, document 7")


@pytest.mark.parametrize(
    ("given", "made", "stops"),
    [
        ({}, {"max_new_tokens": 99, "do_sample": False}, ()),
        ({"max_gen_toks": 5, "temperature": None, "top_p": 0.9}, {"max_new_tokens": 5, "do_sample": False}, ()),
        ({"max_new_tokens": 16, "temperature": 0, "num_beams": 1}, {"max_new_tokens": 16, "do_sample": False}, ()),
        ({"temperature": 0.7, "do_sample": False}, {"max_new_tokens": 99, "do_sample": False}, ()),
        (
            {"temperature": 0.7, "top_p": 0.9, "top_k": 5},
            {"max_new_tokens": 99, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
            (),
        ),
        ({"do_sample": True}, {"max_new_tokens": 99, "do_sample": True, "temperature": 1.0}, ()),
        ({"repetition_penalty": 1.1}, {"max_new_tokens": 99, "do_sample": False, "repetition_penalty": 1.1}, ()),
        ({"until": ["USER:", "\n\n", "", "USER:"]}, {"max_new_tokens": 99, "do_sample": False}, ("USER:",)),
        ({"until": "."}, {"max_new_tokens": 99, "do_sample": False}, (".",)),
    ],
)
def test_generation_kwargs_become_arguments(given, made, stops):
    found = decoding(given, KNOWN, "mme", 99)
    assert (found.arguments, found.stops, found.left_out) == (made, stops, ())


def test_what_of_them_has_no_meaning_is_named_or_refused():
    found = decoding({"image_aspect_ratio": "pad", "seed": 1}, KNOWN, "mme")
    assert found.left_out == ("image_aspect_ratio", "seed") and "seed" not in found.arguments
    for given, said in (
        ({"num_beams": 3}, "mme: num_beams=3"),
        ({"num_return_sequences": 2}, "mme: num_return_sequences=2"),
        ({"until": 7}, "mme: until=7"),
        ({"until": [7]}, "mme: until="),
    ):
        with pytest.raises(UserError, match=said):
            decoding(given, KNOWN, "mme")


def test_an_answer_ends_before_the_first_stop():
    how = Decoding({}, ("USER:", "."), ())
    assert [how.cut(said) for said in ("red. USER: why", "redUSER:.", "red", ".")] == ["red", "red", "red", ""]


def test_model_args_are_those_of_the_adapter_and_of_the_method():
    given = {"ckpt": "runs/x", "batch_size": "8", "max_batch_size": 64, "max_pixels": 1605632.0, "max_keep": 0.1}
    made, options = arguments(given | {"vision_layers": "[2, 1]", "threshold": "null", "system": '"Well, yes."'})
    assert (made.ckpt, made.batch_size, made.max_pixels, made.system) == ("runs/x", 8, 1605632, "Well, yes.")
    assert options["max_keep"] == 0.1 and options["threshold"] is None and len(options["vision_layers"]) == 2
    require_options("glimpse", {"max_keep": 0.1, "vision_layers": options["vision_layers"]})
    with pytest.raises(UserError, match="did you mean 'max_keep'"):
        require_options("glimpse", {"max_kep": 0.1})
    with pytest.raises(UserError, match="did you mean 'ckpt'"):
        require_options("glimpse", {"cktp": "x"})
    with pytest.raises(UserError, match=r"model_args\.max_keep: give 0 to 1"):
        require_options("glimpse", {"max_keep": 3})
    for wrong, said in (
        ({}, "give ckpt="),
        ({"ckpt": "x", "batch_size": "auto"}, "batch_size=auto: give a number"),
        ({"ckpt": "x", "max_pixels": 0}, r"model_args\.max_pixels: give 1 to"),
        ({"ckpt": "x", "device": "gpu"}, r"model_args\.device: give auto, cpu or cuda"),
        ({"ckpt": "x", "vision_layers": "[1"}, "vision_layers"),
    ):
        with pytest.raises(UserError, match=said):
            arguments(wrong)


def test_the_wrapper_for_vlmevalkit_answers(questions, monkeypatch):
    """As docs/lmms-eval.md shows it, on a stand-in of VLMEvalKit's two names."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "lmms-eval.md").read_text(), re.M | re.S)
    base, table = type("BaseModel", (), {"INTERLEAVE": False}), {}
    monkeypatch.setitem(sys.modules, "vlmeval.config", SimpleNamespace(supported_VLM=table))
    monkeypatch.setitem(sys.modules, "vlmeval.vlm.base", SimpleNamespace(BaseModel=base))
    monkeypatch.chdir(ROOT)
    exec(compile(code, "docs/lmms-eval.md", "exec"), {"__name__": "pruned"})
    model = table["pruned"]()
    answers = []
    for question in questions[:6]:
        message = [{"type": "image", "value": question.images[0]}, {"type": "text", "value": question.question}]
        answers.append(model.generate_inner(message, "MMBench") == question.answers[0])
    assert sum(answers) >= 5
    with pytest.raises(ValueError, match="come before the text"):
        model.generate_inner(message[::-1])


# ------------------------------------------------------------------------------------------------- the real lmms-eval

real = pytest.mark.skipif(
    find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed: pip install --no-deps -r requirements/lmms-eval.txt",
)
TASK = """\
task: glimpse_tags
dataset_path: {table}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function rules.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false}}
process_results: !function rules.score
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
metadata:
  - version: 0.0
"""
RULES = """\
def pictures(doc):
    return [doc["image"].convert("RGB")]


def score(doc, results):
    return {"right": float(results[0].strip().lower() == doc["answer"])}
"""


@pytest.fixture(scope="module")
def task(questions, tmp_path_factory) -> Path:
    """A folder with a task of lmms-eval: questions about tags, scored by a rule of its own."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("task")
    rows = [{"image": q.images[0], "question": q.question, "answer": q.answers[0]} for q in questions]
    kinds = datasets.Features({name: datasets.Value("string") for name in rows[0]} | {"image": datasets.Image()})
    table = datasets.Dataset.from_list(rows, features=kinds)
    datasets.DatasetDict({"test": table}).save_to_disk(folder / "table")
    (folder / "glimpse_tags.yaml").write_text(TASK.format(table=folder / "table"))
    (folder / "rules.py").write_text(RULES)
    return folder


def lmms_eval(task: Path, out: Path, model_args: str, *more: str, program: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run the program; its results, and under ``samples`` its log."""
    command = [sys.executable, *(program or ("-m",)), "lmms_eval", "--model", "glimpseprune"]
    command += ["--model_args", model_args, "--tasks", "glimpse_tags", "--include_path", str(task), "--log_samples"]
    paths = {"PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(out / "hub"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--batch_size", "4", "--output_path", str(out), *more],
        cwd=ROOT,
        env=os.environ | paths | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    results = sorted(out.rglob("*_results.json"))
    assert results, done.stdout[-4000:] + done.stderr[-4000:]  # it ends with 0 after errors, too
    (log,) = out.rglob("*_samples_glimpse_tags.jsonl")
    found = json.loads(results[-1].read_text())
    return found | {"samples": [json.loads(line) for line in log.read_text().splitlines()]}


@real
@pytest.mark.slow
def test_the_score_is_that_of_our_own_evaluation(task, questions, tmp_path):
    """With the shipped pruner: each answer, what it kept and what it cost."""
    assert [found.name for found in entry_points(group="lmms_eval.models")].count("glimpseprune"), "pip install -e ."
    theirs = lmms_eval(task, tmp_path / "lmms", f"ckpt={PRUNER}")

    shards.write(questions, tmp_path / "data", split="test")
    own = EvaluateConfig(ckpt=PRUNER, out=str(tmp_path / "own"), controls=[], bootstrap=0, pictures=0, max_new_tokens=8)
    own.data.path = str(tmp_path / "data")
    (row, *_) = run(own)
    assert theirs["results"]["glimpse_tags"]["right,none"] == pytest.approx(row["accuracy"], abs=1e-4)
    assert row["accuracy"] > 0.7 and row["kept"] < 0.2

    lines = map(json.loads, (tmp_path / "own" / "predictions.jsonl").read_text().splitlines())
    ours = {line["key"]: line for line in lines}
    assert len(theirs["samples"]) == len(ours) == COUNT
    for sample in theirs["samples"]:
        line, (costs,) = ours[questions[sample["doc_id"]].key], sample["token_counts"]
        assert sample["filtered_resps"] == line["prediction"]
        for name in ("visual", "kept", "mean_tokens", "decoder_flops", "prefill_flops", "kv", "cut"):
            assert costs[name] == pytest.approx(line[name]), name
        assert costs["input_tokens"] > costs["visual"] == 144 and 0 < costs["output_tokens"] <= 8
    means = theirs["throughput"]
    assert means["avg_kept"] == pytest.approx(row["kept"], abs=1e-4)
    assert means["avg_prefill_flops"] == pytest.approx(row["prefill_flops"], abs=1e-4)


@real
@pytest.mark.slow
def test_two_processes_share_it_and_other_methods_run_on_a_bare_backbone(task, tmp_path):
    backbone = f"backbone={ROOT / 'data' / 'tiny-qwen2_5_vl'},pruner=fastv,keep_ratio=0.25"
    together = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    two = lmms_eval(task, tmp_path / "two", backbone, program=together)
    one = lmms_eval(task, tmp_path / "one", backbone)
    assert two["results"]["glimpse_tags"]["right,none"] == one["results"]["glimpse_tags"]["right,none"]
    found = [{s["doc_id"]: (s["filtered_resps"], s["token_counts"]) for s in log["samples"]} for log in (two, one)]
    assert found[0] == found[1] and len(found[0]) == COUNT
    assert {costs["kept"] for _, (costs,) in found[0].values()} == {36}


@real
@pytest.mark.slow
def test_an_answer_out_of_the_cache_is_the_same_without_costs(task, tmp_path):
    cache = ("--use_cache", str(tmp_path / "cache"), "--limit", "4")
    first = lmms_eval(task, tmp_path / "1", f"ckpt={PRUNER},max_keep=0.03", *cache)
    second = lmms_eval(task, tmp_path / "2", f"ckpt={PRUNER},max_keep=0.03", *cache)
    answers = [[sample["filtered_resps"] for sample in run["samples"]] for run in (first, second)]
    assert answers[0] == answers[1]
    assert all(costs["kept"] <= 0.03 * 144 for sample in first["samples"] for costs in sample["token_counts"])
    assert all(sample["token_counts"] == [None] for sample in second["samples"])


@pytest.fixture(scope="module")
def adapter():
    module = pytest.importorskip("glimpseprune.integrations.lmms_eval", reason="lmms-eval is not installed")
    return module.GlimpsePrune(ckpt=PRUNER, batch_size=3)


def ask(adapter: Any, docs: list[list[dict[str, Any]]], **generation: Any) -> list[Any]:
    """Answers to conversations, one per document."""
    adapter.task_dict["t"] = {"test": docs}
    kwargs = {"max_new_tokens": 8} | generation
    requests = [SimpleNamespace(args=("", lambda doc: doc, kwargs, n, "t", "test")) for n in range(len(docs))]
    return adapter.generate_until(requests)


def conversations(questions: list[Any], system: str | None = None) -> list[list[dict[str, Any]]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [[*first, user(*map(image, question.images), question.question)] for question in questions]


def test_batches_equal_single_prompts_in_any_order(adapter, questions):
    """Of a batch that is not full, with another system prompt in it, and on several images."""
    docs = conversations(questions[:3]) + conversations(questions[3:4], "Be short.") + conversations(questions[4:5])
    docs[1][0]["content"].insert(0, image(Image.new("RGB", (112, 84))))
    together = ask(adapter, docs)
    assert [ask(adapter, [doc])[0] for doc in docs] == together
    assert [each.token_counts.visual for each in together] == [144, 144 + 12, 144, 144, 144]
    assert (
        ask(adapter, conversations(questions[3:4]))[0].token_counts.input_tokens
        != together[3].token_counts.input_tokens
    )


@pytest.mark.parametrize("method", sorted(set(names("glimpseprune.pruners")) - {"oracle"}))
@pytest.mark.parametrize("backbone", TINY)
def test_every_backbone_and_every_method(backbone, method, monkeypatch):
    """On random weights: what the model says itself, and its costs."""
    module = pytest.importorskip("glimpseprune.integrations.lmms_eval", reason="lmms-eval is not installed")
    lvlm = TINY[backbone]()
    try:
        pruner = pruners.build(method, OPTIONS if method == "glimpse" else {}, lvlm).eval()
    except UserError as error:
        pytest.skip(f"{method} has no meaning on {backbone}: {error}")
    model = GlimpsePrune(lvlm, pruner, method)
    monkeypatch.setattr(module, "load", lambda given, options: model)
    found = ask(module.GlimpsePrune(ckpt="x", batch_size=2), [[user(*map(image, PICTURES[n]), "why?")] for n in (0, 1)])
    for n, answer in enumerate(found):
        alone = model.generate(**model.prepare(["why?"], [PICTURES[n]]), max_new_tokens=8, do_sample=False)
        costs = answer.token_counts
        assert answer.text == alone.texts[0]
        assert costs.kept == int(alone.keep[0].sum()) <= costs.visual == len(alone.keep[0])
        assert (costs.decoder_flops == 1) == (method == "none") and costs.to_dict().keys() > {"kv", "input_tokens"}


def test_an_answer_stops_where_the_task_says_and_is_drawn_where_it_says(adapter, questions):
    docs = [doc for doc, question in zip(conversations(questions), questions) if question.kind == "pair"]
    whole = ask(adapter, docs)
    first = [each.text.split()[0] for each in whole]
    stopped = ask(adapter, docs, until=[" "])
    assert [each.text.strip() for each in stopped] == first
    import torch

    torch.manual_seed(0)
    drawn = {tuple(each.text for each in ask(adapter, docs, temperature=20.0)) for _ in range(4)}
    assert len(drawn) == 4
    with pytest.raises(UserError, match="t: num_beams=2"):
        ask(adapter, docs, num_beams=2)


def test_what_is_not_supported_is_refused_before_anything_runs(adapter, questions, monkeypatch):
    monkeypatch.setattr(adapter, "batch", lambda *_: pytest.fail("it runs"))
    assert ask(adapter, []) == []
    docs = conversations(questions[:2])
    with pytest.raises(UserError, match="t, document 0: .* several turns"):
        ask(adapter, [[*docs[0], {"role": "assistant", "content": "12"}, *docs[1]]])
    request = SimpleNamespace(task_name="pope_ppl", args=())
    with pytest.raises(UserError, match="pope_ppl: it asks for log-likelihoods"):
        adapter.loglikelihood([request])
    with pytest.raises(UserError, match="pope_ppl: it has several rounds"):
        adapter.generate_until_multi_round([request])


def test_a_picture_that_the_processor_refuses_is_named_by_its_document(adapter, questions):
    docs = conversations(questions[:5])
    docs[4][0]["content"][0] = image(Image.new("RGB", (1, 400)))
    with pytest.raises(UserError, match="among documents t 3, t 4: .*1x400"):
        ask(adapter, docs)


def test_a_model_that_cannot_be_meant_is_refused(adapter):
    make = type(adapter)
    for given, said in (
        ({"ckpt": PRUNER, "pruner": "oracle"}, "pruner=oracle: it goes by boxes"),
        ({"ckpt": PRUNER, "pruner": "fastw"}, "did you mean 'fastv'"),
        ({"ckpt": PRUNER, "treshold": 0.3}, "did you mean 'threshold'"),
        ({"ckpt": "runs/nowhere"}, "runs/nowhere"),
        ({"backbone": str(ROOT / "data" / "tiny-qwen2_5_vl"), "pruner": "glimpse"}, "weights that are learned"),
    ):
        with pytest.raises(UserError, match=said):
            make(**given)
