"""`gtp-vit tune` and the search behind it, on a tiny model."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import gtp_vit
from gtp_vit import tuning

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("click.testing")
pytest.importorskip("PIL.Image")

from cli_images import ok, run, write_image

KWARGS: dict[str, Any] = {"img_size": 48, "patch_size": 8, "depth": 4, "embed_dim": 32, "num_heads": 2}
MODEL = (
    "--model", "vit_tiny_patch16_224", "--img-size", "48", "--model-kwargs", "patch_size=8",
    "--model-kwargs", '{"depth": 4, "embed_dim": 32, "num_heads": 2}',
)  # fmt: skip


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    made = timm.create_model("vit_tiny_patch16_224", num_classes=5, **KWARGS).eval()
    torch.nn.init.normal_(made.head.weight)
    return made


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def budget(model: Any, num_prop: int = 4) -> float:
    config = gtp_vit.GTPConfig(num_prop=num_prop, **tuning.LIVE)
    return tuning.work_of(model, (48, 48)).macs(config) / 1e9


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (0, 1, 2, 3), (1, 0, 0, 0), (0, 0, 0, 1e-3), (0.3, 5, 0.1, 2)])
@pytest.mark.parametrize("name", tuning.BASELINES)
def test_fit_takes_the_fewest_tokens_that_suffice(model: Any, weights: tuple[float, ...], name: str) -> None:
    work, options = tuning.work_of(model, (48, 48)), tuning.BASELINES[name]
    everything = work.macs(gtp_vit.GTPConfig(num_prop=tuning._spread(35, weights), **options)) / 1e9
    first = work.macs(gtp_vit.GTPConfig(num_prop=0, **options)) / 1e9
    target = everything + 0.3 * (first - everything)
    found = tuning.fit(work, options, weights, target)
    assert all(p >= 0 for p in found)
    assert [p for p, weight in zip(found, weights, strict=True) if weight == 0 and p > 0] == []

    def macs(values: tuple[int, ...]) -> float:
        return work.macs(gtp_vit.GTPConfig(num_prop=values, **options)) / 1e9

    assert macs(found) <= target < macs(tuning._spread(sum(found) - 1, weights))
    with tuning.patched(model, {**options, "num_prop": found}):
        assert gtp_vit.gmacs(model, 48) == pytest.approx(macs(found), rel=1e-9), "the work is that of the model"


def test_fit_says_what_it_cannot_do(model: Any) -> None:
    work = tuning.work_of(model, (48, 48))
    with pytest.raises(ValueError, match=r"gmacs = 1e-05 cannot be reached"):
        tuning.fit(work, tuning.LIVE, (1, 1, 1, 1), 1e-5)
    for weights in ((1, 1, 1), (0, 0, 0, 0), (-1, 1, 1, 1), (float("nan"), 1, 1, 1), (float("inf"), 1, 1, 1)):
        with pytest.raises(ValueError, match="weights must"):
            tuning.fit(work, tuning.LIVE, weights, 1.0)


def test_agreement_of_a_model_with_itself(model: Any) -> None:
    images = pixels(3)
    expected = tuning.outputs(model, images, patches=True, batch_size=2)
    assert expected.patches is not None
    assert expected.patches.shape == (3, 36, 32)
    same = tuning.agreement(tuning.outputs(model, images, patches=True), expected)
    torch.testing.assert_close(same.loss, torch.zeros(3), atol=1e-5, rtol=0)
    assert same.top1 is not None
    assert same.top1.tolist() == [1, 1, 1]
    with tuning.patched(model, {**tuning.PRUNING, "num_prop": 8}):
        other = tuning.agreement(tuning.outputs(model, images, patches=True), expected)
    assert (other.loss > 1e-4).all()
    assert "gtp" not in vars(model)
    parts = torch.stack([other.pooled, other.logits, other.patches])
    torch.testing.assert_close(other.loss, 1 - parts.mean(0))
    headless = timm.create_model("vit_tiny_patch16_224", num_classes=0, **KWARGS).eval()
    found = tuning.outputs(headless, images)
    assert found.logits is None
    assert found.patches is None


def test_candidates_are_different_and_do_no_more_work(model: Any) -> None:
    gmacs = budget(model)
    search = tuning._Search(model, pixels(2), gmacs, False, 8, random.Random(3))
    found = search.candidates(30)
    assert len({candidate.key() for candidate in found}) == 30
    assert {candidate.options["propagation"] for candidate in found} == {"LiveGraph", "GraphProp", "None"}
    changed = [search.changed(candidate) for candidate in found for _ in range(4)]
    for candidate in [*found, *(one for one in changed if one is not None)]:
        work = search.work.macs(gtp_vit.GTPConfig(**candidate.options)) / 1e9
        assert work <= gmacs
        json.dumps(tuning._plain(candidate.options))
    assert sum(one is not None for one in changed) > len(changed) / 3


def test_tuning_finds_what_is_better_and_repeats_itself(model: Any) -> None:
    images, gmacs = pixels(8), budget(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings: dict[str, Any] = {"seconds": 60, "num_candidates": 10, "max_steps": 8}
    said: list[float] = []
    first = tuning.tune(model, images, gmacs, progress=lambda what, share: said.append(share), **settings)
    assert first == tuning.tune(model, images, gmacs, **settings)
    assert first.finished
    assert first.candidates == 10
    assert first.steps[0] == 8
    assert said == sorted(said)
    assert type(model) is timm.models.VisionTransformer
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # It is no worse than anything that it started from: the baselines are among the candidates.
    expected = tuning.outputs(model, images)
    losses = {}
    for name, options in {"best": first.best, **tuning.constant(model, images, gmacs)}.items():
        with tuning.patched(model, options):
            losses[name] = tuning.mean_angle(tuning.agreement(tuning.outputs(model, images), expected).loss)
    assert losses.pop("best") == pytest.approx(first.loss, rel=1e-3)
    assert len(losses) == len(tuning.BASELINES)
    assert first.loss <= min(losses.values()) + 1e-6


def test_without_a_class_token_none_of_its_attention() -> None:
    model = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", num_classes=5, **KWARGS)
    model = model.eval()
    images = pixels(2)
    target = budget(model)
    assert not any("CLS" in name for name in tuning.constant(model, images, target))
    result = tuning.tune(model, images, target, num_candidates=40, seconds=0, max_steps=0)
    assert result.best.get("selection", "MixedAttnMax") == "MixedAttnMax"
    search = tuning._Search(model, images, target, False, 2, random.Random(0))
    pool = search.candidates(40)
    assert {candidate.options.get("selection", "MixedAttnMax") for candidate in pool} == {"MixedAttnMax"}


def test_without_time_there_is_still_a_result(model: Any) -> None:
    found = tuning.tune(model, pixels(2), budget(model), seconds=0)
    assert not found.finished
    assert found.steps == (0, 0)
    gtp_vit.patch(model, **found.best)


def test_tune_refuses(model: Any) -> None:
    with pytest.raises(ValueError, match=r"gmacs must be above 0, and at most"):
        tuning.tune(model, pixels(1), 1e3)
    with pytest.raises(ValueError, match=r"gmacs = 1e-06 cannot be reached"):
        tuning.tune(model, pixels(1), 1e-6)
    with pytest.raises(ValueError, match=r"images must be \[n, 3, H, W\]"):
        tuning.tune(model, pixels(0), budget(model))
    patched = gtp_vit.patch(copy.deepcopy(model), num_prop=2)
    with pytest.raises(ValueError, match="must not be patched"):
        tuning.tune(patched, pixels(1), budget(model))


@pytest.fixture
def weights(model: Any, tmp_path: Path) -> Path:
    torch.save(model.state_dict(), tmp_path / "w.pth")
    return tmp_path / "w.pth"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        write_image(tmp_path / "images" / f"class{number % 2}" / f"{number}.png", number)
    return tmp_path / "images"


def test_command_writes_options_that_patch_takes(model: Any, weights: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned.json"
    shown = ok(
        "tune",
        "--data",
        folder,
        "--gmacs",
        budget(model),
        *MODEL,
        "--weights",
        weights,
        "--candidates",
        8,
        "--steps",
        2,
        "--json",
        output,
    )
    report = json.loads(output.read_text())
    gtp_vit.patch(model, **report["patch"])
    assert gtp_vit.gmacs(model, 48) == pytest.approx(report["gmacs"])
    assert report["judged"][0]["top1"] is not None
    assert report["gmacs"] <= report["gmacs_asked"] < report["gmacs_unpatched"]
    assert report["settings"]["images"] == 4
    assert report["settings"]["images_judged"] == 2
    names = [row["name"] for row in report["judged"]]
    assert names[0] == "tuned"
    assert any(name.startswith("GTP as published, P = ") for name in names)
    for row in report["judged"]:
        better = [other for other in report["judged"] if other["gmacs"] <= row["gmacs"]]
        assert row["pareto"] == (row["pooled"] == max(other["pooled"] for other in better))
    assert "GTP as published" in shown
    assert "num_prop:" in shown


def test_command_judges_on_other_images(model: Any, weights: Path, folder: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "others" / "a.png", 77)
    common = (
        "tune",
        "--gmacs",
        budget(model),
        *MODEL,
        "--weights",
        weights,
        "--candidates",
        2,
        "--steps",
        0,
        "--json",
        tmp_path / "t.json",
    )
    ok(*common, "--data", folder, "--judge", tmp_path / "others", "--patches")
    report = json.loads((tmp_path / "t.json").read_text())
    assert (report["settings"]["images"], report["settings"]["images_judged"]) == (6, 1)
    assert report["settings"]["patches"] is True
    for arguments, message in (
        (("--data", folder, "--judge", folder / "class0"), "3 images are in --data too"),
        (("--data", tmp_path / "others"), "one image"),
        (("--data", folder, "--gmacs", "1000"), "gmacs must be above 0"),
        (("--data", folder, "--gmacs", "1e-9"), "cannot be reached"),
        (("--data", folder, "--json", tmp_path / "nowhere" / "t.json"), "does not exist"),
    ):
        done = run(*common, *arguments)
        assert done.exit_code == 2, done.output
        assert message in " ".join(done.output.replace("│", " ").split()), done.output
    (folder / "bad.png").write_text("no image")
    done = run(*common, "--data", folder, "--judge", tmp_path / "others")
    assert done.exit_code == 2
    assert "bad.png" in done.output
