"""Rollouts: masks and answers are drawn from the very distribution whose log-probabilities come with them."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import devices
from conftest import SPECIAL, TINY, VOCABULARY, deepened, prompt, prompts
from glimpseprune import rollout
from glimpseprune.backbones import LVLM
from glimpseprune.decoder import append, cut, rows, run_layers, start
from glimpseprune.rollout import answer, prefilled, sample_keep, score
from glimpseprune.steps import Steps
from glimpseprune.types import Encoded, Needs, Prefill, Stop

DEPTH = 2
END = SPECIAL.index("<|im_end|>")
OFTEN = [END, *range(20, 50)]
"""Ends of which an untrained model soon says one."""
INDEX = torch.tensor([2, 0, 0, 1, 2, 1, 0])
EXACT = {"atol": 2e-5, "rtol": 1e-4}


class Once:
    """A pruner whose masks are given to it."""

    stops, needs = (Stop(DEPTH),), Needs()


@torch.no_grad()
def wait(backbone: LVLM, depth: int = DEPTH) -> Prefill:
    """Three prompts, unpruned, that wait at some depth."""
    return run_layers(backbone, start(backbone.encode(prompts(backbone))), depth)


def ready(backbone: LVLM, state: Prefill, index: Tensor, keep: Tensor) -> Prefill:
    return prefilled(backbone, None, Once, state, index, keep)


def draw(state: Prefill, index: Tensor = INDEX, share: float = 0.4) -> Tensor:
    """A keep mask of its own for each rollout."""
    torch.manual_seed(4)
    return (torch.rand(len(index), state.mask.shape[1]) < share) | ~state.visual[index]


def masked_logits(backbone: LVLM, one: Encoded, keep: Tensor, tokens: Tensor, depth: int) -> Tensor:
    """Logits [T, vocabulary] of an answer [T] behind one unpadded prompt, by the definition: one forward over all
    columns in which masks do the pruning with ``keep`` [S]. No cache, nothing is dropped, nothing shared."""
    prompt_size, count = len(keep), len(tokens) - 1
    size = prompt_size + count
    last = (one.positions.max() + 1 + torch.arange(count)).expand(*one.positions.shape[:-1], count)
    positions = torch.cat([one.positions, last], -1)
    hidden = torch.cat([one.embeds, backbone.embed(tokens[None, :-1])], 1)
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    shown = torch.cat([keep, torch.ones(count, dtype=torch.bool)]).expand(size, size).clone()
    above = causal & shown | torch.eye(size, dtype=torch.bool)
    shown[:prompt_size] = True  # below, the prompt sees itself; the answer never sees what was dropped
    below = causal & shown
    rope = backbone.text_model.rotary_emb(hidden, positions)
    for layer, module in enumerate(backbone.text_model.layers):
        visible = (below if layer < depth else above)[None, None]
        if backbone.attention == "eager":
            visible = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(hidden.dtype).min)
        hidden = deepened(one, layer, module(hidden, attention_mask=visible, position_embeddings=rope))
    return backbone.logits(hidden[0, prompt_size - 1 :])


def check_against_masks(backbone: LVLM, keep: Tensor, tokens: Tensor, log_probs: Tensor, mask: Tensor, temperature=1.0):
    """``log_probs`` of rollouts of the prompts ``INDEX`` are those of one masked forward each, prompt by prompt."""
    for i, row in enumerate(INDEX.tolist()):
        one = backbone.encode(prompt(backbone, row))
        length, own = int(mask[i].sum()), tokens[i, mask[i]]
        logits = masked_logits(backbone, one, keep[i, -one.mask.shape[1] :], own, DEPTH) / temperature
        expected = logits.log_softmax(-1).gather(1, own[:, None])[:, 0]
        torch.testing.assert_close(log_probs[i, :length], expected, **EXACT)


# ------------------------------------------------------------------------------------------------------------ cuts


@torch.no_grad()
@pytest.mark.parametrize("depth", [0, DEPTH])
def test_many_cuts_of_a_prompt_are_cuts_of_its_rows(backbone, depth) -> None:
    state = wait(backbone, depth)
    keep = draw(state)
    before = {field.name: getattr(state, field.name) for field in fields(state)}
    tensors = {name: value.clone() for name, value in before.items() if isinstance(value, Tensor)}
    cached = [(layer.keys.clone(), layer.values.clone()) for layer in state.cache.layers]

    ours, theirs = cut(state, keep, index=INDEX), cut(rows(state, INDEX), keep)
    assert all(torch.equal(ours.added[layer], added) for layer, added in theirs.added.items())
    for name in before.keys() - {"cache", "added"}:
        mine, his = getattr(ours, name), getattr(theirs, name)
        assert torch.equal(mine, his) if isinstance(mine, Tensor) else name == "trace" or mine == his, name
    for mine, his in zip(ours.trace, theirs.trace, strict=True):
        assert mine.stop == his.stop and torch.equal(mine.kept, his.kept) and torch.equal(mine.flops, his.flops)
    assert len(ours.cache.layers) == len(theirs.cache.layers) == depth
    for mine, his in zip(ours.cache.layers, theirs.cache.layers):
        assert torch.equal(mine.keys, his.keys) and torch.equal(mine.values, his.values)
    assert ours.mask.any(1).all() and not ours.mask.all()  # rows of different lengths
    after = [run_layers(backbone, x, backbone.num_layers).hidden[x.mask] for x in (ours, theirs)]
    assert torch.equal(*after)

    assert all(getattr(state, name) is value for name, value in before.items())
    assert all(torch.equal(value, tensors[name]) for name, value in before.items() if name in tensors)
    assert len(state.cache.layers) == depth
    for layer, (keys, values) in zip(state.cache.layers, cached):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


@torch.no_grad()
def test_cuts_after_append_are_refused() -> None:
    backbone = TINY["qwen2_5_vl"]()
    state = wait(backbone)
    longer = append(state, backbone.embed(torch.full((3, 2), 9)))
    with pytest.raises(ValueError, match="before tokens are appended"):
        cut(longer, longer.mask[INDEX], index=INDEX)


# ------------------------------------------------------------------------------------------------------------- answers


@torch.no_grad()
def test_log_probs_are_those_of_a_masked_forward(backbone) -> None:
    """Of answers that end or not, in one batch of different prompts and masks, at a temperature."""
    state = wait(backbone)
    keep = draw(state)
    torch.manual_seed(0)
    tokens, log_probs, mask, ended = answer(backbone, ready(backbone, state, INDEX, keep), 8, OFTEN, temperature=1.3)
    assert ended.any() and len(set(mask.sum(1).tolist())) > 2
    check_against_masks(backbone, keep, tokens, log_probs, mask, 1.3)
    again, _ = score(backbone, ready(backbone, state, INDEX, keep), tokens, mask, 1.3)
    torch.testing.assert_close(again, log_probs, **EXACT)


@torch.no_grad()
def test_rollouts_with_the_same_mask_share_their_prompt(backbone, monkeypatch) -> None:
    """In all layers; what is sampled and scored is what it is without."""
    sizes: list[int] = []
    monkeypatch.setattr(rollout, "cut", lambda *args, index: sizes.append(len(index)) or cut(*args, index=index))
    state = wait(backbone)
    keep = draw(state)
    keep[4], keep[6] = keep[0], keep[2]  # [0] and [4] are of one prompt, so are [2] and [6] of another
    assert INDEX[4] == INDEX[0] and INDEX[6] == INDEX[2]
    torch.manual_seed(2)
    tokens, log_probs, mask, _ = answer(backbone, ready(backbone, state, INDEX, keep), 8, OFTEN)
    assert not torch.equal(tokens[0], tokens[4]) or not torch.equal(tokens[2], tokens[6])
    check_against_masks(backbone, keep, tokens, log_probs, mask)
    torch.testing.assert_close(
        score(backbone, ready(backbone, state, INDEX, keep), tokens, mask)[0], log_probs, **EXACT
    )
    assert sizes == [5, 5]


@torch.no_grad()
def test_score_of_a_row_does_not_depend_on_its_batch(backbone) -> None:
    state = wait(backbone)
    keep, mask = draw(state), torch.arange(5) < torch.tensor([[5], [1], [3], [4], [2], [5], [1]])
    tokens = torch.randint(8, VOCABULARY, mask.shape) * mask
    log_probs, entropy = score(backbone, ready(backbone, state, INDEX, keep), tokens, mask)
    assert not log_probs[~mask].any() and not entropy[~mask].any()
    for row in range(len(INDEX)):
        one = slice(row, row + 1)
        length = int(mask[row].sum())
        alone = score(backbone, ready(backbone, state, INDEX[one], keep[one]), tokens[one, :length], mask[one, :length])
        torch.testing.assert_close(log_probs[one, :length], alone[0], **EXACT)
        torch.testing.assert_close(entropy[one, :length], alone[1], **EXACT)
    check_against_masks(backbone, keep, tokens, log_probs, mask)


def test_score_gives_the_entropy_of_what_was_drawn_from_and_gradients() -> None:
    backbone = TINY["qwen2_5_vl"]()
    state = wait(backbone)
    keep, mask = draw(state), torch.ones(len(INDEX), 1, dtype=torch.bool)
    tokens = torch.full((len(INDEX), 1), 30)
    state.hidden.requires_grad_()
    log_probs, entropy = score(backbone, ready(backbone, state, INDEX, keep), tokens, mask, temperature=2.0)
    first = run_layers(backbone, cut(state, keep, index=INDEX), backbone.num_layers).hidden[:, -1]
    expected = torch.distributions.Categorical(logits=backbone.logits(first) / 2.0)
    torch.testing.assert_close(entropy[:, 0], expected.entropy(), **EXACT)
    torch.testing.assert_close(log_probs[:, 0], expected.log_prob(tokens[:, 0]), **EXACT)
    (gradient,) = torch.autograd.grad(log_probs.sum(), state.hidden)
    kept = torch.zeros_like(state.mask, dtype=torch.int32)
    kept = kept.scatter_reduce(0, INDEX[:, None].expand_as(keep), keep.int(), "amax").bool()
    assert gradient[kept & state.mask].any(-1).all() and not gradient[~kept].any()


@torch.no_grad()
def test_rows_that_end_leave_the_others_as_they_are(backbone, monkeypatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(backbone, "replays", False)  # rows of a graph stay
    leave = Steps.rows
    monkeypatch.setattr(Steps, "rows", lambda steps, index: sizes.append(len(index)) or leave(steps, index))
    state = wait(backbone)
    index = torch.arange(3).repeat_interleave(6)
    keep = draw(state, index)
    torch.manual_seed(1)
    tokens, log_probs, mask, ended = answer(backbone, ready(backbone, state, index, keep), 14, OFTEN)
    assert len(sizes) > 1 and sizes == sorted(sizes, reverse=True) and sizes[0] <= 9
    torch.testing.assert_close(
        score(backbone, ready(backbone, state, index, keep), tokens, mask)[0], log_probs, **EXACT
    )
    assert tokens.shape == log_probs.shape == mask.shape and mask.any(0).all()
    assert not tokens[~mask].any() and not log_probs[~mask].any() and (log_probs[mask] < 0).all()
    lengths = mask.sum(1)
    assert torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None])
    ending = torch.isin(tokens, torch.tensor(OFTEN)) & mask
    last = torch.zeros_like(mask).scatter(1, lengths[:, None] - 1, True)
    assert not (ending & ~last).any()  # nobody speaks on after an end
    assert torch.equal((ending & last).any(1), ended)
    assert (lengths[~ended] == 14).all() and ended.any()


@torch.no_grad()
def test_an_end_in_the_first_step() -> None:
    backbone = TINY["qwen2_5_vl"]()
    state = wait(backbone)
    tokens, log_probs, mask, ended = answer(backbone, ready(backbone, state, INDEX, draw(state)), 5, range(VOCABULARY))
    assert tokens.shape == (7, 1) and mask.all() and ended.all() and (log_probs < 0).all()


@torch.no_grad()
def test_one_token() -> None:
    backbone = TINY["qwen2_5_vl"]()
    state = wait(backbone)
    torch.manual_seed(0)
    tokens, _, mask, ended = answer(backbone, ready(backbone, state, INDEX, draw(state)), 1, range(60))
    assert tokens.shape == (7, 1) and mask.all()
    assert torch.equal(ended, tokens[:, 0] < 60) and 0 < int(ended.sum()) < 7


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_drawn_from_the_distribution_of_their_log_probs(temperature) -> None:
    backbone = TINY["qwen2_5_vl"]()
    state, count = wait(backbone), 2000
    index, keep = torch.zeros(count, dtype=torch.long), draw(state, INDEX[:1])
    pruned = cut(state, keep, index=index[:1])
    torch.manual_seed(0)
    tokens, log_probs, *_ = answer(
        backbone, ready(backbone, state, index, keep.expand(count, -1)), 1, [END], temperature=temperature
    )
    logits = backbone.logits(run_layers(backbone, pruned, backbone.num_layers).hidden[0, -1])
    p = (logits / temperature).softmax(-1)
    torch.testing.assert_close(log_probs[:, 0], p.log()[tokens[:, 0]], **EXACT)
    often = tokens[:, 0].bincount(minlength=VOCABULARY) / count
    assert ((often - p).abs() < 4.5 * (p * (1 - p) / count).sqrt() + 1 / count).all()


@torch.no_grad()
def test_no_visual_token_survives(backbone) -> None:
    state = wait(backbone)
    keep = ~state.visual[INDEX]
    assert not cut(state, keep, index=INDEX).visual.any()
    torch.manual_seed(0)
    tokens, log_probs, mask, _ = answer(backbone, ready(backbone, state, INDEX, keep), 4, OFTEN)
    check_against_masks(backbone, keep, tokens, log_probs, mask)


# ------------------------------------------------------------------------------------------------- processes in step


def in_processes(work: Callable[[int], None], folder: Path, count: int = 2, seconds: float = 60) -> None:
    """Run ``work(rank)`` in forked processes of one gloo group; fails if one of them fails or takes too long."""

    def run(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
        work(rank)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
    assert not stuck, "processes wait for each other"
    assert [process.exitcode for process in processes] == [0] * count


@pytest.mark.skipif(devices.device == "cuda", reason="forked processes cannot use a GPU")
@torch.no_grad()
def test_processes_that_share_weights_go_on_until_the_last_has_finished(tmp_path) -> None:
    """Layers of which each process holds a part are called equally often by all: rank 0 ends at once, rank 1 late."""
    backbone = copy.copy(TINY["qwen2_5_vl"]())
    backbone.replays = False  # draws are those of the rows that are left
    state = wait(backbone)
    keep, ends = draw(state), {0: range(VOCABULARY), 1: [], 2: OFTEN}

    def roll(ending: int, synced: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return answer(backbone, ready(backbone, state, INDEX, keep), 6, ends[ending], synced=synced)

    def work(rank: int) -> None:
        calls = []
        backbone.text_model.layers[0].register_forward_hook(lambda *_: calls.append(1))
        synced = [roll(kind, synced=True) for kind in (rank, rank + 1)]
        torch.save({"calls": len(calls), "answers": synced}, tmp_path / f"{rank}.pt")

    in_processes(work, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert results[0]["calls"] == results[1]["calls"] > 5
    for rank, result in enumerate(results):
        for kind, ours in zip((rank, rank + 1), result["answers"]):
            for mine, alone in zip(ours, roll(kind, synced=False)):
                torch.testing.assert_close(mine, alone, **EXACT)


# --------------------------------------------------------------------------------------------------------- keep masks


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_keep_masks_are_bernoulli(temperature) -> None:
    state = wait(TINY["qwen2_5_vl"]())
    torch.manual_seed(0)
    logits = 2 * torch.randn(int(state.visual.sum()))
    index = torch.arange(3).repeat_interleave(1000)
    keep, log_probs = sample_keep(state, logits, index, temperature)
    assert keep[~state.visual[index]].all() and not log_probs[~state.visual[index]].any()
    counts = state.visual.sum(1).tolist()
    for row, own in enumerate(logits.split(counts)):
        gate = torch.distributions.Bernoulli(logits=own / temperature)
        drawn = keep[index == row][:, state.visual[row]]  # [1000, V]
        found = log_probs[index == row][:, state.visual[row]]
        torch.testing.assert_close(found, gate.log_prob(drawn.float()))
        spread = (gate.probs * (1 - gate.probs) / 1000).sqrt()
        assert ((drawn.float().mean(0) - gate.probs).abs() < 4.5 * spread + 1e-3).all()
    assert not torch.equal(keep[0], keep[1])


def test_keep_log_probs_reach_the_logits() -> None:
    state = wait(TINY["qwen2_5_vl"]())
    logits = torch.randn(int(state.visual.sum()), requires_grad=True)
    keep, log_probs = sample_keep(state, logits, torch.tensor([0, 0, 2]))
    log_probs.sum().backward()
    drawn = torch.stack([keep[:2].sum(0), keep[2].long()])
    counts = state.visual.sum(1).tolist()
    gradients, p = logits.grad.split(counts), logits.sigmoid().split(counts)
    torch.testing.assert_close(gradients[0], drawn[0][state.visual[0]] - 2 * p[0])
    torch.testing.assert_close(gradients[2], drawn[1][state.visual[2]] - p[2])
    assert not gradients[1].any()
