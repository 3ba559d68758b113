"""What every file in pruners/ must do, on every backbone; and what each of them decides."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from conftest import TINY, prompt, prompts
from glimpseprune.config import UserError
from glimpseprune.decoder import View, approach, prefill, start
from glimpseprune.generate import generate, kept
from glimpseprune.lookup import find, names
from glimpseprune.pruners import build, glimpse
from glimpseprune.types import Needs, Stop

NAMES = names("glimpseprune.pruners")
VIP = {"width": 16, "cond_width": 8, "num_heads": 2}


@pytest.fixture(params=sorted(TINY))
def tiny(request):
    return TINY[request.param]()


def options(name: str) -> dict:
    """Options that differ from the defaults where the tiny models ask for it."""
    return {"glimpse": {"vision_layers": (1,), **VIP}}.get(name, {})


def targets(encoded) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(count, generator=generator) < 0.3 for count in encoded.counts]


@torch.no_grad()
def view_of(backbone, pruner, inputs) -> View:
    encoded = backbone.encode(inputs, pruner.needs)
    encoded.targets = targets(encoded)
    stop = pruner.stops[0] if pruner.stops else None
    return View(approach(backbone, start(encoded), pruner), encoded, backbone, stop)


@pytest.mark.parametrize("name", NAMES)
def test_a_pruner_declares_and_decides(tiny, name) -> None:
    pruner = build(name, options(name), tiny).eval()
    depths = [stop.depth for stop in pruner.stops]
    assert depths == sorted(set(depths)) and all(0 <= depth <= tiny.num_layers for depth in depths)
    assert isinstance(pruner.needs, Needs)
    view = view_of(tiny, pruner, prompts(tiny))
    before = [layer.keys.clone() for layer in view.state.cache.layers]
    with torch.no_grad():
        keep = pruner.decide(view).keep
        again = pruner.decide(view).keep
    assert keep.shape == view.state.mask.shape and keep.dtype == torch.bool
    assert torch.equal(keep, again)
    for layer, keys in zip(view.state.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


@pytest.mark.parametrize("name", NAMES)
def test_a_pruner_decides_for_each_row_alone(tiny, name) -> None:
    pruner = build(name, options(name), tiny).eval()
    with torch.no_grad():
        together = view_of(tiny, pruner, prompts(tiny))
        keep = pruner.decide(together).keep
        for row in range(3):
            alone = view_of(tiny, pruner, prompt(tiny, row))
            alone.encoded.targets = together.encoded.targets[row : row + 1]
            visual = together.state.visual[row]
            assert torch.equal(pruner.decide(alone).keep[0][alone.state.visual[0]], keep[row][visual])


@pytest.mark.parametrize("name", NAMES)
def test_text_stays(tiny, name) -> None:
    pruner = build(name, options(name), tiny).eval()
    encoded = view_of(tiny, pruner, prompts(tiny)).encoded
    with torch.no_grad():
        state = prefill(tiny, encoded, pruner)
    text = encoded.mask & ~encoded.visual
    assert torch.equal((state.mask & ~state.visual).sum(1), text.sum(1))
    assert torch.equal(state.next_position, encoded.positions.reshape(-1, *text.shape).amax((0, 2)) + 1)


@pytest.mark.parametrize("name", NAMES)
def test_generate_runs(tiny, name) -> None:
    pruner = build(name, options(name), tiny).eval()
    inputs = prompts(tiny)
    rollout = generate(tiny, pruner, inputs, targets=targets(tiny.encode(inputs)), max_new_tokens=2)
    assert rollout.tokens.shape[0] == 3


@pytest.mark.parametrize("name", NAMES)
def test_options_are_documented_and_strict(tiny, name) -> None:
    kind = find("glimpseprune.pruners", name).Options
    assert all(field.metadata.get("help") for field in fields(kind))
    with pytest.raises(UserError, match=r"pruner\.options\.thresold"):
        build(name, {"thresold": 0.5}, tiny)


def test_unknown_pruner(tiny) -> None:
    with pytest.raises(UserError, match="glimpse"):
        build("glimpze", {}, tiny)


def test_oracle_keeps_the_targets_and_grows_them(tiny) -> None:
    inputs = prompts(tiny)
    encoded = tiny.encode(inputs)
    wanted = [torch.zeros(count, dtype=torch.bool) for count in encoded.counts]
    part, first = encoded.layouts[1][1].parts[0], encoded.layouts[1][0].count
    rows, cols = part.grid
    wanted[1][first] = True  # upper left corner of the second image of row 1
    encoded.targets = wanted
    for dilate in (0, 1):
        state = prefill(tiny, encoded, build("oracle", {"dilate": dilate}, tiny))
        keep = kept(encoded, state)
        assert not keep[0].any() and not keep[2].any() and not keep[1][:first].any()
        expected = torch.zeros(rows, cols, dtype=torch.bool)
        expected[: 1 + dilate, : 1 + dilate] = True
        assert torch.equal(keep[1][first : first + rows * cols].view(rows, cols), expected)
        assert not keep[1][first + rows * cols :].any()


def test_oracle_needs_boxes(tiny) -> None:
    with pytest.raises(UserError, match="ground-truth boxes"):
        generate(tiny, build("oracle", {}, tiny), prompts(tiny), max_new_tokens=1)


def test_random_keeps_what_it_is_told(tiny) -> None:
    encoded = tiny.encode(prompts(tiny))

    def counts(pruner) -> list[int]:
        return [int(keep.sum()) for keep in kept(encoded, prefill(tiny, encoded, pruner))]

    assert counts(build("random", {"keep": 0.25}, tiny)) == [count // 4 for count in encoded.counts]
    assert counts(build("random", {"keep": 0.0}, tiny)) == [1, 1, 1]
    assert counts(build("random", {"keep": 0.0, "min_keep": 0}, tiny)) == [0, 0, 0]
    assert counts(build("random", {"keep": 1.0}, tiny)) == encoded.counts
    told = build("random", {"keep": 0.25}, tiny)
    told.counts = [[3, 0, 7]]
    assert counts(told) == [3, 0, 7]


def test_random_depends_on_its_seed(tiny) -> None:
    encoded = tiny.encode(prompts(tiny))
    masks = [kept(encoded, prefill(tiny, encoded, build("random", {"keep": 0.5, "seed": s}, tiny))) for s in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(masks[0], masks[1]))
    assert not all(torch.equal(a, b) for a, b in zip(masks[0], masks[2]))


def test_bad_random_options(tiny) -> None:
    with pytest.raises(UserError, match="fraction from 0 to 1"):
        build("random", {"keep": 5.0}, tiny)
    with pytest.raises(UserError, match="prune_layer=-2"):
        build("random", {"prune_layer": -2}, tiny)
    with pytest.raises(UserError, match="min_keep is 1000 but a prompt has only"):
        generate(tiny, build("random", {"min_keep": 1000}, tiny), prompts(tiny), max_new_tokens=1)


def test_prune_layer_beyond_the_last_is_after_the_last(tiny) -> None:
    assert build("random", {"prune_layer": 1000}, tiny).stops == (Stop(tiny.num_layers),)
    assert build("random", {"prune_layer": -1}, tiny).stops == (Stop(0),)


LOGITS = torch.tensor([2.0, -1.0, 0.5, -3.0, 0.0] + [-5.0, -4.0, 9.0])  # two rows, of 5 and 3 tokens


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[0, 2], [2]]),  # sigmoid(0) is not above .5
        ({"threshold": 0.2}, [[0, 1, 2, 4], [2]]),
        ({"threshold": 1.0}, [[0], [2]]),
        ({"threshold": 1.0, "min_keep": 0}, [[], []]),
        ({"threshold": 0.0, "max_keep": 0.5}, [[0, 2], [2]]),  # floor(2.5), floor(1.5)
        ({"threshold": 0.0, "max_keep": 0.1, "min_keep": 3}, [[0, 2, 4], [0, 1, 2]]),  # the minimum wins
        ({"max_keep": 0.4}, [[0, 2], [2]]),  # two of five is not more than .4
        ({"max_keep": 0.0, "min_keep": 0}, [[], []]),
        ({"min_keep": 3}, [[0, 2, 4], [0, 1, 2]]),
    ],
)
def test_chosen(settings, expected) -> None:
    keep = glimpse.chosen(LOGITS, [5, 3], **settings)
    assert [row.nonzero().flatten().tolist() for row in keep.split([5, 3])] == expected


def test_max_keep_is_compared_as_a_fraction() -> None:
    logits = torch.linspace(1, -1, 100)
    keep = glimpse.chosen(logits, [100], threshold=float(logits.sigmoid()[29]), max_keep=0.29)
    assert int(keep.sum()) == 29  # though .29 * 100 < 29 in floating point


def test_min_keep_above_the_number_of_tokens(tiny) -> None:
    with pytest.raises(UserError, match="min_keep is 4 but a prompt has only 3 visual tokens"):
        glimpse.chosen(LOGITS, [5, 3], min_keep=4)
    pruner = build("glimpse", {"vision_layers": (1,), "min_keep": 999, **VIP}, tiny)
    with pytest.raises(UserError, match="min_keep is 999"):
        generate(tiny, pruner, prompts(tiny), max_new_tokens=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"probe_layers": (2,), "prune_layer": 1}, r"probe_layers=\[2\]: the glimpse runs through layers 0 to 1"),
        ({"probe_layers": ()}, "at least one layer"),
        ({"vision_layers": ()}, "at least one layer"),
        ({"probe": "softmax"}, "choices are logits, log_softmax"),
        ({"max_keep": 1.5}, "fraction from 0 to 1"),
        ({"num_heads": 5}, "5 heads"),
    ],
)
def test_glimpse_options_that_do_not_fit(tiny, wrong, message) -> None:
    with pytest.raises(UserError, match=message):
        build("glimpse", {"vision_layers": (1,), **VIP, **wrong}, tiny)


def test_windows_need_a_tower_that_has_them() -> None:
    with pytest.raises(UserError, match="no windows"):
        build("glimpse", {"vision_layers": (1,), "window": True, **VIP}, TINY["llava1_5"]())
    backbone = TINY["qwen2_5_vl"]()
    masks = []
    for window in (False, True):
        torch.manual_seed(0)
        pruner = build("glimpse", {"vision_layers": (1,), "window": window, **VIP}, backbone).eval()
        masks.append(pruner.logits(view_of(backbone, pruner, prompt(backbone))))
    assert pruner.window == 4 and not torch.allclose(*masks)


def test_logit_cap_and_bias(tiny) -> None:
    settings = {"vision_layers": (1,), **VIP}
    torch.manual_seed(0)
    plain = build("glimpse", settings, tiny).eval()
    torch.manual_seed(0)
    capped = build("glimpse", settings | {"logit_cap": 0.5}, tiny).eval()
    view = view_of(tiny, plain, prompts(tiny))
    with torch.no_grad():
        torch.testing.assert_close(capped.logits(view), 0.5 * torch.tanh(plain.logits(view) / 0.5))
    assert build("glimpse", settings | {"init_bias": -2.0}, tiny).vip.attn_out_projs["0"].bias.item() == -2.0


def test_deep_supervision_gives_one_output_per_block(tiny) -> None:
    pruner = build("glimpse", {"vision_layers": (1, 2, 1), "deep_supervision": True, **VIP}, tiny).eval()
    view = view_of(tiny, pruner, prompts(tiny))
    logits = pruner.all_logits(view)
    assert logits.shape == (3, sum(view.encoded.counts))
    assert torch.equal(pruner.logits(view), logits[-1])


def test_dropout_acts_in_training_only(tiny) -> None:
    pruner = build("glimpse", {"vision_layers": (1,), "dropout": 0.5, **VIP}, tiny)
    assert torch.equal(pruner.eval().glimpse(), pruner.glimpse())
    assert not torch.equal(pruner.train().glimpse(), pruner.glimpse())


PUBLISHED = {
    "num_hidden_layers": 4,
    "le_layers": [0, 1, 2, 3],
    "le_length": 1,
    "le_dropout_prob": 0.1,
    "reduce_layer": 2,
    "selected_layers": [1, 2],
    "selected_visual_layers": [2, 1],
    "reduce_threshold": 0.4,
    "max_remain_ratio": 0.5,
    "min_remain_num": 2,
    "attn_fuse_type": "AttnFuserV1",
    "attn_fuse_size": 16,
    "visual_cond_size": 8,
    "attn_fuse_num_heads": 2,
    "use_attention_logits": False,
    "deep_supervision": False,
}


def test_published_checkpoints_are_understood(tiny) -> None:
    read = glimpse.options_from_published(PUBLISHED)
    assert read == glimpse.Options(
        prune_layer=2,
        probe_layers=(1, 2),
        vision_layers=(2, 1),
        threshold=0.4,
        max_keep=0.5,
        min_keep=2,
        width=16,
        cond_width=8,
        num_heads=2,
        dropout=0.1,
        probe="log_softmax",
    )
    assert glimpse.options_from_published(PUBLISHED | {"attn_fuse_global": False}).window
    source = build("glimpse", read, tiny)
    state = {
        "attn_fuser": source.vip.state_dict(),
        "learnable_embeddings": source.glimpse.embeddings.detach(),
        "le_proj": source.glimpse.proj.state_dict(),
        "le_norm": source.glimpse.norm.state_dict(),
    }
    target = build("glimpse", read, tiny)
    target.load_state_dict(glimpse.state_from_published(state))
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name
    del state["le_norm"]
    with pytest.raises(UserError, match="no 'le_norm'"):
        glimpse.state_from_published(state)


def test_published_settings_that_we_do_not_have() -> None:
    with pytest.raises(UserError, match="attn_fuse_type=AttnFuserV2 is not supported"):
        glimpse.options_from_published(PUBLISHED | {"attn_fuse_type": "AttnFuserV2"})
    with pytest.raises(UserError, match="le_layers"):
        glimpse.options_from_published(PUBLISHED | {"le_layers": [0]})
    with pytest.raises(UserError, match="it has no reduce_layer"):
        glimpse.options_from_published({key: value for key, value in PUBLISHED.items() if key != "reduce_layer"})
