"""Collation: answers, masks and box targets; on a backbone reduced to what collation uses, and on the real ones."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from conftest import TINY
from glimpseprune.config import UserError
from glimpseprune.data.collate import Collator, box_targets, sample_targets
from glimpseprune.data.stream import PADDING, _collate
from glimpseprune.types import Layout, Part, Sample

CELL, IMAGE_TOKEN, PAD, END = 10, 1, 0, 2


class Tokenizer:
    """One token per character."""

    pad_token_id, eos_token_id, model_max_length = PAD, END, 40

    def __call__(self, text: str, add_special_tokens: bool, split_special_tokens: bool) -> SimpleNamespace:
        assert split_special_tokens and not add_special_tokens
        return SimpleNamespace(input_ids=[ord(c) for c in text])


class Backbone:
    """Makes one visual token of every CELL x CELL pixels, and refuses what a real one refuses."""

    def __init__(self) -> None:
        self.processor = SimpleNamespace(tokenizer=Tokenizer())
        self.systems = []

    def prepare(self, questions, images, system=None):
        self.systems.append(system)
        grids = [[(i.height // CELL, i.width // CELL) for i in row] for row in images]
        rows = []
        for question, row in zip(questions, grids):
            if "break" in question:
                raise IndexError("list index out of range")
            extra = question.count("<image>")  # smuggled in
            rows.append([IMAGE_TOKEN] * (sum(r * c for r, c in row) + extra) + [ord(c) for c in question])
        length = max(map(len, rows))
        return {
            "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
            "grids": grids,
        }

    def layouts(self, prompt):
        for row, (ids, grids) in enumerate(zip(prompt["input_ids"], prompt["grids"])):
            there, made = int((ids == IMAGE_TOKEN).sum()), sum(r * c for r, c in grids)
            if there != made:
                raise UserError(f"prompt {row} has {there} image tokens, its images make {made}")
        return [[Layout.of(grid) for grid in row] for row in prompt["grids"]]


def sample(key: str = "a", *, sizes=((40, 30),), **changes) -> Sample:
    images = changes.pop("images", None) or [Image.new("RGB", size) for size in sizes]
    fields = {"question": "how?", "answers": ("red",), "boxes": [[(0, 0, 9, 9)] for _ in sizes]}
    return Sample(key=key, images=images, **{**fields, **changes})


def cells(boxes, size=(40, 30), grid=(3, 4), **kwargs) -> list[list[int]]:
    return box_targets(boxes, size, Part(*grid), **kwargs).view(grid).int().tolist()


def test_answers_are_right_padded_and_end_their_turn():
    inputs = Collator(Backbone())([sample("a", answers=("red", "crimson")), sample("b", answers=("7",))])
    assert inputs.answer_ids.tolist() == [[ord("r"), ord("e"), ord("d"), END], [ord("7"), END, PAD, PAD]]
    assert inputs.answer_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert inputs.answer_mask.dtype == torch.bool
    assert inputs.prompt["input_ids"].shape == (2, 12 + 4)
    assert [s.key for s in inputs.samples] == ["a", "b"]


def test_a_long_answer_is_cut_and_does_not_end():
    inputs = Collator(Backbone(), max_answer=3)([sample(answers=("purple",)), sample(answers=("no",))])
    assert inputs.answer_ids.tolist() == [[ord("p"), ord("u"), ord("r")], [ord("n"), ord("o"), END]]
    assert inputs.answer_mask.all()


def test_the_end_pads_where_there_is_no_pad_token_and_without_an_end_nothing_goes():
    backbone = Backbone()
    backbone.processor.tokenizer.pad_token_id = None
    assert Collator(backbone)([sample(), sample(answers=("7",))]).answer_ids[1].tolist() == [ord("7"), END, END, END]
    backbone.processor.tokenizer.eos_token_id = None
    with pytest.raises(UserError, match="no eos token"):
        Collator(backbone)


def test_system_prompt_is_handed_on():
    backbone = Backbone()
    Collator(backbone, system="be brief")([sample()])
    assert backbone.systems == ["be brief"]


def test_targets_of_several_images_and_of_none():
    one = sample("a", sizes=((40, 30), (20, 20)), boxes=[[(25, 0, 30, 5)], []])
    two = sample("b", sizes=((20, 10),), boxes=None)
    targets = Collator(Backbone())([one, two]).targets
    assert [t.dtype for t in targets] == [torch.bool] * 2
    assert targets[0].int().tolist() == [0, 0, 1, 1] + [0] * 8 + [0] * 4
    assert targets[1].tolist() == [True, True]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 9.9, 9.9), [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
        ((9.9, 0, 10, 0), [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),  # an edge on a border touches both sides
        ((15, 5, 25, 25), [[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]]),
        ((0, 0, 40, 30), [[1, 1, 1, 1]] * 3),  # the far edge belongs to the last cell
        ((40, 30, 40, 30), [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]),
        ((12, 12, 12, 12), [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]),  # a point still has its cell
    ],
)
def test_box_rule(box, expected):
    assert cells([box]) == expected


def test_boxes_are_united_and_measured_in_the_original_size():
    assert cells([(0, 0, 5, 5), (35, 25, 36, 26)]) == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert cells([(400, 0, 410, 5)], size=(1000, 50), grid=(1, 5)) == [[0, 0, 1, 0, 0]]
    assert cells([]) == [[0] * 4] * 3


def test_dilation_stops_at_the_border():
    assert cells([(12, 2, 13, 3)], dilate=1) == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert cells([(12, 2, 13, 3)], dilate=9) == [[1] * 4] * 3
    targets = Collator(Backbone(), dilate=1)([sample()]).targets
    assert targets[0].sum() == 4


TILE = Part(4, 3, (0.5, -0.1, 1.1, 0.75), newline=True)  # a tile that shows some padding


def test_a_part_has_targets_where_it_shows_a_box():
    """Of a picture of 100 x 200; cells of the tile are 20 x 42.5 pixels, from (50, -20) on; newlines are no target."""

    def cells(*box) -> list[list[int]]:
        return box_targets([box], (100, 200), TILE).view(4, 4).int().tolist()

    assert cells(0, 0, 49, 200) == [[0] * 4] * 4
    assert cells(0, 151, 100, 200) == [[0] * 4] * 4
    assert cells(0, 0, 100, 200) == [[1, 1, 1, 0]] * 4
    assert cells(72, 30, 88, 60) == [[0] * 4, [0, 1, 0, 0], [0] * 4, [0] * 4]
    assert cells(40, 0, 69, 10) == [[1, 0, 0, 0], [0] * 4, [0] * 4, [0] * 4]
    assert cells(95, 140, 99, 199) == [[0] * 4, [0] * 4, [0] * 4, [0, 0, 1, 0]]


@pytest.mark.parametrize("name", sorted(TINY))
def test_targets_are_the_cells_that_touch_a_box_in_every_part(name):
    """Cell by cell, by the pixels that a layout says it shows."""
    backbone, generator = TINY[name](), torch.Generator().manual_seed(0)
    for size in ((168, 112), (90, 250), (300, 60)):
        layout = backbone.layout_of(backbone.model.config, size, 16, 48 * 1024)
        for _ in range(8):
            x, y = (torch.rand(2, generator=generator).sort().values.mul(edge).tolist() for edge in size)
            box = x[0], y[0], x[1], y[1]
            one = Sample("a", "?", ("a",), [Image.new("RGB", size)], [[box]])
            targets = iter(sample_targets(one, [layout]).tolist())
            for part in layout.parts:
                left, top, right, bottom = (edge * size[axis % 2] for axis, edge in enumerate(part.box))
                wide, high = (right - left) / part.cols, (bottom - top) / part.rows
                for row in range(part.rows):
                    for col in range(part.grid[1]):
                        beside = left + (col + 1) * wide <= x[0] or left + col * wide > x[1]
                        beside |= top + (row + 1) * high <= y[0] or top + row * high > y[1]
                        assert next(targets) == (col < part.cols and not beside), (part, row, col, box)
            assert next(targets, None) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ()}, "sample 'bad': a prompt without an image; every question needs at least one"),
        ({"question": "what is <image> ?"}, "sample 'bad': prompt 0 has 13 image tokens, its images make 12"),
        ({"question": "break it"}, "sample 'bad': list index out of range"),
        ({"question": "?" * 41}, "sample 'bad': its prompt has 41 tokens of text, more than the 40 of the tokenizer"),
    ],
)
def test_the_culprit_is_named_and_replaced(changes, message):
    bad = sample("bad", **changes)
    inputs = Collator(Backbone())([bad, sample("good"), bad, replace(sample("fine"), stands_in="x")])
    assert [(s.key, s.stands_in) for s in inputs.samples] == [
        ("good", message),
        ("good", ""),
        ("good", message),
        ("fine", "x"),
    ]
    assert len(inputs.prompt["input_ids"]) == len(inputs.targets) == len(inputs.answer_ids) == 4
    with pytest.raises(UserError) as error:
        Collator(Backbone())([bad, bad])
    assert str(error.value) == message
    _, damages = _collate(Collator(Backbone()), [bad, sample("good"), replace(bad, stands_in=PADDING)])
    assert damages == [message]


@pytest.fixture(params=sorted(TINY))
def real(request):
    return TINY[request.param]()


def test_batches_fit_the_real_backbones(real):
    one = sample("a", sizes=((112, 84),), boxes=[[(0, 0, 27, 27)]])
    two = sample("b", sizes=((56, 56), (84, 56)), boxes=None, answers=("ab",))
    inputs = Collator(real)([one, two])
    encoded = real.encode(inputs.prompt, targets=inputs.targets)
    assert [len(target) for target in inputs.targets] == encoded.counts
    assert inputs.targets[0][0]
    assert not inputs.targets[0][-1]
    assert inputs.targets[1].all()
    tokenizer = real.processor.tokenizer
    answers = [tokenizer.decode(ids[mask]) for ids, mask in zip(inputs.answer_ids, inputs.answer_mask)]
    assert answers == [f"{text}{tokenizer.eos_token}" for text in ("red", "ab")]


def test_special_tokens_in_questions_and_answers_are_text(real):
    """All of the tokenizer's, and what processors and templates act on: the prompt has those of any other question."""
    tokenizer = real.processor.tokenizer
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    numbers = torch.tensor(tokenizer.convert_tokens_to_ids(specials))
    collate = Collator(real)
    plain = collate([sample("a", question="what?")])
    for token in (*specials, "<|placeholder|>", "{{ messages }}", "".join(specials)):
        quoting = collate([sample("a", question=f"what is {token} ?", answers=(f"it is {token}",))])
        one, other = ((x.prompt["input_ids"][0, :, None] == numbers).sum(0) for x in (quoting, plain))
        assert one.tolist() == other.tolist()
        assert f"what is {token} ?" in tokenizer.decode(quoting.prompt["input_ids"][0])
        assert tokenizer.decode(quoting.answer_ids[0]) == f"it is {token}{tokenizer.eos_token}"
        assert int(torch.isin(quoting.answer_ids, numbers).sum()) == 1  # the end
        assert real.layouts(quoting.prompt) == real.layouts(plain.prompt)
        assert torch.equal(quoting.prompt["pixel_values"], plain.prompt["pixel_values"])


def test_what_no_tokenizer_takes_is_refused(real):
    for changes in ({"question": "a \ud800"}, {"answers": ("\udfff",)}):
        with pytest.raises(UserError, match="holds .*, half of a surrogate pair"):
            Collator(real)([sample("a", **changes)])
    with pytest.raises(UserError, match="a system prompt holds"):
        real.prepare(["?"], [[Image.new("RGB", (56, 56))]], system="\ud800")


def test_photos_are_upright_and_so_are_their_boxes(real):
    upright = Image.new("RGB", (112, 168))
    upright.paste("white", (0, 0, 56, 56))
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    lying.getexif()[0x0112] = 6
    one, two = (Collator(real)([sample("a", images=[image], boxes=[[(0, 0, 20, 160)]])]) for image in (upright, lying))
    assert torch.equal(one.prompt["input_ids"], two.prompt["input_ids"])
    assert torch.equal(one.prompt["pixel_values"], two.prompt["pixel_values"])
    assert torch.equal(one.targets[0], two.targets[0])
    assert real.grids(two.prompt) == real.grids(one.prompt)


def test_a_system_prompt_that_quotes_and_rows_that_do_not(real):
    tokenizer = real.processor.tokenizer
    token, questions = tokenizer.eos_token, ["why?", "what is \0question\0 of", "how?"]
    images = [[Image.new("RGB", (112, 112))]] * 3
    plain = real.prepare(questions, images)
    mixed = real.prepare([questions[0], f"say {token}", questions[2]], images)
    for row in (0, 2):
        ids = [each["input_ids"][row][each["attention_mask"][row].bool()] for each in (plain, mixed)]
        assert torch.equal(*ids)
    texts = real.prepare([f"{token}\n{questions[1]}"], images[:1], system=f"never say {token}")
    ends = (real.prepare(["?"], images[:1], system="?")["input_ids"] == tokenizer.eos_token_id).sum()
    assert (texts["input_ids"] == tokenizer.eos_token_id).sum() == ends
    said = tokenizer.decode(texts["input_ids"][0])
    assert said.index(f"never say {token}") < said.index(f"{token}\nwhat is")


def test_prompts_are_those_of_the_processor(real):
    """Where no text quotes a special token, on images of several sizes."""
    images = [[Image.new("RGB", (168, 112))], [Image.new("RGB", (90, 250)), Image.new("RGB", (300, 60))]]
    questions = ["is it red, blue or grey?", "why?"]
    for system in (None, "be brief"):
        texts = [real._templated(question, len(row), system) for question, row in zip(questions, images)]
        flat = [image for row in images for image in row]
        made = real.processor(text=texts, images=flat, padding=True, padding_side="left", return_tensors="pt")
        prompt = real.prepare(questions, images, system)
        assert set(prompt) == set(made) == set(real.prompt_keys)
        for name, tensor in prompt.items():
            assert tensor.dtype == made[name].dtype
            assert torch.equal(tensor, made[name])
