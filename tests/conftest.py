"""Tiny random models of all backbones, with working processors: what the tests run on. Nothing is downloaded."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

import devices
from glimpseprune import pruners, replay
from glimpseprune.backbones import LVLM
from glimpseprune.backbones._tiny import SPECIAL as SPECIAL
from glimpseprune.backbones._tiny import VOCABULARY as VOCABULARY
from glimpseprune.lookup import find, names
from glimpseprune.types import Encoded

torch.set_num_threads(1)


def tiny(name: str) -> Callable[..., LVLM]:
    """The tiny model of a backbone, on the device of the tests; made once for each set of arguments."""

    @cache
    def make(attn: str = "sdpa", seed: int = 0) -> LVLM:
        made = find("glimpseprune.backbones", name).Backbone.tiny(attn, seed)
        devices.put(made.model)
        return made

    return make


TINY = {name: tiny(name) for name in names("glimpseprune.backbones")}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", choices=("cpu", "cuda", "pretend"), help="where the models of the tests are"
    )


def pytest_configure(config: pytest.Config) -> None:
    devices.start(config.getoption("--device"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs a GPU is left out where it is not asked for, as SLURM is."""
    if config.getoption("--device") != "cuda":
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


PICTURES = [[picture(112, 168, 0)], [picture(140, 84, 1), picture(84, 84, 2)], [picture(196, 112, 3)]]
QUESTIONS = ["what is on the red tag?", "why?", "how many of them are there, and where?"]


def prompts(backbone: LVLM, count: int = 3) -> dict[str, torch.Tensor]:
    """A left-padded batch of different questions on images of different sizes, two images in the second row."""
    return backbone.prepare(QUESTIONS[:count], PICTURES[:count])


def prompt(backbone: LVLM, row: int = 0) -> dict[str, torch.Tensor]:
    """One row of :func:`prompts`, without padding."""
    return backbone.prepare(QUESTIONS[row : row + 1], PICTURES[row : row + 1])


def unmodified(backbone: LVLM) -> torch.nn.Module:
    """Hugging Face's own model with the weights of ``backbone``, on eager attention: nothing of ours is in it."""
    config = copy.deepcopy(backbone.model.config)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    model.load_state_dict(backbone.model.state_dict())
    return devices.put(model.eval())


@contextmanager
def launched() -> Iterator[None]:
    """Nothing is replayed, on a GPU neither: what is replayed is padded, and says nothing of its columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "may", lambda backbone: False)
        yield


@contextmanager
def watched_layers(backbone: LVLM) -> Iterator[list[int]]:
    """Collects how many columns each decoder layer runs on, in the order in which they run to their end."""
    columns: list[int] = []

    def see(layer, inputs, output) -> None:
        columns.append(inputs[0].shape[1])

    hooks = [layer.register_forward_hook(see) for layer in backbone.text_model.layers]
    try:
        with launched():
            yield columns
    finally:
        for hook in hooks:
            hook.remove()


def multiplied(left: torch.Size, right: torch.Size, out_shape: object = None, **_: object) -> int:
    """FLOPs of a batch of matrix products; none of outer products, of which RoPE makes its angles on a GPU."""
    batch, rows, inner = left
    return 2 * batch * rows * inner * right[2] if inner > 1 else 0


def flops_of(work: Callable[[], object]) -> int:
    """FLOPs of ``work``, as torch counts them; fused kernels of a CPU it would leave out."""
    rules = {torch.ops.aten.bmm: multiplied}
    counter = FlopCounterMode(display=False, custom_mapping=rules)
    with launched(), sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def deepened(encoded: Encoded, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    """The output [B, S + T, D] of a decoder layer, for the naive loops of the tests: with what the backbone adds to it
    in the columns of the prompt (deepstack)."""
    if layer not in encoded.added:
        return hidden
    return hidden + pad(encoded.added[layer], (0, 0, 0, hidden.shape[1] - encoded.mask.shape[1]))


@pytest.fixture(params=["eager", "sdpa"])
def attn(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=sorted(TINY))
def backbone(request: pytest.FixtureRequest, attn: str) -> LVLM:
    """Each backbone on each attention backend that runs on a CPU."""
    return TINY[request.param](attn)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint folder of a tiny Qwen2.5-VL, as ``from_pretrained`` wants it."""
    folder = tmp_path_factory.mktemp("tiny_qwen")
    backbone = TINY["qwen2_5_vl"]()
    backbone.model.save_pretrained(folder)
    backbone.processor.tokenizer.save_pretrained(folder)
    backbone.processor.image_processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> list[str]:
    """Arguments of a training of stage 1 on a tiny base of its own and a few tags."""
    from glimpseprune import prepare
    from glimpseprune.tiny.config import PretrainConfig, TinyConfig
    from glimpseprune.tiny.module import PretrainModule

    folder = tmp_path_factory.mktemp("recipe")
    tiny = TinyConfig(layers=3, hidden=32, intermediate=32, vision_layers=4, vision_hidden=32)
    module = PretrainModule(PretrainConfig(model=tiny))
    module.save(str(folder / "base"))
    count = "{train: 48, val: 8, test: 8}"
    small = ["options.size=224", "options.min_tags=4", "options.max_tags=4"]
    prepare.main(["source=tags", f"out={folder / 'data'}", f"options.count={count}", *small])
    return [
        "conf/demo.yaml",
        f"backbone.path={folder / 'base'}",
        f"data.path={folder / 'data'}",
        "pruner.options.prune_layer=1",
        "pruner.options.probe_layers=[0,1]",
        "pruner.options.width=16",
        "pruner.options.cond_width=16",
        "data.batch_size=4",
        "data.val_samples=8",
        "data.workers=0",
        "trainer.log_every=1",
    ]


@pytest.fixture
def staged(tmp_path, monkeypatch) -> str:
    """Puts the method ``staged`` beside those of pruners/."""
    folder = tmp_path / "more-pruners"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("staged.py"), folder)
    monkeypatch.setattr(pruners, "__path__", [*pruners.__path__, str(folder)])
    return "staged"
