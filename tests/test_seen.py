"""A picture is seen once, whoever asks about it: pictures that repeat in a batch, and encodings that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from conftest import PICTURES, QUESTIONS, TINY, picture
from glimpseprune import checkpoint, pruners
from glimpseprune.backbones import LVLM, Seen
from glimpseprune.config import UserError
from glimpseprune.decoder import see
from glimpseprune.generate import generate
from glimpseprune.images import distinct
from glimpseprune.types import Encoded, Needs

ONE, OTHER, THIRD = (row[0] for row in PICTURES)
ROWS = [[ONE], [OTHER, ONE], [ONE, ONE], [THIRD]]
"""Repeats within a row and between rows, beside what comes once."""
ASKED = [*QUESTIONS, "and?"]


@pytest.fixture(params=sorted(TINY))
def tiny(request) -> LVLM:
    return TINY[request.param]()


def everything(backbone: LVLM) -> Needs:
    layers = tuple(backbone.vision_layers)
    return Needs(states=layers, keys=layers, attention=layers)


@contextmanager
def towers(backbone: LVLM) -> Iterator[list[int]]:
    """Collects how many pictures every run of the tower is given."""
    runs: list[int] = []
    own = backbone.run_tower

    def count(pictures, needs) -> Seen:
        runs.append(len(backbone.image_layouts(pictures)))
        return own(pictures, needs)

    backbone.run_tower = count
    try:
        yield runs
    finally:
        del backbone.run_tower


def same(ours: Encoded, theirs: Encoded, atol: float = 1e-5) -> None:
    for name in ("input_ids", "positions", "mask", "visual"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.layouts == theirs.layouts
    torch.testing.assert_close(ours.embeds, theirs.embeds, atol=atol, rtol=0)
    for kind in ("states", "keys", "attention", "added"):
        own, other = getattr(ours, kind), getattr(theirs, kind)
        assert list(own) == list(other)
        for layer, x in own.items():
            torch.testing.assert_close(x, other[layer], atol=atol, rtol=0)


@torch.no_grad()
def test_pictures_that_repeat_are_seen_once(tiny) -> None:
    shared = tiny.prepare(ASKED, ROWS)
    assert shared["image_index"].tolist() == [0, 1, 0, 0, 0, 2]
    separate = tiny.unshared(shared)
    assert set(separate) == set(tiny.prompt_keys)
    assert len(tiny.image_layouts(separate)) == 6 and tiny.layouts(separate) == tiny.layouts(shared)
    with towers(tiny) as runs:
        ours = tiny.encode(shared, everything(tiny))
        theirs = tiny.encode(separate, everything(tiny))
    assert runs == [3, 6]
    same(ours, theirs)
    for row, (question, images) in enumerate(zip(ASKED, ROWS)):
        alone, mask = tiny.encode(tiny.prepare(question, images)), ours.mask[row]
        torch.testing.assert_close(ours.embeds[row][mask], alone.embeds[0], atol=1e-5, rtol=0)
        assert torch.equal(ours.positions[..., row, :][..., mask], alone.positions[..., 0, :])


def test_prompts_without_repeats_are_those_of_the_processor(tiny) -> None:
    prompt = tiny.prepare(QUESTIONS, PICTURES)
    assert set(prompt) == set(tiny.prompt_keys) and tiny.unshared(prompt) is prompt


def test_pictures_are_the_same_if_their_pixels_are() -> None:
    copy, grey, other = ONE.copy(), ONE.convert("L"), ONE.rotate(180)
    pictures, index = distinct([ONE, OTHER, copy, ONE, grey, other])
    assert index == [0, 1, 0, 0, 2, 3] and [x.size for x in pictures] == [x.size for x in (ONE, OTHER, ONE, ONE)]
    nearly = ONE.copy()
    nearly.putpixel((5, 5), tuple(255 - x for x in ONE.getpixel((5, 5))))
    assert distinct([ONE, nearly])[1] == [0, 1] and distinct([]) == ([], [])


@torch.no_grad()
@pytest.mark.parametrize("rows", [[2], [1, 3], [3, 2, 0, 1], [1, 1]])
def test_rows_of_a_shared_prompt(tiny, rows) -> None:
    prompt = tiny.prepare(ASKED, ROWS)
    chosen = tiny.choose(prompt, torch.tensor(rows))
    whole, part = tiny.encode(prompt, everything(tiny)), tiny.encode(chosen, everything(tiny))
    torch.testing.assert_close(part.embeds, whole.embeds[rows], atol=1e-5, rtol=0)
    assert part.layouts == [whole.layouts[row] for row in rows]
    own, layer = part.states[tiny.vision_layers[0]], tiny.vision_layers[0]
    split = whole.states[layer].split(whole.counts)
    torch.testing.assert_close(own, torch.cat([split[row] for row in rows]), atol=1e-5, rtol=0)
    pictures = len({id(image) for row in rows for image in ROWS[row]})
    assert len(tiny.image_layouts(chosen)) == pictures and ("image_index" in chosen) == (
        pictures < sum(len(ROWS[row]) for row in rows)
    )


@torch.no_grad()
def test_seen_once_asked_many_times(tiny) -> None:
    with towers(tiny) as runs:
        one, both = (
            tiny.see(tiny.pictures(ONE), everything(tiny)),
            tiny.see(tiny.pictures([OTHER, ONE]), everything(tiny)),
        )
        assert runs == [1, 2] and (len(one), len(both)) == (1, 2) and one.nbytes > 0
        several = tiny.encode(tiny.prepare(ASKED, [one, both, [one, one], both[0]]), everything(tiny))
        for question in QUESTIONS:
            seen, plain = (tiny.prepare(question, x) for x in (one, ONE))
            ours = tiny.encode(seen, everything(tiny))
            assert len(runs) == 2
            same(ours, tiny.encode(plain, everything(tiny)), 0)  # the very same computation
            runs.pop()
        expected = tiny.prepare(ASKED, [[ONE], [OTHER, ONE], [ONE, ONE], [OTHER]])
    same(several, tiny.encode(expected, everything(tiny)))
    all_of_one = tiny.encode(tiny.prepare(QUESTIONS, one))
    same(all_of_one, tiny.encode(tiny.prepare(QUESTIONS, [ONE] * 3)), 0)
    chosen = tiny.choose(tiny.prepare(QUESTIONS, [one, both, one]), torch.tensor([2, 1]))
    assert len(chosen["seen"]) == 3 and torch.equal(
        tiny.encode(chosen).embeds, tiny.encode(tiny.prepare(QUESTIONS, [one, both, one])).embeds[[2, 1]]
    )


@torch.no_grad()
def test_pictures_are_picked_and_joined(tiny) -> None:
    seen = tiny.see(tiny.pictures([ONE, OTHER, THIRD]), everything(tiny))
    assert seen.pick([0, 1, 2]) is seen and Seen.join([seen]) is seen and len(list(seen)) == 3
    again = Seen.join([seen[0], seen.pick([1, 2])])
    turned = seen.pick([2, 0, 0])
    assert torch.equal(again.tokens, seen.tokens) and turned.layouts == [seen.layouts[x] for x in (2, 0, 0)]
    assert torch.equal(turned[1].tokens, seen[0].tokens) and torch.equal(turned[0].tokens, seen[-1].tokens)
    for kind in ("states", "keys", "attention", "added"):
        for layer, x in getattr(seen, kind).items():
            assert torch.equal(getattr(again, kind)[layer], x)
            assert torch.equal(getattr(turned[2], kind)[layer], getattr(seen[0], kind)[layer])
    for name, sizes in seen.sizes.items():
        assert torch.equal(again.sizes[name], sizes) and torch.equal(turned.sizes[name], sizes[[2, 0, 0]])
    bare = tiny.see(tiny.pictures(ONE))
    assert Seen.join([seen, bare]).states == {} and "4 pictures" in repr(Seen.join([seen, bare]))
    assert seen.to("cpu").nbytes == seen.nbytes == sum(each.nbytes for each in seen)


@torch.no_grad()
def test_the_answers_are_the_same(tiny) -> None:
    pruner = pruners.build("fastv", {}, tiny)
    seen = tiny.see(tiny.pictures(ONE), pruner.needs)
    rollouts = [
        generate(tiny, pruner, tiny.prepare(QUESTIONS, images), max_new_tokens=5) for images in (seen, [ONE] * 3)
    ]
    separate = generate(tiny, pruner, tiny.unshared(tiny.prepare(QUESTIONS, [ONE] * 3)), max_new_tokens=5)
    for rollout in rollouts:
        assert torch.equal(rollout.tokens, separate.tokens)
        for own, other in zip(rollout.prefill.trace, separate.prefill.trace, strict=True):
            assert torch.equal(own.kept, other.kept) and torch.equal(own.flops, other.flops)


def test_a_model_that_sees(tiny_folder) -> None:
    model = checkpoint.load(backbone=tiny_folder, pruner="visionzip")
    seen = model.see(ONE)
    with towers(model.backbone) as runs:
        answers = [model.generate(**model.prepare(question, seen), max_new_tokens=4).texts[0] for question in QUESTIONS]
        both = model.generate(**model.prepare(QUESTIONS, seen), max_new_tokens=4)
        assert runs == []
    assert answers == [model.generate(**model.prepare(x, ONE), max_new_tokens=4).texts[0] for x in QUESTIONS]
    assert both.texts == answers and all(len(row) == 1 for row in both.keep_maps())
    assert not seen.tokens.requires_grad
    blind = checkpoint.load(backbone=tiny_folder, pruner="none").see(ONE)
    with pytest.raises(UserError, match="of the tower's layer .* were not kept"):
        model.generate(**model.prepare("?", blind), max_new_tokens=4)


def test_what_does_not_fit_is_refused(tiny) -> None:
    seen = tiny.see(tiny.pictures(ONE))
    with pytest.raises(UserError, match="some were seen"):
        tiny.prepare(QUESTIONS[:2], [seen, ONE])
    with pytest.raises(UserError, match="has no image"):
        tiny.prepare(QUESTIONS[:1], [[]])
    with pytest.raises(UserError, match="no pixel_values"):
        tiny.see({name: x for name, x in tiny.pictures(ONE).items() if name != "pixel_values"})
    prompt = tiny.prepare(QUESTIONS[:2], [ONE, ONE])
    with pytest.raises(UserError, match="no picture 1 among 1"):
        tiny.encode(prompt | {"image_index": torch.tensor([0, 1])})
    with pytest.raises(UserError, match="more images"):
        tiny.encode(prompt | {"image_index": torch.tensor([0, 0, 0])})


def test_a_look_before_the_tower_gets_each_picture_by_itself(tiny) -> None:
    class Looking:
        needs, stops = Needs(), ()

        def look(self, backbone, prompt):
            got.append(prompt)
            return prompt, [0] * len(prompt["input_ids"])

    got: list[dict] = []
    encoded = see(tiny, Looking(), tiny.prepare(ASKED, ROWS))
    assert set(got[0]) == set(tiny.prompt_keys) and len(encoded.layouts) == 4
    with pytest.raises(UserError, match="before the tower"):
        see(tiny, Looking(), tiny.prepare("?", tiny.see(tiny.pictures(ONE))))
    model = checkpoint.GlimpsePrune(tiny, Looking(), "looking")
    with pytest.raises(UserError, match="looking looks at pictures"):
        model.see(picture(112, 112))
