"""Recordings of the published implementation on tiny random models, reproduced number by number.

The folder is ``GLIMPSEPRUNE_RECORDINGS`` (default: the copy beside this file) with ``qwen/`` and/or ``llava/``; every
case found there is run with its own overrides. Tolerance: 1e-4 on logits, exact on masks, positions and tokens. The
recordings come from HVision-NKU/GlimpsePrune@091a3d5. Its batched decoding puts every row at the last row's position;
recordings named FIXEDPOS have that repaired, and in the others the rows it went wrong for are not decoded.

``grpo_*`` record a step of its reinforcement: four rollouts on a prompt pruned to the evidence box, with adapters
(``grpo_lora_state.pt``) and without. Its log-probabilities are not those of one distribution. The policy's first token
is scored as it was sampled, on the prompt pruned after K layers; its later tokens, and those of the policy without
adapters, on a prompt in which the pruned tokens are missing from every layer; the first token of the policy without
adapters, on the unpruned prompt. Training here knows only the first of these (docs/method.md §1, §3); the others are
asked for explicitly, and then all numbers agree, gradients too.
"""

from __future__ import annotations

import copy
import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from devices import put
from glimpseprune import lora, losses
from glimpseprune.backbones import LVLM, llava1_5, qwen2_5_vl
from glimpseprune.decoder import View, append, branch, cut, prefill, run_layers, start
from glimpseprune.generate import continue_from
from glimpseprune.options import LoraOptions
from glimpseprune.pruners import build, glimpse
from glimpseprune.rollout import prefilled, score
from glimpseprune.types import Encoded, Needs, Stop

RECORDINGS = Path(os.environ.get("GLIMPSEPRUNE_RECORDINGS") or Path(__file__).parent / "recordings")
SHARED = {"images.pt", "le_vectors.pt", "new_modules_gp.pt"}
ADAPTERS = "grpo_lora_state.pt"
PLACEHOLDER = -200
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


def cases(train: bool) -> list:
    """Every case file but those of the RL stage, see :func:`grpo_cases`."""
    files = [file for family in ("qwen", "llava") for file in sorted((RECORDINGS / family).glob("*.pt"))]
    files = [file for file in files if file.name not in SHARED and not file.name.startswith("grpo_")]
    return [
        pytest.param(file, id=f"{file.parent.name}-{file.stem}")
        for file in files
        if file.name.startswith("train_") == train
    ]


def grpo_cases() -> list:
    files = [file for family in ("qwen", "llava") for file in sorted((RECORDINGS / family).glob("grpo_*.pt"))]
    return [pytest.param(file, id=f"{file.parent.name}-{file.stem}") for file in files if file.name != ADAPTERS]


def test_there_are_recordings() -> None:
    assert cases(train=False) or cases(train=True), f"no recordings in {RECORDINGS}"


@pytest.mark.parametrize("file", cases(train=False))
@torch.no_grad()
def test_inference(file: Path) -> None:
    case, backbone = load(file), load_backbone(file)
    pruner, targets = load_pruner(file, case, backbone)
    encoded = backbone.encode(prompt_of(file, case, backbone), pruner.needs, targets)
    real = encoded.mask
    if "position_ids_full" in case:
        same_columns(encoded.positions, real, case["position_ids_full"])
    if "input_ids_full" in case:
        same_columns(encoded.input_ids, real, case["input_ids_full"])
    if "image_embeds" in case:
        close(encoded.embeds[encoded.visual], case["image_embeds"])
    for layer, state in zip(pruner.needs.states, case.get("vip_cond", ())):
        close(encoded.states[layer], state.reshape(-1, state.shape[-1]))

    if isinstance(pruner, glimpse.Pruner):
        check_glimpse(
            file, case, View(run_layers(backbone, start(encoded), pruner.stops[0].depth), encoded, backbone), pruner
        )

    state = prefill(backbone, encoded, pruner)
    check_reduced(case, backbone, encoded.input_ids, state)
    close(backbone.logits(state.hidden[:, -1]), case["prefill_last_logits"])
    if "prefill_logits" in case:
        close(backbone.logits(state.hidden)[state.mask], case["prefill_logits"][state.mask])

    steps = case["generated"].shape[1]
    rollout = continue_from(backbone, encoded, state, max_new_tokens=steps, do_sample=False, output_logits=True)
    for ours, theirs in zip(rollout.keep, case.get("keep_masks", ()), strict="keep_masks" in case):
        assert torch.equal(ours, theirs.flatten())
    ours = state.next_position[:, None] + torch.arange(steps - 1)  # [B, steps - 1]
    theirs = ours
    if "decode_position_ids" in case:  # one row where the reference had one position for all
        recorded = [step[..., -1].reshape(-1, step.shape[-2])[-1] for step in case["decode_position_ids"]]
        theirs = torch.stack(recorded[1 - steps :], 1).expand(ours.shape)
    right = (ours == theirs).all(1)  # [B]
    if not right.all():
        assert len(ours) > 1 and "FIXEDPOS" not in file.name and right[-1] and (theirs == theirs[-1]).all()
    assert torch.equal(rollout.tokens[right], case["generated"][right])
    close(rollout.extra["logits"][right], case["step_logits"].transpose(0, 1)[right])
    close(rollout.extra["logits"][:, 0], case["step_logits"][0])


@pytest.mark.parametrize("file", cases(train=True))
def test_training(file: Path) -> None:
    case, backbone = load(file), load_backbone(file)
    pruner, _ = load_pruner(file, case, backbone)
    pruner.train()
    ids, answer = case["input_ids"], case["labels"] != -100
    lengths = answer.sum(1)
    answer_mask = torch.arange(int(lengths.max())) < lengths[:, None]  # [B, T]
    answer_ids = torch.zeros_like(answer_mask, dtype=torch.long).masked_scatter(answer_mask, ids[answer])
    only_prompt = {**case, "attention_mask": case["attention_mask"].bool() & ~answer}
    with torch.no_grad():
        encoded = backbone.encode(prompt_of(file, only_prompt, backbone), pruner.needs)
        state = run_layers(backbone, start(encoded), backbone.num_layers)

    # The glimpse comes last in the prompt, and the answer one position later.
    columns = torch.cat([answer_mask[:, :1], answer_mask], 1)
    full = append(branch(state), torch.zeros(*columns.shape, backbone.hidden_size), columns)
    positions = case["position_ids_ins" if "position_ids_ins" in case else "position_ids_with_glimpse"]
    for row, mask in enumerate(case["attention_mask_ins"].bool()):
        assert torch.equal(full.positions[..., row, :][..., full.mask[row]], positions[..., row, :][..., mask])

    view = View(state, encoded, backbone)
    probes: list[Tensor] = []
    pruner.vip.register_forward_pre_hook(lambda module, args: probes.append(args[0]))
    keep_logits, answer_logits = pruner.with_answer(view, answer_ids, answer_mask)
    same_rows(probes[0], case["glimpse_attn"])
    close(keep_logits, torch.cat(list(case["image_token_mask_logits"]), 1))
    targets = torch.cat([mask.flatten() for mask in case["ref_token_masks"]])
    loc = losses.mask_loss(keep_logits, targets, encoded.counts)
    le = losses.answer_loss(answer_logits, answer_ids, answer_mask)
    close(loc, case["loc_loss"])
    close(le, case["le_loss"])
    for name, loss in (("dice", losses.dice), ("bce", losses.bce)):
        close(loss(keep_logits[-1], targets, encoded.counts), case[f"{name}_last" if f"{name}_last" in case else name])

    for key, loss in (("grad_norm", loc + le), ("grad_norm_loc", loc), ("grad_norm_le", le)):
        if key in case:
            check_gradients(pruner, loss, case[key], case.get("grads", {}) if key == "grad_norm" else {})
    assert not any(parameter.grad is not None for parameter in backbone.model.parameters())


@pytest.mark.parametrize("file", grpo_cases())
def test_reinforcement(file: Path) -> None:
    """One step: log-probabilities of policy and reference, advantages, both losses, the gradient of every adapter."""
    case = load(file)
    backbone, adapters = adapted(file, case)
    prompt = {"input_ids": case["prompt_input_ids"], "attention_mask": torch.ones_like(case["prompt_input_ids"])}
    grids = load(file.parent / "images.pt")["grid_thw"]
    prompt |= {"images": case["images"], "image_grid_thw": torch.stack([grids[x].view(3) for x in case["images"]])}
    oracle = build("oracle", {"prune_layer": glimpse.options_from_published(published(file)).prune_layer}, backbone)
    targets = [case["ref_token_mask"].flatten()]
    encoded = backbone.encode(prompt_of(file, prompt, backbone), targets=targets)
    keep = (oracle.decide(View(start(encoded), encoded, backbone)).keep | ~encoded.visual).expand(
        len(case["sampled"]), -1
    )
    lengths = torch.tensor([len(row) for row in case["completion_logps"]])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # [R, T]
    check_columns(case, encoded, keep, mask)

    def log_probs(depth: int, keep: Tensor, columns: slice) -> Tensor:
        """Of some columns of the rollouts, on prompts pruned to ``keep`` when ``depth`` layers have run."""
        state, index = run_layers(backbone, start(encoded), depth), torch.zeros(len(keep), dtype=torch.long)
        prompts = prefilled(backbone, encoded, Given(depth), state, index, keep)
        return score(backbone, prompts, case["sampled"][:, : mask.shape[1]], mask)[0][:, columns]

    first, later = slice(0, 1), slice(1, None)
    policy = torch.cat([log_probs(oracle.stops[0].depth, keep, first), log_probs(0, keep, later)], 1)
    with torch.no_grad(), lora.disabled(backbone.model):
        reference = torch.cat([log_probs(0, torch.ones_like(keep), first), log_probs(0, keep, later)], 1)
    for ours, name in ((policy, "completion_logps"), (reference, "ref_completion_logps")):
        close(ours, torch.nn.utils.rnn.pad_sequence(list(case[name]), batch_first=True), name)

    advantages, _ = losses.group_advantages(case["scores"], torch.zeros(len(mask), dtype=torch.long), std_floor=1e-4)
    close(advantages, case["advantages"])
    weights = losses.token_weights(mask, "grpo", mask.shape[1])
    per_token, _ = losses.policy_loss(policy, policy.detach(), advantages[:, None])
    reward_loss, kd_loss = (weights * per_token).sum(), 0.04 * (weights * losses.k3(policy, reference)).sum()
    close(reward_loss, case["reward_loss"])
    close(kd_loss, case["kd_loss"])
    (reward_loss + kd_loss).backward()
    for name, norm in case["grad_norm"].items():
        assert adapters[name].grad.norm().item() == pytest.approx(float(norm), abs=1e-4, rel=1e-4), name


class Given:
    """A pruner whose masks are given to it."""

    needs = Needs()

    def __init__(self, depth: int) -> None:
        self.stops = (Stop(depth),)


def adapted(file: Path, case: dict) -> tuple[LVLM, dict[str, torch.nn.Parameter]]:
    """The backbone with the recorded adapters on all layers, ready to train, and those by their recorded names."""
    backbone, recorded = copy.deepcopy(load_backbone(file)), load(file.parent / ADAPTERS)
    lora.inject(backbone, LoraOptions(rank=int(case["lora_r"]), alpha=float(case["lora_alpha"]), first_layer=0), 0)
    lora.set_trainable(backbone.model, True)
    named = {f"base_model.model.model.{name}": p for name, p in backbone.text_model.named_parameters()}
    adapters = {name: parameter for name, parameter in named.items() if lora.is_adapter(name)}
    assert adapters.keys() == recorded.keys()
    for name, parameter in adapters.items():
        parameter.data.copy_(recorded[name])
    return backbone, adapters


def check_columns(case: dict, encoded: Encoded, keep: Tensor, mask: Tensor) -> None:
    """The pruned prompts with the rollouts behind them: which tokens, at which positions."""
    columns = case["conv_in"]
    state = cut(start(encoded), keep, index=torch.zeros(len(keep), dtype=torch.long))
    size = state.mask.shape[1]
    full = append(state, torch.zeros(*mask.shape, encoded.embeds.shape[-1]), mask)
    assert torch.equal(full.mask, columns["attention_mask"].bool())
    ids = encoded.input_ids.expand(len(keep), -1).gather(1, state.source)
    assert torch.equal(ids, columns["input_ids"][:, :size])
    same_columns(full.positions, full.mask, columns["position_ids"])


def check_glimpse(file: Path, case: dict, view: View, pruner: glimpse.Pruner) -> None:
    if (file.parent / "le_vectors.pt").exists() and not extra_weights(file, case):
        close(pruner.glimpse(), load(file.parent / "le_vectors.pt")["le_vectors"])
    if "hidden_before_reduce" in case:
        close(view.state.hidden[view.state.mask], case["hidden_before_reduce"][view.encoded.mask])
    glimpse_position = case["position_ids_with_glimpse"][..., -1].reshape(-1, len(view.state.mask))[-1]
    assert torch.equal(view.state.next_position, glimpse_position)
    same_rows(pruner.probe(view), case["glimpse_attn"])
    theirs = torch.cat(list(case["image_token_mask_logits"]), 1)  # [outputs, N]
    close(pruner.all_logits(view)[-len(theirs) :], theirs)


def check_reduced(case: dict, backbone: LVLM, input_ids: Tensor, state) -> None:
    """The pruned prompt: which columns, at which positions, and what the cache holds for them."""
    if "attention_mask_reduced" in case:
        assert torch.equal(state.mask, case["attention_mask_reduced"].bool())
        same_columns(state.positions, state.mask, case["position_ids_reduced"])
        same_columns(input_ids.gather(1, state.source), state.mask, case["input_ids_reduced"])
    layers = state.cache.layers
    if case.get("kv_len") is not None:
        assert [layer.keys.shape[2] for layer in layers] == list(case["kv_len"])
    for index, pair in case.get("kv", {}).items():
        for ours, theirs in zip((layers[int(index)].keys, layers[int(index)].values), pair):
            ours = ours if ours.ndim == theirs.ndim else ours.sum(-1)
            mask = state.mask[:, None].expand(ours.shape[:3])
            close(ours[mask], theirs[mask])


def check_gradients(pruner: glimpse.Pruner, loss: Tensor, norms: dict, whole: dict) -> None:
    """Norms of the gradients of ``loss``, and the gradients themselves where they were recorded."""
    ours = dict(pruner.named_parameters())
    names = {name: our_name(name) for name in norms}
    assert sorted(names.values()) == sorted(ours)
    found = torch.autograd.grad(loss, [ours[name] for name in names.values()], retain_graph=True, allow_unused=True)
    for name, gradient in zip(names, found):
        if norms[name] is None:
            assert gradient is None, name
            continue
        assert gradient.norm().item() == pytest.approx(float(norms[name]), abs=1e-4, rel=1e-4), name
        if name in whole:
            close(gradient, whole[name], name)


def our_name(published: str) -> str:
    head, _, tail = published.partition(".")
    head = {"attn_fuser": "vip", "learnable_embeddings": "glimpse.embeddings"}.get(
        head, head.replace("le_", "glimpse.")
    )
    return f"{head}.{tail}".strip(".")


def close(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), **TOLERANCE, msg=lambda text: f"{what} {text}")


def same_columns(ours: Tensor, mask: Tensor, theirs: Tensor) -> None:
    """Equal on real columns; both left-padded to the same width."""
    assert ours.shape == theirs.shape
    assert torch.equal(ours[..., mask], theirs[..., mask])


def same_rows(ours: Tensor, theirs: list[Tensor] | Tensor) -> None:
    close(ours, torch.cat([row.flatten(1) for row in theirs]))


def prompt_of(file: Path, case: dict, backbone: LVLM) -> dict[str, Tensor]:
    images = load(file.parent / "images.pt")["pixel_values"]
    mask = case["attention_mask"].bool()
    if file.parent.name == "qwen":
        pixels = torch.cat([images[name].float() for name in case["images"]])
        return {
            "input_ids": case["input_ids"],
            "attention_mask": mask,
            "pixel_values": pixels,
            "image_grid_thw": case["image_grid_thw"],
        }
    # LLaVA's recordings have one placeholder per image.
    rows, places = [], backbone.visual_tokens((1, 1))
    for ids, real in zip(case["input_ids"], mask):
        rows.append(ids[real].repeat_interleave(torch.where(ids[real] == PLACEHOLDER, places, 1)))
    ids, mask = (torch.zeros(len(rows), max(map(len, rows)), dtype=dtype) for dtype in (torch.long, torch.bool))
    for row, real in enumerate(rows):
        ids[row, -len(real) :], mask[row, -len(real) :] = real, True
    pixels = images[torch.tensor(case["image_idx"])].float()
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def load_pruner(file: Path, case: dict, backbone: LVLM) -> tuple[torch.nn.Module, list[Tensor] | None]:
    """The case's pruner with its overrides; for recordings with given masks, the oracle and its targets per row."""
    overrides = {**case.get("overrides", {}), **case.get("config_overrides", {})}
    if unknown := set(overrides) - set(glimpse.PUBLISHED):
        raise ValueError(f"{file.name} overrides what is not mapped: {sorted(unknown)}")
    if not case.get("do_selection", True):
        return build("none", {}, backbone), None
    options = glimpse.options_from_published({**published(file), **overrides})
    if "ref_token_masks" in case and "labels" not in case:
        if unknown := set(overrides) - {"reduce_layer"}:
            raise ValueError(f"{file.name} has given masks and overrides {sorted(unknown)}")
        images = iter(mask.flatten() for mask in case["ref_token_masks"])
        grids = backbone.layouts(prompt_of(file, case, backbone))
        targets = [torch.cat([next(images) for _ in row]) for row in grids]
        return build("oracle", {"prune_layer": options.prune_layer}, backbone), targets
    pruner = build("glimpse", options, backbone).eval()
    state = load(file.parent / "new_modules_gp.pt")
    for name, value in extra_weights(file, case).items():
        head, _, tail = name.partition(".")
        if tail:
            state[head][tail] = value
        else:
            state[head] = value
    if "selected_visual_layers" in overrides:  # another number of blocks: leave out those that are not there
        state["attn_fuser"] = {k: v for k, v in state["attn_fuser"].items() if k in pruner.vip.state_dict()}
    pruner.load_state_dict(glimpse.state_from_published(state))
    return pruner, None


def extra_weights(file: Path, case: dict) -> dict[str, Tensor]:
    """Weights a case adds to or puts in place of the shared ones; one of its attention backends may stand for all."""
    same_case = file.parent.glob(f"{file.name.split('.')[0]}.*.pt")
    found = (other.get("state_dict_extra") for other in (case, *map(load, same_case)))
    return next((extra for extra in found if extra), {})


def load(file: Path) -> dict:
    return torch.load(file, weights_only=True)


def published(file: Path) -> dict:
    return json.loads((file.parent / "config.json").read_text())


def load_backbone(file: Path) -> LVLM:
    attn = "eager" if file.stem.endswith(".eager") else "sdpa"
    return (load_qwen if file.parent.name == "qwen" else load_llava)(file.parent, attn)


TEXT_KEYS = (
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
)


@cache
def load_qwen(folder: Path, attn: str) -> LVLM:
    config = published(folder / "-")
    rope = {"rope_type": "default", "mrope_section": config["rope_scaling"]["mrope_section"]}
    text = {key: config[key] for key in TEXT_KEYS}
    hf = Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": rope | {"rope_theta": config["rope_theta"]}},
        vision_config=config["vision_config"],
        **{key: config[key] for key in config if key.endswith("_token_id") and key[:3] not in ("bos", "eos")},
        tie_word_embeddings=False,
    )
    names = {"visual.": "model.visual.", "model.": "model.language_model.", "lm_head.": "lm_head."}
    return qwen2_5_vl.Backbone(fill(Qwen2_5_VLForConditionalGeneration, hf, attn, folder, names))


@cache
def load_llava(folder: Path, attn: str) -> LVLM:
    config, images = published(folder / "-"), load(folder / "images.pt")
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    hf = LlavaConfig(
        text_config=LlamaConfig(**{key: config[key] for key in TEXT_KEYS}, rope_parameters=rope, eos_token_id=None),
        vision_config=CLIPVisionConfig(**images["clip_config"]),
        vision_feature_layer=config["mm_vision_select_layer"],
        tie_word_embeddings=False,
    )
    names = {
        "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
        "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
        "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
        "model.": "model.language_model.",
        "lm_head.": "lm_head.",
    }
    backbone = llava1_5.Backbone(fill(LlavaForConditionalGeneration, hf, attn, folder, names))
    backbone.image_token_id = PLACEHOLDER
    return backbone


def fill(kind: type, config, attn: str, folder: Path, names: dict[str, str]) -> torch.nn.Module:
    """A model of ``kind`` with the recorded weights, whose names begin with the keys of ``names`` (first match)."""
    config._attn_implementation = attn
    model = kind(config).eval().requires_grad_(False)
    state = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if (prefix := next((prefix for prefix in names if name.startswith(prefix)), None)) is not None:
            state[names[prefix] + name.removeprefix(prefix)] = value
    state.setdefault("lm_head.weight", state["model.language_model.embed_tokens.weight"])  # tied
    model.load_state_dict(state)
    return put(model)
