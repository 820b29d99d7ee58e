"""The accuracy experiment: the digits, their training, the counting, the table and the plot, what is committed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn")
pytest.importorskip("timm")
pytest.importorskip("matplotlib")
testing = pytest.importorskip("click.testing")

from benchmarks import accuracy, digits

STEP = 15
PS = [0, 15, 30, 31]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, accuracy.Report, str]:
    """One run of the command: its folder, its report, what it printed."""
    folder = tmp_path_factory.mktemp("quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "BUILD", folder / "build")
        done = testing.CliRunner().invoke(accuracy.main, ["--quick", "--step", str(STEP)])
    assert done.exit_code == 0, done.output
    out = folder / "build" / "quick"
    return out, json.loads((out / "accuracy.json").read_text()), done.output


def complete(report: accuracy.Report) -> None:
    """Every method at every setting, P and seed, once; the counts are possible ones."""
    expected = [(name, *setting) for name, method in accuracy.METHODS.items() for setting in method.settings()]
    assert [(row["method"], row["sparsity"], row["token_scales"]) for row in report["rows"]] == expected
    assert [row["method"] for row in report["rows"] if row["default"]] == list(accuracy.METHODS)
    recipe = report["recipe"]
    counts = [report["unpatched"]["correct"], *(counts for row in report["rows"] for counts in row["correct"])]
    assert all(len(found) == len(report["seeds"]) for found in counts)
    assert all(0 <= count <= recipe["test_images"] for found in counts for count in found)
    num_tokens = (recipe["img_size"] // recipe["patch_size"]) ** 2
    for row in report["rows"]:
        assert len(row["correct"]) == len(row["tokens"]) == len(row["gmacs"]) == len(report["num_props"])
        assert row["gmacs"] == sorted(row["gmacs"], reverse=True)
        if row["method"] != "ToMe":
            assert row["tokens"] == [num_tokens - recipe["depth"] * num_prop for num_prop in report["num_props"]]


def agrees_without_reduction(report: accuracy.Report) -> None:
    """P = 0: without the threshold the unpatched model, with it the same model for every method."""
    assert report["num_props"][0] == 0
    thresholded = []
    for row in report["rows"]:
        if row["sparsity"] in (None, 1):
            assert row["correct"][0] == report["unpatched"]["correct"], row["method"]
        else:
            thresholded.append(row["correct"][0])
    assert len(thresholded) > 1
    assert all(found == thresholded[0] for found in thresholded)


def test_quick_run_is_complete(quick: tuple[Path, accuracy.Report, str]) -> None:
    _, report, output = quick
    assert report["torch"] == torch.__version__
    assert report["num_props"] == PS
    assert report["seeds"] == [0, 1]
    complete(report)
    agrees_without_reduction(report)
    assert "random, no propagation" in output


def test_quick_run_writes_table_and_plot(quick: tuple[Path, accuracy.Report, str]) -> None:
    folder, report, _ = quick
    text = (folder / "accuracy.md").read_text()
    assert text == accuracy.generated(text, report)
    for row in report["rows"]:
        assert f"| {row['method']} |" in text
    mean, spread = accuracy.per_cent(report, report["rows"][0]["correct"][1])
    assert f"| GTP | {accuracy.per_cent(report, report['rows'][0]['correct'][0])[0]:.1f} ± " in text
    assert f" | {mean:.1f} ± {spread:.1f} | " in text
    plot = (folder / "accuracy.svg").read_text()
    assert plot.startswith("<?xml")
    assert accuracy.digest(report) in plot


def test_keeping_measures_what_is_missing(
    quick: tuple[Path, accuracy.Report, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, report, _ = quick
    monkeypatch.setattr(accuracy, "BUILD", folder.parent)
    kept = [{**row, "commit": "earlier"} for row in report["rows"] if row["method"] != "ToMe"]
    (tmp_path / "accuracy.json").write_text(json.dumps({**report, "rows": kept}))
    arguments = ["--quick", "--step", str(STEP), "--keep", "--output", str(tmp_path)]
    done = testing.CliRunner().invoke(accuracy.main, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "accuracy.json").read_text())
    assert found["rows"] == [row if row["method"] == "ToMe" else {**row, "commit": "earlier"} for row in report["rows"]]
    assert f"commit {', '.join(sorted({'earlier', str(report['commit'])}))};" in (tmp_path / "accuracy.md").read_text()


def test_redrawing_changes_nothing(quick: tuple[Path, accuracy.Report, str], tmp_path: Path) -> None:
    folder, _, _ = quick
    (tmp_path / "accuracy.json").write_bytes((folder / "accuracy.json").read_bytes())
    done = testing.CliRunner().invoke(accuracy.main, ["--redraw", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for name in ("accuracy.md", "accuracy.svg"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    done = testing.CliRunner().invoke(accuracy.main, ["--redraw", "--output", str(tmp_path / "nowhere")])
    assert done.exit_code == 2
    assert "accuracy.json" in done.output


def test_other_numbers_are_another_table_and_plot(quick: tuple[Path, accuracy.Report, str], tmp_path: Path) -> None:
    folder, report, _ = quick
    other = json.loads(json.dumps(report))
    other["rows"][0]["correct"][1][0] += 7
    text = (folder / "accuracy.md").read_text()
    assert accuracy.generated(text, other) != text
    accuracy.save_plot(other, tmp_path / "other.svg")
    assert (tmp_path / "other.svg").read_text() != (folder / "accuracy.svg").read_text()
    with pytest.raises(ValueError, match="each once"):
        accuracy.generated("no comments", report)


def test_spread_is_the_standard_deviation_over_seeds() -> None:
    report = {"recipe": {"test_images": 200}}
    assert accuracy.per_cent(report, [190, 194, 192]) == (pytest.approx(96), pytest.approx(1))
    assert accuracy.per_cent(report, [190]) == (pytest.approx(95), 0)


def test_num_props_end_with_the_largest() -> None:
    assert accuracy.num_props(196, 12, 2) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert accuracy.num_props(64, 2, STEP) == PS
    assert accuracy.num_props(196, 12, 100) == [0, 16]


@pytest.fixture(scope="module")
def model() -> Any:
    """Random weights, large enough that the tokens of an image differ."""
    torch.manual_seed(0)
    made = digits.create(digits.TINY).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return made


@pytest.mark.parametrize("name", accuracy.METHODS)
def test_methods_reduce_a_copy(name: str, model: Any) -> None:
    image = digits.sampled(digits.load(digits.TINY)[1].images[:3], digits.TINY.img_size)
    method = accuracy.METHODS[name]
    sparsity, scales = 1.0 if 1.0 in method.sparsities else None, method.token_scales[0]
    with torch.inference_mode():
        before = model(image)
        same = method.reduce(model, 0, sparsity, scales)
        assert torch.equal(same(image), before)
        assert accuracy.tokens_left(same, image) == 64
        reduced = method.reduce(model, 12, sparsity, scales)
        assert not torch.allclose(reduced(image), before, atol=1e-3)
        assert accuracy.tokens_left(reduced, image) == 40
        assert torch.equal(model(image), before)


@pytest.mark.parametrize("name", accuracy.METHODS)
def test_settings_change_the_result(name: str, model: Any) -> None:
    image = digits.sampled(digits.load(digits.TINY)[1].images[:3], digits.TINY.img_size)
    settings = list(accuracy.METHODS[name].settings())
    assert len(settings) > 1
    results: list[Tensor] = []
    for setting in settings:
        torch.manual_seed(0)
        with torch.inference_mode():
            results.append(accuracy.METHODS[name].reduce(model, 12, *setting)(image))
    for number, result in enumerate(results):
        assert not any(torch.allclose(result, other, atol=1e-5) for other in results[:number]), settings[number]


class Answers(nn.Module):
    """Says what it was told, image by image."""

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.answers, self.seen = answers, 0

    def forward(self, images: Tensor) -> Tensor:
        chosen = self.answers[self.seen : self.seen + len(images)]
        self.seen += len(images)
        return nn.functional.one_hot(chosen, 10).float()


def test_right_answers_are_counted() -> None:
    labels = torch.arange(2 * accuracy.BATCH + 7) % 10
    data = digits.Digits(torch.zeros(len(labels), 8, 8), labels)
    assert accuracy.count_correct(Answers(labels), data, 8, 0) == len(labels)
    assert accuracy.count_correct(Answers((labels + 1) % 10), data, 8, 0) == 0
    wrong_in_the_last_batch = labels.clone()
    wrong_in_the_last_batch[-2:] = (labels[-2:] + 1) % 10
    assert accuracy.count_correct(Answers(wrong_in_the_last_batch), data, 8, 0) == len(labels) - 2


def test_counting_leaves_the_generator_alone(model: Any) -> None:
    _, test = digits.load(digits.TINY)
    random = accuracy.METHODS["random selection"].reduce(model, 20, 1.0, True)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    counts = [accuracy.count_correct(random, test, digits.TINY.img_size, 1) for _ in range(2)]
    assert counts[0] == counts[1]
    assert torch.equal(torch.rand(3), expected)


def test_split_is_fixed_and_stratified() -> None:
    recipe = digits.Recipe()
    train, test = digits.load(recipe)
    assert (len(train.images), len(test.images)) == (1347, 450)
    assert all(torch.equal(a, b) for a, b in zip(digits.load(recipe)[1], test, strict=True))
    assert 0 <= float(train.images.min()) < float(train.images.max()) <= 1
    share = torch.bincount(train.labels) / len(train.labels) - torch.bincount(test.labels) / len(test.labels)
    assert share.abs().max() < 0.003
    seen = {tuple(image.flatten().tolist()) for image in train.images}
    assert not any(tuple(image.flatten().tolist()) in seen for image in test.images)


def test_sampling() -> None:
    images = digits.load(digits.TINY)[0].images[:4]
    assert torch.allclose(digits.sampled(images, 8), 2 * images[:, None] - 1, atol=1e-5)
    assert digits.sampled(images, 56).shape == (4, 1, 56, 56)
    small = digits.sampled(images, 56).unfold(2, 7, 7).unfold(3, 7, 7).mean((-2, -1))
    assert float((small - (2 * images[:, None] - 1)).abs().mean()) < 0.2
    still = replace(digits.TINY, rotation=0, shift=0, zoom=0)
    assert torch.allclose(digits.random_affine(still, 5), torch.eye(2, 3).expand(5, 2, 3))


def test_random_affine_keeps_within_the_recipe() -> None:
    recipe = digits.Recipe(rotation=12, shift=0.1, zoom=0.15)
    torch.manual_seed(0)
    found = digits.random_affine(recipe, 2000)
    factor = torch.linalg.det(found[:, :, :2]).sqrt()
    assert 1.14 < float(factor.max()) <= 1.1501
    assert 1 / 1.1501 <= float(factor.min()) < 1 / 1.14
    angle = torch.rad2deg(torch.atan2(found[:, 1, 0], found[:, 0, 0]))
    assert 11.9 < float(angle.abs().max()) <= 12.001
    assert 0.19 < float(found[:, :, 2].abs().max()) <= 0.2
    assert float(found[:, :, 2].mean().abs()) < 0.01


def test_training_learns() -> None:
    recipe = replace(
        digits.TINY, embed_dim=32, epochs=10, full_size_epochs=3, train_images=640, learning_rate=4e-3, batch_size=16,
        rotation=0, shift=0, zoom=0,
    )  # fmt: skip
    train, test = digits.load(recipe)
    epochs: list[int] = []
    model = digits.train(recipe, 0, train, lambda: epochs.append(1))
    assert len(epochs) == 10
    assert not model.training
    assert accuracy.count_correct(model, test, recipe.img_size, 0) >= 20  # of 40; 4 by chance


def test_trained_weights_are_kept(tmp_path: Path) -> None:
    epochs: list[int] = []
    torch.manual_seed(9)
    expected = torch.rand(2)
    torch.manual_seed(9)
    first = digits.trained(digits.TINY, 0, tmp_path, lambda: epochs.append(1)).state_dict()
    assert torch.equal(torch.rand(2), expected)
    again = digits.trained(digits.TINY, 0, tmp_path, lambda: epochs.append(1)).state_dict()
    assert len(epochs) == digits.TINY.epochs
    assert all(torch.equal(first[name], again[name]) for name in first)
    anew = digits.trained(digits.TINY, 0, tmp_path / "other").state_dict()
    assert all(torch.equal(first[name], anew[name]) for name in first)
    other = digits.trained(digits.TINY, 1, tmp_path).state_dict()
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert len(list(tmp_path.glob("*.pt"))) == 2
    assert not list(tmp_path.glob("*.part"))
    assert digits.digest(replace(digits.TINY, epochs=3)) != digits.digest(digits.TINY)


def test_most_epochs_see_half_the_size() -> None:
    assert list(replace(digits.TINY, epochs=3, full_size_epochs=1).sizes()) == [16, 16, 32]
    assert list(replace(digits.TINY, epochs=2, full_size_epochs=5).sizes()) == [32, 32]


@pytest.fixture(scope="module")
def committed() -> accuracy.Report:
    report: accuracy.Report = json.loads((accuracy.RESULTS / "accuracy.json").read_text())
    return report


def test_committed_results_are_complete(committed: accuracy.Report) -> None:
    assert len(committed["seeds"]) == 3
    assert committed["num_props"][-1] == accuracy.num_props(196, 12, 1)[-1]
    recipe = digits.Recipe(**committed["recipe"])
    assert recipe == digits.Recipe()
    assert (recipe.img_size // recipe.patch_size) ** 2 == 196
    complete(committed)
    agrees_without_reduction(committed)
    for count in committed["unpatched"]["correct"]:
        assert count / recipe.test_images >= 0.97


def test_document_and_plot_are_what_the_results_say(committed: accuracy.Report) -> None:
    text = accuracy.DOCUMENT.read_text()
    assert accuracy.generated(text, committed) == text
    assert "../benchmarks/results/digits/accuracy.svg" in text
    plot = (accuracy.RESULTS / "accuracy.svg").read_text()
    assert accuracy.digest(committed) in plot


def test_plot_is_what_would_be_drawn(committed: accuracy.Report, tmp_path: Path) -> None:
    import matplotlib

    plot = (accuracy.RESULTS / "accuracy.svg").read_text()
    drawn_by = re.search(r"Matplotlib v([\w.]+)", plot)
    assert drawn_by is not None
    if drawn_by[1] != matplotlib.__version__:
        pytest.skip(f"drawn by matplotlib {drawn_by[1]}; this is {matplotlib.__version__}")
    accuracy.save_plot(committed, tmp_path / "accuracy.svg")
    assert (tmp_path / "accuracy.svg").read_text() == plot
