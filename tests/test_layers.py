"""Checkpointed and compiled layers: the same numbers, from fewer that are held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import devices
from conftest import TINY, picture, tiny
from devices import same
from glimpseprune import decoder, lora
from glimpseprune.backbones import LVLM
from glimpseprune.data.collate import Collator
from glimpseprune.decoder import follow, run_layers, start
from glimpseprune.options import BackboneOptions, DataOptions, LoraOptions, LossOptions, TrainConfig, TrainerOptions
from glimpseprune.pruners import build
from glimpseprune.training._layers import checkpointed
from glimpseprune.training.glimpse import GlimpseModule
from glimpseprune.types import Inputs, Sample

SAMPLES = [
    Sample("a", "what?", ("abcd",), [picture(140, 112)], [[(0, 0, 30, 30)]]),
    Sample("b", "how many of them?", ("c",), [picture(112, 112, 1), picture(84, 112, 2)], [[], []]),
]
GLIMPSE = {"prune_layer": 1, "vision_layers": [2, 1], "width": 16, "cond_width": 16, "num_heads": 2, "dropout": 0.0}


needs_backward = pytest.mark.skipif(devices.device == "pretend", reason="layers run in C++'s backward")


def stage(
    backbone: LVLM, trainer: dict[str, object], prune_layer: int = 1, **loss: float
) -> tuple[GlimpseModule, Inputs]:
    torch.manual_seed(1)
    config = TrainConfig(
        out="",
        backbone=BackboneOptions(path=""),
        data=DataOptions(path=""),
        loss=LossOptions(**loss),
        trainer=TrainerOptions(**trainer),
    )
    module = GlimpseModule(config, backbone, build("glimpse", GLIMPSE | {"prune_layer": prune_layer}, backbone))
    module.log = module.log_dict = lambda *_, **__: None
    module._fabric = module._trainer = None
    return module, Collator(backbone)(SAMPLES)


def gradients(module: GlimpseModule, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    loss = module.training_step(inputs, 0)
    loss.backward()
    return loss.detach(), [p.grad for p in module.pruner.parameters() if p.grad is not None]


@contextmanager
def held() -> Iterator[dict[int, int]]:
    """Bytes of the tensors that a graph saves for its backward pass, by where they are."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("loss", [{}, {"dropped": 2}], ids=["all", "thinned"])
@pytest.mark.parametrize("progress", [0.1, 0.9], ids=["value", "stc"])
@needs_backward
def test_checkpointed_gradients_are_the_same_to_the_bit(monkeypatch, name, loss, progress):
    monkeypatch.setattr(GlimpseModule, "progress", progress)
    (plain, inputs), (frugal, _) = (stage(TINY[name]("sdpa"), {"checkpointing": on}, **loss) for on in (False, True))
    (one, ours), (other, theirs) = gradients(plain, inputs), gradients(frugal, inputs)
    assert torch.equal(one, other)
    assert len(ours) == len(theirs) and all(map(same, ours, theirs))


@needs_backward
def test_adapters_learn_the_same_with_fewer_activations():
    """As the RL stage scores answers: prompt and tokens in turn on one cache, dropout in the adapters."""
    backbone = tiny("qwen2_5_vl")()
    lora.inject(backbone, LoraOptions(rank=4, alpha=8.0, dropout=0.1, first_layer=0), 0)
    inputs = Collator(backbone)(SAMPLES)
    weights = [p for name, p in backbone.model.named_parameters() if lora.is_adapter(name)]
    torch.manual_seed(3)
    for weight in weights:
        torch.nn.init.normal_(weight.requires_grad_(), std=0.1)
    seen = []
    for model in (backbone, checkpointed(backbone)):
        torch.manual_seed(4)
        with held() as saved:
            state = run_layers(model, start(backbone.encode(inputs.prompt)), backbone.num_layers)
            said = follow(model, state, inputs.answer_ids, inputs.answer_mask)
        seen.append((said, torch.autograd.grad(said.square().mean(), weights), sum(saved.values())))
    (one, ours, much), (other, theirs, little) = seen
    assert torch.equal(one, other) and all(map(same, ours, theirs))
    assert little < 0.5 * much


@pytest.mark.parametrize(("compiler", "loss"), [("eager", {"dropped": 2})], ids=["eager, thinned"])
@pytest.mark.skipif(devices.device != "cpu", reason="a compiler does not see where tests put tensors")
def test_compiled_is_what_is_not(monkeypatch, compiler, loss):
    """The last layer and the predictor."""
    monkeypatch.setattr(GlimpseModule, "progress", 0.9)
    # Compiled in place: not the ones of other tests.
    (plain, inputs), (made, _) = (stage(tiny("qwen2_5_vl")(), {"compile": how}, 2, **loss) for how in (None, compiler))
    (one, ours), (other, theirs) = gradients(plain, inputs), gradients(made, inputs)
    torch.testing.assert_close(one, other)
    for mine, theirs_ in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, theirs_, atol=1e-6, rtol=1e-3)
    assert plain.saved().keys() == made.saved().keys()


@torch.no_grad()
def test_checkpointed_layers_run_in_parts_where_there_is_no_gradient(monkeypatch):
    """As of a policy's log-probabilities that are only compared with: an MLP takes a part of the columns at a time."""
    backbone = TINY["qwen2_5_vl"]()
    monkeypatch.setattr(decoder, "ROWS", 7)
    encoded = backbone.encode(Collator(backbone)(SAMPLES).prompt)
    ours, plain = (run_layers(model, start(encoded), 3).hidden for model in (checkpointed(backbone), backbone))
    assert torch.equal(ours, plain)
