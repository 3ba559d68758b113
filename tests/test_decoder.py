"""The prefill loop against Hugging Face's forward, and against masks written out for every layer."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from conftest import TINY, deepened, launched, prompt, prompts
from glimpseprune import decoder
from glimpseprune.attention import Gate
from glimpseprune.backbones import LVLM
from glimpseprune.decoder import View, advance, append, branch, cut, fork, prefill, rows, run_layers, start
from glimpseprune.decoder import follow as follow_on
from glimpseprune.pruners import build, glimpse
from glimpseprune.types import Decision, Encoded, Needs, Prefill, Stop

EXACT = {"atol": 2e-5, "rtol": 1e-4}
GLIMPSE = {
    "prune_layer": 1,
    "probe_layers": (0, 1),
    "vision_layers": (2, 1),
    "width": 16,
    "cond_width": 8,
    "num_heads": 2,
    "dropout": 0.0,
}


class Halves:
    """Drops every other visual token that is left, at each of its stops."""

    needs = Needs()

    def __init__(self, depths: tuple[int, ...], renumber: bool = False, prune_cache: bool = True) -> None:
        self.stops = tuple(Stop(depth, renumber, prune_cache) for depth in depths)

    def decide(self, view: View) -> Decision:
        return Decision(every_other(view.state.source[:, -1:] - view.state.source, self.stops.index(view.stop)))


def every_other(distance: Tensor, stage: int) -> Tensor:
    """Which columns stage 0, 1, ... keep, by their distance from the last one (so padding does not matter)."""
    return distance // 2**stage % 2 == 0


class All(Halves):
    def decide(self, view: View) -> Decision:
        return Decision(torch.ones_like(view.state.mask))


def gaze(backbone: LVLM, **options) -> glimpse.Pruner:
    """A glimpse with weights that tell tokens apart."""
    torch.manual_seed(3)
    pruner = build("glimpse", GLIMPSE | options, backbone).eval()
    for parameter in pruner.glimpse.parameters():
        parameter.data.normal_()
    return pruner


@torch.no_grad()
def naive(
    backbone: LVLM,
    encoded: Encoded,
    hidden: Tensor,
    allowed: list[Tensor],
    positions: list[Tensor],
    inject=None,
    probe=None,
) -> Tensor:
    """All layers over all columns; layer i with its own mask [B, S, S] and positions. No cache, nothing is dropped.
    ``inject`` [L, n, D] goes to the last n columns at the input of every layer but the first."""
    for index, layer in enumerate(backbone.text_model.layers):
        if inject is not None and index > 0:
            hidden = hidden + pad(inject[index], (0, 0, hidden.shape[1] - inject.shape[1], 0))
        visible = (allowed[index] | torch.eye(hidden.shape[1], dtype=torch.bool))[:, None]
        if backbone.attention == "eager":
            visible = torch.zeros_like(visible, dtype=hidden.dtype).masked_fill(~visible, torch.finfo(hidden.dtype).min)
        rope = backbone.text_model.rotary_emb(hidden, positions[index])
        hidden = layer(hidden, attention_mask=visible, position_embeddings=rope, probe=probe)
        hidden = deepened(encoded, index, hidden)
    return hidden


def follow(encoded: Encoded, tokens: int) -> tuple[Tensor, Tensor]:
    """Mask [B, S + T] and positions of an unpruned prompt with ``tokens`` columns behind it."""
    shape = (len(encoded.mask), tokens)
    last = encoded.positions[..., -1:].expand(*encoded.positions.shape[:-1], tokens)
    return (
        torch.cat([encoded.mask, torch.ones(shape, dtype=torch.bool)], 1),
        torch.cat([encoded.positions, last + 1 + torch.arange(tokens)], -1),
    )


def answers(backbone: LVLM, batch: int, tokens: int = 3) -> Tensor:
    torch.manual_seed(5)
    return backbone.embed(torch.randint(8, 100, (batch, tokens)))


@torch.no_grad()
@pytest.mark.parametrize("pruner", [All(()), All((2,)), All((0, 3, 4))], ids=["none", "2", "0,3,4"])
def test_keep_all_is_the_forward_of_hugging_face(backbone, pruner) -> None:
    inputs = prompts(backbone)
    encoded = backbone.encode(inputs)
    with launched():
        state = prefill(backbone, encoded, pruner)
    # LLaVA's forward, unlike its generate, counts padding as positions unless told otherwise.
    told = {"position_ids": encoded.positions} if encoded.positions.ndim == 2 else {}
    ours, theirs = backbone.logits(state.hidden), backbone.model(**inputs, **told).logits
    assert torch.equal(ours[encoded.mask], theirs[encoded.mask])
    assert torch.isfinite(ours).all()


CASES = {
    "prune": Halves((2,)),
    "before the first layer": Halves((0,)),
    "after the last": Halves((4,)),
    "twice": Halves((1, 3)),
    "renumber": Halves((2,), renumber=True),
    "renumber twice": Halves((1, 3), renumber=True),
    "keep the cache": Halves((2,), prune_cache=False),
    "keep the cache twice": Halves((1, 3), prune_cache=False),
    "renumber, keep the cache": Halves((1, 3), renumber=True, prune_cache=False),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_pruned_is_masked(backbone, name) -> None:
    """A prompt and three tokens behind it, one by one and at once, equal one pass in which masks do the pruning."""
    pruner, layers = CASES[name], backbone.num_layers
    encoded = backbone.encode(prompts(backbone))
    state = prefill(backbone, encoded, pruner)
    extra = answers(backbone, len(encoded.mask))
    at_once = run_layers(backbone, append(branch(state), extra), layers)
    one = branch(state)
    steps = []
    for column in range(extra.shape[1]):
        one = run_layers(backbone, append(one, extra[:, column : column + 1]), layers)
        steps.append(one.hidden)
    torch.testing.assert_close(torch.cat(steps, 1), at_once.hidden, **EXACT)

    # keys[i] [B, S]: the prompt's columns that layer i shows to the prompt, and seen[i] those it shows to new tokens
    mask, size = encoded.mask, encoded.mask.shape[1]
    kept, here, positions = [mask], mask, [encoded.positions]
    for stage, stop in enumerate(pruner.stops):
        depth = stop.depth
        here = here & (~encoded.visual | every_other(size - 1 - torch.arange(size), stage))
        renumbered = (here.cumsum(1) - 1).expand(encoded.positions.shape) if stop.renumber else positions[-1]
        kept += [kept[-1]] * (depth + 1 - len(kept)) if depth else []
        positions += [positions[-1]] * (depth + 1 - len(positions)) if depth else []
        kept[depth:], positions[depth:] = [here], [renumbered]
    kept += [kept[-1]] * (layers - len(kept))
    positions += [positions[-1]] * (layers - len(positions))
    survivors = here
    total = size + extra.shape[1]
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    allowed, spans = [], []
    for index in range(layers):
        prompt_sees = pad(kept[index], (0, total - size), value=True)[:, None].expand(-1, size, -1)
        shown = kept[index] if not any(s.prune_cache for s in pruner.stops if s.depth > index) else survivors
        answer_sees = pad(shown, (0, total - size), value=True)[:, None].expand(-1, total - size, -1)
        allowed.append(torch.cat([prompt_sees, answer_sees], 1) & causal)
        behind = positions[index].masked_fill(~kept[index], -1).amax(-1, keepdim=True)
        if behind.ndim == 3:
            behind = behind.amax(0, keepdim=True).expand(3, -1, -1)
        spans.append(torch.cat([positions[index].clamp(min=0), behind + 1 + torch.arange(total - size)], -1))
    expected = naive(backbone, encoded, torch.cat([encoded.embeds, extra], 1), allowed, spans)

    torch.testing.assert_close(at_once.hidden, expected[:, size:], **EXACT)
    columns = expected[:, :size].gather(1, state.source[..., None].expand(-1, -1, expected.shape[-1]))
    torch.testing.assert_close(state.hidden[state.mask], columns[state.mask], **EXACT)
    assert torch.equal(torch.zeros_like(mask).scatter(1, state.source, state.mask), survivors)
    assert torch.isfinite(state.hidden).all()
    lengths = [layer.keys.shape[2] for layer in state.cache.layers]
    width = int(survivors.sum(1).max())
    spared = [not any(stop.prune_cache for stop in pruner.stops if stop.depth > index) for index in range(layers)]
    assert lengths == [int(k.sum(1).max()) if own else width for k, own in zip(kept, spared)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["glimpse", *CASES])
def test_batched_is_single(backbone, name) -> None:
    """Prompts of different lengths, one of them with two images, together and each alone."""
    pruner = gaze(backbone) if name == "glimpse" else CASES[name]
    together = prefill(backbone, backbone.encode(prompts(backbone), pruner.needs), pruner)
    extra = answers(backbone, 3)
    after = run_layers(backbone, append(branch(together), extra), backbone.num_layers)
    for row in range(3):
        alone = prefill(backbone, backbone.encode(prompt(backbone, row), pruner.needs), pruner)
        mask = together.mask[row]
        assert int(mask.sum()) == alone.mask.shape[1] and alone.mask.all()
        torch.testing.assert_close(together.hidden[row][mask], alone.hidden[0], **EXACT)
        alone = run_layers(backbone, append(alone, extra[row : row + 1]), backbone.num_layers)
        torch.testing.assert_close(after.hidden[row], alone.hidden[0], **EXACT)
        assert torch.equal(after.next_position[row], alone.next_position[0])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("pruned", [True, False])
def test_padded_is_unpadded(backbone, side, pruned) -> None:
    pruner, inputs = gaze(backbone) if pruned else All(()), prompt(backbone)
    amount = {"left": (4, 0), "right": (0, 4), "both": (2, 3)}[side]
    padded = {
        **{key: value for key, value in inputs.items() if key != "mm_token_type_ids"},
        "input_ids": pad(inputs["input_ids"], amount, value=0),
        "attention_mask": pad(inputs["attention_mask"], amount),
    }
    plain, other = (backbone.encode(x, pruner.needs) for x in (inputs, padded))
    plain, other = prefill(backbone, plain, pruner), prefill(backbone, other, pruner)
    assert other.mask[:, -1].all()
    torch.testing.assert_close(other.hidden[other.mask], plain.hidden[0], **EXACT)
    assert torch.equal(other.positions[..., other.mask], plain.positions[..., 0, :])
    assert torch.equal(other.source[other.mask] - amount[0], plain.source[0])
    extra = answers(backbone, 1)
    new = [run_layers(backbone, append(x, extra), backbone.num_layers).hidden for x in (plain, other)]
    torch.testing.assert_close(*new, **EXACT)


@torch.no_grad()
def test_a_prompt_without_a_mask_is_all_real(backbone) -> None:
    inputs = prompt(backbone)
    expected = backbone.encode(inputs)
    del inputs["attention_mask"]
    ours = backbone.encode(inputs)
    assert ours.mask.all() and torch.equal(ours.embeds, expected.embeds)
    assert torch.equal(ours.positions, expected.positions)


@torch.no_grad()
def test_what_follows_an_image_is_behind_all_of_it(backbone) -> None:
    """A prompt that ends with one, whose rows and columns may have gone further than its first axis."""
    inputs = prompt(backbone, 2)
    end = int((inputs["input_ids"] == backbone.image_token_id).nonzero()[-1, 1]) + 1
    cut_off = {name: x[:, :end] if x.shape == inputs["input_ids"].shape else x for name, x in inputs.items()}
    encoded = backbone.encode(cut_off)
    assert encoded.visual[0, -1] and int(start(encoded).next_position) == int(encoded.positions.max()) + 1


@torch.no_grad()
@pytest.mark.parametrize("probe", glimpse.PROBES)
def test_glimpse_is_one_token_appended_to_a_full_forward(backbone, probe) -> None:
    """One decode step on the cache sees what a glimpse that was in the sequence from the start would see."""
    pruner = gaze(backbone, probe=probe)
    encoded = backbone.encode(prompts(backbone), pruner.needs)
    state = run_layers(backbone, start(encoded), 2)
    before = [layer.keys.clone() for layer in state.cache.layers]
    ours = pruner.probe(View(state, encoded, backbone))
    for layer, keys in zip(state.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)

    vectors = pruner.glimpse()
    mask, positions = follow(encoded, 1)
    size = mask.shape[1]
    allowed = torch.ones(size, size, dtype=torch.bool).tril() & mask[:, None]
    seen = {}

    def see(index: int, query: Tensor, key: Tensor, scale: float) -> None:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        row = (query[:, :, -1:] @ key.transpose(-1, -2))[:, :, 0] * scale  # [B, H, S + 1]
        if probe == "log_softmax":
            row = row.masked_fill(~mask[:, None], -torch.inf).log_softmax(-1)
        seen[index] = row[..., :-1].transpose(1, 2)[encoded.visual]

    embeds = torch.cat([encoded.embeds, vectors[0].expand(len(mask), -1, -1)], 1)
    naive(backbone, encoded, embeds, [allowed] * 4, [positions] * 4, inject=vectors, probe=see)
    torch.testing.assert_close(ours, torch.cat([seen[0], seen[1]], -1), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("probe", glimpse.PROBES)
def test_a_glimpse_of_the_question_is_a_full_forward(backbone, probe) -> None:
    """A position for each token of the question, and an answer behind them: prompts of a batch see and say what each
    does in a sequence of its own, written out; what the positions see is averaged, head by head."""
    pruner = gaze(backbone, probe=probe, sight="question")
    inputs = prompts(backbone)
    encoded = backbone.encode(inputs, pruner.needs)
    state = run_layers(backbone, start(encoded), backbone.num_layers)
    view = View(state, encoded, backbone)
    together = pruner.probe(view).split(encoded.counts)
    ids, answered = (
        torch.tensor([[9, 10], [11, 0], [12, 13]]),
        torch.tensor([[True, True], [True, False], [True, True]]),
    )
    keep_logits, logits = pruner.with_answer(view, ids, answered)
    if probe == "logits":  # the published log-softmax counts an answer behind the glimpse
        torch.testing.assert_close(keep_logits, pruner.all_logits(view), **EXACT)
    lengths = []
    for row, seen in enumerate(together):
        own, answer = backbone.encode(prompt(backbone, row), pruner.needs), ids[row][answered[row]]
        images = own.input_ids[0] == backbone.image_token_id
        asked = own.embeds[:, int(images.nonzero()[-1]) + 1 :]  # [1, n, D]
        lengths.append(asked.shape[1])
        alone, said = in_sequence(backbone, pruner, own, asked, answer[None])
        torch.testing.assert_close(seen, alone, **EXACT)
        torch.testing.assert_close(logits[row, : len(answer)], said, **EXACT)
    assert len(set(lengths)) == 3 and pruner.looks(encoded.input_ids, encoded.mask, backbone).tolist() == lengths


def in_sequence(
    backbone: LVLM, pruner: glimpse.Pruner, own: Encoded, asked: Tensor, answer: Tensor
) -> tuple[Tensor, Tensor]:
    """Probe and answer's logits of one prompt with a glimpse per token ``asked`` [1, n, D] and an answer [1, T]."""
    unit = asked / (asked.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    part = pruner.glimpse
    vectors = torch.cat([part.norm(part.proj(each + unit)) for each in part.embeddings])  # [L, n, D]
    size, looks, count = own.embeds.shape[1], vectors.shape[1], answer.shape[1]
    mask, positions = follow(own, looks + count)
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril() & mask[:, None]
    seen = {}

    def see(index: int, query: Tensor, key: Tensor, scale: float) -> None:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        glimpses = slice(size, size + looks)
        rows = (query @ key.transpose(-1, -2))[:, :, glimpses, : size + looks] * scale  # [1, H, n, S + n]
        if pruner.options.probe == "log_softmax":
            rows = rows.masked_fill(~causal[:, None, glimpses, : size + looks], -torch.inf).log_softmax(-1)
        seen[index] = rows.exp().mean(2).log()[..., :size].transpose(1, 2)[own.visual]

    embeds = torch.cat([own.embeds, vectors[:1], backbone.embed(answer)], 1)
    shifted = torch.cat([vectors, torch.zeros_like(vectors[:, :count])], 1)
    hidden = naive(backbone, own, embeds, [causal] * 4, [positions] * 4, inject=shifted, probe=see)
    return torch.cat([seen[0], seen[1]], -1), backbone.logits(hidden[:, size + looks - 1 : -1])[0]


@torch.no_grad()
def test_answer_behind_the_glimpse_is_a_full_forward(backbone) -> None:
    pruner = gaze(backbone)
    encoded = backbone.encode(prompts(backbone), pruner.needs)
    state = run_layers(backbone, start(encoded), backbone.num_layers)
    torch.manual_seed(5)
    ids = torch.randint(8, 100, (3, 2))
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    keep_logits, logits = pruner.with_answer(View(state, encoded, backbone), ids, mask)
    torch.testing.assert_close(keep_logits, pruner.all_logits(View(state, encoded, backbone)), **EXACT)

    vectors = pruner.glimpse()
    columns, positions = follow(encoded, 2)
    size = columns.shape[1]
    allowed = torch.ones(size, size, dtype=torch.bool).tril() & columns[:, None]
    embeds = torch.cat([encoded.embeds, vectors[0].expand(3, -1, -1), backbone.embed(ids[:, :1])], 1)
    shifted = torch.cat([vectors, torch.zeros_like(vectors)], 1)  # e_i go to the last column but one
    hidden = naive(backbone, encoded, embeds, [allowed] * 4, [positions] * 4, inject=shifted)
    torch.testing.assert_close(logits[mask], backbone.logits(hidden[:, -2:])[mask], **EXACT)


def test_gradients_reach_glimpse_and_vip_only(backbone) -> None:
    pruner = gaze(backbone, probe_layers=(1,)).train()
    with torch.no_grad():
        encoded = backbone.encode(prompts(backbone), pruner.needs)
        state = run_layers(backbone, start(encoded), 2)
    pruner.logits(View(state, encoded, backbone)).square().sum().backward()
    for name, parameter in pruner.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    used = pruner.glimpse.embeddings.grad.flatten(1).abs().sum(1) > 0
    assert used.tolist() == [True, True, False, False]  # e_2 and e_3 come after the probe
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in backbone.model.parameters())


def test_answer_loss_reaches_the_glimpse_of_every_layer(backbone) -> None:
    pruner = gaze(backbone)
    with torch.no_grad():
        encoded = backbone.encode(prompts(backbone), pruner.needs)
        state = run_layers(backbone, start(encoded), backbone.num_layers)
    ids = torch.full((3, 2), 9)
    logits = pruner.with_answer(View(state, encoded, backbone), ids, torch.ones_like(ids).bool())[1]
    logits.log_softmax(-1)[..., 9].sum().backward()
    assert (pruner.glimpse.embeddings.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in pruner.vip.parameters())


@pytest.mark.parametrize("estimator", ["stc", "value"])
def test_a_gated_student_trains_under_autocast(backbone, estimator) -> None:
    """The whole KL stage's path in bfloat16: keep logits and gradients stay float32 and finite."""
    pruner = gaze(backbone)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            encoded = backbone.encode(prompts(backbone), pruner.needs)
            state = run_layers(backbone, start(encoded), 2)
        keep_logits = pruner.logits(View(state, encoded, backbone))
        weight = torch.ones(state.mask.shape).masked_scatter(state.visual, keep_logits.sigmoid())
        gate = Gate(weight, estimator)
        state = run_layers(backbone, branch(state), backbone.num_layers, gate=gate)
        hidden = run_layers(backbone, append(state, answers(backbone, 3)), backbone.num_layers, gate=gate).hidden
        loss = backbone.logits(hidden).float().logsumexp(-1).mean()
    loss.backward()
    assert keep_logits.dtype == torch.float32
    for name, parameter in pruner.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert pruner.vip.attn_in_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_private_layers_take_the_place_of_the_decoders_own(backbone) -> None:
    """On a fork, where the other branch does not see them."""
    own = {index: copy.deepcopy(backbone.text_model.layers[index]) for index in (0, 2)}
    for layer in own.values():
        for parameter in layer.parameters():
            parameter.mul_(0.9)
    encoded = backbone.encode(prompts(backbone))
    state, layers = start(encoded), backbone.num_layers
    ours = run_layers(backbone, branch(state), layers, layers=own).hidden
    text = SimpleNamespace(
        layers=[own.get(index, layer) for index, layer in enumerate(backbone.text_model.layers)],
        rotary_emb=backbone.text_model.rotary_emb,
    )
    stand_in = SimpleNamespace(text_model=text, attention=backbone.attention)
    causal = torch.ones(2 * state.mask.shape[1:], dtype=torch.bool).tril() & encoded.mask[:, None]
    expected = naive(stand_in, encoded, encoded.embeds, [causal] * layers, [encoded.positions] * layers)
    torch.testing.assert_close(ours[encoded.mask], expected[encoded.mask], **EXACT)
    plain = run_layers(backbone, state, layers).hidden
    assert not torch.allclose(ours, plain) and torch.equal(plain, run_layers(backbone, start(encoded), layers).hidden)


@torch.no_grad()
def test_forks_do_not_see_each_other(backbone) -> None:
    encoded = backbone.encode(prompts(backbone))
    state = run_layers(backbone, start(encoded), backbone.num_layers)
    extra = answers(backbone, 3)
    first = run_layers(backbone, append(branch(state), extra), backbone.num_layers).hidden
    cache = fork(state.cache)
    cut(replace(state, cache=cache), ~state.visual)
    assert cache.layers[0].keys.shape[2] < state.cache.layers[0].keys.shape[2] == encoded.mask.shape[1]
    assert torch.equal(run_layers(backbone, append(branch(state), extra), backbone.num_layers).hidden, first)


@torch.no_grad()
@pytest.mark.parametrize("name", ["prune", "renumber, keep the cache"])
def test_rows_are_the_rows(backbone, name) -> None:
    state = prefill(backbone, backbone.encode(prompts(backbone)), CASES[name])
    index = torch.tensor([2, 0, 0, 1])
    extra = answers(backbone, 4)
    picked = rows(state, index)
    ours = run_layers(backbone, append(picked, extra), backbone.num_layers).hidden
    whole = torch.empty_like(extra)
    for column, row in enumerate(index.tolist()):
        batch = extra[column : column + 1].expand(3, -1, -1)
        whole[column] = run_layers(backbone, append(branch(state), batch), backbone.num_layers).hidden[row]
    torch.testing.assert_close(ours, whole, **EXACT)


@torch.no_grad()
def test_appended_padding_is_not_counted(backbone) -> None:
    """Right-padded answers: padding moves no position and is seen by nobody."""
    state = prefill(backbone, backbone.encode(prompts(backbone)), CASES["prune"])
    extra = answers(backbone, 3)
    mask = torch.tensor([[True, True, False], [True, False, True], [True, True, True]])
    padded = append(branch(state), extra, mask)
    assert (padded.next_position - state.next_position).tolist() == [2, 2, 3]
    assert torch.equal(padded.visual, pad(state.visual, (0, 3)))
    hidden = run_layers(backbone, padded, backbone.num_layers).hidden
    for row in range(3):
        real = extra[row : row + 1, mask[row]].expand(3, -1, -1)
        alone = run_layers(backbone, append(branch(state), real), backbone.num_layers).hidden[row]
        torch.testing.assert_close(hidden[row][mask[row]], alone, **EXACT)


@torch.no_grad()
def test_cut_after_append_is_refused(backbone) -> None:
    state: Prefill = prefill(backbone, backbone.encode(prompt(backbone)), CASES["prune"])
    with pytest.raises(ValueError, match="before tokens are appended"):
        cut(append(state, answers(backbone, 1)), state.mask)


@torch.no_grad()
@pytest.mark.parametrize(("more", "narrower"), [(1, 0), (-1, 0), (0, 1)])
def test_merged_states_of_another_size_are_refused(more, narrower) -> None:
    backbone = TINY["qwen2_5_vl"]()
    state = start(backbone.encode(prompt(backbone)))
    left, width = int(state.visual.sum()), backbone.hidden_size
    merge = torch.zeros(left + more, width - narrower)
    with pytest.raises(ValueError, match=rf"merged states are .*the tokens that stay ask for \[{left}, {width}\]"):
        cut(state, state.visual, merge=merge)


@torch.no_grad()
@pytest.mark.parametrize("name", ["twice", "renumber twice", "renumber, keep the cache"])
def test_a_prefill_may_wait_behind_any_decision(backbone, name) -> None:
    pruner, encoded = CASES[name], backbone.encode(prompts(backbone))
    whole, state = prefill(backbone, encoded, pruner), start(encoded)
    for taken in range(len(pruner.stops) + 1):
        state = advance(backbone, encoded, state, pruner, until=taken)
        assert len(state.trace) == 1 + taken and state.depth == (pruner.stops[taken - 1].depth if taken else 0)
    again = advance(backbone, encoded, state, pruner, until=1)
    assert len(again.trace) == len(state.trace) and again.depth == state.depth
    state = advance(backbone, encoded, state, pruner)
    assert state.depth == backbone.num_layers and torch.equal(state.hidden, whole.hidden)


def test_gradients_pass_a_cut() -> None:
    """They reach what survives, in states and cache, and merged states in place of those that they replace."""
    backbone = TINY["qwen2_5_vl"]()
    with torch.no_grad():
        state = run_layers(backbone, start(backbone.encode(prompts(backbone))), 2)
    for layer in state.cache.layers:
        layer.keys.requires_grad_()
        layer.values.requires_grad_()
    keys, values = state.cache.layers[0].keys, state.cache.layers[0].values
    state.hidden.requires_grad_()
    keep = every_other(state.source[:, -1:] - state.source, 0)
    survivors = (keep | ~state.visual) & state.mask
    merge = torch.randn(int((survivors & state.visual).sum()), backbone.hidden_size, requires_grad=True)
    pruned = cut(state, keep, Stop(2), merge=merge, index=torch.arange(3))
    ids = torch.full((3, 2), 9)
    logits = follow_on(backbone, pruned, ids, torch.ones_like(ids).bool())
    found = torch.autograd.grad(logits.square().sum(), [state.hidden, merge, keys, values])
    assert found[0][survivors & ~state.visual].any(-1).all()
    assert not found[0][state.visual | ~state.mask].any()  # merged states took their place
    assert found[1].any(-1).all()
    for gradient in found[2:]:
        reached = gradient.transpose(1, 2).flatten(2).any(-1)  # [B, S]
        assert reached[survivors].all() and not reached[~survivors].any()


@torch.no_grad()
@pytest.mark.parametrize("dense", [0, 1 << 60], ids=["end to end", "masked"])
def test_a_layer_in_parts_is_the_layer(backbone, dense, monkeypatch) -> None:
    """On few columns at a time, of rows of different lengths, with what is added inside the decoder and a glimpse."""
    options = {"prune_layer": 1, "vision_layers": (1,), "width": 16, "cond_width": 8, "num_heads": 2}
    pruner = build("glimpse", options, backbone).eval()
    encoded = backbone.encode(prompts(backbone), pruner.needs)
    monkeypatch.setattr(decoder, "DENSE", dense)
    whole = prefill(backbone, encoded, pruner)
    monkeypatch.setattr(decoder, "ROWS", 7)
    parts = prefill(backbone, encoded, pruner)
    assert torch.equal(whole.mask, parts.mask) and torch.equal(whole.source, parts.source)
    torch.testing.assert_close(parts.hidden[parts.mask], whole.hidden[whole.mask], atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(parts.cache.layers, whole.cache.layers, strict=True):
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            torch.testing.assert_close(
                a.transpose(1, 2)[parts.mask], b.transpose(1, 2)[parts.mask], atol=1e-5, rtol=1e-5
            )


@torch.no_grad()
@pytest.mark.parametrize("stops", [(), (Stop(2),), (Stop(1, prune_cache=False), Stop(3, renumber=True))], ids=str)
def test_rows_end_to_end_are_rows_that_are_masked(backbone, stops, monkeypatch) -> None:
    """Of different lengths, before and behind what is dropped. (Where sums are in another order, not bit for bit.)"""
    encoded, found = backbone.encode(prompts(backbone)), []

    class Half:
        needs = Needs()

        def decide(self, view: View) -> Decision:
            visual = view.state.visual
            return Decision(visual & (visual.cumsum(1) % 2 == 0))

    Half.stops = stops
    for dense in (-1, 1 << 60):
        monkeypatch.setattr(decoder, "DENSE", dense)
        found.append(prefill(backbone, encoded, Half()))
    ours, theirs = found
    mask = ours.mask
    assert not mask.all() and torch.equal(mask, theirs.mask) and torch.equal(ours.source[mask], theirs.source[mask])
    torch.testing.assert_close(ours.hidden[mask], theirs.hidden[mask], atol=1e-5, rtol=1e-5)
