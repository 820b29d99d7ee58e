"""`gtp-vit eval --model hf:FOLDER`: classifiers of transformers count as by hand, and wrong folders are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gtp_vit

transformers = pytest.importorskip("transformers", minversion="5.18")
pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("click.testing")
pytest.importorskip("PIL.Image")

import test_patch_transformers
from cli_images import ok, run, write_classes
from safetensors.torch import load_file, save_file

from gtp_vit.cli import hf

PATCH = dict(num_prop=2, num_neighbours=3)
OPTIONS = ("--num-prop", 2, "--num-neighbours", 3, "--workers", 0)
CLASSES = {"ant": 5, "bee": 4, "cow": 4}
SIZE = {"height": 64, "width": 64}
# What their checkpoints come with: of the shorter side and a crop, of both sides, of a larger size and a crop.
PROCESSORS: dict[str, Any] = {
    "vit classifier": lambda: transformers.ViTImageProcessor(size=SIZE),
    "deit classifier": lambda: transformers.DeiTImageProcessor(size={"height": 70, "width": 70}, crop_size=SIZE),
    "deit teacher": lambda: transformers.DeiTImageProcessor(size={"height": 70, "width": 70}, crop_size=SIZE),
    "dinov2 swiglu classifier": lambda: transformers.BitImageProcessor(size={"shortest_edge": 90}, crop_size=80),
    "registers classifier": lambda: transformers.BitImageProcessor(size={"shortest_edge": 70}, crop_size=SIZE),
    "clip classifier": lambda: transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=SIZE),
    "siglip classifier": lambda: transformers.SiglipImageProcessor(size=SIZE),
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_classes(tmp_path / "images", CLASSES)
    return tmp_path / "images"


def write_model(folder: Path, key: str = "vit classifier", labels: int = 3, **names: Any) -> Path:
    model = test_patch_transformers.build(key, dtype=torch.float32)
    with torch.no_grad():
        for name in ("classifier", "cls_classifier", "distillation_classifier"):
            if hasattr(model, name):
                width = getattr(model, name).in_features
                setattr(model, name, torch.nn.Linear(width, labels))
                # Of both signs and large, so that the classes differ from image to image.
                torch.nn.init.normal_(getattr(model, name).weight)
    model.config.num_labels = labels
    if names:
        model.config.label2id, model.config.id2label = names, {label: name for name, label in names.items()}
    model.save_pretrained(folder)
    PROCESSORS[key]().save_pretrained(folder)
    return folder


def evaluate(images: Path, folder: Path, output: Path, *arguments: object) -> dict[str, Any]:
    ok("eval", "--data", images, "--model", f"hf:{folder}", *OPTIONS, "--json", output, *arguments)
    report: dict[str, Any] = json.loads(output.read_text())
    return report


def by_hand(folder: Path, images: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model, and images and labels as transformers and torchvision have them, one at a time."""
    from torchvision.datasets import ImageFolder

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    found = ImageFolder(str(images), lambda image: processor(image, return_tensors="pt")["pixel_values"][0])
    pixels, labels = zip(*found, strict=True)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    return model, torch.stack(pixels), torch.tensor(labels)


@pytest.mark.parametrize("key", PROCESSORS)
def test_counts_are_those_of_the_model(images: Path, tmp_path: Path, key: str) -> None:
    folder = write_model(tmp_path / "model", key)
    model, pixels, labels = by_hand(folder, images)
    plain = evaluate(images, folder, tmp_path / "plain.json", "--no-patch", "--batch-size", 5)
    report = evaluate(images, folder, tmp_path / "r.json", "--batch-size", 5)
    with torch.inference_mode():
        unpatched = model(pixels).logits
        logits = gtp_vit.patch(model, **PATCH)(pixels).logits
    assert report["images"] == 13
    assert report["top1_count"] == int((logits.argmax(-1) == labels).sum())
    assert plain["top1_count"] == int((unpatched.argmax(-1) == labels).sum())
    assert 0 < report["top1_count"] < 13, "the test can tell right from wrong"
    assert report["gmacs"] == gtp_vit.gmacs(model, pixels[:1])
    assert plain["gmacs"] == gtp_vit.gmacs(gtp_vit.unpatch(model), pixels[:1]) > report["gmacs"]
    assert report["settings"]["input_size"] == list(pixels.shape[1:])
    assert report["settings"]["weights"] == "its own"


@pytest.mark.parametrize("key", PROCESSORS)
def test_features_and_head_are_the_forward(tmp_path: Path, key: str) -> None:
    model = hf.load(f"hf:{write_model(tmp_path / 'model', key)}")
    pixels = torch.randn(2, *model.input_size)
    with torch.inference_mode():
        for _ in range(2):
            features = model.forward_features(pixels)
            assert torch.equal(model.forward_head(features), model(pixels))
            assert torch.equal(model(pixels), model.model(pixels).logits)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("key", ["vit classifier", "deit teacher", "clip classifier", "siglip classifier"])
def test_agreement_with_the_unpatched_model(images: Path, tmp_path: Path, key: str) -> None:
    folder = write_model(tmp_path / "model", key)
    model, pixels, _ = by_hand(folder, images)
    report = evaluate(images, folder, tmp_path / "r.json", "--label-free", "--batch-size", 5)
    tokens, logits = [], []
    with torch.inference_mode():
        for patched in (False, True):
            if patched:
                gtp_vit.patch(model, **PATCH)
            output = model(pixels)
            last = (
                model.base_model(pixels).last_hidden_state
                if key in ("vit classifier", "deit teacher")
                else (model.vision_model(pixels).last_hidden_state)
            )
            tokens.append(
                {
                    "vit classifier": lambda x: x[:, 0],
                    "deit teacher": lambda x: x[:, :2].flatten(1),
                    "clip classifier": lambda x: x[:, 1:].mean(1),
                    "siglip classifier": lambda x: x.mean(1),
                }[key](last)
            )
            logits.append(output.logits)
    cosine = F.cosine_similarity(*tokens, dim=-1)
    assert report["same_class_count"] == int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
    assert report["cosine"] == pytest.approx(float(cosine.mean()), abs=1e-5)
    assert report["cosine_min"] == pytest.approx(float(cosine.min()), abs=1e-5)
    assert report["cosine_min"] < 0.9999, "the test can tell one model from the other"
    assert report["gmacs_unpatched"] > report["gmacs"]


def test_workers_change_nothing(images: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    one, two = (evaluate(images, folder, tmp_path / f"{n}.json", "--workers", n, "--label-free") for n in (0, 2))
    assert one["cosine"] == two["cosine"]
    assert one["images"] == two["images"] == 13


def test_nothing_propagated_agrees_fully(images: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    report = evaluate(images, folder, tmp_path / "r.json", "--label-free", "--num-prop", 0, "--sparsity", 1)
    assert report["same_class"] == 100
    assert report["cosine_min"] == pytest.approx(1, abs=1e-6)


def test_the_names_of_the_labels_decide(images: Path, tmp_path: Path) -> None:
    """By position ant is 0; the model says that cow is, and it knows more classes than there are folders."""
    folder = write_model(tmp_path / "model", labels=4, cow=0, dog=1, ant=2, bee=3)
    model, pixels, labels = by_hand(folder, images)
    labels = torch.tensor([2, 3, 0])[labels]
    report = evaluate(images, folder, tmp_path / "r.json")
    with torch.inference_mode():
        logits = gtp_vit.patch(model, **PATCH)(pixels).logits
    assert report["top1_count"] == int((logits.argmax(-1) == labels).sum())
    (tmp_path / "map.json").write_text(json.dumps({"ant": 0, "bee": 1, "cow": 2}))
    # As the scripts of transformers write them: numbers as text.
    changed(folder, "config.json", label2id={"cow": "0", "dog": "1", "ant": "2", "bee": "3"})
    assert evaluate(images, folder, tmp_path / "text.json")["top1_count"] == report["top1_count"]
    other = evaluate(images, folder, tmp_path / "map-r.json", "--class-map", tmp_path / "map.json")
    assert other["top1_count"] == int((logits.argmax(-1) == torch.tensor([0] * 5 + [1] * 4 + [2] * 4)).sum())
    assert other["top1_count"] != report["top1_count"]


def test_unreadable_images_are_named(images: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (images / "bee" / "bad.png").write_bytes(b"no image")
    report = evaluate(images, folder, tmp_path / "r.json")
    assert [file for file, _ in report["unreadable"]] == ["bee/bad.png"]
    assert report["images"] == 13


def test_other_processors_are_another_run(images: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    first = evaluate(images, folder, tmp_path / "r.json")["settings"]
    path = folder / "preprocessor_config.json"
    changed = json.loads(path.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    path.write_text(json.dumps(changed))
    second = evaluate(images, folder, tmp_path / "r.json")["settings"]
    assert first["processor"]["image_mean"] == [0.5, 0.5, 0.5]
    assert second["processor"]["image_mean"] == [0.1, 0.2, 0.3]
    assert first["weights_digest"] == second["weights_digest"]


def test_bfloat16(images: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    report = evaluate(images, folder, tmp_path / "r.json", "--dtype", "bfloat16", "--label-free")
    assert report["cosine"] > 0.5
    assert report["settings"]["dtype"] == "bfloat16"
    assert report["not_finite"] == 0


# What is refused


def lacking(folder: Path, name: str) -> None:
    (folder / name).unlink()


def wrong_keys(folder: Path, name: str) -> None:
    state = load_file(folder / name)
    state["vit.nothing"] = state.pop("classifier.bias")
    save_file(state, folder / name, metadata={"format": "pt"})


def wrong_shape(folder: Path, name: str) -> None:
    state = load_file(folder / name)
    state["classifier.weight"] = torch.zeros(3, 5)
    save_file(state, folder / name, metadata={"format": "pt"})


def damaged(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"nonsense")


def changed(folder: Path, name: str, **values: Any) -> None:
    settings = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps(settings))


def bert(folder: Path, name: str) -> None:
    transformers.BertConfig().save_pretrained(folder)


def swin(folder: Path, name: str) -> None:
    config = transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[1], window_size=2, num_labels=3)
    transformers.SwinForImageClassification(config).save_pretrained(folder)


WRONG: dict[str, Any] = {
    "no such folder": (lambda folder, _: shutil.rmtree(folder), "", 1, ["has no config.json", "save_pretrained"]),
    "no weights": (lacking, "model.safetensors", 1, ["model.safetensors"]),
    "no processor": (lacking, "preprocessor_config.json", 1, ["preprocessor_config.json"]),
    "wrong keys": (
        wrong_keys,
        "model.safetensors",
        1,
        ["does not fit ViTForImageClassification", "missing 1: classifier.bias", "unexpected 1: vit.nothing"],
    ),
    "another shape": (
        wrong_shape,
        "model.safetensors",
        1,
        ["other shapes: 1: classifier.weight [3, 5] instead of [3, 48]"],
    ),
    "damaged weights": (damaged, "model.safetensors", 1, ["no classifier of images", "header"]),
    "damaged configuration": (damaged, "config.json", 1, ["config.json"]),
    "damaged processor": (damaged, "preprocessor_config.json", 1, ["preprocessor_config.json"]),
    "code of its own": (
        lambda folder, name: changed(
            folder,
            name,
            model_type="mine",
            auto_map={"AutoConfig": "mine.C", "AutoModelForImageClassification": "mine.M"},
        ),
        "config.json",
        1,
        ["no classifier of images", "custom code"],
    ),
    "a processor of an unknown kind": (
        lambda folder, name: changed(folder, name, image_processor_type="NoneImageProcessor"),
        "preprocessor_config.json",
        1,
        ["no image processor"],
    ),
    "a text model": (bert, "", 1, ["no classifier of images", "Unrecognized configuration class", "BertConfig"]),
    "a model that is not supported": (
        swin,
        "",
        2,
        ["SwinForImageClassification", "supported are ViTForImageClassification, DeiTForImageClassification,"],
    ),
    "images of another size": (
        lambda folder, name: changed(folder, name, size={"height": 32, "width": 32}),
        "preprocessor_config.json",
        2,
        ["the image processor does not fit the model", "32*32"],
    ),
    "images of several sizes": (
        lambda folder, name: changed(folder, name, do_resize=False),
        "preprocessor_config.json",
        2,
        ["images of several sizes, [(3, 60, 90), (3, 90, 60)]"],
    ),
    "attention dropout": (
        lambda folder, name: changed(folder, name, attention_probs_dropout_prob=0.1),
        "config.json",
        2,
        ["attention dropout must be off; got 0.1"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_folders_are_named(images: Path, tmp_path: Path, case: str) -> None:
    spoil, name, code, words = WRONG[case]
    folder = write_model(tmp_path / "model")
    spoil(folder, name)
    result = run("eval", "--data", images, "--model", f"hf:{folder}", *OPTIONS)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    text = " ".join(result.output.split())
    assert str(folder) in text or case == "attention dropout"
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--weights", "x.pth"), ["--weights cannot be given with hf:"]),
        (("--img-size", 64), ["--img-size cannot"]),
        (("--model-kwargs", "depth=2", "--pretrained"), ["--pretrained, --model-kwargs cannot"]),
        (("--num-classes", 0), ["--num-classes cannot"]),
        (("--crop-pct", 0.5), ["--crop-pct cannot"]),
        (("--num-prop", 6), ["num_prop = 6", "largest", "5"]),
        (("--no-patch", "--label-free"), ["--no-patch"]),
    ],
)
def test_options_that_do_not_fit(images: Path, tmp_path: Path, arguments: tuple[object, ...], words: list[str]) -> None:
    folder = write_model(tmp_path / "model")
    result = run("eval", "--data", images, "--model", f"hf:{folder}", *OPTIONS, *arguments)
    assert result.exit_code == 2, result.output
    text = " ".join(result.output.split())
    for word in words:
        assert word in text


def test_other_commands_say_that_they_do_not_take_it(images: Path, tmp_path: Path) -> None:
    name = f"hf:{write_model(tmp_path / 'model')}"
    split = ("--val-split", 0.3, "--batch-size", 4)
    for command in (
        ("doctor", name),
        ("export", name, "-o", tmp_path / "out.pt2"),
        ("tune", "--data", images, "--gmacs", 0.001, "--model", name),
        ("finetune", "--data", images, *split, "--model", name, "--output", tmp_path / "out"),
    ):
        result = run(*command)
        assert result.exit_code == 2, result.output
        assert "taken by gtp-vit eval only" in " ".join(result.output.split()), result.output
