"""Asking: the command, the method and the picture of what was kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import glimpseprune
from conftest import PICTURES, QUESTIONS, TINY
from glimpseprune import ask, plot
from glimpseprune.checkpoint import GlimpsePrune
from glimpseprune.config import UserError
from glimpseprune.pruners import build

TAGS = Path(__file__).parent.parent / "data" / "tags.png"


@pytest.fixture(scope="module")
def shipped() -> GlimpsePrune:
    return glimpseprune.load(Path(__file__).parent.parent / "data" / "demo-pruner")


def test_the_shipped_model_reads_its_picture(capsys, tmp_path) -> None:
    ask.main([f"picture={tmp_path / 'kept.png'}"])
    out, told = capsys.readouterr()
    assert out.startswith("data/tags.png: number on the red tag?\n01\n") and "of 144 visual tokens" in out
    assert ask.KNOWN in told
    with Image.open(tmp_path / "kept.png") as picture:
        assert picture.size[0] == 336


def test_pictures_come_first_and_a_question_may_look_like_an_option(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ask.main([str(TAGS), "is red left of blue, or is x=y?", "max_keep=0.03", "picture=null", "max_new_tokens=2"])
    assert "kept 4 of 144 visual tokens (2.8%)" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["what?"], "give a picture and then a question"),
        (["nowhere.png", "what?"], "there is no picture 'nowhere.png'"),
        ([str(TAGS), "what?", "picture=kept.jpg"], "give the name of a .png file"),
        ([str(Path(__file__)), "what?"], "cannot read the picture"),
        ([str(TAGS), "what?", "options.threshhold=.3"], "did you mean 'threshold'"),
        ([str(TAGS), "what?", "max_keep=2"], "max_keep"),
    ],
)
def test_mistakes(argv, said, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        ask.main(argv)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_an_answer_is_what_generate_says(shipped) -> None:
    with Image.open(TAGS) as image:
        answer = shipped.ask(image, "numbers on red and blue?", max_keep=0.2)
        rollout = shipped.generate(
            **shipped.prepare("numbers on red and blue?", image), max_keep=0.2, max_new_tokens=128, do_sample=False
        )
    assert answer.text == rollout.texts[0].strip() == "01 56"
    assert answer.total == 144 and answer.kept == int(rollout.keep[0].sum()) == int(answer.maps[0].sum())
    assert torch.equal(answer.maps[0], rollout.keep_maps()[0][0])
    assert 0 < answer.first_token <= answer.seconds
    with pytest.raises(UserError, match="one question"):
        shipped.ask(TAGS, ["a", "b"])


def test_a_picture_is_seen_once_for_many_questions(shipped) -> None:
    seen = shipped.see(TAGS)
    for question in ("number on the red tag?", "is red left of blue?"):
        assert shipped.ask(seen, question).text == shipped.ask(TAGS, question).text


def test_a_streamer_hears_the_answer_too() -> None:
    backbone = TINY["qwen2_5_vl"]()
    model, heard = GlimpsePrune(backbone, build("none", {}, backbone), "none"), []

    class Listener:
        def put(self, value) -> None:
            heard.append(value.tolist())

        def end(self) -> None:
            heard.append("end")

    answer = model.ask(PICTURES[1], QUESTIONS[1], max_new_tokens=3, streamer=Listener())
    assert heard[-1] == "end" and [token for (token,) in heard[1:-1]] == answer.rollout.tokens[0].tolist()
    assert len(answer.maps) == 2 and answer.kept == answer.total


def test_what_was_kept_is_bright() -> None:
    white = Image.new("RGB", (100, 50), "white")
    maps = [torch.tensor([[True, False]])]
    page = plot.kept(white, maps, "text")
    assert page.getpixel((80, 60)) == (255, 255, 255) and page.getpixel((250, 60))[0] < 100
    with pytest.raises(UserError, match="2 images, and keep maps of 1"):
        plot.kept([white, white], maps)
