"""Pretraining: the packed batch is what each question would see alone; its parts are the real processor's."""

import numpy as np
import pytest
import torch

from devices import put, same
from glimpseprune import pretrain
from glimpseprune.data.sources import tags
from glimpseprune.tiny.config import Lesson, PretrainConfig, TinyConfig
from glimpseprune.tiny.model import PATCH, image_processor, patchify
from glimpseprune.tiny.module import PretrainModule
from glimpseprune.tiny.packing import Curriculum, draw, packed_masks
from glimpseprune.tiny.tokenizer import token_ids, tokenizer
from glimpseprune.types import Layout

TINY = TinyConfig(
    layers=3,
    hidden=32,
    intermediate=32,
    vision_layers=2,
    vision_hidden=32,
    vision_intermediate=32,
    vision_full=[1],
)
LESSON = Lesson(size=224, min_tags=4, max_tags=4, batch=2, steps=1)


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    return put(draw(np.random.default_rng(0), LESSON, "train"))


@pytest.fixture(scope="module")
def module() -> PretrainModule:
    return put(PretrainModule(PretrainConfig(model=TINY, lessons=[LESSON])).eval())


@pytest.mark.parametrize("text", ["number on the red tag?", "numbers on lime and blue?", "colour of tag 07?", "27 41"])
def test_tokenizer_restores_the_text(text):
    ids = tokenizer()(text, add_special_tokens=False).input_ids
    assert tokenizer().unk_token_id not in ids
    assert tokenizer().decode(ids) == text


def test_every_question_and_answer_is_in_the_vocabulary():
    rng = np.random.default_rng(0)
    view = tags.scene(rng, 336, 12, "train")
    for kind in tags.KINDS:
        for q in tags.ask(rng, view, kind, 12):
            assert tokenizer().unk_token_id not in token_ids(q.text) + token_ids(q.answer)


def test_patchify_is_the_image_processor(batch):
    expected = image_processor()(list(batch["images"].cpu().numpy()), return_tensors="pt")["pixel_values"]
    assert same(patchify(batch["images"]), expected.to(batch["images"].device))


def test_curriculum_does_not_depend_on_workers():
    whole = list(Curriculum([LESSON, LESSON], 5, "train"))
    late = list(Curriculum([LESSON, LESSON], 5, "train", first=1))
    assert torch.equal(whole[1]["ids"], late[0]["ids"]) and torch.equal(whole[1]["images"], late[0]["images"])


def test_a_packed_question_sees_what_it_would_see_alone(batch, module):
    with torch.no_grad():
        features = module._vision(batch)
        embeds, positions = module._sequence(batch, features)
        hidden, _ = module._decode(embeds, positions, *packed_masks(batch, [None, None]))
        packed = module.model.lm_head(hidden[:, 2 + features.shape[1] :])  # [B, P, vocabulary]
        tok, lengths = tokenizer(), batch["lengths"].sum(1).tolist()
        starts = np.cumsum([0, *lengths])
        side = batch["images"].shape[1] // PATCH
        prefix = [tok.convert_tokens_to_ids(t) for t in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")]
        for question in (0, len(lengths) - 1):
            piece = batch["ids"][0, starts[question] : starts[question + 1]].tolist()
            ids = torch.tensor([[prefix[0], *[prefix[1]] * (side // 2) ** 2, prefix[2], *piece]])
            alone = module.model(
                input_ids=ids,
                pixel_values=patchify(batch["images"][:1]),
                image_grid_thw=torch.tensor([[1, side, side]]),
                mm_token_type_ids=(ids == prefix[1]).int(),
            ).logits[0, -len(piece) :]
            assert torch.allclose(packed[0, starts[question] : starts[question + 1]], alone, atol=1e-4)


def test_key_dropout_hides_all_but_the_evidence(batch):
    low, high = packed_masks(batch, [0, None])
    visual = batch["evidence"].shape[-1]
    rows = slice(2 + visual, 2 + visual + int(batch["lengths"][0].sum()))
    assert (high[0, 0, rows, 1 : 1 + visual] == batch["evidence"][0, 0]).all()
    assert high[1, 0, rows, 1 : 1 + visual].all() and low[0, 0, rows, 1 : 1 + visual][0].all()
    assert (low[0, 0, rows, 1 : 1 + visual][-1] == batch["evidence"][0, 0]).all()


def test_training_lowers_the_loss_and_the_folder_loads(tmp_path, capsys):
    import json

    from transformers import Qwen2_5_VLForConditionalGeneration

    from glimpseprune import backbones
    from glimpseprune import pretrain as entry

    lesson = "size: 224, min_tags: 3, max_tags: 3, batch: 2"
    lessons = f"[{{{lesson}, steps: 2, dense: true}}, {{{lesson}, steps: 6}}]"
    model = [f"model.{k}={v}" for k, v in {"layers": 3, "hidden": 32, "intermediate": 32, "vision_layers": 2}.items()]
    model += ["model.vision_hidden=32", "model.vision_intermediate=32", "model.vision_full=[1]"]
    entry.main(
        [f"out={tmp_path}", f"lessons={lessons}", "workers=0", "val_every=4", "val_images=8", "warmup=2", *model]
    )
    curve = json.loads((tmp_path / "curve.json").read_text())["curve"]
    assert [point["step"] for point in curve][:2] == [4, 8] and 0 <= curve[-1]["val/none"] <= 1
    folder = tmp_path / "model"
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    backbone = backbones.load(folder, dtype="float32")
    sample = next(iter(tags.samples(tags.Options(), "test")))
    prompt = backbone.prepare([sample.question], [sample.images])
    assert backbone.layouts(prompt) == [[Layout.of((12, 12))]]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "is not empty: give another folder, overwrite=true, or resume="),
        (["overwrite=true"], "is not a run folder of this command"),
        (["resume=none.ckpt"], "there is no such checkpoint"),
    ],
)
def test_another_run_is_not_replaced(more, said, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("stage: glimpse\n")
    with pytest.raises(SystemExit) as stop:
        pretrain.main([f"out={tmp_path}", *more])
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
