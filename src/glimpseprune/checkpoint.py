"""Run folders: config.yaml + trainable.safetensors <-> a backbone with its pruner; import of published weights.

trainable.safetensors holds the pruner's tensors by their names, and those of the LVLM that are not its checkpoint's
(adapters, fine-tuned layers) with ``lvlm.`` before them. A run folder (ours) and a published folder (``config.json`` +
``new_modules_gp.pt``, local or on the hub) load alike. In a run folder that holds its own LVLM (``src.export`` writes
them) ``backbone.path`` is ``.``, wherever the folder is moved. Both are untrusted: safetensors, or
``torch.load(weights_only=True)``; every tensor is checked against the shape that the backbone asks for before any is
copied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from glimpseprune import backbones, config, files, pruners, resources, sharded
from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError
from glimpseprune.generate import generate
from glimpseprune.options import BackboneOptions, LoraOptions, PrunerOptions, TrainConfig
from glimpseprune.types import Rollout

CONFIG, TRAINABLE, PUBLISHED = "config.yaml", "trainable.safetensors", "new_modules_gp.pt"
LVLM_PREFIX = "lvlm."
HERE = "."
"""``backbone.path`` of a run folder that is its own backbone's folder, too."""


class GlimpsePrune:
    """A backbone with its pruner. ``processor`` makes the inputs, ``generate`` answers from the pruned cache."""

    def __init__(self, backbone: Any, pruner: nn.Module, name: str):
        self.backbone, self.pruner, self.name = backbone, pruner, name

    @property
    def processor(self) -> Any:
        return self.backbone.processor

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def generate(self, **inputs: Any) -> Rollout:
        """Answer prompts: takes what ``processor`` returns and the arguments of Hugging Face's ``generate``.

        Returns:
            Rollout: ``tokens`` [B, T], and per row ``keep`` [V] and ``keep_maps()`` [rows, cols] per image.
        """
        prompt = {name: inputs.pop(name) for name in self.backbone.prompt_keys if name in inputs}
        return generate(self.backbone, self.pruner, prompt, **inputs)


def load(
    ckpt: str | Path | None = None,
    *,
    backbone: str | Path | BackboneOptions | None = None,
    pruner: str | PrunerOptions | None = None,
    lora: LoraOptions | None = None,
    device: str = "cpu",
) -> GlimpsePrune:
    """Load a run folder, a published folder or hub id, or a bare backbone with a pruner that needs no weights.

    Args:
        ckpt: run folder (``config.yaml`` + ``trainable.safetensors``) or published folder (``new_modules_gp.pt``).
        backbone: replaces the backbone that ``ckpt`` names; needed where there is no ``ckpt``.
        pruner: replaces the pruner of ``ckpt``, as name or options; default without ``ckpt``: ``none``.
        lora: adapters, fresh where ``ckpt`` has none; default: those of ``ckpt``.

    Raises:
        UserError: no checkpoint there, damaged weights, or weights of another backbone (the tensor is named).
    """
    saved, weights = _read(ckpt) if ckpt is not None else (None, None)
    own = pruner is None and saved is not None
    method = saved.pruner if own else PrunerOptions("none") if pruner is None else pruner
    method = PrunerOptions(method) if isinstance(method, str) else method
    pruners.options_of(method.name, method.options)  # a typo is answered before a model is loaded
    where = _backbone_options(backbone, saved, ckpt)
    model = backbones.load(
        resources.find(where.path),
        dtype=where.dtype,
        attn=where.attention,
        device=device,
        min_pixels=where.min_pixels,
        max_pixels=where.max_pixels,
    )
    module = pruners.build(method.name, method.options, model).to(device).eval()
    tuned = {name.removeprefix(LVLM_PREFIX): x for name, x in (weights or {}).items() if name.startswith(LVLM_PREFIX)}
    adapters = saved.lora if lora is None and saved is not None else lora
    if adapters is not None:
        from glimpseprune.lora import inject

        inject(model, adapters, module.stops[0].depth if module.stops else 0)
    if tuned:
        restore_lvlm(model, tuned, str(ckpt))
    if weights is not None and method.name == saved.pruner.name:
        restore(module, {name: x for name, x in weights.items() if not name.startswith(LVLM_PREFIX)}, str(ckpt))
    return GlimpsePrune(model, module, method.name)


def outline(
    architecture: PreTrainedConfig, backbone: BackboneOptions, pruner: PrunerOptions, lora: LoraOptions | None = None
) -> GlimpsePrune:
    """What :func:`load` would give, without numbers and without a processor: on the meta device, from no file.

    Raises:
        UserError: a backbone that is not known, or options that do not fit it.
    """
    options = {key: value for key, value in pruner.options.items() if key != "init_token"}  # there is no tokenizer
    model = backbones.skeleton(architecture, backbone.dtype)
    with torch.device("meta"):
        module = pruners.build(pruner.name, options, model)
        if lora is not None:
            from glimpseprune.lora import inject

            inject(model, lora, module.stops[0].depth if module.stops else 0)
    return GlimpsePrune(model, module, pruner.name)


def load_pruner(ckpt: str | Path, backbone: LVLM) -> tuple[str, nn.Module]:
    """Name and pruner of a run folder or a published folder, on a ``backbone`` that is there already.

    Raises:
        UserError: as :func:`load`; or ``ckpt`` holds no weights of a pruner, or also those of a language model, without
            which its pruner would not be what it was.
    """
    saved, weights = _read(ckpt)
    if not weights:
        raise UserError(f"'{ckpt}' holds no weights of a pruner ('{saved.pruner.name}')")
    if any(name.startswith(LVLM_PREFIX) for name in weights):
        raise UserError(f"the pruner of '{ckpt}' belongs to a language model that was trained, too")
    module = pruners.build(saved.pruner.name, saved.pruner.options, backbone).to(backbone.device).eval()
    restore(module, weights, str(ckpt))
    return saved.pruner.name, module


def read_config(ckpt: str | Path) -> TrainConfig:
    """What a run folder or a published folder says of itself; raises as :func:`load`."""
    return _read(ckpt, weights=False)[0]


def restore(pruner: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy ``weights`` into ``pruner``, all or nothing.

    Raises:
        UserError: a tensor is missing, unknown, or of another shape; it is named with both shapes.
    """
    wanted = pruner.state_dict()
    for name, tensor in wanted.items():
        if name not in weights:
            raise UserError(f"{source}: tensor '{name}' is missing; was it saved with other pruner.options?")
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{source}: tensor '{name}' is {list(weights[name].shape)}, this backbone needs {list(tensor.shape)}: "
                "the checkpoint belongs to another backbone or to other pruner.options"
            )
    unknown = sorted(set(weights) - set(wanted))
    if unknown:
        raise UserError(f"{source}: unknown tensor '{unknown[0]}'; was it saved with other pruner.options?")
    pruner.load_state_dict(dict(weights))


def restore_lvlm(backbone: LVLM, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy fine-tuned ``weights`` into the LVLM, all or nothing; raises as :func:`restore`."""
    own = dict(backbone.model.named_parameters())
    for name, tensor in weights.items():
        if name not in own or sharded.shape(own[name]) != tensor.shape:
            there = f"{list(sharded.shape(own[name]))} in this backbone" if name in own else "not in this backbone"
            raise UserError(
                f"{source}: tensor '{LVLM_PREFIX}{name}' of shape {list(tensor.shape)} is {there}: "
                "the checkpoint belongs to another backbone or to other lora options"
            )
    for name, tensor in weights.items():
        sharded.fill(own[name], tensor)
    backbone.restored |= set(weights)


def trained(pruner: nn.Module, backbone: LVLM | None = None) -> dict[str, Tensor]:
    """What trainable.safetensors holds of them, by its names there: the parameters themselves, and buffers."""
    tensors = pruner.state_dict(keep_vars=True)
    if backbone is not None:
        tensors |= {LVLM_PREFIX + name: tensor for name, tensor in backbone.changed().items()}
    return tensors


def save(folder: str | Path, cfg: TrainConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write ``config.yaml`` and ``trainable.safetensors`` (with what :func:`trained` names); a kill meanwhile leaves
    the previous weights whole."""
    folder = Path(folder)
    config.save(cfg, folder / CONFIG)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with files.whole(folder / TRAINABLE) as partial:
        save_file(weights, partial, metadata={"pruner": cfg.pruner.name, "backbone": cfg.backbone.path})


def _read(ckpt: str | Path, weights: bool = True) -> tuple[TrainConfig, dict[str, Tensor] | None]:
    """The configuration and weights (None where there are none) of a run folder or of published weights."""
    folder = Path(resources.find(ckpt))
    if not folder.is_dir() and _looks_like_hub_id(str(ckpt)):
        folder = _download(str(ckpt))
    if (folder / CONFIG).is_file():
        saved = config.read(TrainConfig, folder / CONFIG)
        if saved.backbone.path == HERE and (folder / "config.json").is_file():
            saved.backbone.path = str(folder)
        return saved, _tensors(folder / TRAINABLE) if weights and (folder / TRAINABLE).is_file() else None
    if (folder / PUBLISHED).is_file():
        return _published(folder)
    if folder.is_dir():
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise UserError(f"no checkpoint in '{ckpt}': expected {CONFIG} or {PUBLISHED}, found {there}")
    raise UserError(f"no checkpoint at '{ckpt}': give a run folder, a folder with {PUBLISHED}, or a hub id")


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); is the file complete?") from None


def _published(folder: Path) -> tuple[TrainConfig, dict[str, Tensor]]:
    from glimpseprune.pruners import glimpse

    try:
        described = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {PUBLISHED} needs its config.json beside it ({error})") from None
    try:
        state = torch.load(folder / PUBLISHED, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{folder / PUBLISHED}: cannot be read ({str(error).splitlines()[0]})") from None
    options = vars(glimpse.options_from_published(described))
    path = described.get("base_model") or described.get("_name_or_path") or config.MISSING
    saved = TrainConfig(out=str(folder), backbone=BackboneOptions(path=path), pruner=PrunerOptions("glimpse", options))
    return saved, glimpse.state_from_published(state)


def _backbone_options(given: Any, saved: TrainConfig | None, ckpt: Any) -> BackboneOptions:
    if isinstance(given, BackboneOptions):
        return given
    if given is not None:
        return BackboneOptions(path=str(given))
    if saved is None:
        raise UserError("load needs a checkpoint, or backbone=<folder or hub id>")
    if saved.backbone.path == config.MISSING:
        raise UserError(f"'{ckpt}' does not name its backbone: give backbone.path=<folder or hub id>")
    return saved.backbone


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.yaml", "*.safetensors", PUBLISHED]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(f"no checkpoint at '{name}': no such folder, and the hub says {type(error).__name__}") from None
