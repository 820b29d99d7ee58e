"""The tiles that ship: what the files may say, and which entry of them counts."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gtp_kernels.triton import configs

ROOT = Path(__file__).parents[1]
FILES = sorted(configs.FOLDER.glob("*.json"))
DTYPES = ("bfloat16", "float16", "float32", "float64")
CPU = torch.device("cpu")
# What is not the size of a block: flags and numbers of stages.
NOT_SIZES = ("num_stages",)
FLAGS = (0, 1)


def entries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(choice, entry) for choice, listed in json.loads(path.read_text()).items() for entry in listed]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in place of the files that ship."""
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    for cached in (configs.load, configs._lookup):
        cached.cache_clear()
    yield tmp_path
    for cached in (configs.load, configs._lookup):
        cached.cache_clear()


def write(folder: Path, name: str, **choices: list[dict[str, Any]]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(choices))


def rows(dtype: torch.dtype = torch.float32, **dimensions: int) -> int:
    return configs.lookup("some", CPU, dtype, **dimensions)["rows"]


def test_the_first_entry_that_the_shape_class_satisfies_counts(folder: Path) -> None:
    write(
        folder,
        "default",
        some=[
            {"dtypes": ["bfloat16"], "max_tokens": 64, "tile": {"rows": 1}},
            {"max_tokens": 64, "max_size": 32, "tile": {"rows": 2}},
            {"dtypes": ["bfloat16", "float16"], "tile": {"rows": 4}},
            {"tile": {"rows": 8}},
        ],
    )
    assert rows(torch.bfloat16, tokens=64, size=99) == 1
    assert rows(torch.bfloat16, tokens=65, size=32) == 4
    assert rows(tokens=64, size=32) == 2
    assert rows(tokens=64, size=33) == 8
    assert rows(torch.float16, tokens=64, size=33) == 4


def test_the_architecture_comes_before_the_default(folder: Path) -> None:
    write(folder, "default", some=[{"max_tokens": 64, "tile": {"rows": 4}}, {"tile": {"rows": 8}}])
    write(folder, "interpreter", some=[{"max_tokens": 16, "tile": {"rows": 1}}])
    assert [rows(tokens=tokens) for tokens in (16, 17, 65)] == [1, 4, 8]


def test_an_unknown_choice_or_dimension_is_an_error(folder: Path) -> None:
    write(folder, "default", some=[{"max_tokens": 64, "tile": {"rows": 4}}, {"tile": {"rows": 8}}])
    with pytest.raises(KeyError, match="other"):
        configs.lookup("other", CPU, torch.float32, tokens=3)
    with pytest.raises(KeyError, match="tokens"):
        configs.lookup("some", CPU, torch.float32, size=3)


def test_a_tile_cannot_be_changed(folder: Path) -> None:
    write(folder, "default", some=[{"tile": {"rows": 8}}])
    with pytest.raises(TypeError):
        configs.lookup("some", CPU, torch.float32)["rows"] = 16  # type: ignore[index]  # what is refused


def test_the_architecture_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configs.architecture(CPU) == "interpreter"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    configs._architecture.cache_clear()
    try:
        assert configs.architecture(torch.device("cuda")) == "sm_90"
        assert configs.architecture(torch.device("cuda", 2)) == "sm_92"
    finally:
        configs._architecture.cache_clear()


def test_there_is_a_default() -> None:
    assert configs.FOLDER / f"{configs.DEFAULT}.json" in FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_what_the_lookup_understands(path: Path) -> None:
    known = {choice for choice, _ in entries(configs.FOLDER / f"{configs.DEFAULT}.json")}
    for choice, entry in entries(path):
        assert choice in known, f"{path.name}: {choice} is not in {configs.DEFAULT}.json"
        assert isinstance(entry["tile"], dict), (choice, entry)
        assert entry["tile"], (choice, entry)
        for condition, limit in entry.items():
            if condition == "dtypes":
                assert set(limit) <= set(DTYPES), (choice, entry)
            elif condition != "tile":
                assert condition.startswith("max_"), (choice, entry)
                assert isinstance(limit, int), (choice, entry)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_sizes_are_powers_of_two(path: Path) -> None:
    for choice, entry in entries(path):
        for name, value in entry["tile"].items():
            assert type(value) is int, (choice, name, value)
            if name not in NOT_SIZES and value not in FLAGS:
                assert value > 0, (choice, name, value)
                assert value & (value - 1) == 0, (choice, name, value)
        assert entry["tile"].get("num_warps", 4) in (1, 2, 4, 8, 16, 32), (choice, entry)
        assert 1 <= entry["tile"].get("num_stages", 1) <= 8, (choice, entry)


def test_every_choice_ends_in_an_entry_without_a_condition() -> None:
    for choice, listed in json.loads((configs.FOLDER / f"{configs.DEFAULT}.json").read_text()).items():
        assert list(listed[-1]) == ["tile"], choice
        for entry in listed:
            assert set(entry["tile"]) <= set(listed[-1]["tile"]), f"{choice}: {entry} says what the last one does not"


def looked_up() -> dict[str, set[str]]:
    """The choices that the launchers look up, with the dimensions that each names, from their source.

    Where a module looks up a variable, that may be any choice that stands in that package as a string.
    """
    calls: dict[str, set[str]] = {}
    trees = [ast.parse(path.read_text()) for path in configs.FOLDER.parent.glob("*.py")]
    strings = {str(node.value) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    default = {choice for choice, _ in entries(configs.FOLDER / f"{configs.DEFAULT}.json")}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "configs.lookup":
                choice = node.args[0]
                for name in [str(choice.value)] if isinstance(choice, ast.Constant) else strings & default:
                    calls.setdefault(name, set()).update(str(keyword.arg) for keyword in node.keywords)
    return calls


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_launchers_look_up_what_the_files_say(path: Path) -> None:
    calls = looked_up()
    for choice, entry in entries(path):
        assert choice in calls, f"nothing looks up {choice}"
        named = {condition.removeprefix("max_") for condition in entry if condition.startswith("max_")}
        assert named <= calls[choice], f"{choice}: nothing says {named - calls[choice]}"
    if path.stem == configs.DEFAULT:
        assert set(calls) <= {choice for choice, _ in entries(path)}


@pytest.mark.slow
def test_the_files_are_in_the_wheel(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("gtp_kernels", "python"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(tree)], env=os.environ | {"GTP_NATIVE": "0"}, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert {f"gtp_kernels/triton/configs/{path.name}" for path in FILES} <= set(zipfile.ZipFile(wheel).namelist())
