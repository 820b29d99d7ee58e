"""The benchmark tools: ToMe's matching, the registry, the runner, the plot, and the GPU steps' bookkeeping."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    evidence,
    gpu,
    lines,
    measure,
    models,
    overhead,
    peak,
    readme,
    registry,
    runner,
    smoke,
    tome,
    training,
    tune,
)
from gtp_kernels import backends
from gtp_vit import slicing

testing = pytest.importorskip("click.testing")
timm = pytest.importorskip("timm")

CPU = registry.Setting(torch.device("cpu"), torch.float32, 8, tiny=True)
ROOT = Path(__file__).resolve().parents[1]
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
def tiny() -> Any:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=4).eval()


def test_tome_and_slicing_with_nothing_to_drop_are_the_model(tiny: Any) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = tiny(images)
        torch.testing.assert_close(tome.ToMe(tiny, 0)(images), expected)
        torch.testing.assert_close(slicing.sliced(tiny, 0)(images), expected)
        torch.testing.assert_close(slicing.sliced(tiny, 0, fused=True)(images), expected)


def test_baselines_share_the_weights_and_leave_the_model_alone(tiny: Any) -> None:
    sliced = slicing.sliced(tiny, 3)
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


def test_one_case_that_breaks_does_not_take_the_others() -> None:
    def breaks() -> None:
        raise RuntimeError("no kernel image\nand more")

    def fine() -> None:
        pass

    case = registry.Case(
        "op", "good", {"ours": fine, "lacking": breaks, "plain": fine}, fine, parts={"p": ("plain", fine)}
    )
    told: list[tuple[str, float]] = []
    bad, good = runner.run_cases(
        [registry.Case("op", "bad", {"ours": fine}, breaks), case], CPU.device, CEILINGS, rounds=2, dtype="float32",
        progress=lambda what, share: told.append((what, share)),
    )  # fmt: skip
    assert bad["error"] == "RuntimeError: no kernel image"
    assert "median" not in bad
    assert set(good["median"]) == {"ours", "plain"}
    assert good["left_out"] == {"lacking": "RuntimeError: no kernel image"}
    assert good["parts"]["p"]["of"] == "plain"
    assert told[0] == ("checking op bad", 0.0)
    assert told[-1] == ("timing op good", 1.0)


def test_rivals_are_checked_and_timed_beside_ours() -> None:
    ran: list[str | None] = []

    def ours() -> None:
        ran.append(backends.forced())
        backends.choose("graph", torch.empty(1, 3, 4))

    def check() -> None:
        ours()
        if backends.forced() == "triton":
            raise AssertionError("out: relative error 1")

    case = registry.Case("graph", "shape", {"ours": ours}, check)
    with backends.use_backend("cpu"):
        (result,) = runner.run_cases(
            [case], CPU.device, CEILINGS, rounds=2, dtype="float32", rivals=("cpu", "reference", "triton", "cuda")
        )
    assert result["backends"] == ["cpu"]
    assert list(result["median"]) == ["ours", "reference"]
    assert result["ratio"]["reference"] > 0
    assert set(ran) >= {"cpu", "reference"}
    # Where the process has emulated or interpreted kernels they run; else the reason is theirs, not the whole list.
    for name in ("triton", "cuda"):
        assert name in result.get("wrong", {}) or "can run" not in result["left_out"][name]


def test_wrong_rivals_are_not_timed() -> None:
    def check() -> None:
        if backends.forced() == "reference":
            raise AssertionError("out: relative error 1")

    def breaks() -> None:
        if backends.forced() == "cpu":
            raise RuntimeError("an illegal access\nand more")

    case = registry.Case("op", "shape", {"ours": breaks}, check)
    (result,) = runner.run_cases([case], CPU.device, CEILINGS, rounds=1, dtype="float32", rivals=("cpu",))
    assert result["wrong"] == {"cpu": "RuntimeError: an illegal access"}
    case = registry.Case("op", "shape", {"ours": lambda: backends.choose("op", torch.empty(0))}, check)
    (result,) = runner.run_cases([case], CPU.device, CEILINGS, rounds=1, dtype="float32", rivals=("reference",))
    assert result["wrong"] == {"reference": "out: relative error 1"}
    assert "reference" not in result["median"]
    context = gpu.Context(True, Path())
    assert gpu._timed(context, "float32", [result])["status"] == "failed"


def test_the_scores_beside_sdpa_are_right() -> None:
    pytest.importorskip("triton")
    code = """
import torch
from benchmarks.column_sums import sdpa_with_scores
from gtp_kernels import reference
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
    for tokens, size in ((17, 16), (130, 24)):
        qkv = torch.randn(2, tokens, 3, 3, size, generator=torch.Generator().manual_seed(size)).to(dtype)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out, scores = reference.attention_with_scores(q, k, v)
        for ours, expected in zip(sdpa_with_scores(q, k, v), (out, *scores), strict=True):
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
print("fine")
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.stdout.strip() == "fine", done.stderr


def test_the_threshold_of_a_stored_map() -> None:
    """``kthvalue`` and ``topk`` find one threshold: the baselines do what they are there for."""
    case = next(case for case in registry.attention_cases(CPU) if "kthvalue" in case.calls)
    smallest, largest = case.calls["kthvalue"](), case.calls["topk"]()
    assert torch.equal(smallest.values, largest.values.amin(-1))  # type: ignore[attr-defined]  # what torch returns


def test_the_host_time_of_a_block() -> None:
    found = overhead.measure(CPU, ("cpu", "cuda"), rounds=2)
    steps = ["attention", "importance", "selection", "residual step", "importance to residual step"]
    steps += ["block", "live selection", "live step", "live block", "graph, once"]
    assert list(found["cpu"]) == steps
    assert found["cpu"]["block"]["median"] > 0
    assert found["cpu"]["block"]["launches"] is None
    assert "cuda" in found["left_out"] or list(found["cuda"]) == steps
    text = "\n".join(overhead.lines(found))
    assert "cpu: block: " in text
    assert "unpatched: block: " in text


def test_smoke_runs_every_op() -> None:
    assert smoke.smoke(CPU.device, (17,)) == 20


def ops_report(*results: dict[str, Any], **more: Any) -> dict[str, Any]:
    return gpu_report("ops", {"attention bfloat16": {"status": "passed", "results": list(results)}}, **more)


def measured(tokens: int, speedup: float | None, **more: Any) -> dict[str, Any]:
    ratio = {"sdpa": 0.8, **({} if speedup is None else {"cuda": speedup})}
    about = {"tokens": tokens, "head_size": 64, "backends": ["triton"]}
    return timed("attention", f"N{tokens}", ratio, **{**about, **more})


def write_report(folder: Path, report: dict[str, Any], name: str = "nvidia-h200/ops.json") -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(report))


def test_evidence_lists_what_was_won(tmp_path: Path) -> None:
    write_report(
        tmp_path,
        ops_report(
            measured(197, 1.5), measured(43, 1.2), measured(109, 1.3), measured(109, 1.25),
            measured(785, 1.4),  # more than three times 197: a class of its own
            measured(197, 1.4, head_size=32), measured(109, 0.9, head_size=32),
            measured(197, 1.01, head_size=80),  # too little
            measured(197, None, head_size=96, wrong={"cuda": "relative error 1"}),
            measured(197, 2.0, head_size=128), measured(197, None, head_size=128, left_out={"cuda": "not built"}),
            {**measured(1, 3.0), "case": "select", "tokens": 197, "channels": 0, "arithmetic": "float32"},
            {"case": "graph", "shape": "B2", "dtype": "bfloat16", "error": "differs"},
        ),
    )  # fmt: skip
    write_report(tmp_path, ops_report(measured(300, 9.0), dry_run=True), "dry/ops.json")
    write_report(tmp_path, {"device": "x86_64", "results": [measured(300, 9.0)]}, "cpu/ops.json")
    file = {"file": "benchmarks/results/nvidia-h200/ops.json", "commit": "abc1234"}
    about = {"op": "attention", "capability": "9.0", "dtype": "bfloat16"}
    found = [entry for entry in evidence.entries(tmp_path) if entry["op"] == "attention"]
    assert found == [
        {**about, "head_size": 32, "tokens": [197, 197], "speedup": 1.4, **file},
        {**about, "head_size": 64, "tokens": [43, 197], "speedup": 1.2, **file},
        {**about, "head_size": 64, "tokens": [785, 785], "speedup": 1.4, **file},
    ]


def test_evidence_of_other_ops_and_of_a_run_of_cuda(tmp_path: Path) -> None:
    common = {"backends": ["cuda"], "tokens": 197}
    write_report(
        tmp_path,
        ops_report(
            timed("select", "N197", {"triton": 0.5}, channels=0, arithmetic="float32", **common),
            timed("propagate", "N197", {"triton": 2.0}, channels=384, **common),
            timed("graph", "N197", {"triton": 0.8}, channels=384, **common),
        ),
    )
    found = {entry["op"]: entry for entry in evidence.entries(tmp_path)}
    assert set(found) == {"select", "graph"}
    assert (found["select"]["dtype"], found["select"]["channels"], found["select"]["speedup"]) == ("float32", 0, 2.0)
    assert (found["graph"]["dtype"], found["graph"]["channels"]) == ("bfloat16", 384)


def test_the_packaged_evidence_is_what_the_tool_writes() -> None:
    assert evidence.PATH.read_text() == evidence.written(ROOT / "benchmarks" / "results")
    assert evidence.main(["--check"]) == 0
    assert backends.EVIDENCE == evidence.PATH


def test_every_timed_op_says_its_shape_class() -> None:
    for op, cases in registry.OPS.items():
        for case in cases(CPU):
            assert case.about["tokens"] > 0
            assert ("head_size" in case.about) != ("channels" in case.about)
            assert op != "attention" or "head_size" in case.about


def test_what_was_not_built_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    context = gpu.Context(True, Path())
    monkeypatch.setattr(gpu, "_cuda_missing", lambda context: "not built")
    absent = {"status": "absent", "output": "not built"}
    assert gpu._smoke(context, 1, backend="cuda") == absent
    assert gpu._sanitize(context, "memcheck", 1, backend="cuda") == absent
    assert gpu._tests(context, "test_select.py", 1, emulated=True) == absent
    names = [name for name, _ in gpu.pieces("sanitize", context)]
    assert {"smoke", "memcheck", "smoke cuda", "memcheck cuda", "synccheck cuda", "initcheck cuda"} <= set(names)


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
    assert list(result["median"]) == ["ours", "timm", "slicing", "tome", "slicing, fused linear"]
    assert result["per_second"]["ours"] > 0
    assert result["ceiling_share"] > 0
    overhead = result["parts"]["tome overhead"]
    assert overhead["of"] == "tome"
    assert overhead["median"] > 0
    assert overhead["share"] > 0


def test_run_times_live_edges() -> None:
    case = models.live_case("vit_tiny_patch16_224", 1, CPU, img_size=64, depth=1, embed_dim=32, num_heads=2)
    (result,) = runner.run_cases([case], CPU.device, CEILINGS, rounds=1, dtype="float32")
    assert list(result["median"]) == ["ours", "GraphProp", "tome"]
    assert result["propagation"] == "LiveGraph"


def test_training_times_the_step(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    arguments = ["--tiny", "--model", "vit_tiny_patch16_224", "--batch", "2", "--num-prop", "2", "--rounds", "1"]
    done = testing.CliRunner().invoke(training.main, [*arguments, "--json", str(path)])
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text())
    assert report["torch"] == torch.__version__
    (result,) = report["results"]
    assert list(result["median"]) == ["ours", "timm", "slicing"]
    assert set(result["ratio"]) == {"timm", "slicing"}
    assert result["per_second"]["ours"] > 0


def test_wrong_gradients_are_not_timed() -> None:
    class Wrong(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 if backends.forced() == "reference" else 1.001)

    images, labels = torch.ones(2, 3), torch.tensor([0, 1])
    training.check_gradients(torch.nn.Linear(3, 2), images, labels)
    with pytest.raises(AssertionError, match="the gradient of weight"):
        training.check_gradients(Wrong(3, 2), images, labels)


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
    origin = dict.fromkeys(("source", "device", "torch", "triton"), "x")
    monkeypatch.setattr(measure, "provenance", lambda device: origin)
    context = gpu.Context(False, tmp_path)

    def statuses(budget: float) -> dict[str, str]:
        found = gpu.run_step("tests", context, budget)["pieces"]
        assert json.loads((tmp_path / "tests.json").read_text())["pieces"] == found
        return {name: piece["status"] for name, piece in found.items()}

    assert statuses(0) == dict.fromkeys(outcomes, "pending")
    assert statuses(60) == {"good": "passed", "breaks": "failed", "lacks": "absent"}
    outcomes["good"] = breaks  # done before with these sources, so not run again
    assert statuses(60)["good"] == "passed"
    origin["source"] = "y"
    assert statuses(60)["good"] == "failed"


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
    monkeypatch.setattr("shutil.which", lambda *_, **__: "compute-sanitizer")
    monkeypatch.setattr(gpu, "_run", lambda *_, **__: (status, output))
    assert gpu._sanitize(gpu.Context(False, Path()), "memcheck", 1)["status"] == verdict


def test_time_that_was_up_is_no_failure_before_the_last_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: "compute-sanitizer")
    monkeypatch.setattr(gpu, "_run", lambda *_, **__: (None, "so far"))
    context = gpu.Context(False, Path(), budget=100)
    for piece in (gpu._sanitize(context, "memcheck", 20), gpu._smoke(context, 20), gpu._tests(context, "x.py", 20)):
        assert piece["status"] == "pending"
    # It had the whole step to itself.
    assert gpu._sanitize(context, "memcheck", 99)["status"] == "failed"


def test_results_say_where_they_come_from() -> None:
    found = measure.provenance()
    assert {"date", "commit", "source", "device", "torch", "triton", "python"} <= set(found)
    assert found["source"] == measure.source_digest()


def gpu_report(step: str, pieces: dict[str, Any], **more: object) -> dict[str, Any]:
    origin = {"device": "NVIDIA H200", "driver": "580.1", "cuda": "13.0", "torch": "2.11.0", "triton": "3.6.0"}
    return {**origin, "commit": "abc1234", "capability": [9, 0], "step": step, "pieces": pieces, **more}


def timed(case: str, shape: str, ratio: dict[str, float], **more: object) -> dict[str, Any]:
    median = {"ours": 2e-5, **{name: 2e-5 / value for name, value in ratio.items()}}
    return {"case": case, "shape": shape, "dtype": "bfloat16", "median": median, "ratio": ratio, **more}


def test_readme_tables_come_from_the_results(tmp_path: Path) -> None:
    about = {"model": "deit_small_patch16_224", "batch": 128, "num_prop": 8}
    ratio = {"timm": 0.5, "slicing": 1.0, "tome": 0.8, "cuda": 1.25}
    model = timed("deit", "B128 P8", ratio, per_second={"ours": 43210.0}, **about)
    wrong = {"case": "graph", "shape": "B2", "dtype": "bfloat16", "error": "differs"}
    live = timed("deit LiveGraph", "B128 P8", {"GraphProp": 1.25, "tome": 0.5}, propagation="LiveGraph", **about)
    wrong_live = {**about, "dtype": "bfloat16", "propagation": "LiveGraph", "num_prop": 14, "error": "differs"}
    op = timed("attention", "B128 N197", {"sdpa": 0.8}, ceiling_share=0.61)
    pieces = {
        "deit": {"status": "passed", "results": [model]},
        "deit LiveGraph": {"status": "failed", "results": [live, wrong_live]},
    }
    reports = {
        "nvidia-h200/models.json": gpu_report("models", pieces),
        "nvidia-h200/ops.json": gpu_report("ops", {"attention": {"status": "failed", "results": [op, wrong]}}),
        "nvidia-h200/tests.json": gpu_report(
            "tests", {"test_select.py": {"status": "passed", "tests": 9, "skipped": 2, "failures": 0, "errors": 0}}
        ),
        "nvidia-h200/sanitize.json": gpu_report("sanitize", {"racecheck": {"status": "refused"}}),
        "dry/ops.json": gpu_report("ops", {}, dry_run=True),
        "cpu/ops.json": {"device": "x86_64", "results": [op]},
    }
    for name, report in reports.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(report))
    found = readme.load(tmp_path)
    assert set(found) == {"nvidia-h200"}
    text = readme.render(found)
    assert "**NVIDIA H200**, driver 580.1, CUDA 13.0, torch 2.11.0, Triton 3.6.0; commit abc1234" in text
    assert "| deit_small_patch16_224 | 128 | 8 | bfloat16 | 43,210 | 2.00 | 1.00 | 1.25 | 0.80 |" in text
    assert "| deit_small_patch16_224 | 128 | bfloat16 | 8 | 2.00 | 0.80 |" in text
    assert "| deit_small_patch16_224 | 128 | bfloat16 | 14 | wrong result |  |" in text
    assert "| attention | B128 N197 | bfloat16 | 20.0 | 1.25 | 61% |" in text
    assert "| graph | B2 | bfloat16 | wrong result |" in text
    assert "tests: 7 ran, 0 failed" in text
    assert "racecheck refused" in text
    assert "ops, not passed: attention failed" in text
    assert readme.render(readme.load(tmp_path / "cpu")) == "Not yet measured on a GPU."


def test_readme_is_what_the_results_say() -> None:
    text = (ROOT / "README.md").read_text()
    assert readme.generated(text, ROOT / "benchmarks" / "results") == text
    assert readme.main(["--check"]) == 0
    with pytest.raises(ValueError, match="each once"):
        readme.replaced("no comments", "gpu", "")


def cpu_pieces() -> dict[str, Any]:
    attention = timed("attention", "B16 H6 N197 d64", {"sdpa": 0.8, "sdpa+bias": 0.7, "definition": 0.1})
    ratio = {"timm": 0.75, "slicing": 1.05, "slicing, fused linear": 1.1, "tome": 0.9}
    model = [timed("m", f"B8 P{p}", ratio, model="m", batch=8, num_prop=p) for p in (8, 1)]
    about = {"model": "m", "batch": 8, "num_prop": 8, "propagation": "LiveGraph"}
    live = timed("m LiveGraph", "B8 P8", {"GraphProp": 1.03, "tome": 0.8}, **about)
    wrong = {"case": "attention", "shape": "B4 H12 N785 d64", "dtype": "bfloat16", "error": "out differs"}
    return {
        "attention": {"results": [attention, wrong]},
        "m": {"results": model},
        "live": {"results": [live]},
        "memory": {"bytes": 8_000_000},
    }


def test_lines_are_held_or_missed() -> None:
    found = {line.what: line for line in lines.lines(cpu_pieces())}
    verdicts = {what: line.verdict for what, line in found.items() if line.line is not None}
    shape = "attention B16 H6 N197 d64 bfloat16"
    assert verdicts == {
        f"{shape}: time / SDPA": "holds",
        f"{shape}: times as fast as the definition": "holds",
        "attention B4 H12 N785 d64 bfloat16: out differs": "missed",
        "m b8 P8 bfloat16: × free slicing": "missed",
        "m b8 P8 bfloat16: × ToMe": "holds",
        "m b8 P1 bfloat16: × free slicing": "missed",
        "m LiveGraph b8 P8 bfloat16: time / GraphProp": "missed",
        "m LiveGraph b8 P8 bfloat16: × ToMe": "holds",
        "attention B1 H12 N4096 float32: MB above inputs and outputs": "holds",
    }
    assert lines.Line("", 0.75, 0.9, 0.75, at_most=True).verdict == "goal"
    assert lines.Line("", 0.96, 0.97).verdict == "missed"


def test_readme_has_the_lines(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    report = {"device": "CPU", "threads": 2, "torch": "2.11.0", "commit": "abc", "pieces": cpu_pieces()}
    (tmp_path / "cpu" / "lines.json").write_text(json.dumps(report))
    text = readme.render_cpu(tmp_path)
    assert "**CPU**, 2 threads, torch 2.11.0; commit abc" in text
    assert "| m | 8 | bfloat16 | 1 / 8 | 1.33 / 1.33 | 0.95 / 0.95 | 0.91 / 0.91 | 1.11 / 1.11 |" in text
    assert "| m | 8 | bfloat16 | 8 | 1.25 | 0.97 |" in text
    assert "| B16 H6 N197 d64 | bfloat16 | 0.02 | 1.25 | 1.43 | 10.00 | – |" in text
    assert readme.render_cpu(tmp_path / "cpu") == "Not yet measured."


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is reset through Linux's /proc")
def test_attention_of_many_tokens_needs_little_memory() -> None:
    pytest.importorskip("gtp_kernels._C", reason="the native module was not built")
    assert 1e6 < lines._memory(None)["bytes"] < 64e6


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("triton")
    from gtp_kernels.triton import configs

    return configs


def test_an_override_leaves_nothing_behind(configs: Any) -> None:
    def ask(tokens: int = 17, dtype: torch.dtype = torch.float32) -> dict[str, int]:
        return dict(configs.lookup("attention", torch.device("cpu"), dtype, tokens=tokens, size=16))

    shipped, other = ask(), {"rows": 99}
    with configs.override("attention", other, torch.float32, tokens=17) as asked:
        assert ask() == other
        assert ask(18) == shipped
        assert ask(17, torch.float16) != other
        with configs.override() as inner:
            assert ask() == other
        with configs.override("attention", shipped):
            assert ask() == shipped
        with configs.override("rank", other):
            assert ask() == other
    assert ask() == shipped
    assert [(one.choice, one.dimensions["tokens"], dict(one.tile)) for one in inner] == [("attention", 17, shipped)]
    assert len(asked) == 6
    with pytest.raises(ValueError, match="a choice together with a tile"), configs.override("attention"):
        pass


def test_the_search_finds_the_fastest_that_is_right() -> None:
    tried: list[tune.Tile] = []

    def evaluate(tiles: list[tune.Tile]) -> list[tune.Verdict]:
        tried.extend(tiles)

        # Best at 64 rows and 8 warps; 128 rows do not fit; 2 stages are slow for one of the problems.
        def verdict(tile: tune.Tile) -> tune.Verdict:
            if tile["rows"] == 128:
                return "too large"
            a = abs(tile["rows"] - 64) / 100 + abs(tile["num_warps"] - 8) / 10 + 0.4
            return {"a": a, "b": 2.5 if tile["num_stages"] == 2 else 0.5}

        return [verdict(tile) for tile in tiles]

    shipped = {"rows": 16, "num_warps": 4, "num_stages": 1}
    found = tune.search("attention", shipped, [{"rows": 32, "num_warps": 4, "num_stages": 1}, {"other": 1}], evaluate)
    best = min(found, key=lambda pair: tune.score(pair[1]))
    assert best[0]["rows"] == 64
    assert best[0]["num_warps"] == 8
    assert best[0]["num_stages"] != 2
    assert len({json.dumps(tile, sort_keys=True) for tile in tried}) == len(tried)
    assert any(verdict == "too large" for _, verdict in found)
    assert len(tune.search("attention", shipped, [], evaluate, limit=2)) == 2
    assert tune.score({"a": 0.5, "b": 1.2}) == float("inf")  # slower on one
    assert tune.score("too large") == float("inf")
    assert tune.score({}) == 1


class FakeBench:
    """Stands in for ``tune.Bench``: tiles by the ratios that they get, first and when timed again."""

    def __init__(self, ratios: dict[int, tuple[float, float]], spilling: tuple[int, ...] = ()) -> None:
        self.ratios, self.spilling, self.rounds, self.calls = ratios, spilling, 3, {"problem": None}
        self.device = torch.device("cpu")

    def evaluate(self, tiles: list[tune.Tile], rounds: int = 0) -> list[tune.Verdict]:
        return [{"problem": self.ratios[tile["num_warps"]][rounds > 0]} for tile in tiles]

    def spills(self, tile: tune.Tile) -> str | None:
        return "spills: 8" if tile["num_warps"] in self.spilling else None


@pytest.mark.parametrize(
    ("ratios", "spilling", "winner"),
    [
        ({1: (0.5, 0.5), 2: (0.7, 0.7), 8: (0.9, 0.9), 16: (1.5, 1.5)}, (), 1),
        ({1: (0.5, 0.5), 2: (0.7, 0.7), 8: (0.9, 0.9), 16: (1.5, 1.5)}, (1,), 2),
        ({1: (0.5, 1.2), 2: (0.7, 0.7), 8: (0.9, 0.9), 16: (1.5, 1.5)}, (), 2),  # it was noise
        ({1: (0.98, 0.9), 2: (1, 1), 8: (1, 1), 16: (1, 1)}, (), 4),  # too little to change anything
    ],
)
def test_only_what_is_clearly_faster_ships(
    ratios: dict[int, tuple[float, float]], spilling: tuple[int, ...], winner: int, configs: Any
) -> None:
    job, shipped = tune.Job("norm", "float32", ()), {"num_warps": 4}
    bench: Any = FakeBench(ratios, spilling)
    found = tune.tune(job, shipped, bench, crashed=[{"num_warps": 16}])
    assert found["tile"] == {"num_warps": winner}
    assert {"tile": {"num_warps": 16}, "why": "the process ended while it ran"} in found["tried"]
    if winner == 2:
        (one,) = (entry for entry in found["tried"] if entry["tile"] == {"num_warps": 1})
        assert "why" in one


def job(tokens: int, warps: int, *, limit: int | None = None, dtype: str = "bfloat16") -> dict[str, Any]:
    return {
        "choice": "rank", "dtype": dtype, "dimensions": {"tokens": tokens}, "shipped": {"num_warps": 4},
        "limits": {} if limit is None else {"tokens": limit}, "tile": {"num_warps": warps},
    }  # fmt: skip


def test_every_class_is_met_by_its_own_entry(configs: Any, tmp_path: Path) -> None:
    jobs = [job(785, 8), job(109, 4, limit=256), job(197, 2, limit=256), job(197, 4, dtype="float32")]
    report = {"arch": "sm_90", "jobs": dict(enumerate(jobs))}
    (tmp_path / "sm_90.json").write_text(
        json.dumps({"rank": [{"dtypes": ["bfloat16"], "max_tokens": 785, "tile": {"num_warps": 1}}], "emit": []})
    )
    path = tune.write({"pieces": {"tune": {"found": report}}}, tmp_path)
    assert path == tmp_path / "sm_90.json"
    content = json.loads(path.read_text())
    assert content == {
        "rank": [
            {"dtypes": ["bfloat16"], "max_tokens": 109, "tile": {"num_warps": 4}},
            {"dtypes": ["bfloat16"], "max_tokens": 256, "tile": {"num_warps": 2}},
            {"dtypes": ["bfloat16"], "max_tokens": 785, "tile": {"num_warps": 8}},
        ],
        "emit": [],
    }

    def first(tokens: int) -> int:
        known = (entry for entry in content["rank"] if configs.matches(entry, torch.bfloat16, {"tokens": tokens}))
        return next(known)["tile"]["num_warps"]

    assert [first(tokens) for tokens in (61, 109, 197, 257, 785)] == [4, 4, 2, 8, 8]
    assert tune.write({"arch": "sm_90", "jobs": {"": job(197, 4)}}, tmp_path) is None
    for refused in ({"arch": "interpreter", "jobs": {}}, {**report, "tiny": True}, {}):
        with pytest.raises(ValueError, match="not the report of a GPU"):
            tune.write(refused, tmp_path)


def test_candidates_must_give_the_same(configs: Any) -> None:
    x, i = torch.randn(100, generator=torch.Generator().manual_seed(0)), torch.arange(100)
    problem = tune.Problem("p", lambda: lambda: (), 1e-3)
    assert tune.difference((x, i), (x * (1 + 1e-5), i), problem) is None
    assert "relative error" in str(tune.difference((x, i), (x * 1.01, i), problem))
    assert "relative error" in str(tune.difference((x * float("nan"), i), (x, i), problem))
    assert "places" in str(tune.difference((x, i), (x, i.roll(1)), problem))
    assert "outputs" in str(tune.difference((x,), (x, i), problem))
    assert "int64" in str(tune.difference((i,), (x,), problem))
    graph = tune.Problem("g", lambda: lambda: (), 1e-3, flips=0.02)
    other = i.clone()
    other[3] = 0
    assert tune.difference((other,), (i,), graph) is None
    assert tune.difference((i.roll(1),), (i,), graph) is not None
    # An edge more in a row shifts every later one; the rows are compared.
    indptr, indices = torch.tensor([[0, 1, 3]], dtype=torch.int32), torch.tensor([[1, 0, 1, 0]], dtype=torch.int32)
    edges, values = tune._adjacency((indptr, indices, torch.tensor([[1.0, 2.0, 3.0, 0.0]])))
    assert edges.tolist() == [[False, True, True, True]]
    assert values.tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_every_key_of_a_tile_can_be_varied(configs: Any) -> None:
    for choice, several in configs.load("default").items():
        for entry in several:
            for key, value in entry["tile"].items():
                values = tune.values_of(choice, key, value)
                assert value in values
                # Twice a flag is no size of a block.
                known = key in tune.VALUES or f"{choice}.{key}" in tune.VALUES
                assert known or value != 1, (choice, key)


@pytest.mark.slow
def test_the_tuner_reaches_every_choice_and_goes_on(configs: Any, tmp_path: Path) -> None:
    report = tmp_path / "tune.json"
    before = {path: path.read_bytes() for path in configs.FOLDER.glob("*.json")}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    command = [sys.executable, "-m", "benchmarks.tune", "--tiny", "--write", "--json", str(report)]

    def start(*more: str) -> dict[str, Any]:
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return {"output": done.stdout, **json.loads(report.read_text())}

    found = start()
    assert {one["choice"] for one in found["jobs"].values()} == set(configs.load("default"))
    assert all(len(one["tried"]) <= 1 for one in found["jobs"].values())
    timed = [one for job in found["jobs"].values() for one in job["tried"] if "ratios" in one]
    assert len(timed) > len(found["jobs"]) / 2
    assert found["trying"] is None
    key = next(key for key, one in found["jobs"].items() if one["choice"] == "importance")
    crashed = found["jobs"].pop(key)["tried"][0]["tile"]
    report.write_text(json.dumps({**found, "trying": {"job": key, "tile": crashed}}))
    again = start("--choice", "importance")
    assert again["output"].startswith(key)
    assert again["output"].count("\n") == 1
    assert again["jobs"][key]["tried"] == [{"tile": crashed, "why": "the process ended while it ran"}]
    assert {path: path.read_bytes() for path in configs.FOLDER.glob("*.json")} == before


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the loop is of x86-64 instructions")
def test_peak_counts_what_it_runs(tmp_path: Path) -> None:
    library = peak.compiled(tmp_path)
    out = (ctypes.c_float * 64)()
    library.run(ctypes.c_long(3), out)
    # Three multiply-adds from 5: x · 1.0001 + 1e-6.
    assert out[5] == pytest.approx(((5 * 1.0001 + 1e-6) * 1.0001 + 1e-6) * 1.0001 + 1e-6, rel=1e-6)
    assert library.width() in (12 * 8, 12 * 16)
    path = tmp_path / "peak.json"
    done = testing.CliRunner().invoke(
        peak.main, ["--threads", "1", "--rounds", "3", "--count", "100000", "--json", str(path)]
    )
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text())
    assert 0 < report["gflops"]["median"] <= report["gflops"]["best"]
