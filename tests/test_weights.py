"""What others wrote is looked at before it is used: files of weights, and the numbers in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glimpseprune.config import UserError
from glimpseprune.weights import is_finite, require_files, require_good

NAN, INF = float("nan"), float("inf")


def shards(folder: Path, **files: dict[str, torch.Tensor]) -> dict[str, str]:
    """Files of weights, and what their index would say."""
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return {tensor: f"{name}.safetensors" for name, tensors in files.items() for tensor in tensors}


def indexed(folder: Path, named: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(named))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        require_files(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_whole_files_of_floats_are_taken(tmp_path):
    one = shards(tmp_path, one={"a": torch.zeros(2)}, two={"b": torch.zeros(3, dtype=torch.bfloat16)})
    indexed(tmp_path, {"weight_map": one})
    assert [path.name for path in require_files(tmp_path)] == ["one.safetensors", "two.safetensors"]
    shards(tmp_path, model={"c": torch.zeros(1)})
    assert [path.name for path in require_files(tmp_path)] == ["model.safetensors"]  # as transformers prefers it


def test_an_index_is_not_believed(tmp_path):
    named = shards(tmp_path, one={"a": torch.zeros(2)})
    outside = tmp_path / "outside"
    outside.mkdir()
    shards(outside, two={"b": torch.zeros(2)})
    for wrong, said in (
        (named | {"b": "two.safetensors"}, "1 of 2 files of weights are missing: two.safetensors"),
        (named | {"b": "outside/two.safetensors"}, "'outside/two.safetensors' is no safetensors file of this folder"),
        (named | {"b": "../two.safetensors"}, "is no safetensors file of this folder"),
        (named | {"b": str(outside / "two.safetensors")}, "is no safetensors file of this folder"),
        (named | {"b": "config.json"}, "is no safetensors file of this folder"),
        (named | {"b": "one.safetensors"}, "one.safetensors: tensor 'b' is not in it"),
        ({}, "names no weights"),
        ([1], "no index of weights"),
    ):
        indexed(tmp_path, {"weight_map": wrong})
        assert said in refused(tmp_path)
    indexed(tmp_path, ["weight_map"])
    assert "no index of weights" in refused(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ')
    assert "no index of weights" in refused(tmp_path)


def test_files_that_are_damaged_or_of_another_kind(tmp_path):
    assert "there are no weights" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is a pickle" in refused(tmp_path)
    shards(tmp_path, model={"a": torch.zeros(100)})
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-1], whole[:20], whole[:4], b"", whole + b"x"):
        file.write_bytes(broken)
        assert "is the file complete?" in refused(tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n")
    assert "git lfs pull" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    assert "holds adapters of PEFT" in refused(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    for dtype, name in ((torch.int8, "I8"), (torch.int64, "I64"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8")):
        shards(tmp_path, model={"a": torch.zeros(1), "b": torch.zeros(1).to(dtype)})
        assert f"tensor 'b' is {name}" in refused(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_number_is_looked_at(dtype):
    for size in (1, 7, 1000):
        tensor = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)
        assert is_finite(tensor)  # whose sum would not be
        for place in {0, size // 2, size - 1}:
            for value in (NAN, INF, -INF):
                broken = tensor.clone()
                broken[place] = value
                assert not is_finite(broken) and not is_finite(broken.view(1, -1).T)
                with pytest.raises(UserError, match="here: tensor 'b' holds NaN or Inf"):
                    require_good([("a", tensor), ("b", broken)], "here")
    assert is_finite(torch.empty(0, 3, dtype=dtype)) and is_finite(torch.tensor(1.0, dtype=dtype))


def test_numbers_of_another_kind():
    for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64):
        kind = str(dtype).removeprefix("torch.")
        with pytest.raises(UserError, match=f"tensor 'a' is {kind}, which is no floating-point type"):
            require_good([("a", torch.zeros(2).to(dtype))], "here")
