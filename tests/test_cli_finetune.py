"""`gtp-vit finetune`: it learns, it goes on where it was killed with the same weights, and processes agree."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("click.testing")
Image = pytest.importorskip("PIL.Image")

from cli_images import KWARGS, MODEL, environment, ok, run, torchrun, write_classes

CLASSES = {"ant": 8, "bee": 8}
SHORT = ("--epochs", 2, "--batch-size", 4, "--workers", 0, "--warmup-epochs", 0, "--lr", 0.1, "--repeats", 2)
PLAIN = ("--mixup", 0, "--cutmix", 0, "--drop-path", 0, "--no-augment", "--erase", 0, "--repeats", 1)

# Each process of a run also leaves its own weights.
KEEPING = """
import torch
from gtp_vit.cli import finetune, main

train = finetune.Run.train

def keeping(self):
    train(self)
    torch.save(self.model.state_dict(), self.output / f"rank{self.group.rank}.pt")

finetune.Run.train = keeping
main()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_classes(tmp_path / "images" / "train", CLASSES)
    write_classes(tmp_path / "images" / "val", {"ant": 3, "bee": 2}, seed=100)
    return tmp_path / "images"


def command(folder: Path, output: Path, *arguments: object) -> tuple[object, ...]:
    return ("finetune", "--data", folder, "--output", output, *MODEL, *SHORT, *arguments)


def checkpoint(output: Path, name: str = "last.pt") -> dict[str, Any]:
    return torch.load(output / name, weights_only=True)


def log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def untimed(output: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in log(output)]


def same_bits(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def write_colours(root: Path, count: int) -> None:
    """Reddish and bluish images."""
    for label, name in enumerate(("blue", "red")):
        (root / name).mkdir(parents=True)
        for number in range(count):
            colour = (200 - number, 10 + number, 30) if label else (30, 10 + number, 200 - number)
            Image.new("RGB", (40, 40), colour).save(root / name / f"{number}.png")


def test_it_learns(tmp_path: Path) -> None:
    write_colours(tmp_path / "images", 20)
    ok(*command(tmp_path / "images", tmp_path / "out", *PLAIN, "--val-split", 0.2, "--lr", 0.5, "--epochs", 4))
    lines = log(tmp_path / "out")
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["top1"] == 100
    assert {line["images"] for line in lines} == {8}
    best = checkpoint(tmp_path / "out", "best.pt")
    first = next(line["epoch"] for line in lines if line["top1"] == max(line["top1"] for line in lines))
    assert (best["epoch"], best["best"]) == (first + 1, 100)


def test_the_defaults_are_the_recipe_of_the_paper(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from gtp_vit.cli import finetune

    runs: list[Any] = []
    monkeypatch.setattr(finetune.Run, "train", lambda self: runs.append(self))
    ok("finetune", "--data", folder, "--output", tmp_path / "out", *MODEL, "--batch-size", 16)
    (it,) = runs
    assert it.options["epochs"] == 30
    assert type(it.optimizer) is torch.optim.AdamW
    assert {group["weight_decay"] for group in it.optimizer.param_groups} == {0.0, 0.05}
    assert (it.mixup.mixup_alpha, it.mixup.cutmix_alpha, it.mixup.label_smoothing) == (0.8, 1.0, 0.1)
    assert it.model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    text = str(it.train_images.transform)
    for part in ("RandomResizedCrop", "RandomHorizontalFlip", "RandAugment", "RandomErasing"):
        assert part in text
    erasing = it.train_images.transform.transforms[-1]
    assert (erasing.probability, erasing.mode) == (0.25, "pixel")
    assert "RandomResizedCrop" not in str(it.val_images.transform)
    rates = []
    for epoch in range(30):
        it.scheduler.step(epoch)
        rates.append(it.optimizer.param_groups[0]["lr"])
    # 16 images a step: 1e-5 * 16 / 512 is below the minimum, so it stays.
    assert rates == pytest.approx([1e-5 * 16 / 512] * 30)

    ok("finetune", "--data", folder, "--output", tmp_path / "out", *MODEL, "--batch-size", 16, "--no-scale-lr")
    rates = []
    for epoch in range(30):
        runs[1].scheduler.step(epoch)
        rates.append(runs[1].optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-6), "the warm-up"
    assert max(rates) == rates[5] == pytest.approx(1e-6 + 9e-6 * (1 + math.cos(math.pi * 5 / 30)) / 2)
    assert rates[29] == pytest.approx(1e-6, rel=0.1)


def test_epochs_read_every_image_once_or_repeatedly(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from gtp_vit.cli import finetune

    runs: list[Any] = []
    monkeypatch.setattr(finetune.Run, "train", lambda self: runs.append(self))
    ok(*command(folder, tmp_path / "out", "--repeats", 1))
    orders = []
    for runs[0].epoch in (0, 1):
        keys = [key for batch in runs[0]._batches() for key in batch]
        assert sorted(number for _, _, number in keys) == list(range(16))
        assert [position for _, position, _ in keys] == list(range(16))
        orders.append([number for _, _, number in keys])
    assert orders[0] != orders[1] != sorted(orders[1])
    ok(*command(folder, tmp_path / "out", "--repeats", 3))
    numbers = [number for batch in runs[1]._batches() for _, _, number in batch]
    assert len(numbers) == 16
    assert len(set(numbers)) == 6
    images = runs[1].train_images
    assert torch.equal(images[0, 5, 3].image, images[0, 5, 3].image), "its place decides how an image is augmented"
    assert not torch.equal(images[0, 5, 3].image, images[0, 6, 3].image)
    assert not torch.equal(images[0, 5, 3].image, images[1, 5, 3].image)


# Resuming


@pytest.mark.parametrize("steps", [1, 3, 4, 6, 8])
def test_a_run_that_failed_goes_on_with_the_same_weights(
    folder: Path, tmp_path: Path, monkeypatch: Any, steps: int
) -> None:
    from gtp_vit.cli import finetune

    ok(*command(folder, tmp_path / "whole"))
    done: list[float] = []
    update = finetune.Run._update

    def failing(self: Any, *arguments: Any) -> float:
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(update(self, *arguments))
        return done[-1]

    end_epoch = finetune.Run._end_epoch

    def failing_end(self: Any) -> None:
        if len(done) == steps:
            raise KeyboardInterrupt
        end_epoch(self)

    monkeypatch.setattr(finetune.Run, "_update", failing)
    monkeypatch.setattr(finetune.Run, "_end_epoch", failing_end)
    interrupted = command(folder, tmp_path / "cut", "--checkpoint-steps", 1, "--resume", "auto")
    assert run(*interrupted).exit_code != 0
    assert (tmp_path / "cut" / "last.pt").exists()
    with (tmp_path / "cut" / "log.jsonl").open("a") as stream:
        stream.write('{"epoch": 1, "of": "a run that ended before its checkpoint"}\n{"epo')
    monkeypatch.setattr(finetune.Run, "_update", update)
    monkeypatch.setattr(finetune.Run, "_end_epoch", end_epoch)
    text = ok(*interrupted)
    assert "Going on from" in text
    for name in ("last.pt", "best.pt"):
        one, two = checkpoint(tmp_path / "whole", name), checkpoint(tmp_path / "cut", name)
        assert same_bits(one["model"], two["model"])
        assert (one["epoch"], one["best"]) == (two["epoch"], two["best"])
    one, two = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut")
    for number, state in one["optimizer"]["state"].items():
        assert same_bits(state, two["optimizer"]["state"][number])
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    ok(*command(folder, tmp_path / "whole", "--epochs", 6))
    arguments = command(folder, tmp_path / "killed", "--epochs", 6, "--checkpoint-steps", 1, "--resume", "auto")
    process = subprocess.Popen(
        [sys.executable, "-m", "gtp_vit.cli", *map(str, arguments)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    last = tmp_path / "killed" / "last.pt"
    deadline = time.monotonic() + 120
    while not last.exists():
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    state = checkpoint(tmp_path / "killed")
    assert (state["epoch"], state["step"]) < (6, 0), "it was killed on the way"
    ok(*arguments)
    assert same_bits(checkpoint(tmp_path / "whole")["model"], checkpoint(tmp_path / "killed")["model"])
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "killed")


def test_workers_change_nothing(folder: Path, tmp_path: Path) -> None:
    ok(*command(folder, tmp_path / "none", "--epochs", 1))
    ok(*command(folder, tmp_path / "two", "--epochs", 1, "--workers", 2))
    assert same_bits(checkpoint(tmp_path / "none")["model"], checkpoint(tmp_path / "two")["model"])


def test_the_seed_decides(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        ok(*command(folder, tmp_path / name, "--epochs", 1, "--seed", seed))
    one, again, other = (checkpoint(tmp_path / name)["model"] for name in "abc")
    assert same_bits(one, again)
    assert not same_bits(one, other)


def test_what_does_not_belong_together_is_refused(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    ok(*command(folder, output, "--epochs", 1))
    for arguments, words in (
        ((), ["holds a run", "--resume auto"]),
        (("--resume", "auto"), ["another run", "epochs was 1, is 2"]),
        (("--resume", "auto", "--epochs", 1, "--num-prop", 2), ["num_prop was 3, is 2"]),
        (("--resume", "auto", "--epochs", 1, "--batch-size", 8), ["images_per_step was 4, is 8"]),
        (("--resume", output / "best.pt", "--epochs", 1), ["no last.pt of finetune", "optimizer"]),
        (("--resume", folder / "train" / "ant" / "000.png"), ["not a checkpoint"]),
        (("--resume", tmp_path / "nowhere.pt"), ["no such file"]),
    ):
        result = run(*command(folder, output, *arguments))
        text = " ".join(result.output.split())
        assert isinstance(result.exception, SystemExit), result.exception
        assert all(word in text for word in words), text
    text = ok(*command(folder, output, "--epochs", 1, "--resume", "auto", "--workers", 1))
    assert "epoch 1, step 0" in text, "it was complete, and is left as it is"


# Training


@pytest.mark.slow
def test_two_processes_train_as_one(folder: Path, tmp_path: Path) -> None:
    # Not AdamW: it turns the noise of gradients that vanish into steps as long as any.
    arguments = (*PLAIN, "--epochs", 2, "--lr", 5, "--opt", "sgd")
    ok(*command(folder, tmp_path / "one", *arguments, "--batch-size", 8))
    script = tmp_path / "keeping.py"
    script.write_text(KEEPING)
    text = torchrun(2, script, *command(folder, tmp_path / "two", *arguments, "--checkpoint-steps", 1))
    assert text.count("epoch 1:") == 1, "one process speaks"
    ranks = [torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert same_bits(*ranks)
    one, two = checkpoint(tmp_path / "one")["model"], checkpoint(tmp_path / "two")["model"]
    assert same_bits(two, ranks[0])
    torch.manual_seed(0)
    start = timm.create_model("vit_tiny_patch16_224", num_classes=2, **KWARGS).state_dict()
    moved = max(float((value - start[key]).abs().max()) for key, value in one.items())
    assert moved > 1e-2
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    for mine, theirs in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert mine["top1_count"] == theirs["top1_count"]
        assert mine["images"] == theirs["images"] == 5
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision(folder: Path, tmp_path: Path, amp: str) -> None:
    ok(*command(folder, tmp_path / "out", "--epochs", 1, "--amp", amp, "--clip-grad", 1))
    state = checkpoint(tmp_path / "out")
    assert all(value.dtype == torch.float32 for value in state["model"].values())
    assert all(value.isfinite().all() for value in state["model"].values())
    assert bool(state["scaler"]) == (amp == "float16")
    assert log(tmp_path / "out")[0]["not_finite"] == 0


def test_gradient_checkpointing_computes_the_same(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from gtp_vit.cli import finetune

    runs: list[Any] = []
    train = finetune.Run.train
    monkeypatch.setattr(finetune.Run, "train", lambda self: (runs.append(self), train(self)))
    for name, extra in (("plain", ()), ("checkpointed", ("--grad-checkpointing",))):
        ok(*command(folder, tmp_path / name, "--epochs", 1, *extra))
    assert [it.model.grad_checkpointing for it in runs] == [False, True]
    assert same_bits(checkpoint(tmp_path / "plain")["model"], checkpoint(tmp_path / "checkpointed")["model"])


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from timm.loss import SoftTargetCrossEntropy

    calls: list[Tensor] = []

    def forward(self: Any, logits: Tensor, target: Tensor) -> Tensor:
        calls.append(logits)
        return logits.sum() * (float("inf") if len(calls) == 6 else 0)

    monkeypatch.setattr(SoftTargetCrossEntropy, "forward", forward)
    result = run(*command(folder, tmp_path / "out"))
    text = " ".join(result.output.split())
    assert result.exit_code == 1
    assert "epoch 1, step 1" in text
    assert "the loss is" in text
    assert all(value.isfinite().all() for value in checkpoint(tmp_path / "out")["model"].values())
    assert checkpoint(tmp_path / "out")["epoch"] == 1


def test_unreadable_images_are_named_and_replaced(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "ant" / "bad.png").write_bytes(b"")
    (folder / "val" / "bee" / "bad.png").write_bytes(b"")
    text = ok(*command(folder, tmp_path / "out", "--epochs", 1, "--repeats", 1, "--batch-size", 2, "--seed", 1))
    (line,) = log(tmp_path / "out")
    assert "could not be read" in text
    assert {file for file, _ in line["unreadable"]} == {"ant/bad.png", "bee/bad.png"}
    assert line["images"] == 5
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"")
    result = run(*command(folder, tmp_path / "other", "--epochs", 1))
    assert result.exit_code == 1
    assert "none of the 17 training images could be read" in " ".join(result.output.split())


def test_eval_reads_the_best_checkpoint(folder: Path, tmp_path: Path) -> None:
    ok(*command(folder, tmp_path / "out"))
    best = max(line["top1"] for line in log(tmp_path / "out"))
    weights = tmp_path / "out" / "best.pt"
    ok("eval", "--data", folder / "val", *MODEL, "--workers", 0, "--weights", weights, "--json", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["top1"] == best


def test_weights_of_other_classes_need_a_new_head(folder: Path, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **KWARGS)
    torch.nn.init.constant_(model.cls_token, 0.125)
    torch.save(model.state_dict(), tmp_path / "seven.pth")
    arguments = ("--weights", tmp_path / "seven.pth", "--epochs", 1, "--lr", 1e-9, "--min-lr", 0, "--warmup-lr", 0)
    result = run(*command(folder, tmp_path / "out", *arguments))
    assert result.exit_code == 1
    assert "head.weight [7, 32] instead of [2, 32]" in " ".join(result.output.split())
    text = ok(*command(folder, tmp_path / "out", *arguments, "--new-head"))
    assert "seven.pth weights" in text
    state = checkpoint(tmp_path / "out")["model"]
    assert state["head.weight"].shape == (2, 32)
    torch.testing.assert_close(state["cls_token"], torch.full((1, 1, 32), 0.125))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch-size", 3), ["--batch-size", "even"]),
        (("--batch-size", 32), ["16 training images", "32"]),
        (("--val-split", 0.5), ["has train/ and val/ already"]),
        (("--opt", "nonsense"), ["--opt", "nonsense"]),
        (("--num-prop", 8), ["num_prop", "largest"]),
        (("--model-kwargs", "num_classes=4"), ["num_classes"]),
        (("--epochs", 0), ["--epochs"]),
        (("--lr", 0), ["--lr"]),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    folder: Path, tmp_path: Path, arguments: tuple[object, ...], words: list[str]
) -> None:
    result = run(*command(folder, tmp_path / "out", *arguments))
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.output
    assert all(word in " ".join(result.output.split()) for word in words), result.output
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "val" / "cow").mkdir()
    result = run(*command(folder, tmp_path / "out"))
    assert result.exit_code == 2
    assert "cow" in result.output
    result = run(*command(folder / "train", tmp_path / "out"))
    assert result.exit_code == 2
    assert "--val-split" in result.output
