"""`gtp-vit eval`: what it counts, what it leaves out, what it refuses, and that every image counts once."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gtp_vit
import gtp_vit.lvvit

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("click.testing")
pytest.importorskip("PIL.Image")

from cli_images import KWARGS, MODEL, environment, ok, run, torchrun, write_classes, write_image

PATCH = dict(num_prop=3, num_neighbours=4)
CLASSES = {"ant": 5, "bee": 4, "cow": 4}
COUNTS = ("images", "top1_count", "top5_count", "not_finite", "unreadable", "same_class_count", "cosine", "cosine_min")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_classes(tmp_path / "images", CLASSES)
    return tmp_path / "images"


def model_of(num_classes: int, seed: int = 3, patched: bool = True) -> Any:
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **KWARGS).eval()
    torch.nn.init.normal_(model.head.weight)  # zero by default: all classes alike
    return gtp_vit.patch(model, **PATCH) if patched else model


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save(model_of(3, patched=False).state_dict(), tmp_path / "three.pth")
    return tmp_path / "three.pth"


def report_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def evaluate(folder: Path, output: Path, *arguments: object) -> dict[str, Any]:
    ok("eval", "--data", folder, *MODEL, "--workers", 0, "--json", output, *arguments)
    return report_of(output)


def by_hand(model: Any, folder: Path) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Files, images and labels as timm and torchvision have them, one at a time."""
    from timm.data import create_transform, resolve_model_data_config
    from torchvision.datasets import ImageFolder

    config = resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    found = ImageFolder(str(folder), create_transform(**config))
    images, labels = zip(*found, strict=True)
    return [path for path, _ in found.samples], torch.stack(images), torch.tensor(labels)


def test_counts_are_those_of_the_model(folder: Path, weights: Path, tmp_path: Path) -> None:
    report = evaluate(folder, tmp_path / "r.json", "--weights", weights, "--batch-size", 4)
    model = model_of(3)
    _, images, labels = by_hand(model, folder)
    with torch.inference_mode():
        logits = model(images)
    assert report["images"] == 13
    assert report["top1_count"] == int((logits.argmax(-1) == labels).sum())
    assert report["top1"] == pytest.approx(100 * report["top1_count"] / 13)
    assert report["top5_count"] == 13, "all three classes are among the first five"
    assert 0 < report["top1_count"] < 13, "the test can tell right from wrong"
    assert report["gmacs"] == pytest.approx(gtp_vit.gmacs(model, 32))
    assert report["images_per_second"] > 0
    assert report["images_per_second_end_to_end"] > 0
    assert report["settings"]["patch"]["num_prop"] == 3


def test_lvvit_with_the_keys_of_its_authors(folder: Path, tmp_path: Path) -> None:
    """A checkpoint's classes decide both heads; live edges come through the command, too."""
    kwargs = dict(embed_dim=32, depth=2, num_heads=2, img_size=32)
    torch.manual_seed(0)
    model = gtp_vit.lvvit.lvvit_s(num_classes=3, **kwargs).eval()
    for head in (model.head, model.aux_head):
        torch.nn.init.normal_(head.weight)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "lvvit.pth")
    arguments = ["--img-size", 32, *(f"--model-kwargs={key}={kwargs[key]}" for key in kwargs if key != "img_size")]
    options = [
        "--weights",
        tmp_path / "lvvit.pth",
        "--num-prop",
        1,
        "--num-neighbours",
        2,
        "--propagation",
        "LiveGraph",
    ]
    output = tmp_path / "lvvit.json"
    ok("eval", "--data", folder, "--model", "lvvit_s", *arguments, *options, "--workers", 0, "--json", output)
    gtp_vit.patch(model, num_prop=1, num_neighbours=2, propagation="LiveGraph")
    _, images, labels = by_hand(model, folder)
    with torch.no_grad():
        assert report_of(output)["top1_count"] == int((model(images).argmax(1) == labels).sum())


def test_top5_of_many_classes(tmp_path: Path) -> None:
    write_classes(tmp_path / "images", {f"c{number}": 3 for number in range(8)})
    torch.save(model_of(8).state_dict(), tmp_path / "w.pth")
    report = evaluate(tmp_path / "images", tmp_path / "r.json", "--weights", tmp_path / "w.pth", "--batch-size", 5)
    model = model_of(8)
    _, images, labels = by_hand(model, tmp_path / "images")
    with torch.inference_mode():
        best = model(images).topk(5).indices
    assert report["top5_count"] == int((best == labels[:, None]).any(-1).sum())
    assert report["top1_count"] < report["top5_count"] < report["images"]


def test_the_baseline_is_the_model_as_it_is(folder: Path, weights: Path, tmp_path: Path) -> None:
    arguments = ("--weights", weights, "--batch-size", 4)
    plain = evaluate(folder, tmp_path / "plain.json", *arguments, "--no-patch")
    zero = evaluate(folder, tmp_path / "zero.json", *arguments, "--num-prop", 0, "--sparsity", 1)
    patched = evaluate(folder, tmp_path / "patched.json", *arguments)
    model = model_of(3, patched=False)
    _, images, labels = by_hand(model, folder)
    with torch.inference_mode():
        assert plain["top1_count"] == int((model(images).argmax(-1) == labels).sum())
    assert {key: plain.get(key) for key in COUNTS} == {key: zero.get(key) for key in COUNTS}
    assert plain["gmacs"] == zero["gmacs"] > patched["gmacs"]
    assert plain["settings"]["patch"] is None


def test_unreadable_images_are_named_and_the_run_goes_on(folder: Path, weights: Path, tmp_path: Path) -> None:
    whole = evaluate(folder, tmp_path / "whole.json", "--weights", weights, "--batch-size", 4)
    (folder / "ant" / "004.txt").write_text("not an image, and not called one")
    (folder / "bee" / "nothing.png").write_bytes(b"")
    (folder / "bee" / "text.jpg").write_text("no image")
    cut = (folder / "cow" / "001.png").read_bytes()
    (folder / "cow" / "cut.png").write_bytes(cut[: len(cut) // 2])
    (folder / "cow" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    text = ok("eval", "--data", folder, *MODEL, "--workers", 0, "--json", tmp_path / "r.json", "--weights", weights,
              "--batch-size", 4)  # fmt: skip
    report = report_of(tmp_path / "r.json")
    assert [file for file, _ in report["unreadable"]] == [
        "bee/nothing.png", "bee/text.jpg", "cow/cut.png", "cow/gone.png",
    ]  # fmt: skip
    assert all(why for _, why in report["unreadable"])
    assert (report["images"], report["top1_count"]) == (whole["images"], whole["top1_count"])
    assert "4 images could not be read" in text
    assert "bee/nothing.png" in text


def test_a_folder_without_a_readable_image_is_an_error(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "x.png").write_bytes(b"x")
    result = run("eval", "--data", tmp_path / "images", *MODEL, "--num-classes", 3, "--workers", 0)
    assert result.exit_code == 1
    assert "none of the 3 images could be read" in " ".join(result.output.split())


def test_workers_change_nothing(folder: Path, weights: Path, tmp_path: Path) -> None:
    (folder / "bee" / "bad.png").write_bytes(b"")
    arguments = ("--weights", weights, "--batch-size", 4, "--label-free")
    one = evaluate(folder, tmp_path / "one.json", *arguments)
    two = evaluate(folder, tmp_path / "two.json", *arguments, "--workers", 2)
    assert {key: one.get(key) for key in COUNTS} == {key: two.get(key) for key in COUNTS}


# Without labels


@pytest.mark.parametrize("num_classes", [3, 0])
def test_agreement_with_the_unpatched_model(tmp_path: Path, num_classes: int) -> None:
    for number in range(7):
        write_image(tmp_path / "images" / f"{number}.png", number)
    torch.save(model_of(num_classes or 3).state_dict(), tmp_path / "w.pth")
    model = model_of(num_classes or 3)
    if num_classes == 0:
        state = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
        torch.save(state, tmp_path / "w.pth")
        model.reset_classifier(0)
    report = evaluate(tmp_path / "images", tmp_path / "r.json", "--weights", tmp_path / "w.pth", "--batch-size", 3,
                      "--num-classes", num_classes)  # fmt: skip
    plain = gtp_vit.unpatch(copy.deepcopy(model))
    write_classes(tmp_path / "again", {"x": 7})
    _, images, _ = by_hand(model, tmp_path / "again")
    with torch.inference_mode():
        features = [m.forward_head(m.forward_features(images), pre_logits=True) for m in (model, plain)]
        same = model(images).argmax(-1) == plain(images).argmax(-1)
    cosine = F.cosine_similarity(*features, dim=-1)
    assert report["images"] == 7
    assert report["cosine"] == pytest.approx(float(cosine.mean()), abs=1e-5)
    assert report["cosine_min"] == pytest.approx(float(cosine.min()), abs=1e-5)
    assert report["cosine_min"] < 0.9999, "the models differ"
    assert report.get("same_class_count") == (int(same.sum()) if num_classes else None)
    assert "top1" not in report
    assert report["gmacs"] < report["gmacs_unpatched"]
    assert report["images_per_second_unpatched"] > 0


def test_label_free_reads_every_folder(folder: Path, weights: Path, tmp_path: Path) -> None:
    write_image(folder / "loose.png", 99)
    (folder / "broken.png").write_bytes(b"")
    report = evaluate(folder, tmp_path / "r.json", "--weights", weights, "--label-free", "--batch-size", 1)
    assert report["images"] == 14
    assert len(report["unreadable"]) == 1
    assert "top1" not in report
    same = evaluate(folder, tmp_path / "s.json", "--weights", weights, "--label-free", "--num-prop", 0, "--sparsity", 1)
    assert same["same_class"] == 100
    assert same["cosine_min"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("label_free", [False, True])
def test_values_that_are_not_finite_are_counted_and_wrong(folder: Path, tmp_path: Path, label_free: bool) -> None:
    state = model_of(3).state_dict()
    state["head.weight"].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pth")
    arguments = ("--label-free",) if label_free else ()
    report = evaluate(folder, tmp_path / "r.json", "--weights", tmp_path / "nan.pth", *arguments)
    assert report["not_finite"] == 13
    assert report["same_class_count" if label_free else "top5_count"] == 0


# Classes


def test_as_many_folders_as_classes_are_wanted(folder: Path, weights: Path) -> None:
    (folder / "dog").mkdir()
    result = run("eval", "--data", folder, *MODEL, "--weights", weights)
    text = " ".join(result.output.split())
    assert result.exit_code == 2
    for word in ("4 class folders", "3 classes", "--class-map", "--subset", "--label-free"):
        assert word in text


@pytest.mark.parametrize("suffix", [".json", ".txt"])
def test_a_class_map_says_which_class_a_folder_is(folder: Path, weights: Path, tmp_path: Path, suffix: str) -> None:
    order = {"bee": 0, "cow": 1, "ant": 2}
    path = tmp_path / f"map{suffix}"
    path.write_text(json.dumps(order) if suffix == ".json" else "".join(f"{name}\n" for name in order))
    report = evaluate(folder, tmp_path / "r.json", "--weights", weights, "--class-map", path)
    model = model_of(3)
    _, images, labels = by_hand(model, folder)
    labels = torch.tensor([2, 0, 1])[labels]
    with torch.inference_mode():
        assert report["top1_count"] == int((model(images).argmax(-1) == labels).sum())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"ant": 0, "bee": 1}', ["1 class folders", "cow", "map.json"]),
        ('{"ant": 0, "bee": 1, "cow": 3}', ["3 classes", "has 3 for cow"]),
        ('{"ant": 0, "bee": 1, "cow": "2"}', ["map.json", "class indices"]),
        ('{"ant": 0', ["map.json", "not JSON"]),
    ],
)
def test_class_maps_that_do_not_fit(
    folder: Path, weights: Path, tmp_path: Path, content: str, words: list[str]
) -> None:
    (tmp_path / "map.json").write_text(content)
    result = run("eval", "--data", folder, *MODEL, "--weights", weights, "--class-map", tmp_path / "map.json")
    assert result.exit_code == 2, result.output
    assert all(word in " ".join(result.output.split()) for word in words), result.output


def test_a_subset_is_found_by_its_names(tmp_path: Path) -> None:
    # Tench and English springer, and the last class by its index.
    names = {"n01440764": 0, "n02102040": 217, "999": 999}
    write_classes(tmp_path / "images", dict.fromkeys(names, 2))
    model = model_of(1000)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    arguments = ("--weights", tmp_path / "w.pth", "--subset")
    report = evaluate(tmp_path / "images", tmp_path / "r.json", *arguments)
    _, images, labels = by_hand(model, tmp_path / "images")
    labels = torch.tensor([names[name] for name in sorted(names)])[labels]
    with torch.inference_mode():
        best = model(images).topk(5).indices
    assert report["top5_count"] == int((best == labels[:, None]).any(-1).sum())
    (tmp_path / "images" / "tench").mkdir()
    result = run("eval", "--data", tmp_path / "images", *MODEL, *arguments)
    assert result.exit_code == 2
    assert "tench" in result.output


# Interrupted


def interrupt(monkeypatch: pytest.MonkeyPatch, judging: str, calls: int) -> list[list[int]]:
    """Stops the run in this call of the judge; the labels that it was called with."""
    from gtp_vit.cli import eval as command

    judged: list[list[int]] = []
    judge = getattr(command, judging).__call__

    def counted(self: Any, images: torch.Tensor, labels: torch.Tensor) -> Any:
        judged.append(labels.tolist())
        if len(judged) == calls:
            raise KeyboardInterrupt
        return judge(self, images, labels)

    monkeypatch.setattr(getattr(command, judging), "__call__", counted)
    return judged


def test_an_interrupted_run_continues(
    folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--weights", weights, "--batch-size", 2, "--selection", "Random", "--label-free")
    whole = evaluate(folder, tmp_path / "whole.json", *arguments)
    output = tmp_path / "r.json"
    judged = interrupt(monkeypatch, "Agreement", 5)
    result = run("eval", "--data", folder, *MODEL, "--workers", 0, "--json", output, *arguments)
    assert result.exit_code != 0
    assert not output.exists()
    partial = tmp_path / "r.json.0.partial"
    assert len(partial.read_text().splitlines()) == 1 + 3, "three batches; the first was also the warm-up"
    with partial.open("a") as stream:
        stream.write('{"batch": 3, "images": 2, "unreada')
    text = ok("eval", "--data", folder, *MODEL, "--workers", 0, "--json", output, *arguments)
    assert "Continuing an interrupted run: 3 batches are done" in text
    assert len(judged) == 5 + 1 + 4, "the four batches that were left, one of them also as the warm-up"
    assert {key: whole.get(key) for key in COUNTS} == {key: report_of(output).get(key) for key in COUNTS}
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.parametrize("change", ["option", "weights", "files"])
def test_another_run_starts_anew_and_says_so(folder: Path, weights: Path, tmp_path: Path, change: str) -> None:
    output, arguments = tmp_path / "r.json", ["--weights", weights, "--batch-size", 4]
    settings = evaluate(folder, output, *arguments)["settings"]
    poisoned = {"batch": 0, "images": 4, "unreadable": [], "top1": 4000, "top5": 4000, "not_finite": 0, "seconds": 1}
    (tmp_path / "r.json.1.partial").write_text(json.dumps(settings) + "\n" + json.dumps(poisoned) + "\n")
    (tmp_path / "r.json.x.partial").write_text("of somebody else")
    command = ("eval", "--data", folder, *MODEL, "--workers", 0, "--json", output)
    taken = ok(*command, *arguments)
    assert "Continuing" in taken
    assert report_of(output)["top1_count"] >= 4000, "what was kept is what is reported"

    (tmp_path / "r.json.1.partial").write_text(json.dumps(settings) + "\n" + json.dumps(poisoned) + "\n")
    if change == "option":
        arguments += ["--alpha", "0.3"]
    elif change == "weights":
        torch.save(model_of(3, seed=5).state_dict(), weights)
    else:
        write_image(folder / "ant" / "new.png", 77)
    text = ok(*command, *arguments)
    named = {"option": "(patch)", "weights": "(weights_digest)", "files": "(files)"}[change]
    assert "Starting anew" in text
    assert named in text
    assert report_of(output)["top1_count"] <= 14
    assert [path.name for path in tmp_path.glob("*.partial")] == ["r.json.x.partial"]


# Several processes


@pytest.mark.slow
def test_two_processes_count_every_image_once(
    folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "bee" / "bad.png").write_bytes(b"")
    arguments = ("--weights", weights, "--batch-size", 2)
    one = evaluate(folder, tmp_path / "one.json", *arguments)
    # The third of three processes was interrupted, and two go on.
    interrupt(monkeypatch, "Accuracy", 4)
    command = ("eval", "--data", folder, *MODEL, "--workers", 0, *arguments, "--json", tmp_path / "two.json")
    assert run(*command).exit_code != 0
    (tmp_path / "two.json.0.partial").rename(tmp_path / "two.json.2.partial")
    text = torchrun(2, "-m", "gtp_vit.cli", *command)
    two = report_of(tmp_path / "two.json")
    assert "2 batches are done" in text
    assert text.count("top-1") == 1, "one process speaks"
    assert two["processes"] == 2
    assert two["images"] == 13
    assert {key: one.get(key) for key in COUNTS} == {key: two.get(key) for key in COUNTS}
    assert list(tmp_path.glob("*.partial")) == []


# The command line


def test_random_weights_are_named(folder: Path) -> None:
    text = ok("eval", "--data", folder, *MODEL, "--num-classes", 3, "--workers", 0)
    assert "The weights are random" in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types(folder: Path, weights: Path, tmp_path: Path, dtype: str) -> None:
    report = evaluate(folder, tmp_path / "r.json", "--weights", weights, "--dtype", dtype, "--label-free")
    assert report["images"] == 13
    assert report["not_finite"] == 0
    assert report["cosine"] > 0.5


def test_a_backend_can_be_forced(folder: Path, weights: Path, tmp_path: Path) -> None:
    a, b = (evaluate(folder, tmp_path / "r.json", "--weights", weights, "--backend", name)
            for name in ("reference", "cpu"))  # fmt: skip
    assert a["top1_count"] == b["top1_count"]
    assert a["settings"]["backend"] == "reference"


def test_wrong_keys_are_named(folder: Path, tmp_path: Path) -> None:
    state = model_of(3).state_dict()
    state["blocks.7.ls1.gamma"] = state.pop("blocks.1.norm2.bias")
    torch.save(state, tmp_path / "wrong.pth")
    result = run("eval", "--data", folder, *MODEL, "--weights", tmp_path / "wrong.pth")
    text = " ".join(result.output.split())
    assert result.exit_code == 1
    assert "missing 1: blocks.1.norm2.bias" in text
    assert "unexpected 1: blocks.7.ls1.gamma" in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--num-classes", "3", "--no-patch", "--label-free"), 2, ["--no-patch"]),
        (("--num-classes", "3", "--num-prop", "8"), 2, ["num_prop", "largest", "7"]),
        (("--num-classes", "3", "--num-prop", "1,1,1"), 2, ["num_prop", "2 blocks"]),
        (("--num-classes", "0"), 2, ["no classifier", "--label-free"]),
        (("--weights", "nowhere.pth"), 1, ["nowhere.pth"]),
        (("--weights", "nowhere.pth", "--pretrained"), 2, ["exclude"]),
        (("--model-kwargs", "depth"), 2, ["depth", "name=value"]),
        (("--model-kwargs", '{"depth"'), 2, ["not JSON"]),
        (("--model-kwargs", "nonsense=4"), 2, ["timm cannot build", "nonsense"]),
        (("--model-kwargs", "seed=4"), 2, ["timm cannot build", "seed"]),
        (("--model-kwargs", "pretrained=True"), 2, ["--pretrained"]),
        (("--model", "deit_smal_patch16_224"), 2, ["deit_small_patch16_224"]),
        (("--device", "nonsense"), 2, ["--device"]),
        (("--json", "/nowhere/at/all.json"), 2, ["/nowhere/at"]),
        (("--batch-size", "0"), 2, ["--batch-size"]),
        (("--label-free", "--subset"), 2, ["--subset"]),
        (("--num-classes", "3", "--crop-pct", "0"), 2, ["--crop-pct"]),
        (("--model-kwargs", "img_size=64"), 2, ["img_size", "--img-size"]),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    folder: Path, arguments: tuple[str, ...], code: int, words: list[str]
) -> None:
    result = run("eval", "--data", folder, *MODEL, "--workers", "0", *arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())
    assert all(word in text for word in words), result.output


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    for words in (["no images below"], ["no images below the class folders"]):
        result = run("eval", "--data", tmp_path, *MODEL, "--num-classes", 1)
        assert result.exit_code == 2
        assert words[0] in " ".join(result.output.split())
        (tmp_path / "class").mkdir(exist_ok=True)


def test_the_commands_import_their_libraries_when_they_run() -> None:
    script = (
        "import sys; from gtp_vit.cli.app import cli, COMMANDS;"
        "assert {'eval', 'finetune'} <= {cli.get_command(None, name).name for name in COMMANDS};"
        "assert not {'timm', 'torchvision', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=environment())
