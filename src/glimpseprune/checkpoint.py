"""Run folders: config.yaml + trainable.safetensors <-> a backbone with its pruner; import of published weights.

trainable.safetensors holds the pruner's tensors by their names, and those of the LVLM that are not its checkpoint's
(adapters, fine-tuned layers) with ``lvlm.`` before them. A run folder (ours) and a published folder (``config.json`` +
``new_modules_gp.pt``, local or on the hub) load alike. In a run folder that holds its own LVLM (``src.export`` writes
them) ``backbone.path`` is ``.``, wherever the folder is moved. Both are untrusted: safetensors, or
``torch.load(weights_only=True)``; every tensor is checked against the shape that the backbone asks for, and its numbers
for being numbers, before any is copied. What is not there is never made up, unless a training asks for it.
"""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.generation.streamers import BaseStreamer

from glimpseprune import backbones, config, files, generate, hub, lookup, pruners, sharded
from glimpseprune.backbones import ALONGSIDE, LVLM, Seen
from glimpseprune.config import UserError
from glimpseprune.options import BackboneOptions, LoraOptions, PrunerOptions, TrainConfig
from glimpseprune.resources import CONFIG, TRAINABLE
from glimpseprune.types import Answer, Rollout
from glimpseprune.weights import require_good, said_of

PUBLISHED = hub.PUBLISHED
LVLM_PREFIX = "lvlm."


class GlimpsePrune:
    """A backbone with its pruner: ``prepare`` makes the inputs, ``generate`` answers from the pruned cache; ``see``
    runs the vision tower once for all questions on a picture."""

    def __init__(self, backbone: LVLM, pruner: nn.Module, name: str):
        self.backbone, self.pruner, self.name = backbone, pruner, name

    @property
    def processor(self) -> Any:
        return self.backbone.processor

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model's weights."""
        return self.backbone.lm_head.weight.dtype

    @property
    def options(self) -> dict[str, Any]:
        """Those of the pruner."""
        return dict(vars(self.pruner.options)) if hasattr(self.pruner, "options") else {}  # "none" has none

    def __repr__(self) -> str:
        kind = type(self.backbone).__module__.rpartition(".")[2]
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return (
            f"GlimpsePrune(backbone={kind} ({self.backbone.model.name_or_path}), pruner={self.name}({options}), "
            f"dtype={str(self.dtype).removeprefix('torch.')}, device={self.device})"
        )

    def to(self, device: str | torch.device) -> GlimpsePrune:
        """Move it; itself again. Its dtype is chosen when it is loaded: ``load(dtype=...)``."""
        where = device_of(device)
        self.backbone.model.to(where)
        self.pruner.to(where)
        return self

    @torch.no_grad()
    def see(self, images: Any) -> Seen:
        """What the vision tower makes of an image, or of a list of them: ``prepare`` takes it in the place of images,
        as often as there are questions, and ``generate`` then runs no tower.

        ``len(seen)`` pictures are there; ``seen[0]`` is the first. All of it lies on the device of the model.

        Raises:
            UserError: as ``prepare``; or this method looks at pictures before the tower does, for each question anew.
        """
        if hasattr(self.pruner, "look"):
            raise UserError(f"{self.name} looks at pictures before the tower does: give prepare the images themselves")
        return self.backbone.see(self.backbone.pictures(images), self.pruner.needs)

    def prepare(self, questions: Any, images: Any, system: str | None = None) -> dict[str, Any]:
        """What ``generate`` takes, of questions and their images in the forms that people have them.

        Args:
            questions: a text, or a list of them.
            images: of one question, an image or a list of images; of several, a list with one of these per question. An
                image is a PIL image, a path, an array [H, W] or [H, W, C], or a tensor [C, H, W]; or all of them are
                what ``see`` returned, which may be given once for all questions.
            system: system prompt; None is the backbone's default.

        Raises:
            UserError: as ``LVLM.prepare``.
        """
        return self.backbone.prepare(questions, images, system)

    def with_options(self, **options: Any) -> GlimpsePrune:
        """The same model and weights, with other ``options`` of the pruner.

        Raises:
            UserError: the pruner has no such option, or needs other weights for it.
        """
        merged = self.options | options
        if merged.pop("init_token", None) != self.options.get("init_token"):
            raise UserError("init_token says where a training starts from: give it to one")
        if not is_learned(self.pruner):
            pruner = pruners.build(self.name, merged, self.backbone).to(self.device).eval()
        else:
            with torch.device("meta"):  # neither numbers nor draws of them
                pruner = pruners.build(self.name, merged, self.backbone).eval()
            own = self.pruner.state_dict()
            require_same(pruner.state_dict(), own, "with other options")
            pruner.load_state_dict(own, assign=True)
        if hasattr(pruner, "mimic"):  # which decides where another method does
            pruner.mimic(self.pruner.stops)
        return GlimpsePrune(self.backbone, pruner, self.name)

    def ask(self, images: Any, question: str, *, max_new_tokens: int = 128, **arguments: Any) -> Answer:
        """Ask one question about an image, or about several.

        Args:
            images: as of ``prepare``, of one question; or what ``see`` made of them, for more questions on them.
            arguments: as of ``generate``: options of the pruner (``max_keep=.1``), ``streamer`` ...

        Raises:
            UserError: as ``prepare`` and ``generate``; or the backbone has no processor.
        """
        began = time.perf_counter()
        if not isinstance(question, str):
            raise UserError(f"ask takes one question, a text, not {type(question).__name__}: prepare takes several")
        watch = Stopwatch(arguments.pop("streamer", None))
        arguments = {"do_sample": False, "max_new_tokens": max_new_tokens, "streamer": watch} | arguments
        rollout = self.generate(**self.prepare(question, images), **arguments)
        ended = time.perf_counter()
        keep = rollout.keep[0]
        return Answer(
            text=rollout.texts[0].strip(),
            maps=rollout.keep_maps()[0],
            kept=int(keep.sum()),
            total=len(keep),
            first_token=(watch.first or ended) - began,
            seconds=ended - began,
            rollout=rollout,
        )

    def generate(self, **inputs: Any) -> Rollout:
        """Answer prompts: takes what ``prepare`` returns, the pruner's options for this call (such as ``max_keep=.1``)
        and the arguments of Hugging Face's ``generate``.

        Returns:
            Rollout: ``texts``, ``tokens`` [B, T], and per row ``keep`` [V] and ``keep_maps()`` [rows, cols] per image.

        Raises:
            UserError: a tensor of the prompt is missing, no such argument, or a value that it cannot have.
        """
        prompt = {name: inputs.pop(name) for name in (*self.backbone.prompt_keys, *ALONGSIDE) if name in inputs}
        if not isinstance(prompt.get("input_ids"), Tensor):
            raise UserError("generate takes what prepare returns, and has got no input_ids: generate(**inputs, ...)")
        options = {name: inputs.pop(name) for name in self.options if name in inputs}
        for name in inputs:
            lookup.choose(
                name, {*GENERATION, *self.options}, f"the arguments of generate and the options of {self.name}"
            )
        pruner = self.with_options(**options).pruner if options else self.pruner
        try:
            rollout = generate.generate(self.backbone, pruner, prompt, **inputs)
        except (ValueError, TypeError) as error:  # what transformers says of an argument
            if isinstance(error, UserError):
                raise
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            given = ", ".join(f"{name}={str(value)[:40]}" for name, value in inputs.items())
            raise UserError(f"generate({given}): {said}") from error
        if self.processor is None:
            return rollout
        texts = self.processor.tokenizer.batch_decode(rollout.tokens, skip_special_tokens=True)
        return replace(rollout, texts=texts)


class Stopwatch(BaseStreamer):
    """Knows when the first token came, and hands all of them on to another streamer."""

    def __init__(self, further: BaseStreamer | None = None) -> None:
        self.further, self.prompt, self.first = further, True, None

    def put(self, value: Tensor) -> None:
        if not self.prompt and self.first is None:
            self.first = time.perf_counter()
        self.prompt = False  # which comes first of all
        if self.further is not None:
            self.further.put(value)

    def end(self) -> None:
        if self.further is not None:
            self.further.end()


GENERATION = {
    *GenerationConfig().to_dict(),
    *(name for name, item in inspect.signature(generate.generate).parameters.items() if item.kind == item.KEYWORD_ONLY),
    *("tokenizer", "streamer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"),
}
"""Arguments of ``generate`` beside a pruner's options."""


def load(
    ckpt: str | Path | None = None,
    *,
    backbone: str | Path | BackboneOptions | None = None,
    pruner: str | PrunerOptions | None = None,
    lora: LoraOptions | None = None,
    device: str | torch.device = "cpu",
    device_map: str | torch.device | Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    fresh: bool = False,
    **options: Any,
) -> GlimpsePrune:
    """Load a run folder, a published folder or hub id, or a bare backbone with a pruner that needs no weights.

    Args:
        ckpt: run folder (``config.yaml`` + ``trainable.safetensors``) or published folder (``new_modules_gp.pt``).
        backbone: replaces the backbone that ``ckpt`` names; needed where there is no ``ckpt``.
        pruner: replaces the pruner of ``ckpt``, as name or options; default without ``ckpt``: ``none``.
        lora: adapters; default: those of ``ckpt``.
        device: ``cpu``, ``cuda``, ``cuda:1``; ``auto``: a GPU if there is one.
        device_map: the same, as Hugging Face calls it; it is one device.
        dtype: of the language model's weights, such as ``bfloat16`` (default: as the backbone's options say).
        fresh: for the start of a training: a pruner, or adapters, whose weights nobody has given begin at random.
        options: of the pruner, over those of ``ckpt``: ``threshold=.3``.

    Raises:
        UserError: no checkpoint there, missing or damaged weights, or weights of another backbone (the tensor is
            named); options that the pruner does not have.
    """
    device = device_of(device if device_map is None else device_map)
    saved, weights = _read(ckpt) if ckpt is not None else (None, None)
    own = pruner is None and saved is not None
    method = saved.pruner if own else PrunerOptions("none") if pruner is None else pruner
    method = PrunerOptions(method) if isinstance(method, str) else method
    for name, value, kind in (("pruner", method, PrunerOptions), ("lora", lora, LoraOptions | None)):
        if not isinstance(value, kind):
            raise UserError(f"{name}={value!r}: give {'a name, or ' * (name == 'pruner')}options.{name.title()}Options")
    if options:
        known = {item.name for item in fields(lookup.find("glimpseprune.pruners", method.name).Options)}
        for name in options:
            choices = {*known, *inspect.signature(load).parameters} - {"options"}
            lookup.choose(name, choices, f"the arguments of load and the options of {method.name}")
        method = PrunerOptions(method.name, {**method.options, **options})
    pruners.options_of(method.name, method.options)  # a typo is answered before a model is loaded
    where = _backbone_options(backbone, saved, ckpt)
    where = where if dtype is None else replace(where, dtype=backbones.dtype_of(dtype))
    restored = weights is not None and method.name == saved.pruner.name
    if not (restored or fresh):
        require_unlearned(method, where, ckpt, saved)
    model = backbones.load(
        where.path,
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
        from glimpseprune.lora import inject, is_adapter

        found = [int(re.search(r"\blayers\.(\d+)\.", name)[1]) for name in tuned if is_adapter(name)]
        if found and adapters.first_layer is None:  # where they are, whatever pruner is asked for
            adapters = replace(adapters, first_layer=min(found))
        inject(model, adapters, module.stops[0].depth if module.stops else 0)
        wanted = {name for name, _ in model.model.named_parameters() if is_adapter(name)}
        if (missing := sorted(wanted - set(tuned))) and (found or not fresh):
            raise UserError(f"{_called(ckpt)}: tensor '{LVLM_PREFIX}{missing[0]}' of an adapter is missing (lora)")
    if tuned:
        restore_lvlm(model, tuned, str(ckpt))
    if restored:
        restore(module, {name: x for name, x in weights.items() if not name.startswith(LVLM_PREFIX)}, str(ckpt))
    return GlimpsePrune(model, module, method.name)


def require_unlearned(
    method: PrunerOptions, backbone: BackboneOptions, ckpt: Any = None, saved: TrainConfig | None = None
) -> None:
    """Raise UserError if the pruner has weights that are learned, which ``ckpt`` was not given: before a model is
    loaded."""
    if method.name == "none":
        return
    if not is_learned(outline(backbones.architecture(backbone.path), backbone, method).pruner):
        return
    if saved is None:
        held = "a bare backbone holds none"
    elif saved.pruner.name == method.name:
        held = f"'{ckpt}' holds none ({TRAINABLE}): its training has not come to a validation yet"
    else:
        held = f"'{ckpt}' holds those of {saved.pruner.name}"
    raise UserError(f"the method {method.name} has weights that are learned, and {held}: give a run folder of one")


def device_of(device: Any) -> torch.device:
    """The one device that is meant: ``auto``, a name, a torch.device, or a ``device_map`` with nothing but one.

    Raises:
        UserError: it is none, or not on this machine, or several.
    """
    if isinstance(device, Mapping):
        found = {str(where) for where in device.values()}
        if len(found) != 1:
            raise UserError(f"device_map={dict(device)}: a model is on one device here, such as device='cuda:0'")
        device = found.pop()
    if device in ("auto", "balanced", "sequential"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(f"cuda:{device}" if str(device).isdigit() else device)
    except (RuntimeError, TypeError):
        raise UserError(f"device={device!r}: give auto, cpu, cuda or cuda:0 (a dtype: load(dtype=...))") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={device}: torch finds {torch.cuda.device_count()} CUDA devices here")
    return found


def is_learned(pruner: nn.Module) -> bool:
    """Whether it has weights."""
    return any(True for _ in pruner.parameters())


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
        UserError: a tensor is missing, unknown, of another shape, no floating-point one, or holds NaN or Inf.
    """
    require_same(pruner.state_dict(), weights, source)
    require_good(weights.items(), source)
    pruner.load_state_dict(dict(weights))


def require_same(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError unless ``weights`` have the names and shapes of those that are ``wanted``."""
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
    require_good(((LVLM_PREFIX + name, tensor) for name, tensor in weights.items()), source)
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
    folder = hub.folder(ckpt)
    if (folder / CONFIG).is_file():
        saved = config.read(TrainConfig, folder / CONFIG)
        if lookup.is_file(saved.pruner.name) and hub.is_id(ckpt):  # nothing that is downloaded says what is run
            raise UserError(f"'{ckpt}' names the file {saved.pruner.name} as its method: download it, and look at both")
        return saved, _tensors(folder / TRAINABLE) if weights and (folder / TRAINABLE).is_file() else None
    if (folder / PUBLISHED).is_file():
        return _published(folder)
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
    raise UserError(f"no checkpoint in '{ckpt}': expected {CONFIG} or {PUBLISHED}, found {there}")


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:
        raise UserError(said_of(path, error)) from None


def _published(folder: Path) -> tuple[TrainConfig, dict[str, Tensor]]:
    from glimpseprune.pruners import glimpse

    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}: {PUBLISHED} needs its config.json beside it ({error})") from None
    try:
        state = torch.load(folder / PUBLISHED, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{folder / PUBLISHED}: cannot be read ({str(error).splitlines()[0]})") from None
    try:
        options = vars(glimpse.options_from_published(described))
        tensors = glimpse.state_from_published(state)
    except (TypeError, AttributeError, KeyError) as error:  # of another structure altogether
        raise UserError(f"{folder}: not published weights of GlimpsePrune ({error})") from None
    if odd := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{folder / PUBLISHED}: '{odd[0]}' is no tensor")
    path = described.get("base_model") or described.get("_name_or_path") or config.MISSING
    saved = TrainConfig(out=str(folder), backbone=BackboneOptions(path=path), pruner=PrunerOptions("glimpse", options))
    return saved, tensors


def _called(ckpt: Any) -> str:
    return "a bare backbone" if ckpt is None else str(ckpt)


def _backbone_options(given: Any, saved: TrainConfig | None, ckpt: Any) -> BackboneOptions:
    if isinstance(given, BackboneOptions):
        return given
    if given is not None:
        hub.require_name(given)
        return BackboneOptions(path=str(given))
    if saved is None:
        raise UserError("load needs a checkpoint, or backbone=<folder or hub id>")
    if saved.backbone.path == config.MISSING:
        raise UserError(f"'{ckpt}' does not name its backbone: give backbone.path=<folder or hub id>")
    return saved.backbone
