"""What every file in pruners/ must do, on every backbone; a new file is tested the moment it exists.

Beside them stand the throw-away methods of ``_methods.py``, which say whatever the contract is to be able to say. A
method that refuses a backbone does so when it is built, in a sentence; it is then tested on the others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import PICTURES, QUESTIONS, TINY, VOCABULARY, flops_of, launched, prompt, prompts
from contracts._masked import Replay, Witness, masked, rolled_out
from contracts._methods import METHODS
from glimpseprune import cost, pruners
from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError, merge_options
from glimpseprune.data.collate import Collator
from glimpseprune.decoder import (
    View,
    advance,
    append,
    approach,
    branch,
    cut,
    decide,
    prefill,
    rows,
    run_layers,
    see,
    start,
)
from glimpseprune.generate import generate, kept
from glimpseprune.lookup import find, names
from glimpseprune.options import BackboneOptions, DataOptions, TrainConfig
from glimpseprune.rollout import prefilled, score
from glimpseprune.training.glimpse import GlimpseModule
from glimpseprune.types import Encoded, Needs, Sample, Stop

NAMES = [*names("glimpseprune.pruners"), *METHODS]
EXACT = {"atol": 2e-5, "rtol": 1e-4}


def module_of(name: str) -> Any:
    return METHODS[name] if name in METHODS else find("glimpseprune.pruners", name)


def build(name: str, backbone: LVLM, options: Mapping[str, Any] | None = None) -> nn.Module:
    torch.manual_seed(0)
    if name in METHODS:
        kind = METHODS[name]
        pruner = kind.Pruner(backbone, merge_options(kind.Options, options or {}, "pruner.options"))
    else:
        pruner = pruners.build(name, options or {}, backbone)
    return pruner.to(backbone.device).eval()


@cache
def refusal(name: str, backbone: str) -> str | None:
    """Why a method does not run on a backbone; None where it does, and where building it fails in any other way."""
    try:
        build(name, TINY[backbone]())
    except UserError as error:
        return str(error)
    except Exception:
        return None  # let the tests of this pair fail
    return None


PAIRS = [(name, backbone) for name in NAMES for backbone in sorted(TINY)]
BUILT = [pair for pair in PAIRS if refusal(*pair) is None]
on_all = pytest.mark.parametrize(("name", "on"), BUILT, ids=["-".join(pair) for pair in BUILT])


@pytest.mark.parametrize("name", NAMES)
def test_a_refusal_is_a_sentence_and_some_backbone_is_accepted(name) -> None:
    said = {backbone: refusal(name, backbone) for backbone in sorted(TINY)}
    refused = {backbone: why for backbone, why in said.items() if why is not None}
    assert len(refused) < len(said), refused
    for backbone, why in refused.items():
        print(f"{name} refuses {backbone}: {why}")
        assert len(why.split()) >= 5 and "\n" not in why, why


def test_unknown_pruner() -> None:
    with pytest.raises(UserError, match="did you mean 'glimpse'"):
        build("glimpze", next(iter(TINY.values()))())


# -------------------------------------------------------------------------------------------------------------- pieces


@torch.no_grad()
def encode(backbone: LVLM, pruner: Any, inputs: dict[str, Tensor] | None = None) -> Encoded:
    encoded = see(backbone, pruner, prompts(backbone) if inputs is None else inputs)
    encoded.targets = targets(encoded)
    return encoded


def targets(encoded: Encoded) -> list[Tensor]:
    """Of each row, whatever its batch."""
    found = []
    for count in encoded.counts:
        drawn = torch.rand(count, generator=torch.Generator().manual_seed(count))
        found.append((drawn < 0.3).to(encoded.mask.device))
    return found


def extra(backbone: LVLM, batch: int, tokens: int = 3) -> Tensor:
    """[B, T, D], tokens behind a prompt."""
    ids = torch.randint(8, 100, (batch, tokens), generator=torch.Generator().manual_seed(5))
    return backbone.embed(ids.to(backbone.device))


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All that can be reached from ``value``: containers with their sizes, tensors, everything else as it is."""
    if isinstance(value, (Mapping, list, tuple)):
        yield f"{path} holds", list(value) if isinstance(value, Mapping) else len(value)
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from walk(item, f"{path}[{key}]")
    elif is_dataclass(value):
        for field in fields(value):
            yield from walk(getattr(value, field.name), f"{path}.{field.name}")
    elif hasattr(value, "layers") and hasattr(value, "get_seq_length"):
        yield path, value
        yield f"{path} holds", len(value.layers)
        for number, layer in enumerate(value.layers):
            yield from walk([layer.keys, layer.values], f"{path}[{number}]")
    else:
        yield path, value


@contextmanager
def read_only(**things: Any) -> Iterator[None]:
    """Within it nothing that can be reached from ``things`` may be replaced or changed."""
    before = [(path, value, value.clone() if isinstance(value, Tensor) else None) for path, value in walk(things)]
    yield
    after = dict(walk(things))
    assert after.keys() == {path for path, *_ in before}
    for path, value, as_it_was in before:
        if as_it_was is None:
            assert after[path] is value or after[path] == value, f"{path} was replaced"
        else:
            assert after[path] is value, f"{path} was replaced"
            assert torch.equal(value, as_it_was), f"{path} was changed"


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


# ------------------------------------------------------------------------------------------------- what a method says


@on_all
def test_what_a_pruner_declares(name, on) -> None:
    backbone = TINY[on]()
    pruner = build(name, backbone)
    depths = [stop.depth for stop in pruner.stops]
    assert depths == sorted(set(depths)) and all(0 <= depth <= backbone.num_layers for depth in depths)
    assert isinstance(pruner.needs, Needs) and all(isinstance(stop, Stop) for stop in pruner.stops)
    assert all(layer in range(depths[-1]) for layer in pruner.needs.probes), "a probe of a layer behind the last stop"


@pytest.mark.parametrize("name", NAMES)
def test_options_are_documented_and_strict(name) -> None:
    kind = module_of(name).Options
    assert all(field.metadata.get("help") for field in fields(kind))
    with pytest.raises(UserError, match=r"pruner\.options\.no_such_option"):
        build(name, next(TINY[on]() for other, on in BUILT if other == name), {"no_such_option": 0.5})


@torch.no_grad()
@on_all
def test_its_view_is_left_as_it_is_and_decisions_repeat(name, on) -> None:
    """At every stop, state, cache, encoded batch, all weights; whatever random numbers are about."""
    backbone = TINY[on]()
    pruner = build(name, backbone)
    weights = {"backbone": state_of(backbone.model), "pruner": state_of(pruner)}
    inputs = prompts(backbone)
    with read_only(inputs=inputs, weights=weights):
        encoded = encode(backbone, pruner, inputs)
        again = see(backbone, pruner, inputs)
    assert torch.equal(encoded.embeds, again.embeds) and list(encoded.flops) == list(again.flops)
    state = start(encoded)
    for stop in pruner.stops:
        state = approach(backbone, state, pruner)
        view = View(state, encoded, backbone, stop)
        found = []
        with read_only(state=state, encoded=encoded, weights=weights):
            for seed in (1, 2):
                torch.manual_seed(seed)
                found.append(pruner.decide(view))
        first, second = found
        assert first.keep.shape == state.mask.shape and first.keep.dtype == torch.bool
        assert torch.equal(first.keep, second.keep) and list(first.flops) == list(second.flops)
        assert len(first.flops) in (0, len(state.mask))
        assert (first.merge is None) == (second.merge is None)
        if first.merge is not None:
            assert torch.equal(first.merge, second.merge)
            left = int((first.keep & state.visual).sum())
            assert first.merge.shape == (left, backbone.hidden_size) and first.merge.isfinite().all()
        before = state
        state = cut(state, first.keep, stop, merge=first.merge, flops=first.flops)
        if first.merge is not None:
            assert torch.equal(state.hidden[state.visual], first.merge)
            text = before.hidden[before.mask & ~before.visual]
            assert torch.equal(state.hidden[state.mask & ~state.visual], text)


@torch.no_grad()
@on_all
def test_rows_are_decided_alone(name, on) -> None:
    """Prompts of different lengths, one of them with two images, in a batch and each for itself."""
    backbone = TINY[on]()
    pruner = build(name, backbone)
    witness = Witness(pruner)
    encoded = encode(backbone, pruner)
    together, behind = prefill(backbone, encoded, witness), extra(backbone, len(QUESTIONS))
    after = run_layers(backbone, append(branch(together), behind), backbone.num_layers)
    for row in range(len(QUESTIONS)):
        alone = Witness(pruner)
        own = encode(backbone, pruner, prompt(backbone, row))
        state = prefill(backbone, own, alone)
        size = own.mask.shape[1]
        for ours, theirs in zip(witness.taken, alone.taken, strict=True):
            assert torch.equal(ours.left[row, -size:], theirs.left[0])
            if theirs.merged is not None:
                torch.testing.assert_close(ours.merged[row, -size:], theirs.merged[0], **EXACT)
        for ours, theirs in zip(together.trace, state.trace, strict=True):
            assert int(ours.flops[row]) == int(theirs.flops[0]) and int(ours.kept[row]) == int(theirs.kept[0])
        torch.testing.assert_close(together.hidden[row][together.mask[row]], state.hidden[0][state.mask[0]], **EXACT)
        state = run_layers(backbone, append(state, behind[row : row + 1]), backbone.num_layers)
        torch.testing.assert_close(after.hidden[row], state.hidden[0], **EXACT)


@torch.no_grad()
@on_all
@pytest.mark.parametrize("index", [[2, 0, 1], [1, 0, 0, 2], [1]], ids=str)
def test_rows_may_be_others_than_those_encoded(name, on, index) -> None:
    """In another order, several times, not all: as rollouts of a group and micro-batches have them."""
    backbone = TINY[on]()
    pruner = build(name, backbone)
    encoded = encode(backbone, pruner)
    index = torch.tensor(index, device=backbone.device)
    ours, theirs = Witness(pruner), Witness(pruner)
    others = advance(backbone, encoded, rows(approach(backbone, start(encoded), pruner), index), ours)
    state = prefill(backbone, encoded, theirs)
    for mine, his in zip(ours.taken, theirs.taken, strict=True):
        assert torch.equal(mine.left, his.left[index])
    for mine, his in zip(others.trace, state.trace, strict=True):
        assert torch.equal(mine.kept, his.kept[index]) and torch.equal(mine.flops, his.flops[index])
    assert torch.equal(others.row, index)
    torch.testing.assert_close(others.hidden[others.mask], state.hidden[index][state.mask[index]], **EXACT)


@torch.no_grad()
@on_all
def test_text_stays_and_everything_has_its_place(name, on) -> None:
    """Survivors keep their positions until a stop numbers them anew; what follows goes on behind the last of them."""
    backbone = TINY[on]()
    pruner = build(name, backbone)
    encoded = encode(backbone, pruner)
    state, text = start(encoded), encoded.mask & ~encoded.visual
    positions, follow = encoded.positions, encoded.positions.masked_fill(~encoded.mask, -1)
    follow = follow.reshape(-1, *text.shape).amax((0, 2)) + 1  # [B]
    for stop in pruner.stops:
        state = decide(backbone, encoded, state, pruner)
        own = [state.source[row][state.mask[row] & ~state.visual[row]] for row in range(len(text))]
        for row, columns in enumerate(own):
            assert torch.equal(columns, text[row].nonzero()[:, 0])
        if stop.renumber:
            for row, mask in enumerate(state.mask):
                positions = positions.clone()
                positions[..., row, state.source[row, mask]] = torch.arange(int(mask.sum()), device=mask.device)
            follow = state.mask.sum(1)
        at = positions.gather(-1, state.source.expand(*positions.shape[:-1], -1))
        assert torch.equal(state.positions[..., state.mask], at[..., state.mask])
        assert torch.equal(state.next_position, follow)


# --------------------------------------------------------------------------------------------- what is made of it


@torch.no_grad()
@on_all
def test_pruned_is_masked(name, on, attn) -> None:
    """A prompt and tokens behind it, one by one and at once, equal one pass in which masks do the pruning."""
    backbone = TINY[on](attn)
    pruner = build(name, backbone)
    witness, encoded = Witness(pruner), encode(backbone, pruner)
    state = prefill(backbone, encoded, witness)
    behind = extra(backbone, len(encoded.mask))
    expected = masked(backbone, encoded, state.row, witness.taken, behind)
    size = encoded.mask.shape[1]

    at_once = run_layers(backbone, append(branch(state), behind), backbone.num_layers)
    torch.testing.assert_close(at_once.hidden, expected.hidden[:, size:], **EXACT)
    one, steps = branch(state), []
    for column in range(behind.shape[1]):
        one = run_layers(backbone, append(one, behind[:, column : column + 1]), backbone.num_layers)
        steps.append(one.hidden)
    torch.testing.assert_close(torch.cat(steps, 1), at_once.hidden, **EXACT)
    width = expected.hidden.shape[-1]
    columns = expected.hidden.gather(1, state.source[..., None].expand(-1, -1, width))
    torch.testing.assert_close(state.hidden[state.mask], columns[state.mask], **EXACT)
    left = torch.zeros_like(encoded.mask)
    row, column = state.mask.nonzero(as_tuple=True)
    left[row, state.source[row, column]] = True
    assert torch.equal(left, expected.left) and torch.isfinite(state.hidden).all()
    lengths = [layer.keys.shape[2] for layer in state.cache.layers]
    assert lengths == [int(held.sum(1).max()) for held in expected.held]
    assert [int(mask.sum()) for mask in kept(encoded, state)] == (expected.left & encoded.visual).sum(1).tolist()


@contextmanager
def counting(backbone: LVLM, witness: Witness) -> Iterator[dict[int, list[int]]]:
    """Layer -> columns of each call of it, but for calls while the pruner decides."""
    seen: dict[int, list[int]] = {}

    def watch(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not witness.busy:
                seen.setdefault(layer, []).append(args[0].shape[1])

        return hook

    layers = backbone.text_model.layers
    handles = [layer.register_forward_pre_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        with launched():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
@on_all
@pytest.mark.parametrize("row", range(len(QUESTIONS)))
def test_costs_are_what_layers_really_saw(name, on, row) -> None:
    """Mean tokens, KV and both FLOPs ratios from the trace against a probe in every layer and the cache as it is."""
    backbone = TINY[on]()
    pruner, inputs = build(name, backbone), prompt(backbone, row)
    witness, encoded = Witness(pruner), encode(backbone, pruner, inputs)
    with counting(backbone, witness) as seen:
        state = prefill(backbone, encoded, witness)
    layers, original = backbone.num_layers, backbone.layouts(inputs)[0]
    assert sorted(seen) == list(range(layers)) and all(len(calls) == 1 for calls in seen.values())
    text, visual = int(encoded.mask.sum()) - encoded.counts[0], sum(layout.count for layout in original)
    tokens = [seen[layer][0] - text for layer in range(layers)]
    held = [layer.keys.shape[2] for layer in state.cache.layers]

    found = cost.account(
        backbone.shapes, text, original, cost.steps_of(state.trace, 0), looked=encoded.layouts[0], itemsize=4
    )
    assert found.mean_tokens == pytest.approx(sum(tokens) / layers)
    assert found.kept == int(kept(encoded, state)[0].sum()) == int(state.visual.sum())
    assert found.kv_bytes == sum(
        x.numel() * x.element_size() for layer in state.cache.layers for x in (layer.keys, layer.values)
    )
    assert found.kv_ratio == pytest.approx(sum(columns - text for columns in held) / layers / visual)
    decisions = sum(int(cut.flops[0]) for cut in state.trace)
    decoder = sum(cost.layer_flops(backbone.shapes.decoder, text + count) for count in tokens)
    full = layers * cost.layer_flops(backbone.shapes.decoder, text + visual)
    assert found.decoder_ratio == pytest.approx((decoder + decisions) / full)
    rest = cost.prefill_flops(backbone.shapes, text, original, [(layers, visual)])
    ours = cost.prefill_flops(backbone.shapes, text, encoded.layouts[0], [(layers, 0)])
    outside = [flops.tower + flops.projector + flops.lm_head for flops in (ours, rest)]
    assert found.ratio == pytest.approx((outside[0] + decoder + decisions) / (outside[1] + full))


@torch.no_grad()
@on_all
@pytest.mark.parametrize("row", [0, 1])
def test_declared_flops_are_those_that_torch_counts(name, on, row) -> None:
    """All that a method costs beside the decoder on the same columns: its look, what it has the tower compute once
    more, its probes and its decisions, within 3% (the zeros that pad the values of glimpse's predictor are not counted,
    nor is what does not depend on the input). And the decoder on those columns, to the last one."""
    backbone = TINY[on]("eager")
    pruner, inputs = build(name, backbone), prompt(backbone, row)
    looked = pruner.look(backbone, inputs)[0] if hasattr(pruner, "look") else inputs
    witness, made = Witness(pruner), {}

    def whole() -> None:
        made["encoded"] = encoded = see(backbone, pruner, inputs, given)
        made["state"] = prefill(backbone, encoded, witness)

    given = targets(backbone.encode(looked))
    everything = flops_of(whole)
    tower = flops_of(lambda: backbone.encode(looked))
    decoder = flops_of(lambda: prefill(backbone, made["encoded"], Replay(witness)))
    declared = sum(int(cut.flops[0]) for cut in made["state"].trace)
    assert everything - tower - decoder == pytest.approx(declared, rel=0.03)

    encoded = made["encoded"]
    text = int(encoded.mask.sum()) - encoded.counts[0]
    steps = cost.steps_of(made["state"].trace, 0)
    spans = cost.spans(backbone.num_layers, steps)
    assert cost.prefill_flops(backbone.shapes, text, encoded.layouts[0], spans).decoder == decoder


@torch.no_grad()
@on_all
def test_generate_says_what_a_masked_model_says(name, on) -> None:
    backbone = TINY[on]()
    pruner, inputs = build(name, backbone), prompts(backbone)
    encoded, witness = encode(backbone, pruner), Witness(pruner)
    rollout = generate(backbone, pruner, inputs, targets=encoded.targets, max_new_tokens=4, eos_token_id=None)
    state = prefill(backbone, encoded, witness)
    said = masked(backbone, encoded, state.row, witness.taken, backbone.embed(rollout.tokens[:, :-1]))
    logits = backbone.logits(said.hidden[:, encoded.mask.shape[1] - 1 :])  # [B, T, vocabulary]
    assert rollout.tokens.shape == (len(QUESTIONS), 4) and torch.equal(logits.argmax(-1), rollout.tokens)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rollout.keep, kept(encoded, state), strict=True))
    for maps, pictures in zip(rollout.keep_maps(), PICTURES, strict=True):
        assert len(maps) == len(pictures)


@cache
def halved(on: str) -> LVLM:
    backbone = TINY[on]()
    return type(backbone)(copy.deepcopy(backbone.model).to(torch.bfloat16), backbone.processor)


@torch.no_grad()
@on_all
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_it_runs_in_half_precision(name, on, autocast) -> None:
    """What the model computes in stays what it computes in, whatever a method's own weights and scores are."""
    backbone = TINY[on]() if autocast else halved(on)
    pruner = build(name, backbone)
    with torch.autocast(backbone.device.type, torch.bfloat16, enabled=autocast):
        encoded = encode(backbone, pruner)
        plain, state = prefill(backbone, encoded, build("none", backbone)), prefill(backbone, encoded, pruner)
        after = run_layers(backbone, append(branch(state), extra(backbone, len(encoded.mask))), backbone.num_layers)
    for ours, theirs in ((state, plain), (after, plain)):
        assert ours.hidden.dtype == theirs.hidden.dtype and ours.hidden.isfinite().all()
    for ours, theirs in zip(state.cache.layers, plain.cache.layers, strict=True):
        assert ours.keys.dtype == theirs.keys.dtype and ours.values.dtype == theirs.values.dtype


@torch.no_grad()
@on_all
def test_sampled_masks_are_masks(name, on) -> None:
    """Rollouts whose first decision is given: their log-probabilities are those of one masked forward each."""
    backbone = TINY[on]()
    pruner = build(name, backbone)
    encoded = encode(backbone, pruner)
    state = approach(backbone, start(encoded), pruner)
    index = torch.tensor([2, 0, 0, 1, 2], device=backbone.device)
    generator = torch.Generator().manual_seed(4)
    drawn = torch.rand(len(index), state.mask.shape[1], generator=generator).to(backbone.device) < 0.6
    keep = drawn | ~state.visual[index]
    keep[4] = keep[0]  # the same prompt with the same mask, which are prefilled once
    tokens = torch.randint(8, VOCABULARY, (len(index), 3), generator=generator).to(backbone.device)
    mask = torch.arange(3, device=backbone.device) < torch.tensor([3, 1, 3, 2, 2], device=backbone.device)[:, None]
    ready = prefilled(backbone, encoded, pruner, branch(state), index, keep)
    found, entropy = score(backbone, ready, tokens, mask)
    assert torch.equal(ready.row, index) and len(ready.trace) == 1 + max(1, len(pruner.stops))
    assert [int(left.sum()) for left in kept(encoded, ready)] == ready.trace[-1].kept.tolist()
    size = encoded.mask.shape[1]
    for each in range(len(index)):
        one = slice(each, each + 1)
        taken, length = rolled_out(backbone, encoded, pruner, index[one], keep[one]), int(mask[each].sum())
        behind = backbone.embed(tokens[one, : length - 1])
        logits = backbone.logits(masked(backbone, encoded, index[one], taken, behind).hidden[:, size - 1 :])
        expected = logits.log_softmax(-1)
        assert len(taken) == max(1, len(pruner.stops))
        torch.testing.assert_close(found[one, :length], expected.gather(2, tokens[one, :length, None])[..., 0], **EXACT)
        torch.testing.assert_close(entropy[one, :length], -(expected.exp() * expected).sum(-1), **EXACT)


BUDGETS = [pair for pair in BUILT if hasattr(module_of(pair[0]), "to_budget")]


@torch.no_grad()
@pytest.mark.parametrize(("name", "on"), BUDGETS, ids=["-".join(pair) for pair in BUDGETS])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_a_budget_is_kept_but_for_rounding(name, on, keep) -> None:
    """A method may choose image by image, and tokens of two kinds, each number of them rounded."""
    backbone = TINY[on]()
    inputs = prompts(backbone)
    pruner = build(name, backbone, module_of(name).to_budget(keep, backbone))
    state = prefill(backbone, encode(backbone, pruner, inputs), pruner)
    for row, left in zip(backbone.layouts(inputs), state.trace[-1].kept.tolist(), strict=True):
        assert abs(left - keep * sum(layout.count for layout in row)) < 2 * len(row)


# ------------------------------------------------------------------------------------------------------------ training

SAMPLES = [
    Sample(str(row), question, ("ab", "c"), pictures, [[(0, 0, 40, 40)] for _ in pictures])
    for row, (question, pictures) in enumerate(zip(QUESTIONS, PICTURES))
]


@on_all
def test_a_method_with_logits_trains(name, on) -> None:
    """One step of stage 1 against the box and the unpruned model: what is trained has gradients, nothing else."""
    backbone = TINY[on]()
    pruner = build(name, backbone)
    parts = [part for part in ("glimpse", "private", "vip") if hasattr(pruner, part)]
    config = TrainConfig(out="", train=parts or ["vip"], backbone=BackboneOptions(path=""), data=DataOptions(path=""))
    if not hasattr(pruner, "all_logits"):
        with pytest.raises(UserError, match="trains the pruner 'glimpse'"):
            GlimpseModule(config, backbone, pruner)
        return
    config.loss.mask = 1.0
    module = GlimpseModule(config, backbone, pruner)
    module.log = module.log_dict = lambda *_, **__: None
    module._fabric = module._trainer = None
    loss = module.training_step(Collator(backbone)(SAMPLES), 0)
    loss.backward()
    grads = [parameter.grad for part in parts for parameter in getattr(pruner, part).parameters()]
    assert loss.isfinite() and any(grad is not None and grad.abs().sum() > 0 for grad in grads)
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
