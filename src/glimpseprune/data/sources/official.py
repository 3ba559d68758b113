"""Question sets of the literature, in the files that their authors publish, unpacked into one folder::

    python -m src.prepare source=official options.set=docvqa options.root=docvqa out=data/docvqa

=================  ============================================================  ====================================
set                files in ``root`` (<s>: train, val)                           pictures in ``images``
=================  ============================================================  ====================================
docvqa             <s>_v1.0_withQT.json or <s>_v1.0.json                         documents/ or spdocvqa_images/
infographicvqa     infographicsVQA_<s>_v1.0_withQT.json or ..._<s>_v1.0.json     infographicsvqa_images/ or images/
textvqa            TextVQA_0.5.1_<s>.json                                        train_images/
vqav2              v2_OpenEnded_mscoco_<s>2014_questions.json and                <s>2014/
                   v2_mscoco_<s>2014_annotations.json
gqa                <s>_balanced_questions.json, testdev_balanced_questions.json  images/
chartqa            <s>/<s>_human.json and <s>/<s>_augmented.json, also of test   <s>/png/
pope               coco_pope_random.json, ..._popular.json, ..._adversarial.json val2014/
scienceqa          problems.json                                                 <s>/<id>/, also of test
=================  ============================================================  ====================================

Files are those of the splits that are wanted: what is not there is no split. Test questions whose answers are kept by
an evaluation server cannot be scored and are not read. Every question gets the line that papers put behind it
(``brief``). VQAv2 has the answer that most gave first, then all ten. Questions of ScienceQA without a picture are none
of the set that is reported; how many there are is told.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from glimpseprune import lookup
from glimpseprune.config import UserError, option
from glimpseprune.data.sources._fields import SPLITS, Fields
from glimpseprune.data.sources._pictures import Folder
from glimpseprune.data.sources._rows import Held, Joined, Row, Table, table
from glimpseprune.data.sources._splits import Rows, Unfit, remembered
from glimpseprune.tasks import LETTER, SHORT
from glimpseprune.types import Sample

splits = SPLITS


@dataclass
class Options:
    set: str = option(help="docvqa, infographicvqa, textvqa, vqav2, gqa, chartqa, pope or scienceqa")
    root: str = option(help="folder of its files, as they are published")
    images: str | None = option(None, "folder of its pictures, or of the folders that they are in; null: root")
    brief: bool = option(True, "ask for a short answer behind every question, as papers do")


@dataclass(frozen=True)
class Part:
    """Rows of one file, or of the first of these names that is there."""

    split: str
    names: tuple[str, ...]
    kind: str = "all"
    open: Callable[[Path], Table] = table


Shape = Callable[[Row, Part, Folder], Row]
"""A row as it is published -> image, question, answer, id, kind; what it lacks is told by a KeyError."""


@dataclass(frozen=True)
class Format:
    parts: Sequence[Part]
    shape: Shape
    suffix: str = SHORT


def present(options: Options) -> tuple[str, ...]:
    """The splits of which there are files; raises UserError as :func:`samples`."""
    return _rows(options).present


def samples(options: Options, split: str, start: int = 0, stop: int | None = None) -> Iterator[Sample | Unfit]:
    """Samples ``start`` to ``stop`` of a split in the order of its files, and what is wrong in place of unfit rows.

    Raises:
        UserError: there is no such set or folder, or none of its files.
    """
    return _rows(options).samples(split, start, stop)


def count(options: Options, split: str) -> int:
    """How many samples a split has, unfit ones included; raises UserError as :func:`samples`."""
    return _rows(options).count(split)


def inputs(options: Options) -> list[Path]:
    files = list(_files(options, _form(options)).values())
    return [*files, *map(_annotations, files)] if options.set == "vqav2" else files


def license(options: Options) -> str | None:
    """As their authors say; of other sets it is not known here."""
    return {
        "vqav2": "annotations: CC BY 4.0 (visualqa.org); pictures: those of COCO",
        "textvqa": "CC BY 4.0 (the card of facebook/textvqa)",
        "chartqa": "GPL 3.0 (the card of ahmed-masry/ChartQA)",
    }.get(options.set)


def notes(options: Options) -> list[str]:
    """Files without which a split is not whole, and rows that are none of the set that is reported."""
    form = _form(options)
    files = _files(options, form)
    splits = {part.split for part in files}
    lost = [part for part in form.parts if part.split in splits and part not in files]
    said = [f"there is no {part.names[0]}: {part.split} is without its questions" for part in lost]
    if options.set == "scienceqa":
        (problems,) = files.values()
        rows = table(problems)
        without = sum(not rows.read(number).get("image") for number in range(len(rows)))
        if without:
            said.append(f"{without} of {len(rows)} questions in {problems.name} have no picture and are not read")
    return said


def _rows(options: Options) -> Rows:
    form = _form(options)
    files = _files(options, form)
    return remembered(partial(_read, form, files), options, {part.names[0]: file for part, file in files.items()})


def _form(options: Options) -> Format:
    return FORMATS[lookup.choose(options.set, FORMATS, "the sets that are known")]


def _files(options: Options, form: Format) -> dict[Part, Path]:
    if not os.path.isdir(options.root):
        raise UserError(f"options.root={options.root}: there is no such folder")
    found = {}
    for part in form.parts:
        places = [Path(options.root, name) for name in part.names]
        if file := next(filter(Path.exists, places), None):
            found[part] = file
    if not found:
        names = ", ".join(part.names[0] for part in form.parts)
        raise UserError(f"options.root={options.root}: there is none of the files of {options.set}: {names}")
    return found


def _read(form: Format, files: Mapping[Part, Path], options: Options) -> Rows:
    folder = Folder(options.root if options.images is None else options.images)
    tables = [(file.name, _open(part, file), partial(_shaped, form, part, folder)) for part, file in files.items()]
    fields = Fields(split_field="split", suffix=form.suffix if options.brief else "")
    return Rows(Joined(tables), fields, folder, options.set)


def _open(part: Part, file: Path) -> Table:
    try:
        return part.open(file)
    except (ValueError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is not as this set has it: {error}") from None


def _shaped(form: Format, part: Part, folder: Folder, row: Row, place: str) -> Row:
    try:
        made = {"kind": part.kind, "split": part.split, "id": place, **form.shape(row, part, folder)}
    except KeyError as error:
        raise ValueError(f"there is no field {error}") from None
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"the row is not as this set has it: {error}") from None
    return {**made, "key": "-".join((made["split"], *[part.kind] * (part.kind != "all"), str(made["id"])))}


# ------------------------------------------------------------------------------------------------------------ the sets


def _docvqa(row: Row, part: Part, folder: Folder) -> Row:
    name = row["image"].rpartition("/")[2]
    return {
        "image": folder.first(f"documents/{name}", f"spdocvqa_images/{name}", name),
        "question": row["question"],
        "answer": row["answers"],
        "id": row["questionId"],
        "kind": _first(row.get("question_types")),
    }


def _infographicvqa(row: Row, part: Part, folder: Folder) -> Row:
    name = row["image_local_name"]
    return {
        "image": folder.first(f"infographicsvqa_images/{name}", f"images/{name}", name),
        "question": row["question"],
        "answer": row["answers"],
        "id": row["questionId"],
        "kind": _first(row.get("answer_type")),
    }


def _first(kinds: list[str] | None) -> str:
    return kinds[0] if kinds else "all"


def _textvqa(row: Row, part: Part, folder: Folder) -> Row:
    name = f"{row['image_id']}.jpg"
    return {
        "image": folder.first(f"train_images/{name}", f"train_val_images/train_images/{name}", name),
        "question": row["question"],
        "answer": row["answers"],
        "id": row["question_id"],
    }


def _answered(questions: Path) -> Table:
    """The questions of VQAv2 with what the file of annotations beside theirs says of each."""
    said = table(_annotations(questions))
    known = {row["question_id"]: row for row in map(said.read, range(len(said)))}
    asked = table(questions)
    rows = map(asked.read, range(len(asked)))
    return Held([{**known.get(row["question_id"], {}), **row} for row in rows])


def _annotations(questions: Path) -> Path:
    return questions.with_name(questions.name.replace("OpenEnded_", "").replace("_questions", "_annotations"))


def _vqav2(row: Row, part: Part, folder: Folder) -> Row:
    stem = f"{part.split}2014"
    name = f"COCO_{stem}_{int(row['image_id']):012d}.jpg"
    given, most = [each["answer"] for each in row["answers"]], row["multiple_choice_answer"]
    return {
        "image": folder.first(f"{stem}/{name}", name),
        "question": row["question"],
        "answer": sorted(given, key=lambda answer: answer != most),
        "id": row["question_id"],
        "kind": row["answer_type"],
    }


def _gqa(row: Row, part: Part, folder: Folder) -> Row:
    name = f"{row['imageId']}.jpg"
    return {
        "image": folder.first(f"images/{name}", name),
        "question": row["question"],
        "answer": row["answer"],
        "id": row["key"],
        "kind": row["types"]["structural"],
    }


def _chartqa(row: Row, part: Part, folder: Folder) -> Row:
    name = row["imgname"]
    image = folder.first(f"{part.split}/png/{name}", name)
    return {"image": image, "question": row["query"], "answer": row["label"]}


def _pope(row: Row, part: Part, folder: Folder) -> Row:
    name = row["image"]
    image = folder.first(f"val2014/{name}", name)
    return {"image": image, "question": row["text"], "answer": row["label"], "id": row["question_id"]}


def _pictured(problems: Path) -> Table:
    """The problems of ScienceQA that have a picture."""
    all_ = table(problems)
    return Held([row for row in map(all_.read, range(len(all_))) if row.get("image")])


def _scienceqa(row: Row, part: Part, folder: Folder) -> Row:
    letters = "ABCDEFGHIJ"
    choices = [f"{letter}. {text}" for letter, text in zip(letters, row["choices"])]
    hint = [f"Context: {row['hint']}"] if row.get("hint") else []
    name = f"{row['split']}/{row['key']}/{row['image']}"
    return {
        "image": folder.first(name, f"images/{name}"),
        "question": "\n".join((*hint, row["question"], *choices)),
        "answer": choices[row["answer"]][0],
        "id": row["key"],
        "split": row["split"],
        "kind": row["subject"],
    }


def _of(*patterns: str, splits: Sequence[str] = ("train", "val"), kind: str = "all", **more: object) -> list[Part]:
    return [Part(split, tuple(p.replace("<s>", split) for p in patterns), kind, **more) for split in splits]


FORMATS = {
    "docvqa": Format(_of("<s>_v1.0_withQT.json", "<s>_v1.0.json", "<s>/<s>_v1.0.json"), _docvqa),
    "infographicvqa": Format(
        _of("infographicsVQA_<s>_v1.0_withQT.json", "infographicsVQA_<s>_v1.0.json"), _infographicvqa
    ),
    "textvqa": Format(_of("TextVQA_0.5.1_<s>.json"), _textvqa),
    "vqav2": Format(_of("v2_OpenEnded_mscoco_<s>2014_questions.json", open=_answered), _vqav2),
    "gqa": Format(
        [
            *_of("<s>_balanced_questions.json", "questions1.2/<s>_balanced_questions.json"),
            *_of("testdev_balanced_questions.json", "questions1.2/testdev_balanced_questions.json", splits=["test"]),
        ],
        _gqa,
    ),
    "chartqa": Format(
        [part for kind in ("human", "augmented") for part in _of(f"<s>/<s>_{kind}.json", splits=SPLITS, kind=kind)],
        _chartqa,
    ),
    "pope": Format(
        [
            part
            for kind in ("random", "popular", "adversarial")
            for part in _of(f"coco_pope_{kind}.json", f"coco/coco_pope_{kind}.json", splits=["test"], kind=kind)
        ],
        _pope,
    ),
    "scienceqa": Format([Part("test", ("problems.json",), open=_pictured)], _scienceqa, LETTER),
}
