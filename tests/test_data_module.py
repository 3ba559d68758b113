"""The stream of batches under Lightning: every checkpoint resumes at the next sample, validation is complete."""

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from glimpseprune.config import UserError
from glimpseprune.data.module import ShardDataModule
from glimpseprune.data.stream import ShardDataset, ShardLoader
from test_shards import make
from test_stream import keys, write_damaged, write_whole
from test_stream import time_limit as time_limit

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*LeafSpec")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_whole(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def damaged(tmp_path):
    return write_damaged(tmp_path)


class Module(L.LightningModule):
    """Writes down what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated = [], []

    def training_step(self, batch, index):
        self.trained.append((self.current_epoch, batch))
        return self.weight * 0

    def validation_step(self, batch, index):
        self.validated += batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, tmp_path, *, ckpt=None, workers=0, validate=True, checkpoint=None, callbacks=(), **kwargs):
    """(what was trained on, the data module, the trainer) of a run of the 50 samples in batches of 10."""
    module = Module()
    data = ShardDataModule(
        folder, keys, val="val" if validate else None, batch_size=10, workers=workers, shuffle_shards=2
    )
    if checkpoint:
        checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, **checkpoint)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=checkpoint is not None,
        callbacks=[*callbacks, *([checkpoint] if checkpoint else [])],
        limit_val_batches=None if validate else 0,
        default_root_dir=tmp_path,
        **kwargs,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=False if ckpt else None)
    return module.trained, data, trainer


def own_epochs(folder, epochs: int) -> list:
    loader = ShardLoader(ShardDataset(folder, "train"), keys, 10, shuffle=True, shuffle_shards=2)
    return [(epoch, batch) for epoch in range(epochs) for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(
    "checkpoint",
    [
        {"every_n_train_steps": 1},
        {"every_n_epochs": 1},
        {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    ],
    ids=["after-every-step", "after-validation", "at-the-end-of-epochs"],
)
def test_lightning_resumes_exactly_from_every_checkpoint(folder, tmp_path, checkpoint, validate, workers):
    whole, _, _ = fit(folder, tmp_path, max_epochs=3, checkpoint=checkpoint, validate=validate, workers=workers)
    assert whole == own_epochs(folder, 3)
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) >= (3 if "every_n_epochs" in checkpoint else 15)
    for path in saved[:: 2 if workers == 0 else 7] + saved[4:5]:
        steps = torch.load(path, weights_only=False)["global_step"]
        resumed, _, trainer = fit(folder, tmp_path, ckpt=path, max_epochs=3, validate=validate, workers=workers)
        assert resumed == whole[steps:], path.name
        assert trainer.global_step == 15


class StopAfter(Callback):
    """Ask for the end after so many batches, as a handler of SIGUSR1 would."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/stopped.ckpt")
            trainer.should_stop = True


@pytest.mark.parametrize("steps", [3, 5, 9])
def test_a_run_that_is_stopped_and_requeued_sees_every_sample_once(folder, tmp_path, steps):
    first, _, _ = fit(folder, tmp_path, callbacks=[StopAfter(steps)], max_steps=14, workers=1)
    second, _, _ = fit(folder, tmp_path, ckpt=tmp_path / "stopped.ckpt", max_steps=14, workers=2)
    assert first + second == own_epochs(folder, 3)[:14]


@pytest.mark.parametrize("checkpoint", [{"every_n_train_steps": 4}, {"monitor": None}], ids=["steps", "validation"])
def test_resumes_when_validation_counts_steps_not_epochs(folder, tmp_path, checkpoint):
    options = {"max_steps": 15, "val_check_interval": 4, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    whole, _, _ = fit(folder, tmp_path, checkpoint=checkpoint, **options)
    assert [batch for _, batch in whole] == [batch for _, batch in own_epochs(folder, 3)]
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) >= 3
    for path in saved:
        steps = torch.load(path, weights_only=False)["global_step"]
        resumed, _, _ = fit(folder, tmp_path, ckpt=path, **options)
        assert [batch for _, batch in resumed] == [batch for _, batch in whole[steps:]], path.name


def test_limits_and_reloads_of_lightning(folder, tmp_path):
    trained, _, _ = fit(folder, tmp_path, max_epochs=5, limit_train_batches=2, reload_dataloaders_every_n_epochs=1)
    own = own_epochs(folder, 5)
    assert trained == [batch for epoch in range(5) for batch in own[5 * epoch : 5 * epoch + 2]]


def test_validation_is_complete_and_may_be_limited(folder, tmp_path):
    module, data = Module(), ShardDataModule(folder, keys, batch_size=4)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    for _ in range(2):
        trainer.validate(module, datamodule=data, verbose=False)
    assert module.validated == [make(i).key for i in range(100, 111)] * 2
    short = ShardDataModule(folder, keys, batch_size=4, val_limit=6)
    assert [len(batch) for batch in short.val_dataloader()] == [4, 2]


def test_another_fit_of_the_same_module_starts_over(folder, tmp_path):
    _, data, _ = fit(folder, tmp_path, max_steps=3)
    module = Module()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, enable_checkpointing=False, default_root_dir=tmp_path, **options
    )
    trainer.fit(module, datamodule=data)
    assert module.trained == own_epochs(folder, 1)[:2]


def test_overfitting_takes_the_same_batches_each_time(folder, tmp_path):
    trained, _, _ = fit(folder, tmp_path, max_epochs=3, overfit_batches=1, validate=False)
    assert [batch for _, batch in trained] == [[make(i).key for i in range(10)]] * 3


def test_counters_are_reached_from_the_data_module(damaged, tmp_path):
    data = ShardDataModule(damaged, keys, val="train", batch_size=8, workers=2)
    with pytest.warns(UserWarning, match="damaged sample") as caught:
        for _ in range(2):
            list(data.train_dataloader())
            list(data.val_dataloader())
    assert set(data.damaged.values()) == {4}
    assert len(data.damaged) == len([w for w in caught if "damaged sample" in str(w.message)]) == 3
    data.teardown("fit")


def test_rank_and_world_are_those_of_the_trainer(folder):
    class Trainer:
        global_rank, world_size, overfit_batches = 2, 3, 0

    data = ShardDataModule(folder, keys, batch_size=4)
    data.trainer = Trainer()
    deal = data.train_dataloader().deal
    assert (deal.rank, deal.world, len(deal)) == (2, 3, 4)


def test_bad_folders_and_splits_are_refused_at_once(folder, tmp_path):
    with pytest.raises(UserError, match="there is no such folder; make them with `python -m src.prepare"):
        ShardDataModule(tmp_path / "nowhere")
    with pytest.raises(UserError, match="there is no split 'test', only train, val"):
        ShardDataModule(folder, test="test")
    with pytest.raises(UserError, match="this run was given no split for 'test'"):
        ShardDataModule(folder, keys).test_dataloader()
