"""Stage 1: losses that mean what they say, gradients where they belong; runs that resume, evaluate and fail well."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from conftest import TINY, picture
from glimpseprune import checkpoint, config, evaluate, losses, train
from glimpseprune.attention import Gate
from glimpseprune.config import UserError
from glimpseprune.data.collate import Collator
from glimpseprune.decoder import prefill
from glimpseprune.options import BackboneOptions, DataOptions, LossOptions, TrainConfig
from glimpseprune.pruners import build
from glimpseprune.running import slurm
from glimpseprune.training.glimpse import GlimpseModule, mask_scores
from glimpseprune.types import Inputs, Sample

OPTIONS = {
    "prune_layer": 1,
    "probe_layers": [0, 1],
    "vision_layers": [2, 1],
    "width": 16,
    "cond_width": 16,
    "num_heads": 2,
    "dropout": 0.0,
}
SAMPLES = [
    Sample("a", "what?", ("ab",), [picture(140, 112)], [[(0, 0, 30, 30)]], scene="one"),
    Sample("b", "why?", ("c",), [picture(140, 112)], [[(80, 60, 139, 111)]], scene="one"),
    Sample("c", "how many?", ("def",), [picture(112, 112), picture(84, 112)], [[(0, 0, 30, 30)], []]),
]


def stage(name: str = "qwen2_5_vl", **loss) -> tuple[GlimpseModule, Inputs]:
    backbone = TINY[name]("sdpa")
    torch.manual_seed(1)
    pruner = build("glimpse", OPTIONS, backbone)
    config = TrainConfig(out="", backbone=BackboneOptions(path=""), data=DataOptions(path=""), loss=LossOptions(**loss))
    module = GlimpseModule(config, backbone, pruner)
    module.log = module.log_dict = lambda *_, **__: None
    module._fabric = module._trainer = None
    return module, Collator(backbone)(SAMPLES)


def run_step(module: GlimpseModule, inputs: Inputs, progress: float = 0.9) -> torch.Tensor:
    type(module).progress = property(lambda _: progress)
    return module.training_step(inputs, 0)


@pytest.fixture(autouse=True)
def restore_progress():
    saved = GlimpseModule.progress
    yield
    GlimpseModule.progress = saved


@pytest.mark.parametrize("name", sorted(TINY))
def test_teacher_is_the_plain_model(name):
    module, inputs = stage(name)
    module.eval()
    with torch.no_grad():
        shared = module.share(inputs)
        logits = module.answer_logits(shared.state, inputs.answer_ids, inputs.answer_mask)
    for row, sample in enumerate(SAMPLES):
        prompt = module.backbone.prepare([sample.question], [sample.images])
        length = int(inputs.answer_mask[row].sum())
        ids = torch.cat([prompt["input_ids"], inputs.answer_ids[row : row + 1, :length]], 1)
        prompt |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in prompt:
            prompt["mm_token_type_ids"] = (ids == module.backbone.image_token_id).int()
        module.backbone.model.model.rope_deltas = None
        with torch.no_grad():
            plain = module.backbone.model(**prompt).logits[0, -length - 1 : -1]
        assert torch.allclose(logits[row, :length], plain, atol=2e-4)


@pytest.mark.parametrize("name", sorted(TINY))
def test_hard_gate_is_pruned_prefill(name):
    """The student that trains is the model that will run: gated answer logits equal those after real pruning."""
    module, inputs = stage(name)
    module.eval()
    with torch.no_grad():
        shared = module.share(inputs)
        keep = module.pruner.mask(shared.logits[-1], shared.counts)
        weight = torch.ones(shared.state.visual.shape).masked_scatter(shared.state.visual, keep.float())
        gated = module.answer_logits(shared.state, inputs.answer_ids, inputs.answer_mask, Gate(weight))
        state = prefill(module.backbone, shared.encoded, module.pruner)
        first = module.backbone.logits(state.hidden[:, -1])
    assert 0 < int(keep.sum()) < len(keep)
    assert torch.allclose(gated[:, 0], first, atol=1e-4)


@pytest.mark.parametrize("loss", [{}, {"kl": 0.0, "pressure": 0.0, "mask": 1.0, "answer": 1.0}])
def test_gradients_reach_glimpse_and_vip_only(loss):
    module, inputs = stage(**loss)
    run_step(module, inputs).backward()
    assert all(p.grad is None for p in module.lvlm.parameters())
    for part in (module.pruner.glimpse, module.pruner.vip):
        norms = [p.grad.norm() for p in part.parameters() if p.grad is not None]
        assert norms and all(torch.isfinite(n) for n in norms) and sum(norms) > 0


def test_weights_of_zero_leave_a_loss_out():
    module, inputs = stage(kl=0.0, pressure=0.0, mask=2.0)
    shared = module.share(inputs)
    expected = 2 * losses.mask_loss(shared.logits, torch.cat(inputs.targets), shared.counts, dice=1, bce=0.1)
    assert torch.allclose(run_step(module, inputs), expected, atol=1e-6)


def test_pressure_ramps():
    module, inputs = stage(kl=0.0, pressure=3.0, pressure_kind="mean", pressure_from=0.2, pressure_ramp=0.4)
    full = run_step(module, inputs, 0.9).item()
    assert full > 0
    assert run_step(module, inputs, 0.4).item() == pytest.approx(full / 2, rel=1e-4)
    assert run_step(module, inputs, 0.1).item() == 0


def test_mask_scores_are_those_of_hand_made_masks():
    samples = [
        Sample("a", "q", ("a",), [], [[(0, 0, 1, 1)]], scene="s"),
        Sample("b", "q", ("a",), [], [[(1, 1, 2, 2)]], scene="s"),
    ]
    keep = torch.tensor([1, 1, 0, 0, 0, 1, 1, 0], dtype=torch.bool)
    targets = torch.tensor([1, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool)
    scores = {name: float(score) for name, score in mask_scores(keep, targets, Inputs({}, samples), [4, 4]).items()}
    assert scores["box_iou"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert scores["box_recall"] == pytest.approx((1 + 1 / 2) / 2)
    assert scores["mask_overlap"] == pytest.approx(1 / 3)


def test_learns_to_keep_the_box_of_one_sample():
    module, inputs = stage(kl=0.0, pressure=0.0, mask=1.0, bce=1.0)
    optimizer = torch.optim.Adam(module.pruner.parameters(), 3e-3)
    first = None
    for _ in range(60):
        loss = run_step(module, inputs)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first


# --------------------------------------------------------------------------------------------- the commands, end to end


@pytest.fixture(scope="module")
def world(recipe, tmp_path_factory) -> dict[str, str]:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("world")
    args = [*recipe, "trainer.max_steps=4", "trainer.val_every=2"]
    train.main([*args, f"out={folder / 'run'}"])
    given = dict(argument.partition("=")[::2] for argument in recipe)
    paths = {"base": given["backbone.path"], "data": given["data.path"]}
    return paths | {"args": args, "run": str(folder / "run"), "folder": str(folder)}


def test_run_folder_holds_what_it_promises(world):
    run = Path(world["run"])
    assert {"config.yaml", "trainable.safetensors", "metrics.jsonl", "tensorboard", "checkpoints"} <= {
        p.name for p in run.iterdir()
    }
    lines = validations(run)
    assert [line["step"] for line in lines] == [2, 4]
    wanted = {
        "train/kl",
        "train/pressure",
        "train/grad_norm",
        "val/kl",
        "val/accuracy",
        "val/keep_ratio",
        "val/box_iou",
    }
    assert wanted <= set(lines[-1])
    saved = torch.load(run / "checkpoints" / "step-00000004.ckpt", weights_only=True)
    assert not any(name.startswith("lvlm") for name in saved["state_dict"])
    best = min(lines, key=lambda line: line["val/loss"])["step"]
    kept = json.loads((run / "checkpoints" / "checkpoints.json").read_text())
    assert min((entry["score"], entry["step"]) for entry in kept.values())[1] == best
    assert checkpoint.load(run / "best").name == "glimpse"
    for folder in (run, run / "best"):  # whose paths are relative to it
        said = yaml.safe_load((folder / "config.yaml").read_text())
        assert (folder / said["data"]["path"]).resolve() == Path(world["data"]).resolve()


def test_tensorboard_has_pictures(world):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(f"{world['run']}/tensorboard/run", size_guidance={"images": 0})
    log.Reload()
    scalars = log.Tags()["scalars"]
    assert log.Tags()["images"] == ["answers/kept"] and min(scalars).startswith("answers/")  # what one sees first
    assert {"answers/keep_ratio", "answers/accuracy", "answers/accuracy_full", "train/kl", "val/kl"} <= set(scalars)


def test_curves_and_lines_agree_on_steps(world):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = {line["step"]: line for line in read(world["run"], "metrics.jsonl")}
    assert list(lines) == [1, 2, 3, 4]
    log = EventAccumulator(f"{world['run']}/tensorboard/run").Reload()
    for name in ("train/kl", "lr/vip", "perf/step_s"):
        assert {e.step: pytest.approx(lines[e.step][name], abs=1e-5) for e in log.Scalars(name)} == {
            e.step: e.value for e in log.Scalars(name)
        }
    assert [event.step for event in log.Scalars("answers/keep_ratio")] == [2, 4]


def test_resume_continues_where_the_run_stopped(world):
    folder = world["folder"]
    train.main([*world["args"], f"out={folder}/half", "trainer.max_steps=4"])
    whole = weights(folder, "half")
    train.main([*world["args"], f"out={folder}/long", "trainer.max_steps=4"])
    again = weights(folder, "long")
    assert all(torch.equal(whole[name], again[name]) for name in whole)  # the run is deterministic
    train.main([*world["args"], f"out={folder}/long", "trainer.max_steps=6", "resume=true"])
    further = weights(folder, "long")
    assert any(not torch.equal(again[name], further[name]) for name in again)
    assert [line["step"] for line in read(f"{folder}/long", "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in validations(f"{folder}/long")] == [2, 4, 6]


def test_a_requeued_job_ends_as_if_never_interrupted(world, monkeypatch, tmp_path):
    """srun with one task: stopped by SIGUSR1 after the first step, and started again by SLURM with the same command."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    task = {"JOB_ID": 17, "JOB_NAME": "stage1", "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "STEP_ID": 0}
    for name, value in (task | {"STEP_NUM_NODES": 1}).items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    args = [*world["args"], f"out={world['folder']}/requeued"]
    with monkeypatch.context() as told:
        told.setattr(slurm.Requeue, "on_fit_start", lambda self, *_: self.listen())
        with pytest.raises(SystemExit) as stop:
            train.main(args)
    assert stop.value.code == slurm.EXIT_CODE and (tmp_path / "asked").read_text() == "requeue 17\n"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    train.main(args)
    assert signal.signal(signal.SIGUSR1, signal.SIG_DFL) is signal.SIG_IGN  # one that comes now must not kill
    whole, again = weights(world["folder"], "run"), weights(world["folder"], "requeued")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [line["step"] for line in read(f"{world['folder']}/requeued", "metrics.jsonl")] == [1, 2, 3, 4]
    log = EventAccumulator(f"{world['folder']}/requeued/tensorboard/requeued").Reload()
    assert [event.step for event in log.Scalars("train/kl")] == [1, 2, 3, 4]


def validations(run: str | Path) -> list[dict[str, float]]:
    return [line for line in read(run, "metrics.jsonl") if "val/loss" in line]


def test_a_signal_saves_and_tells_the_line_that_resumes(world, monkeypatch, capsys):
    out, step = f"{world['folder']}/interrupted", GlimpseModule.training_step

    def told(self, inputs: Inputs, index: int) -> torch.Tensor:
        if self.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, inputs, index)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(GlimpseModule, "training_step", told)
        train.main([*world["args"], f"out={out}"])
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("interrupted (SIGTERM)")]
    assert stop.value.code == 143 and f"saved {out}/checkpoints/step-00000002.ckpt" in said
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    command = shlex.split(said.partition("go on with: ")[2])
    assert command[:3] == ["python", "-m", "src.train"]
    train.main(command[3:])
    whole, again = weights(world["folder"], "run"), weights(world["folder"], "interrupted")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["stage=grpo"], 'stage was "glimpse"'),
        (["loss.kl=0.5"], "loss.kl was 1.0"),
        (["data.batch_size=2"], "a step was of 4 samples"),
        (["optim.vip_lr=0.5"], "optim.vip_lr was"),
    ],
)
def test_a_resume_as_another_run_is_refused_and_changes_nothing(world, capsys, more, said):
    run = Path(world["run"])
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    error = fails(train.main, [*world["args"], f"out={run}", "resume=true", "trainer.max_steps=6", *more], capsys)
    assert said in error and {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def weights(folder: str, run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / run / "trainable.safetensors")


def test_evaluate_prints_every_method_and_writes_its_files(world, tmp_path, capsys):
    evaluate.main([f"ckpt={world['run']}", f"out={tmp_path}", "data.workers=0", "max_new_tokens=6"])
    rows = read(tmp_path, "scores.json")
    assert {row["method"] for row in rows} == {"none", "glimpse", "random", "oracle", "zero"}
    assert {row["kind"] for row in rows} == {"all", "number", "pair", "relation"}
    by = {(row["method"], row["kind"]): row for row in rows}
    assert by["none", "all"]["kept"] == 1 and by["none", "all"]["prefill_flops"] == 1
    assert by["zero", "all"]["kept"] == 0 and by["zero", "all"]["n"] == 8
    assert by["random", "all"]["kept"] == by["glimpse", "all"]["kept"]
    assert by["zero", "all"]["mean_tokens"] == pytest.approx(64 * 2 / 3, abs=0.01)
    lines = read(tmp_path, "predictions.jsonl")
    assert len(lines) == 5 * 8
    mean = sum(line["score"] for line in lines if line["method"] == "glimpse") / 8
    assert math.isclose(mean, by["glimpse", "all"]["accuracy"])
    assert "glimpse" in capsys.readouterr().out


def test_summary_counts_the_kinds_that_need_the_tokens():
    def row(method, kind, accuracy, n=10):
        return {"method": method, "kind": kind, "accuracy": accuracy, "kept": 0.5, "n": n}

    rows = [row("none", "all", 0.9)]
    rows += [row("none", "easy", 0.9), row("glimpse", "easy", 0.1), row("zero", "easy", 0.4)]
    rows += [row("none", "hard", 0.8), row("glimpse", "hard", 0.6), row("zero", "hard", 0.2)]
    rows += [row("none", "long", 1.0, 30), row("glimpse", "long", 1.0, 30), row("zero", "long", 0.0, 30)]
    summary = evaluate.over_needing_kinds(rows)
    assert summary["kinds"] == ["hard", "long"]
    assert summary["methods"]["glimpse"] == {"accuracy": 0.9, "kept": 0.5, "relative": round(0.9 / 0.95, 4)}
    assert evaluate.over_needing_kinds(rows[:4]) is None


@pytest.mark.parametrize("stage, options", [("glimpse", ["loss.mask=1"]), ("grpo", ["grpo.masks=boxes"])])
def test_what_goes_by_boxes_wants_some(stage, options, capsys):
    cfg = config.load(TrainConfig, ["out=o", "backbone.path=b", "data.path=d", f"stage={stage}", "data.batch_size=2"])
    boxed, without = [Sample("a", "?", ("b",), [], [[]])], [Sample("a", "?", ("b",), [])]
    train.require_data(cfg, without * 4, processes=2)  # which does not go by them
    cfg = config.load(TrainConfig, ["out=o", "backbone.path=b", "data.path=d", f"stage={stage}", *options])
    with pytest.raises(UserError, match="goes by boxes, and none of 64 samples of data.path=d has any"):
        train.require_data(cfg, without * 500, processes=1)
    train.require_data(cfg, boxed * 500, processes=1)
    assert capsys.readouterr().out == ""
    train.require_data(cfg, without * 250 + boxed * 250, processes=1)
    assert "note: 32 of 64 samples of data.path=d have boxes" in capsys.readouterr().out
    with pytest.raises(UserError, match="data.batch_size=16 on 2 processes: data.path=d has 31 training samples"):
        train.require_data(cfg, boxed * 31, processes=2)


def test_several_nodes_are_not_waited_for_where_nobody_starts_them(monkeypatch):
    cfg = config.load(TrainConfig, ["out=o", "backbone.path=b", "data.path=d", "trainer.nodes=2"])
    for name in ("SLURM_STEP_ID", "MASTER_ADDR", "JSM_NAMESPACE_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="trainer.nodes=2: nobody starts the other nodes: use sbatch"):
        train.require_launcher(cfg)
    monkeypatch.setenv("MASTER_ADDR", "first")  # as torchrun has it
    train.require_launcher(cfg)


def test_a_teacher_that_knows_nothing_is_told_once():
    module, _ = stage()
    means = {"kl": 1.0, "keep_ratio": 0.5, "accuracy_full": 0.0}
    with pytest.warns(UserWarning, match="val/accuracy_full is 0"):
        module.summary(means)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.summary(means)
        stage()[0].summary(means | {"accuracy_full": 0.01})
        stage(kl=0.0)[0].summary(means)


def test_another_pruner_can_be_evaluated(world, tmp_path):
    args = [
        f"ckpt={world['run']}",
        "data.workers=0",
        f"out={tmp_path}",
        "limit=4",
        "max_new_tokens=4",
        "controls=[none]",
    ]
    evaluate.main([*args, "pruner.name=random", "pruner.options.keep=0.25"])
    rows = {row["method"]: row for row in read(tmp_path, "scores.json") if row["kind"] == "all"}
    assert set(rows) == {"none", "random"} and rows["random"]["kept"] == 0.25 and rows["random"]["n"] == 4


def test_library_api_loads_and_generates(world):
    import glimpseprune

    model = glimpseprune.load(world["run"])
    text = "<|vision_start|><|image_pad|><|vision_end|>colour of tag 27?"
    inputs = model.processor(text=[text], images=[picture(140, 112)], return_tensors="pt")
    rollout = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert rollout.tokens.shape[0] == 1 and rollout.tokens.shape[1] <= 3
    assert [m.shape for m in rollout.keep_maps()[0]] == [(4, 5)]
    plain = glimpseprune.load(backbone=world["base"])
    assert plain.generate(**inputs, max_new_tokens=3).keep[0].all()


def read(folder: str | Path, name: str) -> Any:
    text = (Path(folder) / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith("jsonl") else json.loads(text)


def test_a_published_folder_can_be_evaluated(world, tmp_path):
    saved = checkpoint.read_config(world["run"])
    publish(weights(world["folder"], "run"), saved.pruner.options | {"num_hidden_layers": 3}, tmp_path / "published")
    args = [
        f"ckpt={tmp_path / 'published'}",
        f"backbone.path={world['base']}",
        f"data.path={world['data']}",
    ]
    evaluate.main([*args, f"out={tmp_path / 'out'}", "data.workers=0", "max_new_tokens=6", "controls=[none]"])
    one = [f"ckpt={world['run']}", "pruner.options.sight=one"]  # as published; the run's is question
    evaluate.main([*one, f"out={tmp_path / 'own'}", "data.workers=0", "max_new_tokens=6", "controls=[]"])
    theirs, own = (
        [line for line in read(tmp_path / name, "predictions.jsonl") if line["method"] == "glimpse"]
        for name in ("out", "own")
    )
    assert theirs == own and len(own) == 8


def publish(state: dict[str, torch.Tensor], options: dict[str, Any], folder: Path) -> None:
    """Write weights and options as the paper's authors publish them."""
    folder.mkdir(exist_ok=True)
    torch.save(
        {
            "attn_fuser": {k[4:]: v for k, v in state.items() if k.startswith("vip.")},
            "learnable_embeddings": state["glimpse.embeddings"],
            "le_proj": {k: state[f"glimpse.proj.{k}"] for k in ("weight", "bias")},
            "le_norm": {"weight": state["glimpse.norm.weight"]},
        },
        folder / "new_modules_gp.pt",
    )
    published = {
        "reduce_layer": options["prune_layer"],
        "selected_layers": options["probe_layers"],
        "selected_visual_layers": options["vision_layers"],
        "reduce_threshold": 0.5,
        "max_remain_ratio": None,
        "min_remain_num": 1,
        "attn_fuse_size": options["width"],
        "visual_cond_size": options["cond_width"],
        "attn_fuse_num_heads": options["num_heads"],
        "use_attention_logits": options.get("probe", "logits") == "logits",
        "le_dropout_prob": 0.0,
        "deep_supervision": False,
        "num_hidden_layers": options["num_hidden_layers"],
    }
    (folder / "config.json").write_text(json.dumps(published))


def fails(main, args, capsys, after_loading: bool = False) -> str:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    *progress, error = captured.err.strip().splitlines()
    assert error.startswith("error: ") and "Traceback" not in captured.err + captured.out
    return error if after_loading or not progress else pytest.fail(f"more than one line: {progress}")


def test_bad_input_is_one_line_and_exit_code_two(world, capsys, tmp_path):
    args = [*world["args"], f"out={tmp_path}/x"]
    assert "trainer.max_steps" in fails(train.main, [*args, "trainer.max_step=4"], capsys)
    assert "trainer.max_steps" in fails(train.main, [*args, "trainer.max_steps=many"], capsys)
    assert "threshold" in fails(train.main, [*args, "pruner.options.thresold=0.4"], capsys)
    assert "ckpt" in fails(evaluate.main, [], capsys)
    assert "no checkpoint at" in fails(evaluate.main, [f"ckpt={tmp_path}/nothing"], capsys)
    assert "not empty" in fails(train.main, [*world["args"], f"out={world['run']}"], capsys)
    assert "src.prepare" in fails(train.main, [*args, f"data.path={tmp_path}/none", "overwrite=true"], capsys)


def test_a_typo_does_not_cost_the_run_it_would_overwrite(world, capsys, tmp_path):
    """Nor what was found out only when the model had been loaded, or in the first step."""
    (tmp_path / "config.yaml").write_text("stage: glimpse\n")
    (tmp_path / "trainable.safetensors").write_text("precious")
    args = [*world["args"], f"out={tmp_path}", "overwrite=true"]
    assert "threshold" in fails(train.main, [*args, "pruner.options.thresold=0.4"], capsys)
    assert "choices are glimpse, grpo" in fails(train.main, [*args, "stage=pretrain"], capsys)
    assert "has 48 training samples" in fails(train.main, [*args, "data.batch_size=1000"], capsys, after_loading=True)
    assert (tmp_path / "trainable.safetensors").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "trainable.safetensors"]


def test_checkpoint_of_another_backbone_names_the_tensor(world, capsys, tmp_path):
    from glimpseprune.tiny.config import PretrainConfig, TinyConfig
    from glimpseprune.tiny.module import PretrainModule

    wider = TinyConfig(layers=3, hidden=64, intermediate=32, vision_layers=4, vision_hidden=32)
    PretrainModule(PretrainConfig(model=wider)).save(str(tmp_path / "wider"))
    error = fails(
        evaluate.main, [f"ckpt={world['run']}", f"backbone.path={tmp_path / 'wider'}"], capsys, after_loading=True
    )
    assert "glimpse." in error and "[3, 1, 32]" in error and "[3, 1, 64]" in error


def test_truncated_and_foreign_weights_are_refused(world, tmp_path):
    data = Path(world["run"], "trainable.safetensors").read_bytes()
    broken = tmp_path / "run"
    broken.mkdir()
    (broken / "config.yaml").write_text(Path(world["run"], "config.yaml").read_text())
    (broken / "trainable.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="safetensors"):
        checkpoint.load(broken)
    pruner = nn.Linear(2, 2)
    with pytest.raises(UserError, match="missing"):
        checkpoint.restore(pruner, {"weight": torch.zeros(2, 2)}, "here")
    with pytest.raises(UserError, match="unknown tensor 'more'"):
        checkpoint.restore(pruner, pruner.state_dict() | {"more": torch.zeros(1)}, "here")


def test_published_weights_load_with_a_backbone(tmp_path):
    """A folder as the paper's authors publish it, made here from a pruner of ours."""
    backbone = TINY["qwen2_5_vl"]()
    options = OPTIONS | {"probe_layers": [1]}
    pruner = build("glimpse", options, backbone)
    own = pruner.state_dict()
    publish(own, options | {"num_hidden_layers": 4}, tmp_path)
    folder = tmp_path / "base"
    backbone.model.save_pretrained(folder)
    backbone.processor.tokenizer.save_pretrained(folder)
    backbone.processor.image_processor.save_pretrained(folder)
    model = checkpoint.load(tmp_path, backbone=folder)
    assert all(torch.equal(value, own[name]) for name, value in model.pruner.state_dict().items())
    with pytest.raises(UserError, match="backbone.path"):
        checkpoint.load(tmp_path)
