"""The pretended GPU knows CUDA's rules, which a run with ``--device cuda`` holds against a real one; the rest of the
tests passes on it (a few of them here, the others by ``make test-gpu DEVICE=pretend``); without a GPU, CUDA is refused.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import devices
from conftest import TINY, prompts, pytest_configure
from glimpseprune.backbones import LVLM
from glimpseprune.decoder import View
from glimpseprune.generate import generate
from glimpseprune.lookup import names
from glimpseprune.pruners import build
from glimpseprune.types import Decision, Needs, Stop


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """One, if only a pretended one."""
    with devices.Pretend() if devices.device == "cpu" else nullcontext():
        yield


def on(device: str, *shape: int) -> Tensor:
    return torch.ones(shape, device=device)


def here(*shape: int) -> Tensor:
    return on("cpu", *shape)


def there(*shape: int) -> Tensor:
    return on("cuda", *shape)


def set_item(x: Tensor, index: object, value: object) -> Tensor:
    x[index] = value
    return x


def numbers(device: str) -> Tensor:
    return torch.zeros(2, dtype=torch.long, device=device)


REFUSED = {
    "a sum": lambda: there(2) + here(2),
    "a matrix product": lambda: there(2, 2) @ here(2, 2),
    "a sum into one on the CPU": lambda: here(2).add_(there(2)),
    "a sum into a number on the CPU": lambda: here().add_(there()),
    "a number on the GPU among many on the CPU": lambda: here(2) + there(),
    "one joined to another": lambda: torch.cat([there(2), here(2)]),
    "numbers that are stacked": lambda: torch.stack([there(), here()]),
    "an index on the GPU": lambda: here(2)[numbers("cuda")],
    "a mask on the CPU": lambda: there(2).masked_fill(here(2).bool(), 0),
    "a choice by an index on the CPU": lambda: there(2).gather(0, numbers("cpu")),
    "rows of a table on the CPU": lambda: nn.functional.embedding(numbers("cuda"), here(3, 2)),
    "a layer on the CPU": lambda: nn.Linear(2, 2)(there(2)),
    "values put at an index": lambda: set_item(there(2), numbers("cuda"), here(2)),
    "arrays": lambda: there(2).numpy(),
    "arrays unasked": lambda: np.asarray(there(2)),
    "chance of the CPU": lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
    "chance of the CPU, drawn from": lambda: torch.multinomial(there(2), 1, generator=torch.Generator()),
    "a gradient": lambda: setattr(nn.Parameter(there(2)), "grad", here(2)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_mixes_devices_is_refused(what: str) -> None:
    with pytest.raises((RuntimeError, TypeError, IndexError)):
        REFUSED[what]()


def moved() -> Tensor:
    layer = nn.Linear(2, 2)
    before = layer.weight
    layer.to("cuda")
    assert before is layer.weight  # optimisers that know it train it
    return layer(there(2))


def trained() -> Tensor:
    layer = nn.Linear(2, 2).to("cuda")
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(there(2)).sum().backward()
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
    return torch.stack([p.grad.sum() for p in layer.parameters()])


ALLOWED: dict[str, Callable[[], Tensor]] = {
    "a number on the CPU": lambda: there(2) + here(),
    "an index on the CPU": lambda: there(2)[numbers("cpu")],
    "a slice that is copied into": lambda: set_item(there(2), slice(0, 2), here(2)),
    "a number put at an index": lambda: set_item(there(2), numbers("cuda"), here()),
    "a copy": lambda: there(2).copy_(here(2)),
    "a fill": lambda: there(2).fill_(here()),
    "a size": lambda: there(1).expand_as(here(2)),
    "what is made like it": lambda: torch.zeros_like(there(2)) + there(2).new_ones(2),
    "what is made of it": lambda: torch.tensor(there(2).tolist(), device=there(2).device),
    "a move": lambda: here(2).to(there(2)) + here(2).cuda() + here(2).to("cuda", torch.float64),
    "what was moved": moved,
    "what was copied": lambda: copy.deepcopy(nn.Linear(2, 2).to("cuda"))(there(2)),
    "what is trained": trained,
    "a parameter": lambda: nn.Parameter(there(2)).data + there(2),
}


@pytest.mark.parametrize("what", ALLOWED)
def test_what_does_not_is_done(what: str) -> None:
    found = ALLOWED[what]()
    assert found.device == devices.CUDA and found.is_cuda and not found.cpu().is_cuda
    assert not (found.cpu() + here(1)).is_cuda


def test_moving_is_copying() -> None:
    x = here(2)
    x.to("cuda").zero_()
    x.to("cuda").cpu().zero_()
    assert x.tolist() == [1, 1] and x.to("cpu") is x


def on_it(backbone: LVLM, pruner: nn.Module) -> tuple[LVLM, nn.Module]:
    moved = copy.deepcopy(backbone)
    moved.model.to("cuda")
    return moved, pruner.to("cuda")


@pytest.mark.parametrize("method", names("glimpseprune.pruners"))
@pytest.mark.parametrize("name", sorted(TINY))
def test_every_method_says_on_it_what_it_says_elsewhere(name: str, method: str) -> None:
    """Prompts and targets are on the CPU, where processors and loaders leave them."""
    backbone, answers = TINY[name](), []
    prompt = {key: value.cpu() for key, value in prompts(backbone).items()}
    counts = [sum(layout.count for layout in row) for row in backbone.layouts(prompt)]
    targets = [torch.arange(count, device="cpu") % 3 == 0 for count in counts]
    for moved in (False, True):
        torch.manual_seed(0)
        model, pruner = backbone, build(method, {}, backbone).eval()
        if moved:
            model, pruner = on_it(model, pruner)
        answers.append(generate(model, pruner, prompt, targets=targets, max_new_tokens=3))
    plain, ours = answers
    assert ours.tokens.is_cuda and ours.prefill.hidden.is_cuda
    assert torch.equal(ours.tokens.cpu(), plain.tokens.cpu())
    assert all(torch.equal(mine.cpu(), other.cpu()) for mine, other in zip(ours.keep, plain.keep))
    assert [[each.tolist() for each in row] for row in ours.keep_maps()] == [
        [each.tolist() for each in row] for row in plain.keep_maps()
    ]


class Misplaced(nn.Module):
    """A pruning method with the mistake that this is all about."""

    stops, needs = (Stop(1),), Needs()

    def decide(self, view: View) -> Decision:
        return Decision(torch.ones(view.state.mask.shape, dtype=torch.bool, device="cpu"))


def test_a_planted_mistake_is_found() -> None:
    backbone, pruner = on_it(TINY["qwen2_5_vl"](), Misplaced())
    with pytest.raises(RuntimeError, match="cpu" if devices.device == "cuda" else "on the GPU and on the CPU"):
        generate(backbone, pruner, prompts(backbone), max_new_tokens=1)


# ---------------------------------------------------------------------------------------------------------- the option


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_cuda_is_refused() -> None:
    """Not skipped: pytest ends with an error of usage before it looks for tests."""
    asked = SimpleNamespace(getoption={"--device": "cuda"}.get)
    with pytest.raises(pytest.UsageError, match="torch finds no CUDA device here"):
        pytest_configure(asked)


HANDFUL = [
    "golden/test_golden.py::test_inference[qwen-batch2_thresh.sdpa]",
    "test_grpo.py::test_gradient_is_that_of_a_naive_implementation[sdpa-qwen2_5_vl]",
    "test_pretrain.py::test_training_lowers_the_loss_and_the_folder_loads",
    "test_training.py::test_evaluate_prints_every_method_and_writes_its_files",  # and what it evaluates: a training
]


@pytest.mark.slow
@pytest.mark.skipif(devices.device != "cpu", reason="this is such a run")
def test_a_handful_passes_on_the_pretended_one() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "pretend", *HANDFUL]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "skipped" not in done.stdout
