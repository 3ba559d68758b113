"""A stage 1 whose masks ignore the question: when that is said, and that it begins anew, exactly, also when resumed."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from glimpseprune import train
from glimpseprune.config import UserError
from glimpseprune.options import BackboneOptions, DataOptions, LossOptions, TrainConfig, WatchOptions
from glimpseprune.running.astray import OVERLAP, Astray
from glimpseprune.running.strategies import Zero


def config(**watch) -> TrainConfig:
    loss = LossOptions(pressure_from=0.1, pressure_ramp=0.3)
    watch = WatchOptions(**watch)
    return TrainConfig(out="", backbone=BackboneOptions(path=""), data=DataOptions(path=""), loss=loss, watch=watch)


@pytest.mark.parametrize(
    ("overlaps", "said"),
    [
        ([0.9, 0.9, 0.05, 0.2, 0.05, 0.2], []),  # high while the pressure grows, then never twice
        ([0.9, 0.9, 0.9, 0.2, 0.05, 0.05], [3]),
        ([0.9, 0.2, 0.05, 0.2, 0.11, 0.3], [5]),  # once
        ([0.9, 0.9, 0.2, 0.2, 0.05, 0.2, 0.2], [3, 7]),
        ([None] * 6, []),  # no two questions on one image
    ],
)
def test_it_is_said_after_two_validations_under_the_whole_pressure(overlaps, said, recwarn):
    astray, trainer = Astray(config()), SimpleNamespace(sanity_checking=False, callback_metrics={})
    for index, overlap in enumerate(overlaps):
        trainer.global_step = index + 1
        trainer.callback_metrics = {} if overlap is None else {OVERLAP: torch.tensor(overlap)}
        astray.on_validation_end(trainer, SimpleNamespace(progress=0.2 * (index + 1)))
    lines = [str(each.message) for each in recwarn if OVERLAP in str(each.message)]
    assert [int(line.split()[1].strip(":")) for line in lines] == said
    assert all("\n" not in line and "sight=question" in line and "another seed" in line for line in lines)
    assert not astray.due


def test_nothing_is_said_where_it_is_not_asked_for(recwarn):
    astray, trainer = Astray(config(overlap=None, restarts=1)), SimpleNamespace(sanity_checking=False, global_step=9)
    trainer.callback_metrics = {OVERLAP: torch.tensor(0.9)}
    for _ in range(3):
        astray.on_validation_end(trainer, SimpleNamespace(progress=1.0))
    assert not astray.due and not [each for each in recwarn if OVERLAP in str(each.message)]


def test_restarts_that_cannot_be(recwarn):
    wrong = config(restarts=1)
    wrong.train = ["glimpse", "vip", "lora"]
    with pytest.raises(UserError, match=r"watch\.restarts: only glimpse, private layers and vip"):
        Astray(wrong)
    with pytest.raises(UserError, match=r"watch\.restarts: .*ZeRO"):
        Astray(config(restarts=1), Zero.__new__(Zero))
    Astray(config(), Zero.__new__(Zero))


@pytest.fixture(scope="module")
def args(recipe) -> list[str]:
    """Three steps; nearly everything is kept, so masks of different questions are alike."""
    steps = ["trainer.max_steps=3", "trainer.val_every=1", "trainer.last_checkpoints=9"]
    quick = ["data.val_samples=4", "trainer.logger=[]"]
    return [*recipe, *steps, *quick, "loss.pressure_ramp=0", "watch.overlap=0", "watch.restarts=1"]


def test_a_restart_and_a_resume_at_it(args, tmp_path, recwarn):
    """Two validations, other weights, all three steps again; then only a word. A run that ended just before the restart
    ends with the same weights when it goes on."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    train.main([*args, f"out={whole}"])
    said = [str(each.message) for each in recwarn if OVERLAP in str(each.message)]
    assert ["begins anew" in line for line in said] == [True, False] and "step 2:" in said[0] and "step 4:" in said[1]
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr/vip"] for line in lines if "lr/vip" in line}
    assert sorted(rates) == [1, 2, 3, 4, 5] and rates[3] == rates[1] and rates[4] == rates[2]  # warmed up once more

    shutil.copytree(whole, again)
    index = again / "checkpoints" / "checkpoints.json"
    kept = {name: entry for name, entry in json.loads(index.read_text()).items() if entry["step"] <= 2}
    index.write_text(json.dumps(kept))
    before = torch.load(again / "checkpoints" / "step-00000002.ckpt", weights_only=True)["state_dict"]
    train.main([*args, f"out={again}", "resume=true"])
    first, second = (load_file(run / "trainable.safetensors") for run in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    moved = max((first[name] - before[f"pruner.{name}"]).abs().max() for name in first if name.startswith("vip."))
    assert moved > 0.1  # no three steps at these rates get so far
