"""The glimpse: what it keeps by its logits, its options, published checkpoints, and its start as a copy of a token."""

import pytest
import torch

from conftest import TINY, prompt, prompts
from glimpseprune import attention, decoder
from glimpseprune.config import UserError
from glimpseprune.decoder import View, append, approach, branch, run_layers, start
from glimpseprune.generate import generate
from glimpseprune.pruners import _gated, build, glimpse
from glimpseprune.types import Needs

OPTIONS = {"prune_layer": 0, "probe_layers": [0], "vision_layers": [0], "width": 16, "cond_width": 16, "num_heads": 2}
VIP = {"width": 16, "cond_width": 8, "num_heads": 2}


@pytest.fixture(params=sorted(TINY))
def tiny(request):
    return TINY[request.param]()


@torch.no_grad()
def view_of(backbone, pruner, inputs) -> View:
    encoded = backbone.encode(inputs, pruner.needs)
    return View(approach(backbone, start(encoded), pruner), encoded, backbone, pruner.stops[0])


def test_a_copied_token_sees_what_the_token_sees():
    backbone = TINY["qwen2_5_vl"]()
    pruner = build("glimpse", OPTIONS | {"init_token": "?"}, backbone).eval()
    token = torch.tensor(backbone.processor.tokenizer("?", add_special_tokens=False).input_ids)
    assert torch.allclose(pruner.glimpse()[:, 0], backbone.embed(token).expand(backbone.num_layers, -1), atol=1e-5)
    encoded = backbone.encode(prompts(backbone), Needs(states=(0,)))
    state = run_layers(backbone, start(encoded), 1)
    seen = {}
    appended = append(branch(state), backbone.embed(token).expand(len(encoded.mask), 1, -1))
    size = state.mask.shape[1]

    def see(layer, query, key, scaling):
        seen[layer] = attention.logits(query, key, scaling)[:, :, 0, :size].transpose(1, 2)[state.visual]

    run_layers(backbone, appended, 1, probe=see)
    assert torch.allclose(pruner.probe(View(state, encoded, backbone)), seen[0], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dense", [-1, 1 << 60], ids=["end to end", "masked"])
@pytest.mark.parametrize("probe", glimpse.PROBES)
@pytest.mark.parametrize("sight", glimpse.SIGHTS)
def test_a_glimpse_that_rides_is_one_that_looks_alone(backbone, sight, probe, dense, monkeypatch):
    """It sees the same, no token sees it, nothing of it stays; and what it saw is told to no other pruner."""
    monkeypatch.setattr(decoder, "DENSE", dense)
    options = VIP | {"prune_layer": 2, "probe_layers": [0, 2], "vision_layers": [1], "sight": sight, "probe": probe}
    torch.manual_seed(0)
    pruner, other = (build("glimpse", options, backbone).eval() for _ in range(2))
    other.glimpse.embeddings.add_(torch.randn_like(other.glimpse.embeddings))
    encoded = backbone.encode(prompts(backbone), pruner.needs)
    alone = approach(backbone, start(encoded), pruner)
    ridden = approach(backbone, start(encoded), pruner, encoded)
    assert alone.ridden is None and ridden.ridden is not None
    mask = ridden.mask
    torch.testing.assert_close(ridden.hidden[mask], alone.hidden[mask], atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(ridden.cache.layers, alone.cache.layers, strict=True):
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            torch.testing.assert_close(*(x.transpose(1, 2)[mask] for x in (a, b)), atol=1e-5, rtol=1e-5)
    views = [View(state, encoded, backbone, pruner.stops[0]) for state in (ridden, alone)]
    torch.testing.assert_close(*map(pruner.probe, views), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(*map(other.probe, views), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(other.probe(views[0]), pruner.probe(views[0]), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(TINY))
def test_a_glimpse_of_the_question_starts_as_its_tokens(name):
    """Their embeddings, as large as embeddings of this vocabulary are, whatever the size of the token's own."""
    backbone = TINY[name]()
    pruner = build("glimpse", OPTIONS | {"sight": "question", "vision_layers": [1]}, backbone).eval()
    table = backbone.text_model.embed_tokens.weight
    tokens = backbone.embed(torch.tensor([[5, 9, 17]]))  # [1, 3, D]
    vectors = pruner.glimpse(tokens)
    assert vectors.shape == (backbone.num_layers, *tokens.shape)
    assert torch.allclose(torch.cosine_similarity(vectors, tokens.expand_as(vectors), -1), torch.tensor(1.0))
    assert torch.allclose(vectors.pow(2).mean(-1).sqrt(), table.pow(2).mean().sqrt(), rtol=1e-2)


QUESTION = [  # image 7, padding 0
    ([3, 7, 7, 4, 5, 6], [0, 0, 0, 1, 1, 1]),
    ([0, 0, 3, 7, 7, 4], [0, 0, 0, 0, 0, 1]),
    ([7, 4, 7, 5, 6, 0], [0, 0, 0, 1, 1, 0]),  # two images; right padding
    ([7, 3, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]),
    ([0, 0, 4, 5, 7, 7], [0, 0, 0, 0, 0, 1]),  # an image is last: one position, as where one looks
    ([4, 5, 7, 7, 0, 0], [0, 0, 0, 1, 0, 0]),
]


@pytest.mark.parametrize(("ids", "expected"), QUESTION)
def test_the_question_is_what_comes_behind_the_last_image(ids, expected):
    ids = torch.tensor([ids])
    assert _gated.question(ids, ids != 0, 7).long().tolist() == [expected]
    everything = torch.tensor([row for row, _ in QUESTION])
    assert _gated.question(everything, everything != 0, 7).any(1).all()


@pytest.mark.parametrize("text", ["", "two"])
def test_init_token_must_be_in_the_vocabulary(text):
    with pytest.raises(UserError, match="init_token"):
        build("glimpse", OPTIONS | {"init_token": text}, TINY["qwen2_5_vl"]())


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
    keep = _gated.chosen(LOGITS, [5, 3], **settings)
    assert [row.nonzero().flatten().tolist() for row in keep.split([5, 3])] == expected


def test_max_keep_is_compared_as_a_fraction() -> None:
    logits = torch.linspace(1, -1, 100)
    keep = _gated.chosen(logits, [100], threshold=float(logits.sigmoid()[29]), max_keep=0.29)
    assert int(keep.sum()) == 29  # though .29 * 100 < 29 in floating point


def test_min_keep_above_the_number_of_tokens(tiny) -> None:
    with pytest.raises(UserError, match="min_keep is 4 but a prompt has only 3 visual tokens"):
        _gated.chosen(LOGITS, [5, 3], min_keep=4)
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
        ({"sight": "questions"}, "choices are one, question"),
        ({"sight": "question", "init_token": "?"}, "init_token: .* leave it out"),
        ({"max_keep": 1.5}, "max_keep: give 0 to 1, got 1.5"),
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
    assert glimpse.options_from_published(PUBLISHED | {"attn_fuse_global": False}).windowed
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
