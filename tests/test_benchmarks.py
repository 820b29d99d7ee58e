"""The benchmark tools: ToMe's matching, the registry, the runner, the plot, and the GPU steps' bookkeeping."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, measure, models, registry, runner, tome

testing = pytest.importorskip("click.testing")
timm = pytest.importorskip("timm")

CPU = registry.Setting(torch.device("cpu"), torch.float32, 8, tiny=True)
CEILINGS = measure.Ceilings(1e9, 1e9)


def brute_force_merge(x: Tensor, metric: Tensor, size: Tensor, r: int, prefix: int) -> tuple[list[Tensor], list[float]]:
    """One image, token by token: the paper's description, with lists."""
    image = list(range(prefix, len(x)))
    a, b = image[::2], image[1::2]
    edges = []
    for i in a:
        similarities = [float(torch.cosine_similarity(metric[i], metric[j], dim=0)) for j in b]
        best = max(range(len(b)), key=similarities.__getitem__)
        edges.append((similarities[best], i, b[best]))
    strongest = sorted(edges, reverse=True)[:r]
    into = {i: j for _, i, j in strongest}
    rows, sizes = [x[i] for i in range(prefix)], [float(size[i]) for i in range(prefix)]
    for i in a:
        if i not in into:
            rows.append(x[i])
            sizes.append(float(size[i]))
    for j in b:
        group = [j, *(i for i in into if into[i] == j)]
        total = sum(float(size[i]) for i in group)
        rows.append(sum(x[i] * float(size[i]) for i in group) / total)  # type: ignore[arg-type]  # starts at 0
        sizes.append(total)
    return rows, sizes


@pytest.mark.parametrize(("count", "prefix", "r"), [(9, 1, 3), (17, 1, 8), (16, 0, 1), (12, 2, 99), (8, 1, 0)])
def test_tome_merges_as_the_paper_says(count: int, prefix: int, r: int) -> None:
    generator = torch.Generator().manual_seed(count)
    x, metric = torch.randn(2, 3, count, 5, generator=generator).unbind(0)
    size = torch.randint(1, 5, (3, count), generator=generator).float()
    matching = tome.bipartite_soft_matching(metric[:, prefix:], r)
    merged, merged_size = tome.merge(x, size, matching, prefix)
    for image in range(3):
        rows, sizes = brute_force_merge(x[image], metric[image], size[image], r, prefix)
        torch.testing.assert_close(merged[image], torch.stack(rows))
        torch.testing.assert_close(merged_size[image], torch.tensor(sizes))


def test_tome_keeps_the_class_token_and_the_weight_of_every_patch() -> None:
    x, size = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 9)
    merged, merged_size = tome.merge(x, size, tome.bipartite_soft_matching(x[:, 1:], 3), 1)
    assert torch.equal(merged[:, 0], x[:, 0])
    assert merged.shape == (2, 6, 4)
    torch.testing.assert_close(merged_size.sum(1), size.sum(1))
    torch.testing.assert_close((merged * merged_size[..., None]).sum(1), x.sum(1))
    with pytest.raises(ValueError, match="r must not be negative"):
        tome.bipartite_soft_matching(x, -1)


@pytest.fixture
def tiny() -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=4).eval()


def test_tome_and_slicing_with_nothing_to_drop_are_the_model(tiny: torch.nn.Module) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = tiny(images)
        torch.testing.assert_close(tome.ToMe(tiny, 0)(images), expected)
        torch.testing.assert_close(models.sliced(tiny, 0)(images), expected)


def test_baselines_share_the_weights_and_leave_the_model_alone(tiny: torch.nn.Module) -> None:
    sliced = models.sliced(tiny, 3)
    assert all(a is b for a, b in zip(sliced.parameters(), tiny.parameters(), strict=True))
    assert type(tiny.blocks[0]).__name__ == "Block"
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert sliced.forward_features(images).shape[1] == 17 - 6
        assert tome.ToMe(tiny, 3)(images).shape == (1, 4)


@pytest.mark.parametrize("op", sorted(registry.OPS))
def test_every_op_is_checked_and_timed(op: str) -> None:
    results = runner.run_cases(registry.OPS[op](CPU), CPU.device, CEILINGS, rounds=2, dtype="float32")
    assert results
    for result in results:
        assert "error" not in result
        assert {"ours"} < set(result["median"])
        assert result["ceiling_share"] > 0
        assert all(len(samples) == 2 for samples in result["seconds"].values())


def test_wrong_results_are_not_timed() -> None:
    def wrong() -> None:
        registry.agree("out", torch.ones(2), torch.zeros(2) + 2, 1e-3)

    def never() -> None:
        raise RuntimeError("only the check may run")

    (result,) = runner.run_cases(
        [registry.Case("op", "shape", {"ours": never}, wrong)], CPU.device, CEILINGS, rounds=1, dtype="float32"
    )
    assert "relative error" in result["error"]
    assert "median" not in result


def test_run_writes_what_plot_draws(tmp_path: Path) -> None:
    from benchmarks.run import main

    path = tmp_path / "out" / "result.json"
    arguments = ["--tiny", "--rounds", "1", "--op", "attention", "--op", "select", "--json", str(path)]
    done = testing.CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "of ceiling" in done.output
    report = json.loads(path.read_text())
    assert report["torch"] == torch.__version__
    assert {result["case"] for result in report["results"]} == {"attention", "select"}
    pytest.importorskip("matplotlib")
    from benchmarks.plot import main as plot

    done = testing.CliRunner().invoke(plot, [str(path)])
    assert done.exit_code == 0, done.output
    assert path.with_suffix(".svg").read_text().lstrip().startswith("<?xml")


def test_run_times_a_model_against_its_baselines() -> None:
    case = models.model_case("vit_tiny_patch16_224", 1, CPU, img_size=64, depth=1, embed_dim=32, num_heads=2)
    (result,) = runner.run_cases([case], CPU.device, CEILINGS, rounds=1, dtype="float32")
    assert list(result["median"]) == ["ours", "timm", "slicing", "tome", "tome overhead"]
    assert result["per_second"]["ours"] > 0


def test_folders_are_named_after_devices() -> None:
    assert measure.slug("NVIDIA H200") == "nvidia-h200"
    assert measure.slug("NVIDIA GeForce RTX 3090") == "nvidia-geforce-rtx-3090"


def test_gpu_steps_record_what_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(left: float) -> dict[str, object]:
        raise ZeroDivisionError("piece")

    def lacks(left: float) -> dict[str, object]:
        raise ModuleNotFoundError("No module named 'timm'")

    outcomes = {"good": lambda left: {"status": "passed"}, "breaks": breaks, "lacks": lacks}
    monkeypatch.setattr(gpu, "pieces", lambda step, context: iter(outcomes.items()))
    monkeypatch.setattr(
        measure, "provenance", lambda device: dict.fromkeys(("commit", "device", "torch", "triton"), "x")
    )
    context = gpu.Context(True, tmp_path)

    def statuses(budget: float) -> dict[str, str]:
        found = gpu.run_step("ops", context, budget)["pieces"]
        assert json.loads((tmp_path / "ops.json").read_text())["pieces"] == found
        return {name: piece["status"] for name, piece in found.items()}

    assert statuses(0) == dict.fromkeys(outcomes, "pending")
    assert statuses(60) == {"good": "passed", "breaks": "failed", "lacks": "absent"}
    outcomes["good"] = breaks  # done before at this commit, so not run again
    assert statuses(60)["good"] == "passed"


@pytest.mark.parametrize(
    ("status", "output", "verdict"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "passed"),
        (99, "========= ERROR SUMMARY: 2 errors", "failed"),
        (0, "========= RACECHECK SUMMARY: 3 hazards displayed", "failed"),
        (255, "========= Error: Target application terminated before first instrumented API call", "refused"),
        (0, "Device not supported.", "refused"),
    ],
)
def test_a_sanitizer_that_did_not_watch_is_refused(
    status: int, output: str, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: "compute-sanitizer")
    monkeypatch.setattr(gpu, "_run", lambda *_, **__: (status, output))
    assert gpu._sanitize(gpu.Context(False, Path()), "memcheck", 1)["status"] == verdict
