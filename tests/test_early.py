"""The private look: what it sees and what it leaves out, what trains, what it costs, and what becomes of it on disk."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from conftest import TINY, flops_of, picture, prompt, prompts
from glimpseprune import attention, checkpoint, decoder, losses, plan
from glimpseprune.config import UserError
from glimpseprune.cost import Vip, layer_flops, query_key_flops, row_flops, vip_flops
from glimpseprune.data.collate import Collator
from glimpseprune.decoder import View, append, approach, branch, prefill, rows, run_layers, start
from glimpseprune.options import BackboneOptions, DataOptions, LossOptions, PrunerOptions, TrainConfig
from glimpseprune.pruners import build, early
from glimpseprune.pruners._gated import question
from glimpseprune.training.glimpse import GlimpseModule
from glimpseprune.types import Sample

SMALL = {"vision_layers": [1], "width": 16, "cond_width": 8, "num_heads": 2}


@pytest.fixture(params=sorted(TINY))
def tiny(request):
    return TINY[request.param]()


def pruner_of(backbone, **options):
    torch.manual_seed(0)
    return build("early", SMALL | options, backbone).eval()


def view_of(backbone, pruner, inputs=None) -> View:
    with torch.no_grad():
        encoded = backbone.encode(prompts(backbone) if inputs is None else inputs, pruner.needs)
        return View(approach(backbone, start(encoded), pruner), encoded, backbone, pruner.stops[0])


def asked_of(view) -> torch.Tensor:
    """bool [B, S], of a state whose columns are those that were encoded, in another place."""
    encoded, state = view.encoded, view.state
    asked = question(encoded.input_ids, encoded.mask, view.backbone.image_token_id)[state.row]
    return asked.gather(1, state.source) & state.mask


# ------------------------------------------------------------------------------------------------------ what it sees


@torch.no_grad()
@pytest.mark.parametrize("dense", [-1, 1 << 60], ids=["end to end", "masked"])
@pytest.mark.parametrize(("prune_layer", "count"), [(-1, 1), (0, 2), (1, 1)])
def test_untrained_it_sees_what_the_question_sees_in_the_decoders_own_layers(
    tiny, prune_layer, count, dense, monkeypatch
):
    """The log of the mean over the question's tokens of their attention, causal, in K to K + T - 1."""
    monkeypatch.setattr(decoder, "DENSE", dense)
    pruner = pruner_of(tiny, prune_layer=prune_layer, private_layers=count)
    view, depth = view_of(tiny, pruner), prune_layer + 1
    state, asked, expected = view.state, asked_of(view), {}
    size = state.mask.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()

    def see(layer, query, key, scaling):
        every = attention.logits(query, key, scaling).masked_fill(~(state.mask[:, None, None] & causal), -torch.inf)
        every = every.softmax(-1).nan_to_num()  # [B, H, S, S]; padding sees nothing
        mean = (every * asked[:, None, :, None]).sum(2) / asked.sum(1)[:, None, None]
        expected[layer] = mean.transpose(1, 2)[state.visual].log()

    run_layers(tiny, branch(state), depth + count, probe=see)
    assert list(expected) == list(range(depth, depth + count)) == list(pruner.probe_layers)
    torch.testing.assert_close(pruner.probe(view), torch.cat(list(expected.values()), -1), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_of_the_last_private_layer_nothing_is_held_but_queries_and_keys(tiny):
    pruner = pruner_of(tiny, private_layers=2)
    first, last = pruner.private
    kinds = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in last.named_parameters()}
    assert kinds <= {"q_proj", "k_proj", "q_norm", "k_norm", "input_layernorm"}
    theirs = dict(tiny.text_model.layers[1].named_parameters())
    assert [name for name, _ in first.named_parameters()] == list(theirs)
    assert all(torch.equal(p, theirs[name]) for name, p in first.named_parameters())
    assert pruner.vip.attn_in_proj.in_features == 2 * tiny.num_heads


@torch.no_grad()
def test_it_is_the_method_s_own(tiny):
    """What changes in private layers changes in no other, and the reverse."""
    pruner, before = pruner_of(tiny), copy.deepcopy(tiny.model.state_dict())
    view = view_of(tiny, pruner)
    seen = pruner.probe(view)
    for parameter in pruner.private.parameters():
        parameter.mul_(1.5)
    assert not torch.allclose(pruner.probe(view), seen, atol=1e-3)
    assert all(torch.equal(x, before[name]) for name, x in tiny.model.state_dict().items())


@torch.no_grad()
def test_adapters_of_the_base_stay_behind():
    from glimpseprune import lora
    from glimpseprune.options import LoraOptions

    backbone = TINY["llava1_5"]()
    backbone = type(backbone)(copy.deepcopy(backbone.model), backbone.processor)
    plain = pruner_of(backbone).state_dict()
    lora.inject(backbone, LoraOptions(rank=2, first_layer=0), 1)
    after = pruner_of(backbone).state_dict()
    assert plain.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in plain.items())


# -------------------------------------------------------------------------------------------------- where it stops


@torch.no_grad()
def test_a_last_stop_after_which_no_visual_token_is_left(tiny):
    pruner = pruner_of(tiny, last_layer=2)
    encoded = tiny.encode(prompts(tiny), pruner.needs)
    state = prefill(tiny, encoded, pruner)
    first, last = state.trace[1:]
    assert (first.stop.depth, last.stop.depth) == (1, 3) and not last.stop.prune_cache
    assert first.kept.min() > 0 and not last.kept.any() and not state.visual.any() and not last.flops.any()
    text = int((encoded.mask & ~encoded.visual).sum(1).max())
    held = [layer.keys.shape[2] for layer in state.cache.layers]
    assert held[0] == held[2] > text and set(held[3:]) == {text}  # what layers saw, they keep
    behind = tiny.embed(torch.full((len(encoded.mask), 2), 5))
    assert run_layers(tiny, append(state, behind), tiny.num_layers).hidden.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_layer": 2, "private_layers": 2}, "private_layers=2: behind layer prune_layer=2 there are 1"),
        ({"prune_layer": 9}, "private_layers=1: behind layer prune_layer=9 there are 0"),
        ({"last_layer": 0}, "last_layer=0: give one behind prune_layer=0"),
        ({"last_layer": 3}, "last_layer=3: .* before the decoder's last, 3"),
        ({"vision_layers": []}, "vision_layers needs at least one"),
        ({"num_heads": 3}, "3 heads must divide"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        pruner_of(TINY["qwen2_5_vl"](), **options)


# --------------------------------------------------------------------------------------------------------- its cost


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3])
def test_declared_flops_are_counted_ones(tiny, count):
    """With a predictor so small that the look is most of it."""
    pruner = pruner_of(tiny, private_layers=count)
    view = view_of(tiny, pruner)
    alone = replace(view, state=rows(view.state, torch.tensor([1])))
    declared, shapes = int(pruner.decide(alone).flops[0]), tiny.shapes
    columns, looks = int(view.state.mask[1].sum()), int(asked_of(view)[1].sum())
    look = (count - 1) * layer_flops(shapes.decoder, columns) + query_key_flops(shapes.decoder, columns)
    look += row_flops(shapes.decoder, columns, count * looks)
    assert declared == look + vip_flops(Vip.of(pruner), shapes, pruner.segments(view)[1])
    single = view_of(tiny, pruner, prompt(tiny, 1))
    assert flops_of(partial(pruner.probe, single)) == pytest.approx(look, rel=0.03)


# ---------------------------------------------------------------------------------------------------------- training


def module_of(backbone, loss=None, train=("private", "vip"), **options):
    config = TrainConfig(
        out="",
        train=list(train),
        backbone=BackboneOptions(path=""),
        pruner=PrunerOptions("early", SMALL | options),
        data=DataOptions(path=""),
        loss=LossOptions(**(loss or {})),
    )
    module = GlimpseModule(config, backbone, pruner_of(backbone, **options))
    module.log = module.log_dict = lambda *_, **__: None
    module._fabric = module._trainer = None
    return module


def batch(backbone):
    samples = [
        Sample(str(row), asked, (said,), [picture(84, 84, row)], [[(0, 0, 40, 40)]])
        for row, (asked, said) in enumerate((("what is it?", "ab"), ("where is the other one?", "c")))
    ]
    return Collator(backbone)(samples)


LOSSES = {
    "kl": ({"kl": 1.0, "pressure": 0.0}, {}),
    "attention": ({"kl": 0.0, "pressure": 0.0, "attention": 1.0}, {}),
    "answer": ({"kl": 0.0, "pressure": 0.0, "answer": 1.0}, {"complete": True}),
    "answer_kl": ({"kl": 0.0, "pressure": 0.0, "answer_kl": 1.0}, {"complete": True}),
}


@pytest.mark.parametrize("which", LOSSES)
@pytest.mark.parametrize("count", [1, 2])
def test_each_loss_teaches_private_layers_and_nothing_of_the_base(tiny, which, count):
    loss, options = LOSSES[which]
    module = module_of(tiny, loss, private_layers=count, init_bias=-2.0, **options)
    found = module.training_step(batch(tiny), 0)
    found.backward()
    taught = {name for name, p in module.pruner.private.named_parameters() if p.grad is not None and p.grad.any()}
    assert found > 0 and {f"{layer}.self_attn.q_proj.weight" for layer in range(count)} <= taught
    if not options:  # no weight is there for nothing: DDP would wait for its gradient
        assert taught >= {name for name, _ in module.pruner.private.named_parameters() if name.endswith("weight")}
    learns = any(p.grad is not None and p.grad.any() for p in module.pruner.vip.parameters())
    assert learns == (not options) and all(p.grad is None for p in tiny.model.parameters())


def test_the_answer_out_of_private_layers_is_that_of_the_decoder_up_to_there(tiny):
    """Untrained: as if it ended with K + T - 1; and the look is no other for the answer behind it."""
    pruner = pruner_of(tiny, private_layers=2, complete=True)
    inputs = batch(tiny)
    view = view_of(tiny, pruner, inputs.prompt)
    ids, mask = inputs.answer_ids, inputs.answer_mask
    with torch.no_grad():
        logits, said = pruner.with_answer(view, ids, mask)
        torch.testing.assert_close(logits, pruner.all_logits(view), atol=1e-4, rtol=1e-4)
        tokens = run_layers(tiny, append(branch(view.state), tiny.embed(ids[:, :-1]), mask[:, :-1]), 1)
        whole = replace(tokens, hidden=torch.cat([view.state.hidden, tokens.hidden], 1))
        expected = tiny.logits(run_layers(tiny, whole, 3).hidden[:, -ids.shape[1] :])
    torch.testing.assert_close(said[mask], expected[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [None, 1, 3])
def test_the_attention_to_imitate_is_that_of_the_tokens_that_answer(tiny, layer):
    """One pass of the unpruned model over prompt and answer; of the heads' and the answer's mean, what is visual."""
    module, inputs = module_of(tiny, {"attention": 1.0, "attention_layer": layer}), batch(tiny)
    ids, mask, seen = inputs.answer_ids, inputs.answer_mask, {}
    shared = module.share(inputs)
    teacher, looked = module.teach(shared, ids, mask)
    state, size = shared.state, shared.state.mask.shape[1]

    def see(which, query, key, scaling):
        seen[which] = attention.logits(query, key, scaling)

    with torch.no_grad():
        encoded, _ = module.prompt(inputs)
        whole = start(encoded)
        joined = append(whole, tiny.embed(ids[:, :-1]), mask[:, :-1])
        joined = replace(joined, hidden=torch.cat([whole.hidden, joined.hidden], 1))
        done = run_layers(tiny, joined, tiny.num_layers, probe=see)
    every = seen[2 * tiny.num_layers // 3 if layer is None else layer][:, :, size - 1 :, :size]
    every = every.masked_fill(~state.visual[:, None, None], -torch.inf).softmax(-1).mean(1)  # [B, T, S]
    expected = torch.stack([row[said].mean(0) for row, said in zip(every, mask)])[state.visual]
    torch.testing.assert_close(looked, expected, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(teacher[mask], tiny.logits(done.hidden[:, size - 1 :])[mask], atol=1e-4, rtol=1e-4)
    assert [float(row.sum()) for row in looked.split(shared.counts)] == pytest.approx([1, 1], abs=1e-5)


def test_attention_kl():
    target = torch.tensor([0.5, 0.5, 0.0, 1.0])
    logits = torch.tensor([0.0, 0.0, -torch.inf, 3.0]).clamp(min=-1e9)
    assert losses.attention_kl(target, logits, [3, 1]).item() == pytest.approx(0, abs=1e-6)
    uniform = losses.attention_kl(target, torch.zeros(4), [3, 1]).item()
    assert uniform == pytest.approx(torch.log(torch.tensor(1.5)).item() / 2)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ({"answer_kl": 1.0}, {}, "complete=true"),
        ({"answer": 1.0}, {}, "complete=true"),
        ({"attention": 1.0, "attention_layer": 0}, {}, "attention_layer=0: give one .* 1 to 3"),
        ({"attention": 1.0, "attention_layer": 4}, {}, "attention_layer=4"),
    ],
)
def test_losses_that_cannot_be(loss, options, message):
    with pytest.raises(UserError, match=message):
        module_of(TINY["qwen2_5_vl"](), loss, **options)


def test_a_glimpse_has_no_answer_of_private_layers():
    backbone = TINY["qwen2_5_vl"]()
    config = TrainConfig(out="", backbone=BackboneOptions(path=""), data=DataOptions(path=""))
    config.loss.answer_kl = 1.0
    with pytest.raises(UserError, match=r"loss\.answer_kl needs a method with private layers"):
        GlimpseModule(config, backbone, build("glimpse", SMALL, backbone))


# ----------------------------------------------------------------------------------------------- precision and disk


@torch.no_grad()
@pytest.mark.parametrize("complete", [False, True])
def test_beside_a_base_of_half_precision_weights_stay_float32_and_multiply_in_bfloat16(tiny, complete):
    half = type(tiny)(copy.deepcopy(tiny.model).to(torch.bfloat16), tiny.processor)
    pruner, dtypes = pruner_of(half, private_layers=2, complete=complete), set()
    assert {p.dtype for p in pruner.private.parameters()} == {torch.float32}
    view = view_of(half, pruner)
    for layer in pruner.private:
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    before = view.state.hidden.clone()
    logits = pruner.all_logits(view)
    assert dtypes == {torch.bfloat16} and logits.dtype == torch.float32 and logits.isfinite().all()
    assert torch.equal(view.state.hidden, before) and view.state.hidden.dtype == torch.bfloat16


TINY_BASE = "data/tiny-qwen2_5_vl"


@torch.no_grad()
def test_a_run_folder_holds_private_layers_and_no_more(tmp_path):
    """Saved, loaded, with other options, exported: the same look."""
    from glimpseprune import export

    options = {"vision_layers": [1], "width": 8, "cond_width": 8, "num_heads": 2, "private_layers": 2, "threshold": 0.0}
    options["max_keep"] = 0.1
    where = BackboneOptions(TINY_BASE, dtype="float32")
    model = checkpoint.load(backbone=where, pruner=PrunerOptions("early", options), fresh=True)
    for parameter in model.pruner.private.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    config = TrainConfig(
        out=str(tmp_path / "run"),
        train=["private", "vip"],
        backbone=where,
        pruner=PrunerOptions("early", options),
        data=DataOptions(path="-"),
    )
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run", config, checkpoint.trained(model.pruner))
    with pytest.raises(UserError, match="has weights that are learned"):
        checkpoint.load(backbone=where, pruner=PrunerOptions("early", options))
    inputs = model.prepare("number on the red tag?", "data/tags.png")
    expected = model.generate(**inputs, max_new_tokens=4)
    export.run(export.ExportConfig(ckpt=str(tmp_path / "run"), out=str(tmp_path / "out")))
    for folder in ("run", "out"):
        found = checkpoint.load(tmp_path / folder)
        rollout = found.generate(**inputs, max_new_tokens=4)
        assert torch.equal(rollout.keep[0], expected.keep[0]) and torch.equal(rollout.tokens, expected.tokens)
        fewer = found.generate(**inputs, max_new_tokens=1, max_keep=0.05)
        assert int(fewer.keep[0].sum()) == int(0.05 * 144) and (expected.keep[0] | ~fewer.keep[0]).all()


def test_the_outline_has_every_weight_without_numbers():
    cfg = plan.config.load(plan.PlanConfig, ["conf/early.yaml", "out=-", "data.path=-"])
    module = plan.skeleton(cfg, plan.architecture(TINY_BASE))
    model = checkpoint.load(backbone=cfg.backbone, pruner=cfg.pruner, fresh=True)
    ours = {name: x.shape for name, x in module.pruner.state_dict().items()}
    assert ours == {name: x.shape for name, x in model.pruner.state_dict().items()}
    assert all(x.is_meta for x in module.pruner.state_dict().values())
    assert early.to_budget(0.2, model.backbone)["max_keep"] == 0.2
