"""Decoding against Hugging Face's generate, and pruned decoding against one masked forward per token."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, NoBadWordsLogitsProcessor
from transformers.generation import TextIteratorStreamer

from conftest import PICTURES, QUESTIONS, SPECIAL, deepened, prompt, prompts
from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError
from glimpseprune.decoder import View, run_layers, start
from glimpseprune.generate import continue_from, generate
from glimpseprune.pruners import build

NEW = 6
GLIMPSE = {
    "prune_layer": 1,
    "vision_layers": (2, 1),
    "width": 16,
    "cond_width": 8,
    "num_heads": 2,
    "max_keep": 0.3,
}


def pruners(backbone: LVLM) -> dict[str, torch.nn.Module]:
    torch.manual_seed(1)
    return {
        "none": build("none", {}, backbone),
        "random": build("random", {"keep": 0.3, "prune_layer": 1}, backbone),
        "zero": build("random", {"keep": 0.0, "min_keep": 0, "prune_layer": 0}, backbone),
        "glimpse": build("glimpse", GLIMPSE, backbone).eval(),
    }


def hugging_face(backbone: LVLM, inputs: dict[str, Tensor], **kwargs) -> Tensor:
    known = inspect.signature(backbone.model.forward).parameters  # a processor of ours may say more than it
    theirs = {name: x for name, x in inputs.items() if name in known}
    return backbone.model.generate(**theirs, **kwargs)[:, inputs["input_ids"].shape[1] :]


def test_greedy_is_hugging_face(backbone) -> None:
    inputs = prompts(backbone)
    ours = generate(backbone, pruners(backbone)["none"], inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(ours.tokens, hugging_face(backbone, inputs, max_new_tokens=NEW, do_sample=False))
    assert all(keep.all() for keep in ours.keep)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.7, "top_k": 7}, {"repetition_penalty": 1.5}], ids=str)
def test_sampling_is_hugging_face_with_the_same_seed(backbone, settings) -> None:
    inputs, none = prompts(backbone), pruners(backbone)["none"]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=True, pad_token_id=0, eos_token_id=2, **settings)
    torch.manual_seed(7)
    theirs = hugging_face(backbone, inputs, generation_config=config)
    torch.manual_seed(7)
    ours = generate(backbone, none, inputs, generation_config=config)
    assert torch.equal(ours.tokens, theirs)
    torch.manual_seed(8)
    other = generate(backbone, none, inputs, generation_config=config)
    assert not torch.equal(ours.tokens, other.tokens)


def test_samples_of_one_prompt_share_its_prefill(backbone) -> None:
    # One image each: transformers 5.17 deals the images of several out wrongly when it repeats prompts.
    inputs, none = backbone.prepare(QUESTIONS[::2], PICTURES[::2]), pruners(backbone)["none"]
    settings = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(7)
    theirs = hugging_face(backbone, inputs, **settings)
    torch.manual_seed(7)
    ours = generate(backbone, none, inputs, **settings)
    assert torch.equal(ours.tokens, theirs)
    assert len(ours.keep) == len(ours.layouts) == len(ours.prefill.mask) == 6
    assert [len(keep) for keep in ours.keep] == [count for count in backbone.encode(inputs).counts for _ in range(3)]


@pytest.mark.parametrize("name", ["random", "zero", "glimpse"])
def test_pruned_decoding_is_a_masked_forward_per_token(backbone, name) -> None:
    """Greedy tokens and their logits, row by row, without cache or pruning code: all columns, masks do it."""
    pruner, inputs = pruners(backbone)[name], prompts(backbone)
    ours = generate(backbone, pruner, inputs, max_new_tokens=NEW, do_sample=False, output_logits=True)
    for row in range(3):
        one = backbone.encode(prompt(backbone, row))
        kept = torch.ones_like(one.visual[0]).masked_scatter(one.visual[0], ours.keep[row])
        shallow = pruner.stops[0].depth
        tokens: list[int] = []
        for step in range(NEW):
            new = backbone.embed(torch.tensor([tokens], dtype=torch.long))
            size = len(kept) + step
            position = one.positions.max() + 1 + torch.arange(step)
            positions = torch.cat([one.positions, position.expand(*one.positions.shape[:-1], step)], -1)
            hidden = torch.cat([one.embeds, new], 1)
            causal = torch.ones(size, size, dtype=torch.bool).tril()
            survivors = torch.cat([kept, torch.ones(step, dtype=torch.bool)])
            for index, layer in enumerate(backbone.text_model.layers):
                shown = survivors.expand(size, -1).clone()
                if index < shallow:
                    shown[: len(kept)] = True  # below, the prompt sees itself; new tokens never see what was dropped
                visible = (causal & shown | torch.eye(size, dtype=torch.bool))[None, None]
                if backbone.attention == "eager":
                    visible = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
                rope = backbone.text_model.rotary_emb(hidden, positions)
                hidden = layer(hidden, attention_mask=visible, position_embeddings=rope)
                hidden = deepened(one, index, hidden)
            logits = backbone.logits(hidden[0, -1])
            torch.testing.assert_close(ours.extra["logits"][row, step], logits, atol=1e-4, rtol=1e-4)
            tokens.append(int(ours.tokens[row, step]))
            assert tokens[-1] == int(logits.argmax())
            if tokens[-1] == SPECIAL.index("<|im_end|>"):
                break


@pytest.mark.parametrize("name", ["glimpse", "random"])
def test_batched_is_single(backbone, name) -> None:
    pruner = pruners(backbone)[name]
    together = generate(backbone, pruner, prompts(backbone), max_new_tokens=NEW, do_sample=False)
    for row in range(3):
        alone = generate(backbone, pruner, prompt(backbone, row), max_new_tokens=NEW, do_sample=False)
        assert torch.equal(alone.keep[0], together.keep[row])
        length = alone.tokens.shape[1]
        assert torch.equal(alone.tokens[0], together.tokens[row, :length])
        assert (together.tokens[row, length:] == SPECIAL.index("<|endoftext|>")).all()


def test_rows_that_ended_are_padded(backbone) -> None:
    inputs, none = prompts(backbone), pruners(backbone)["none"]
    free = generate(backbone, none, inputs, max_new_tokens=NEW, do_sample=False).tokens
    end = int(free[1, 1])
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": end, "pad_token_id": 3}
    ours = generate(backbone, none, inputs, **settings).tokens
    assert torch.equal(ours, hugging_face(backbone, inputs, **settings))
    assert (ours[1, (free[1] == end).nonzero()[0, 0] + 1 :] == 3).all()


def test_rows_that_were_cut_are_known(backbone) -> None:
    inputs, none = prompts(backbone), pruners(backbone)["none"]
    free = generate(backbone, none, inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None).tokens
    end = int(free[0, NEW - 1])  # a row that says it with its last token has ended
    rollout = generate(backbone, none, inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=0)
    assert rollout.ended.tolist() == [end in row for row in free.tolist()] and rollout.ended[0]
    few = generate(backbone, none, inputs, max_new_tokens=1, do_sample=False, eos_token_id=-7, pad_token_id=0)
    assert not few.ended.any() and len(few.ended) == len(free)


def test_stop_strings(backbone) -> None:
    inputs, none = prompt(backbone, 1), pruners(backbone)["none"]
    tokenizer = backbone.processor.tokenizer
    free = generate(backbone, none, inputs, max_new_tokens=NEW, do_sample=False).tokens
    stop = tokenizer.decode(free[0, 1:3])
    kwargs = {"max_new_tokens": NEW, "do_sample": False}
    theirs = hugging_face(backbone, inputs, stop_strings=[stop], tokenizer=tokenizer, **kwargs)
    assert theirs.shape[1] < NEW
    assert torch.equal(generate(backbone, none, inputs, stop_strings=[stop], **kwargs).tokens, theirs)
    config = GenerationConfig(stop_strings=[stop], **kwargs)
    ours = generate(backbone, none, inputs, generation_config=config, tokenizer=tokenizer)
    assert torch.equal(ours.tokens, theirs)
    assert config.stop_strings == [stop]


def test_streamer(backbone) -> None:
    inputs, pruner = prompt(backbone), pruners(backbone)["glimpse"]
    tokenizer = backbone.processor.tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=5)
    tokens = generate(backbone, pruner, inputs, max_new_tokens=NEW, do_sample=False, streamer=streamer).tokens
    assert "".join(streamer) == tokenizer.decode(tokens[0])


def test_logits_processors_and_outputs(backbone) -> None:
    inputs, none = prompts(backbone), pruners(backbone)["none"]
    settings = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "output_scores": True}
    free = generate(backbone, none, inputs, **settings)
    banned = NoBadWordsLogitsProcessor([[int(free.tokens[0, 0])]], eos_token_id=None)
    ours = generate(backbone, none, inputs, logits_processor=LogitsProcessorList([banned]), **settings)
    assert ours.tokens[0, 0] != free.tokens[0, 0]
    assert ours.extra["logits"].shape == ours.extra["scores"].shape == (3, 3, backbone.lm_head.out_features)
    assert torch.equal(ours.extra["scores"].argmax(-1)[:, 0], ours.tokens[:, 0])
    assert torch.equal(ours.extra["logits"][:, 0], free.extra["logits"][:, 0])
    assert not generate(backbone, none, inputs, max_new_tokens=1).extra


def test_a_prefill_can_be_continued_twice(backbone) -> None:
    pruner, inputs = pruners(backbone)["glimpse"], prompts(backbone)
    first = generate(backbone, pruner, inputs, max_new_tokens=NEW, do_sample=False)
    encoded = backbone.encode(inputs, pruner.needs)
    widths = [layer.keys.shape[2] for layer in first.prefill.cache.layers]
    again = continue_from(backbone, encoded, first.prefill, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(again.tokens, first.tokens)
    assert widths == [layer.keys.shape[2] for layer in first.prefill.cache.layers] == [first.prefill.mask.shape[1]] * 4


def test_keep_maps_lie_on_the_images(backbone) -> None:
    pruner, inputs = pruners(backbone)["glimpse"], prompts(backbone)
    rollout = generate(backbone, pruner, inputs, max_new_tokens=1)
    encoded = backbone.encode(inputs, pruner.needs)
    view = View(run_layers(backbone, start(encoded), pruner.stops[0].depth), encoded, backbone)
    with torch.no_grad():
        kept = pruner.decide(view).keep[encoded.visual].split(encoded.counts)
    for keep, row, layouts, expected in zip(rollout.keep, rollout.keep_maps(), encoded.layouts, kept, strict=True):
        assert torch.equal(keep, expected)
        parts = keep.split([layout.count for layout in layouts])
        for found, layout, part in zip(row, layouts, parts, strict=True):
            assert torch.equal(found, layout.map(part))  # whose cells test_types.py places
            if len(layout.parts) == 1:
                assert torch.equal(found, part.view(layout.grids[0]))
        assert 1 <= int(keep.sum()) <= 0.3 * len(keep)


def test_beam_search_is_refused(backbone) -> None:
    with pytest.raises(UserError, match="beam_search is not supported"):
        generate(backbone, pruners(backbone)["none"], prompts(backbone), max_new_tokens=2, num_beams=2)


def test_stop_strings_without_a_tokenizer(backbone, monkeypatch) -> None:
    inputs, none = prompt(backbone), pruners(backbone)["none"]
    monkeypatch.setattr(backbone, "processor", None)
    with pytest.raises(UserError, match="needs a tokenizer"):
        generate(backbone, none, inputs, max_new_tokens=2, stop_strings=["x"])
