"""One training, however its processes share it out: DDP and DeepSpeed ZeRO on two CPU processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glimpseprune import train
from glimpseprune.config import UserError
from glimpseprune.running import strategies

SCRIPT = Path(__file__).with_name("training_script.py")
SHARED = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
REINFORCE = ["stage=grpo", "train=[lora, glimpse, vip]", "lora={rank: 4, alpha: 8}", "grpo.num_generations=4"]
REINFORCE += ["grpo.max_completion_length=4", "rewards.functions={format: 1.0}", "rewards.pruning_when=always"]
REINFORCE += ["grpo.micro_batch=3", "optim.lora_lr=1e-3", "data.batch_size=2"]


def start(out: Path, args: list[str], seconds: float = 300, **more: str) -> subprocess.CompletedProcess:
    """A training in processes of its own."""
    if any("=zero" in argument for argument in args):
        pytest.importorskip("deepspeed")
    env = {"PYTHONPATH": os.pathsep.join(sys.path), "DIARY": f"{out}.diary", "OMP_NUM_THREADS": "1"} | more
    command = [sys.executable, SCRIPT, *args, f"out={out}"]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=seconds)


def run(out: Path, args: list[str]) -> None:
    done = start(out, args)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]


def curve(out: Path, name: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [
        event.value for event in EventAccumulator(str(out / "tensorboard" / out.name)).Reload().Scalars(f"train/{name}")
    ]


def keys(out: Path) -> dict[int, list[str]]:
    """Step -> the samples of all ranks, in their order."""
    lines = sorted(json.loads(line)[:3] for line in Path(f"{out}.diary").read_text().splitlines())
    steps: dict[int, list[str]] = {}
    for _, step, own in lines:
        steps.setdefault(step, []).extend(own)
    return steps


@pytest.fixture(scope="module")
def args(recipe) -> list[str]:
    exact = ["pruner.options.dropout=0", "trainer.max_steps=4", "trainer.val_every=2", "optim.warmup=2"]
    return [*recipe, *exact, "trainer.last_checkpoints=9"]


@pytest.fixture(scope="module")
def one(args, tmp_path_factory) -> Path:
    """One process, four samples a step."""
    out = tmp_path_factory.mktemp("one") / "run"
    run(out, args)
    return out


@pytest.fixture(scope="module")
def two(args, tmp_path_factory):
    """Two processes with two samples each, by strategy; made when first asked for."""
    made: dict[str, Path] = {}

    def make(strategy: str) -> Path:
        if strategy not in made:
            made[strategy] = tmp_path_factory.mktemp(strategy) / "run"
            run(made[strategy], [*args, *shared(strategy)])
        return made[strategy]

    return make


def shared(strategy: str, batch: int = 2) -> list[str]:
    return [f"trainer.strategy={strategy}", "trainer.devices=2", f"data.batch_size={batch}"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", SHARED)
def test_same_curve_and_weights_as_one_process(one, two, strategy):
    """The four steps of one seed and one global batch. AdamW's first steps are as long for a gradient that is mere
    rounding as for any other, so weights are compared where ZeRO-3, whose gathered weights lie elsewhere in memory and
    are multiplied in another order, can keep up: in what they do."""
    other = two(strategy)
    assert keys(one) == keys(other)
    for name in ("loss", "kl", "pressure", "grad_norm", "keep_ratio"):
        assert curve(other, name) == pytest.approx(curve(one, name), rel=1e-3, abs=1e-5), name
    if strategy != "zero3":
        mine, theirs = (load_file(out / "trainable.safetensors") for out in (one, other))
        for name, tensor in mine.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", SHARED[1:])
def test_one_kind_of_checkpoint_whoever_wrote_it(one, two, strategy):
    """Names, shapes and kinds of everything in it are those of one process; no frozen weight is in it."""
    mine, theirs = (
        torch.load(out / "checkpoints/step-00000002.ckpt", weights_only=True) for out in (one, two(strategy))
    )
    assert mine["state_dict"].keys() == theirs["state_dict"].keys()
    assert not any(name.startswith("lvlm") for name in theirs["state_dict"])
    (own,), (other,) = mine["optimizer_states"], theirs["optimizer_states"]
    assert [group["params"] for group in own["param_groups"]] == [group["params"] for group in other["param_groups"]]
    assert own["state"].keys() == other["state"].keys()
    for number, state in own["state"].items():
        assert state.keys() == other["state"][number].keys()
        assert float(state["step"]) == float(other["state"][number]["step"]) == 2
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(other["state"][number][moment], state[moment], rtol=1e-2, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [("zero2", "auto"), ("auto", "zero3"), ("zero3", "zero2")])
def test_resumes_under_another_strategy_and_world_size(one, two, args, tmp_path, before, after):
    """Killed when the third step begins, and continued from the checkpoint of the second by others."""
    places = {name: [] if name == "auto" else shared(name) for name in (before, after)}
    out = tmp_path / "run"
    killed = start(out, [*args, *places[before]], KILL_AT="2")
    assert killed.returncode != 0 and (out / "checkpoints" / "step-00000002.ckpt").is_file(), killed.stderr[-3000:]
    run(out, [*args, *places[after], "resume=true"])
    assert keys(out)[2] == keys(one)[2] and keys(out)[3] == keys(one)[3]
    assert curve(out, "loss") == pytest.approx(curve(one, "loss"), rel=1e-3, abs=1e-5)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "val/keep_ratio" in line] == [2, 4]


@pytest.mark.long
def test_rollouts_are_reinforced_alike(recipe, tmp_path):
    """Two ranks that draw answers of other lengths; what they draw, and the gradient that they make of it."""
    args = [*recipe, *REINFORCE, "trainer.max_steps=2", "trainer.val_every=2", "optim.warmup=0"]
    found = {}
    for strategy in SHARED:
        run(tmp_path / strategy, [*args, *shared(strategy)])
        lines = map(json.loads, Path(f"{tmp_path / strategy}.diary").read_text().splitlines())
        said = sorted(line[:4] for line in lines if line[1] == 0)
        norm = curve(tmp_path / strategy, "grad_norm")[0]
        found[strategy] = said, norm, len(load_file(tmp_path / strategy / "trainable.safetensors"))
    said, norm, count = found.pop("ddp")
    assert said[0][3] != said[1][3]
    for strategy, (text, own, tensors) in found.items():
        assert text == said and own == pytest.approx(norm, rel=1e-4) and tensors == count, strategy


@pytest.mark.slow
def test_a_rank_of_one_token_answers_waits_for_the_others(recipe, tmp_path):
    """Under ZeRO-3 all ranks call every layer equally often, in the passes that score answers, too."""
    pytest.importorskip("deepspeed")
    config = strategies.read("zero3")
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small ones, too, are gathered at every call
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    args = [*recipe, *REINFORCE, *shared(tmp_path / "zero3.json"), "trainer.max_steps=2", "trainer.val_every=2"]
    done = start(tmp_path / "run", args, 150, TERSE="0")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_no_process_holds_a_model_that_zero3_splits(tmp_path):
    """Once it is read; where nothing is split, nothing starts and one process has it all."""
    pytest.importorskip("deepspeed")
    folder, out = "data/tiny-qwen2_5_vl", tmp_path / "held"
    command = [sys.executable, Path(__file__).with_name("splitting_script.py"), folder]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for strategy in ("zero3", "zero2"):
        done = subprocess.run([*command, strategy, out], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        parts = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("held.*"))]
        (held, total, embeddings), *others = parts
        if strategy == "zero3":
            assert others == [[held, total, embeddings]] and held == pytest.approx(total / 2, rel=0.01)
        else:
            assert held == total and others == [[total // 2, total, pytest.approx(embeddings)]]  # rank 1 as before
    model = load_file(Path(folder, "model.safetensors"))
    assert total == sum(tensor.numel() for tensor in model.values())
    own = model["model.embed_tokens.weight"]
    assert embeddings == pytest.approx(own.double().sum().item(), rel=1e-6)


PARTING = """
import sys, time
import torch, torch.distributed as dist
from glimpseprune.running import strategies

class Slow:
    def __del__(self, now=time.monotonic):
        end = now() + 1.5
        while now() < end:
            pass

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
time.sleep(0.5 * rank)
work = dist.all_reduce(torch.ones(10), async_op=True)
told = work.get_future().then(lambda future: future.value())
if rank:
    work.wait()
strategies.leave()
sys.modules["slow"] = Slow()  # so that Python takes its time to shut down
"""


def test_threads_of_gloo_outlive_no_process(tmp_path):
    """One that wants to run Python code, or frees a tensor, while Python shuts down would abort the process."""
    command = [sys.executable, "-c", PARTING]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], env=env) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]


@pytest.mark.long
def test_zero3_trains_a_model_in_half_precision(recipe, tmp_path):
    """Parts of the LVLM beside the pruner: rollouts and names are those of ZeRO-2; and from there a stage 1 that leaves
    what was restored as it is."""
    args = [*recipe, *REINFORCE, "trainer.max_steps=2", "trainer.val_every=1", "backbone.dtype=bfloat16"]
    args += ["train=[glimpse,vip,decoder,vision]", "lora=null", "optim.warmup=0"]
    found = {}
    for strategy in ("zero2", "zero3"):
        run(tmp_path / strategy, [*args, *shared(strategy)])
        lines = map(json.loads, Path(f"{tmp_path / strategy}.diary").read_text().splitlines())
        weights = load_file(tmp_path / strategy / "trainable.safetensors")
        found[strategy] = sorted(line[:4] for line in lines if line[1] == 0), {k: x.shape for k, x in weights.items()}
    assert found["zero2"] == found["zero3"]
    more = ["trainer.max_steps=1", "trainer.val_every=1", *shared("zero3"), f"init_from={tmp_path / 'zero3'}"]
    run(tmp_path / "again", [*recipe, "backbone.dtype=bfloat16", *more])
    kept, before = (load_file(tmp_path / name / "trainable.safetensors") for name in ("again", "zero3"))
    own = [name for name in kept if name.startswith("lvlm.")]
    assert own and all(torch.equal(kept[name], before[name].to(kept[name].dtype)) for name in own)


def test_what_auto_stands_for():
    choose = strategies.choose
    assert choose("auto", processes=1, cuda=True, deepspeed=True, trained=8e9) == "auto"
    assert choose("auto", processes=8, cuda=True, deepspeed=True, trained=2e7) == "zero2"
    assert choose("auto", processes=8, cuda=True, deepspeed=True, trained=8e9) == "zero3"
    assert choose("auto", processes=8, cuda=True, deepspeed=False, trained=2e7) == "ddp"
    assert choose("auto", processes=2, cuda=False, deepspeed=True, trained=2e7) == "ddp"
    assert choose("zero3", processes=2, cuda=False, deepspeed=True, trained=1) == "zero3"


def test_zero_leaves_a_model_in_half_precision_as_it_is():
    pytest.importorskip("deepspeed")
    zero, half, whole = strategies.build("zero2"), torch.bfloat16, torch.float32
    assert strategies.precision("32-true", zero, half) == "bf16-mixed"
    assert strategies.precision("32-true", zero, torch.float16) == "16-mixed"
    assert strategies.precision("32-true", zero, whole) == strategies.precision("32-true", "ddp", half) == "32-true"
    assert strategies.precision("bf16-true", zero, half) == "bf16-true"


@pytest.mark.parametrize("name", strategies.ZERO)
def test_a_file_for_every_stage(name):
    config = strategies.read(name)
    assert config["zero_optimization"]["stage"] == int(name[4])
    assert ("offload_param" in config["zero_optimization"]) == name.endswith("offload")


def test_unknown_strategies_are_named(recipe, capsys, tmp_path):
    with pytest.raises(UserError, match=r"give auto, ddp, zero1.*or a JSON file"):
        strategies.read("zero4")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        strategies.read(str(tmp_path / "bad.json"))
    with pytest.raises(SystemExit):
        train.main([*recipe, f"out={tmp_path / 'run'}", "trainer.strategy=fsdp"])
    error = capsys.readouterr().err
    assert "trainer.strategy: give auto" in error and "'fsdp'" in error and not (tmp_path / "run").exists()


def test_half_precision_without_masters_is_refused(recipe, capsys, tmp_path):
    for half in ("backbone.dtype=bfloat16", "trainer.precision=bf16-true"):
        with pytest.raises(SystemExit):
            train.main([*recipe, *REINFORCE, "train=[vision]", half, f"out={tmp_path / 'run'}"])
        assert "give backbone.dtype=float32" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_devices_of_this_node(monkeypatch):
    assert strategies.devices("cpu", "auto") == ["cpu"] and strategies.devices("cpu", "3") == ["cpu"] * 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert strategies.devices("auto", "auto") == strategies.devices("gpu", -1) == [f"cuda:{i}" for i in range(4)]
    assert strategies.devices("auto", "[2, 3]") == ["cuda:2", "cuda:3"] and strategies.devices("gpu", 1) == ["cuda:0"]
    for wrong in ("two", "0", "-3", "5", "[2, 4]", "[1, 1]"):
        with pytest.raises(UserError, match="trainer.devices="):
            strategies.devices("gpu", wrong)
    with pytest.raises(UserError, match="trainer.devices=99: there are .* processes at most"):
        strategies.devices("cpu", "99")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="accelerator=gpu: there is no GPU"):
        strategies.devices("gpu", "auto")
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert strategies.mine(["cuda:2", "cuda:3"]) == "cuda:2"
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert strategies.mine(["cuda:2", "cuda:3"]) == "cuda:3"
