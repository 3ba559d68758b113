"""The benchmarks run, count what is there, and need nothing that a bare checkout lacks. No time is asserted."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import clock, counters, feeding, inference, rows, runner, training, world
from benchmarks.__main__ import main
from benchmarks.cases import Bench, Case
from benchmarks.clock import AGAIN, Late, Spread, Turns
from benchmarks.rows import Row
from glimpseprune import cost, decoder, losses

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
NEEDED = ("torch", "transformers", "safetensors", "numpy")


@pytest.fixture(scope="module", autouse=True)
def in_no_time() -> Iterator[None]:
    """Rates of the machine, which no test asserts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "SECONDS", {True: 0.05, False: 0.05})
        yield


@pytest.fixture(scope="module")
def small() -> world.World:
    return world.World("tiny", CPU, torch.float32)


# ------------------------------------------------------------------------------------------------------ a bare checkout

BARE = """
import sys

class Bare:
    '''A finder to which some packages are not installed.'''
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

HIDDEN = {hidden!r}
sys.meta_path[:] = [Bare(finder) if hasattr(finder, "find_spec") else finder for finder in sys.meta_path]
"""


def closure(names: tuple[str, ...]) -> set[str]:
    """Distributions that these need."""
    found, waiting = set(), list(names)
    while waiting:
        name = normal(waiting.pop())
        if name in found:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # on this platform
            continue
        found.add(name)
        waiting += [re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need]
    return found


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def bare(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run ``code`` where nothing is installed but ``NEEDED``, and what these need."""
    needed = closure(NEEDED)
    hidden = {name for name, of in metadata.packages_distributions().items() if not needed & set(map(normal, of))}
    assert hidden >= {"omegaconf", "PIL", "lightning", "webdataset", "peft"}
    program = BARE.format(hidden=hidden - {"glimpseprune"}) + code
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_what_a_model_needs_is_imported_from_a_bare_checkout():
    names = "backbones decoder generate pruners vip cost rollout losses attention options evaluation".split()
    names += [f"backbones.{name}" for name in ("qwen2_5_vl", "qwen3_vl", "llava1_5", "llava_next")]
    names += [f"pruners.{file.stem}" for file in sorted((ROOT / "src/glimpseprune/pruners").glob("[a-z]*.py"))]
    imports = "".join(f"import glimpseprune.{name}\n" for name in names)
    done = bare(f"import benchmarks\n{imports}print(glimpseprune.__file__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "src/glimpseprune/__init__.py")


def test_cases_run_from_a_bare_checkout(tmp_path):
    out = tmp_path / "found.json"
    code = "import benchmarks.__main__\nsys.exit(benchmarks.__main__.main(sys.argv[1:]))"
    given = ["--tiny", "--cases", "prefill,stage-1,shards", "--rounds", "1", "--budget-s", "200", "--out", str(out)]
    done = bare(code, *given)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    sides = {row["side"]: row for row in found["rows"] if row["case"] == "prefill"}
    assert set(sides) == {"Hugging Face", "none", "K = 4", "K = 2", "Hugging Face (A/A)"}
    for row in sides.values():
        assert row["bound"] > 0 and row["kernels"] > 0
    assert sides["Hugging Face"]["syncs"] > sides["K = 4"]["syncs"] > sides["none"]["syncs"]
    assert sides["K = 4"]["ratio_bound"] != 1
    notes = {row["case"]: row["note"] for row in found["rows"] if "note" in row}
    assert notes == {"stage-1": "skipped: needs lightning", "shards": "skipped: needs PIL"}
    assert "skipped: needs lightning" in done.stdout


# ---------------------------------------------------------------------------------------------------------------- turns


def test_sides_take_turns_and_the_first_runs_twice():
    calls = []
    sides = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    turns = Turns(sides, CPU).take(time.monotonic() + 100, rounds=3)
    assert calls == ["a", "b"] + ["a", "b", "a"] + ["a", "b", "a"] + ["a", "b", "a"]
    assert {name: len(parts[""]) for name, parts in turns.own.items()} == {"a": 3, "b": 3, "a" + AGAIN: 3}


def test_backwards_in_every_other_round():
    calls = []
    sides = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    Turns(sides, CPU).take(time.monotonic() + 100, rounds=2, warm_up=0)
    assert calls == ["a", "b", "c", "a"] + ["a", "c", "b", "a"]


def test_the_first_round_is_taken_however_late_it_is():
    turns = Turns({"a": lambda: None}, CPU).take(time.monotonic() - 1, rounds=5)
    assert len(turns.own["a"][""]) == 1


def test_without_time_for_a_round_what_it_took_to_warm_up_is_told():
    """Of the sides that got that far, and said so."""

    def late() -> None:
        raise Late

    turns = Turns({"a": {"x": lambda: None, "y": lambda: None}, "b": late}, CPU).take(time.monotonic() + 100, rounds=3)
    assert turns.is_warming and {name: set(parts) for name, parts in turns.own.items() if parts} == {"a": {"x", "y"}}
    turns.derive("both", "x", "y")
    (row,) = (row for row in cases_rows(turns, part="both"))
    assert (row.side, row.rounds) == ("a", 0) and row.note.startswith("as it warmed up")


def test_a_side_that_fails_costs_only_itself():
    def fails() -> None:
        raise RuntimeError("out of\nluck")

    for sides in ({"a": fails, "b": lambda: None}, {"b": lambda: None, "a": fails}):
        turns = Turns(sides, CPU).take(time.monotonic() + 100, rounds=2)
        assert turns.failed == {"a": "RuntimeError: out of"}
        assert len(turns.own["b"][""]) == 2 and "a" not in turns.own
        found = list(cases_rows(turns))
        assert [row.side for row in found if row.note] == ["a"]
        assert all(row.ratio is None for row in found) or turns.first == "b"


def cases_rows(turns: Turns, **more):
    from benchmarks.cases import rows as rows_of

    return rows_of("case", turns, **more)


def test_parts_and_what_is_derived_from_them():
    turns = Turns({"a": {"short": lambda: None, "long": lambda: None}}, CPU)
    turns.own = {
        "a": {"short": [1.0, 2.0], "long": [11.0, 22.0]},
        "a" + AGAIN: {"short": [2.0, 2.0], "long": [22.0, 12.0]},
    }
    turns.derive("each", "long", "short", 10)
    assert turns.own["a"]["each"] == [1.0, 2.0] and turns.own["a" + AGAIN]["each"] == [2.0, 1.0]
    assert turns.ratio("a" + AGAIN, "each").median == pytest.approx(1.25)
    assert turns.ratio("a", "nothing") is None


def test_spread():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(2.0, 3.0, 4.0)
    assert Spread.of([1.0, 3.0]) == Spread(1.0, 2.0, 3.0)


def test_elapsed_is_cpu_time_on_a_cpu():
    own, wall = clock.elapsed(lambda: time.sleep(0.05), CPU)
    assert own < wall


# -------------------------------------------------------------------------------------------------------------- counted


@pytest.mark.parametrize(
    ("work", "kernels", "syncs"),
    [
        (lambda x, w: (x @ w).relu(), 2, 0),
        (lambda x, w: x.view(6)[None].transpose(0, 1), 0, 0),
        (lambda x, w: x.sum().item(), 1, 1),
        (lambda x, w: x.tolist(), 0, 1),
        (lambda x, w: x.cpu(), 0, 1),
        (lambda x, w: x.nonzero(), 1, 1),
        (lambda x, w: bool((x > 0).any()), 2, 1),
        (lambda x, w: x[x > 0], 2, 1),
        (lambda x, w: x[torch.tensor([0, 1])], 1, 1),
        (lambda x, w: x + torch.arange(3, device=x.device), 1, 0),
        (lambda x, w: x + torch.tensor([1.0, 2.0, 3.0], device=x.device), 1, 1),
        (lambda x, w: x + torch.arange(3.0).to(x.device), 1, 1),
        (lambda x, w: torch.cat([torch.tensor([], device=x.device), x.flatten()]), 1, 0),
        (lambda x, w: torch.arange(3).tolist(), 0, 0),
        (lambda x, w: torch.tensor([1.0], device=torch.arange(3).device).tolist(), 0, 0),
        (lambda x, w: (x.cpu() + 1).sum().item(), 0, 1),
        (lambda x, w: x.to("cpu").sum().item(), 0, 1),
        (lambda x, w: x + torch.arange(3.0).to(x.device, non_blocking=True), 1, 0),
        (lambda x, w: torch.ones(3)[torch.tensor([True, False, True])].sum().item(), 0, 0),
    ],
)
def test_kernels_and_syncs_are_counted(work, kernels, syncs):
    x, layer = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]]), nn.Linear(3, 2)
    counted = counters.count(lambda: work(x, layer.weight.data.T), CPU, [x, layer, layer.weight.data])
    assert (counted.kernels, counted.syncs) == (kernels, syncs)
    assert sum(counted.where.values()) == syncs


def test_a_sync_is_told_by_the_line_that_waits():
    x = torch.ones(3)
    counted = counters.count(lambda: x.sum().item(), CPU, [x])
    assert list(counted.where) == [f"tests/test_benchmarks.py:{line_of('x.sum().item(), CPU')} _local_scalar_dense"]


def line_of(text: str) -> int:
    return next(n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if text in line)


def test_the_peak_is_of_tensors_that_live_at_once():
    size = 4 * 2**20

    def run() -> torch.Tensor:
        first = torch.ones(size // 4)
        second = first + 1
        del first
        return second

    run()
    most, after = counters.peak(run, CPU)
    assert most == pytest.approx(2 * size, rel=0.01) and after == pytest.approx(size, rel=0.01)


# ------------------------------------------------------------------------------------------------------------ the sides


def test_all_sides_answer_alike_where_nothing_is_pruned(small):
    theirs, none = small.sides()[:2]
    for prompt in (small.prompt, small.batch(3)):
        torch.testing.assert_close(theirs.prefill(prompt)[0], none.prefill(prompt)[0], atol=2e-5, rtol=1e-4)
        assert theirs.generate(prompt, 4).tolist() == none.generate(prompt, 4).tolist()
        torch.testing.assert_close(theirs.tower(prompt), none.tower(prompt), atol=2e-5, rtol=1e-4)


def test_the_twin_is_unmodified_and_has_the_same_weights(small):
    twin, model = small.twin, small.model
    assert twin.config.text_config._attn_implementation == twin.model.visual.config._attn_implementation == "sdpa"
    assert model.model.visual.config._attn_implementation != "sdpa"
    for (name, own), (other, theirs) in zip(model.named_parameters(), twin.named_parameters()):
        assert name == other and own.data_ptr() == theirs.data_ptr()
    assert not any(x.is_meta for x in [*twin.parameters(), *twin.buffers()])


def test_pruned_sides_keep_what_they_are_told(small):
    size = small.size
    visual = size.grid[0] * size.grid[1]
    for depth, side in zip(size.depths, small.sides()[2:]):
        _, state = small.ran(side, small.prompt)
        start, cut = state.trace
        assert (start.kept.tolist(), cut.kept.tolist()) == ([visual], [int(size.keep * visual)])
        assert cut.stop.depth == depth
    grids = [(9, 10), (7, 8), (10, 9), (4, 4)]
    _, state = small.ran(small.sides(world.Ragged)[2], small.prompts(grids))
    assert state.trace[-1].kept.tolist() == [2, 5, 5, 1]  # 3.1, 10, 6.1 and 5% of 90, 56, 90 and 16, one at least


def test_questions_on_one_image_see_it_once(small):
    theirs, none = small.sides()[:2]
    prompt = small.questions(3)
    assert len(prompt.placed["pixel_values"]) == 3 * len(prompt["pixel_values"])
    torch.testing.assert_close(theirs.prefill(prompt)[0], none.prefill(prompt)[0], atol=2e-5, rtol=1e-4)
    assert small.bounds(theirs, prompt).tower > small.bounds(none, prompt).tower


def test_graphs_that_cannot_be_recorded_are_not_asked_for_again(small):
    _, none = small.sides()[:2]
    launched = replace(none, replays=False)
    assert [side.backbone.replays for side in (none, launched, none)] == [True, False, True]
    small.backbone.replays = False  # what a recording that fails leaves behind
    assert [side.backbone.replays for side in (none, launched, none)] == [False, False, False]
    small.recordable = True


def test_rows_of_a_batch_alone(small):
    prompt = small.batch(3)
    _, none = small.sides()[:2]
    together = none.prefill(prompt)[0]
    alone = torch.cat([none.prefill(row)[0] for row in small.rows_of(prompt)])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------------- bounds


def test_bounds_are_the_cost_models(small, monkeypatch):
    """At one FLOP in a microsecond and with bytes that cost nothing, a bound in ms is thousandths of FLOPs."""
    monkeypatch.setitem(small.__dict__, "rates", world.Rates(1e6, float("inf")))
    monkeypatch.setattr(small, "known", {})
    for side in small.sides()[1:]:
        encoded, state = small.ran(side, small.prompt)
        bounds = small.bounds(side, small.prompt)
        steps, text = cost.steps_of(state.trace, 0), int(encoded.mask.sum()) - encoded.counts[0]
        spans = cost.spans(small.layers, steps)
        decided = sum(step.flops for step in steps)
        shapes = small.backbone.shapes
        flops = cost.prefill_flops(shapes, text, encoded.layouts[0], spans, decided, causal=True)
        assert bounds.prefill * 1e3 == pytest.approx(flops.total)
        assert bounds.decoder * 1e3 == pytest.approx(flops.prunable + flops.lm_head)
        assert bounds.generate(3) == pytest.approx(bounds.prefill + 2 * bounds.token)
        assert (bounds.below > 0) == (bounds.vip > 0) == bool(side.pruner.stops)


def test_bounds_count_bytes_where_they_decide(small, monkeypatch):
    monkeypatch.setitem(small.__dict__, "rates", world.Rates(float("inf"), 1e3))
    monkeypatch.setattr(small, "known", {})
    none, pruned = (small.bounds(side, small.prompt) for side in small.sides()[1:3])
    text = small.backbone.text_model.layers
    weights = sum(p.numel() * 4 for module in (text, small.backbone.lm_head) for p in module.parameters())
    assert none.token == pytest.approx(weights + none.cache) and pruned.token == pytest.approx(weights + pruned.cache)
    assert pruned.cache < none.cache


def test_rates_are_measured():
    rates = world.Rates.measured(CPU, torch.float32)
    assert rates.flops > 0 and rates.bytes > 0
    assert rates.ms(rates.flops, 0) == pytest.approx(1000) == rates.ms(0, rates.bytes)


def test_the_published_way_computes_the_published_loss(small):
    """One sequence through all layers is the glimpse, and the answer behind it, on the prompt's cache."""
    torch.manual_seed(0)
    pruner, inputs = small.pruner(small.size.depths[0]), training.example(small, small.size.trained[1])
    value = training.published(small, pruner, inputs)
    encoded = decoder.see(small.backbone, pruner, inputs.prompt)
    state = decoder.run_layers(small.backbone, decoder.start(encoded), small.layers)
    logits, through = pruner.with_answer(
        decoder.View(state, encoded, small.backbone), inputs.answer_ids, inputs.answer_mask
    )
    wanted = losses.mask_loss(logits, inputs.targets[0], encoded.counts)
    # Published logits of the glimpse are over the whole key row; a row of logits alone does not depend on it.
    wanted = wanted + losses.answer_loss(through, inputs.answer_ids, inputs.answer_mask)
    torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-4)
    value.backward()
    assert all(p.grad is not None for p in pruner.vip.parameters()) and pruner.glimpse.embeddings.grad.any()


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("name", [name for name in runner.CASES if name not in ("prefill", "counts", "rl-trl")])
def test_a_case_gives_rows(name, small, monkeypatch):
    monkeypatch.setattr(inference, "LONG", 4)
    monkeypatch.setattr(inference, "BATCHES", (2,))
    monkeypatch.setattr(small, "size", replace(small.size, trained=small.size.trained[1:]))
    for figure, value in (("SAMPLES", 8), ("SHARDS", 2), ("WORKERS", 1)):
        monkeypatch.setattr(feeding, figure, value)
    bench = Bench(small, until=time.monotonic() + 2, rounds=1, memory=world.MIB, counting=False)
    found = list(runner.CASES[name].run(bench))
    assert found and not [row.note for row in found if "failed" in row.note]
    differences = "select", "vip", "glimpse"  # of two times, at no size
    assert all(row.value.median > 0 or row.case.endswith(differences) for row in found if row.value)
    assert name in ("memory", "largest-batch") or any(row.side.endswith(AGAIN) for row in found)
    rows.show(found, "a title")


def test_narrow_counts_are_of_the_whole_depth():
    size = world.thin(world.SIZES["7b"])
    assert (size.text["num_hidden_layers"], size.vision["depth"]) == (28, 32) and size.grid == (66, 76)
    assert size.text["hidden_size"] < 100


def bench_of(until: float = float("inf")) -> Bench:
    return Bench(None, until)


def test_a_case_that_fails_or_runs_over_costs_only_itself():
    def fails(bench):
        yield Row("a", "one")
        raise RuntimeError("no luck")

    def lasts(bench):
        yield Row("b", "one")
        while True:
            time.sleep(0.01)

    def needs(bench):
        import glimpseprune_has_no_such_module

        yield glimpseprune_has_no_such_module

    def turns(bench):
        yield from cases_rows(
            Turns({"quick": lambda: None, "slow": lambda: time.sleep(100)}, CPU).take(0, 1, warm_up=0)
        )

    notes = [[row.note for row in runner.taken(bench_of(), Case(run, 1, 1), 2.0)] for run in (fails, lasts, needs)]
    assert notes[0] == ["", "failed: RuntimeError: no luck"]
    assert notes[1] == ["", "stopped after 2 s"]
    assert notes[2] == ["skipped: needs glimpseprune_has_no_such_module"]

    def slow(bench):
        yield from cases_rows(Turns({"slow": lambda: time.sleep(100)}, CPU).take(0, 1, warm_up=0))

    (nothing,) = runner.taken(bench_of(), Case(slow, 1, 1), 2.0)
    assert nothing.note == "2 s were not enough for one round"
    cut = list(runner.taken(bench_of(), Case(turns, 1, 1), 2.0))
    assert [(row.side, row.note) for row in cut] == [("quick", "")]  # what had been measured by then
    assert [row.note for row in runner.taken(bench_of(), Case(fails, 1, 1), 0.1)] == ["skipped: no time is left"]


def test_rows_are_written_as_they_come(tmp_path):
    out = tmp_path / "deep" / "found.json"
    row = Row("a", "one", value=Spread(1.0, 2.0, 3.0), bound=1.0, more={"all": [1.0, 3.0]})
    rows.write(out, [row], {"machine": "x"})
    assert json.loads(out.read_text()) == {
        "machine": "x",
        "rows": [{"case": "a", "side": "one", "unit": "ms", "value": {"low": 1.0, "median": 2.0, "high": 3.0},
                  "bound": 1.0, "rounds": 1, "more": {"all": [1.0, 3.0]}}],
    }  # fmt: skip
    assert [each.name for each in out.parent.iterdir()] == ["found.json"]
    assert rows.values(out) == {("a", "one"): 2.0}


def test_the_table_is_plain_without_rich(monkeypatch, capsys):
    found = [
        Row("a", "one", value=Spread(1.0, 2.0, 3.0), bound=1.5, rounds=3),
        Row("a", "two", value=Spread(4.0, 4.0, 4.0), ratio=Spread(1.9, 2.0, 2.1), rounds=3, before=8.0),
        Row("b", note="skipped: needs luck"),
    ]
    monkeypatch.setattr(rows, "find_spec", lambda name: None)
    rows.show(found, "title")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title" and lines[1].startswith("case")
    assert lines[2].split() == "a one 2.00 ms 1.00 .. 3.00 1.50 1.33 3".split()
    assert lines[3].split() == "two 4.00 ms 4.00 .. 4.00 2.000 1.900 .. 2.100 8.00 0.500 3".split()
    assert lines[4] == "b: skipped: needs luck"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "prefil"], "no case 'prefil': choose from prefill"),
        (["--gpu"], "torch finds no CUDA device here"),
        (["--against", "nowhere.json"], "there is no file 'nowhere.json'"),
    ],
)
def test_what_is_wrong_is_said(arguments, said, capsys):
    if torch.cuda.is_available() and arguments == ["--gpu"]:
        pytest.skip("there is a GPU")
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_cases_are_listed(capsys):
    assert main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name} " in said for name in runner.CASES)
    assert sum(case.gpu for case in runner.CASES.values()) > 0
