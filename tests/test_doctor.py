"""`gtp-vit doctor`: what it measures, what it concludes from which facts, and what it refuses. No speed is asserted."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

testing = pytest.importorskip("click.testing")
pytest.importorskip("timm")

from gtp_kernels import native
from gtp_vit.cli import app, doctor

TINY = ("vit_tiny_patch16_224", "--size", "64", "--batch", "2", "--rounds", "3", "--threads", "1")
SMALL = ("--model-kwargs", '{"depth": 2, "embed_dim": 32, "num_heads": 2}')


def run(*arguments: str, small: Sequence[str] = SMALL) -> Any:
    return testing.CliRunner().invoke(app.cli, ["doctor", *arguments, *small])


def results(*arguments: str, small: Sequence[str] = SMALL) -> dict[str, Any]:
    done = run(*arguments, "--json", "-", small=small)
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = run(*TINY, "--num-prop", "5,1", "--json", str(path))
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text())
    assert report["setting"]["image_tokens"] == 16
    assert report["setting"]["blocks"] == 2
    assert [row["num_prop"] for row in report["results"]] == [1, 5]
    assert [row["tokens"] for row in report["results"]] == [14, 6]
    assert report["results"][0]["promise"] < report["results"][1]["promise"]
    for row in report["results"]:
        assert row["backends"] == ["cpu"]
        assert row["milliseconds"].keys() == {"unpatched", "patched", "sliced"}
        assert min(row["milliseconds"].values()) > 0
        assert row["busy"] > 0
        assert row["pays"] == (row["speedup"][1] > 1)
    for line in report["verdict"]:
        assert line in done.output
    assert "sliced" in done.output


def test_default_values_of_p_fit_the_model() -> None:
    assert [row["num_prop"] for row in results(*TINY)["results"]] == [1, 2, 4, 5]


def test_dtype_backend_and_options() -> None:
    (row,) = results(*TINY, "--num-prop", "2", "--dtype", "bfloat16", "--backend", "reference")["results"]
    assert row["backends"] == ["reference"]
    assert row["rate_float32"] > 0
    assert "attention (the backend reference is forced)" in row["notes"]


def test_plain_pytorch_is_explained_for_every_p(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", "it was left at home")
    for row in results(*TINY, "--num-prop", "1,2")["results"]:
        assert set(row["backends"]) == {"reference"}
        assert any("cpu: it was left at home" in note for note in row["notes"])


def test_a_model_that_cannot_be_sliced() -> None:
    small = ("--model-kwargs", '{"depth": 2, "embed_dim": 32, "num_heads": 2}')
    arguments = ("vit_base_patch16_rpn_224", *TINY[1:], "--num-prop", "2")
    (row,) = results(*arguments, small=small)["results"]
    assert row["slicing"] is None
    assert row["milliseconds"].keys() == {"unpatched", "patched"}


def test_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    report = results(*TINY, "--num-prop", "1,2", "--compile")
    assert [(row["mode"], row["num_prop"]) for row in report["results"]] == [
        ("eager", 1), ("eager", 2), ("compiled", 1), ("compiled", 2),
    ]  # fmt: skip
    assert len(report["verdict"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-prop", "8"), r"P must be in [1, 7] for 16 image tokens and 2 blocks; got [8]"),
        (("--num-prop", "0"), r"P must be in [1, 7]"),
        (("--num-prop", "x"), "'x' is neither a number nor numbers"),
        (("--sparsity", "2"), "sparsity"),
        (("--backend", "cuda"), "cuda cannot run here"),
        (("--size", "10"), "10 × 10 is smaller than one patch of the model"),
        (("--rounds", "1"), "--rounds"),
        (("--json", "no/such/folder.json"), "no/such"),
    ],
)
def test_refused(arguments: tuple[str, ...], message: str) -> None:
    done = run(*TINY, *arguments)
    assert done.exit_code == 2, done.output
    assert message.split("/")[0] in " ".join(done.output.replace("│", " ").split())


def test_unknown_and_unsupported_models() -> None:
    assert "close to it: vit_tiny_patch16_224" in " ".join(
        run("vit_tiny_patch16_244", small=()).output.replace("│", " ").split()
    )
    done = run("resnet18", small=())
    assert done.exit_code == 2
    assert "VisionTransformer" in done.output


def test_too_few_tokens_for_the_blocks() -> None:
    done = run("vit_tiny_patch16_224", "--size", "32", small=("--model-kwargs", "depth=5"))
    assert done.exit_code == 2
    assert "4 image tokens are too few for 5 blocks" in " ".join(done.output.replace("│", " ").split())


# What follows from which facts

SETTING = doctor.Setting(8, 196, 12, 384, "cpu", "bfloat16", 4.6)
GOOD: dict[str, Any] = dict(
    mode="eager",
    num_prop=8,
    tokens=100,
    milliseconds={"unpatched": 120.0, "patched": 84.0, "sliced": 80.0},
    speedup=(1.43, 1.4, 1.45),
    slicing=1.5,
    promise=1.5,
    rate=400.0,
    rate_float32=200.0,
    busy=0.8,
    backends=("cpu",),
    notes=(),
)
SLOW: dict[str, Any] = dict(speedup=(0.95, 0.9, 1.02))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, []),
        ({"speedup": (1.25, 1.2, 1.3), "slicing": 1.25}, []),
        ({**SLOW, "slicing": 1.4}, ["scores, selection and propagation cost 0.333 ms a block"]),
        ({**SLOW, "slicing": None}, []),
        (
            {**SLOW, "promise": 1.04, "slicing": 0.9},
            ["too few tokens leave: P = 8 of 196 in each of 12 blocks", "the time"],
        ),
        ({**SLOW, "slicing": 0.94}, ["the time does not follow the tokens: cutting them off for nothing gives ×0.94"]),
        ({**SLOW, "slicing": 0.94, "busy": 0.1}, ["the time does not follow", "launch-bound, or bound by memory"]),
        ({**SLOW, "slicing": None, "rate": 90.0}, ["bfloat16 has no fast path on this CPU: 90 GMAC/s, against 200"]),
        ({**SLOW, "slicing": None, "backends": ("cpu", "reference"), "notes": ("no kernels",)}, ["plain PyTorch ran"]),
        (
            {**SLOW, "speedup": (0.9, 0.6, 1.2), "slicing": None},
            ["the machine is too busy to tell: quartiles from ×0.60"],
        ),
        # It pays, and yet gives less than half of what it might.
        ({"speedup": (1.1, 1.05, 1.15)}, ["scores, selection and propagation cost"]),
    ],
)
def test_reasons_follow_from_the_facts(facts: dict[str, Any], expected: list[str]) -> None:
    found = list(doctor.reasons(SETTING, doctor.Measured(**{**GOOD, **facts})))
    assert len(found) == len(expected), found
    for sentence, start in zip(found, expected, strict=True):
        assert sentence.startswith(start), sentence


def test_verdict_names_the_first_that_pays_and_the_best() -> None:
    rows = [
        doctor.Measured(**{**GOOD, "num_prop": p, "speedup": s})
        for p, s in ((2, (0.9, 0.8, 1.1)), (4, (1.1, 1.01, 1.2)))
    ]
    assert list(doctor.verdict(SETTING, [*rows, doctor.Measured(**GOOD)])) == [
        "eager: patching pays from P = 4 (×1.10); the most was ×1.43, with P = 8."
    ]
    assert list(doctor.verdict(SETTING, rows[:1])) == [
        "eager: patching does not pay here; the best was ×0.90, with P = 2."
    ]
