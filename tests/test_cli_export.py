"""`gtp-vit export`, AOTInductor packages, the C++ program that runs them, and files that are not what they should."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gtp_kernels
import gtp_vit
from gtp_kernels import native
from gtp_vit import export as exporting
from gtp_vit.export import ExportError, Parity, errors_of, export, load, load_aoti, load_onnx

timm = pytest.importorskip("timm")
testing = pytest.importorskip("click.testing")
ROOT = Path(__file__).resolve().parents[1]
needs_native = pytest.mark.skipif(native.missing is not None, reason="the native library is not there")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
TINY = ("export", "vit_tiny_patch16_224", "--img-size", "32", "--num-prop", "0", "--num-neighbours", "1")


def tiny(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=24, num_heads=2, num_classes=7, **options
    ).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.25)
    return model


def patched(**options: Any) -> nn.Module:
    return gtp_vit.patch(tiny(), **{"num_prop": 3, "num_neighbours": 3, **options})


def images(count: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def run(*arguments: object) -> testing.Result:
    from gtp_vit.cli.app import cli

    return testing.CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="gtp-vit")


# Parity


def test_errors_are_relative_to_the_largest_logit_of_each_image() -> None:
    expected = torch.tensor([[1.0, -4.0], [0.5, 0.1], [0.0, 0.0]])
    actual = torch.tensor([[1.0, -3.0], [0.5, 0.1], [0.0, 0.0]])
    assert errors_of(actual, expected) == pytest.approx((0.25, 0.0, 0.0))
    assert errors_of(torch.tensor([[float("nan"), 1.0]]), torch.tensor([[1.0, 1.0]])) == (float("inf"),)
    with pytest.raises(ExportError, match=r"gives \(1, 2\), the model \(1, 3\)"):
        errors_of(torch.zeros(1, 2), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("errors", "agrees"),
    [
        ((1e-6,) * 4, True),
        ((1e-6, 1e-6, 1e-6, 1e-2), True),  # a quarter
        ((1e-6, 1e-6, 1e-2, 1e-2), False),
        ((1e-6, 1e-6, 1e-2), False),  # a third
        ((2e-4,), False),
        ((float("inf"),) * 3, False),
        ((float("nan"),), False),
    ],
)
def test_a_quarter_of_the_images_may_be_beyond(errors: tuple[float, ...], agrees: bool) -> None:
    assert Parity(errors, 1e-4).agrees is agrees


# What is refused before anything is exported


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(kind="tflite"), "kind must be one of aoti, onnx; got 'tflite'"),
        (dict(path="model.onnx"), "path must end with .pt2 for aoti; got 'model.onnx'"),
        (dict(path="missing/model.pt2"), "missing does not exist"),
        (dict(images=torch.zeros(3, 64, 64)), r"images must be a tensor \[k, 3, H, W\] with k ≥ 1; got \(3, 64, 64\)"),
        (dict(images=torch.zeros(0, 3, 64, 64)), "k ≥ 1"),
        (dict(images=torch.zeros(2, 3, 64, 64).double()), "images must have the dtype of the model, torch.float32"),
        (dict(images=torch.zeros(2, 3, 64, 64, device="meta")), "images must be on the device of the model, cpu"),
        (dict(batch=3), "batch must be None or a number of which 4 images make whole batches; got 3"),
        (dict(batch=0), "batch must be"),
        (dict(batch=True), "batch must be"),
    ],
)
def test_arguments_are_named(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    given = {"path": "model.pt2", "images": images(), **change}
    path, x = tmp_path / given.pop("path"), given.pop("images")
    with pytest.raises(ValueError, match=match):
        export(tiny(), path, x, **given)
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_exported(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match=r"model must be in eval mode: call model.eval\(\) first"):
        export(tiny().train(), path, images(), kind="onnx")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got function"):
        export(lambda x: x, path, images(), kind="onnx")  # type: ignore[arg-type]  # the point
    with pytest.raises(ValueError, match="selection must not be 'Random' at export"):
        export(patched(selection="Random"), path, images(), kind="onnx")
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match=f"must be one of float32, float16 for onnx; cls_token is {dtype}"):
            export(patched().to(dtype), path, images().to(dtype), kind="onnx")

    with pytest.raises(
        ValueError, match=r"must be one of float32, bfloat16, .* for aoti; cls_token is torch.float8_e4m3"
    ):
        export(patched().to(torch.float8_e4m3fn), path.with_suffix(".pt2"), images())

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    if native.missing is None:
        with pytest.raises(TypeError, match="model must return one tensor; got tuple"):
            export(Pair().eval(), path, images(), kind="onnx")

        class Branches(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

        with pytest.raises(ExportError, match=r"torch.export refuses Branches: .*"):
            export(Branches().eval(), path, images(), kind="onnx")
    with gtp_kernels.use_backend("reference"), pytest.raises(ValueError, match="must not be forced to 'reference'"):
        export(patched(), path.with_suffix(".pt2"), images())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "suffix"), exporting.SUFFIXES.items())
def test_nothing_is_exported_without_the_native_library(
    kind: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "missing", "the library was not built; build it")
    with pytest.raises(ExportError, match="the operators of the native library, and the library was not built; build"):
        export(patched(), tmp_path / f"model{suffix}", images(), kind=kind)
    assert list(tmp_path.iterdir()) == []


@needs_native
def test_a_forced_backend_that_is_absent_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GTP_KERNELS_BACKEND", "cuda")
    result = run(*TINY, "--num-prop", "1", "--img-size", "64", "-o", tmp_path / "model.pt2")
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Error: the forced backend 'cuda' cannot run" in result.output
    assert all(f"  {name}: " in result.output for name in gtp_kernels.backends.NAMES)
    assert list(tmp_path.iterdir()) == []


def test_live_edges_are_no_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before the model runs, also where the model around the patched one is exported."""
    match = r"propagation must be one of None, Mean, GraphProp for onnx; got 'LiveGraph', .* Export it as aoti"
    model = patched(propagation="LiveGraph", num_prop=(0, 3))
    monkeypatch.setattr(exporting, "_program", lambda *given: pytest.fail("the export began"))
    model.register_forward_pre_hook(lambda *given: pytest.fail("the model ran"))
    for given in (model, nn.Sequential(model).eval()):
        with pytest.raises(ValueError, match=match):
            export(given, tmp_path / "model.onnx", images(), kind="onnx")
    assert list(tmp_path.iterdir()) == []
    # Where no token leaves there is no walk.
    exporting._checked(patched(propagation="LiveGraph", num_prop=0), tmp_path / "model.onnx", images(), "onnx", None)


@needs_native
def test_an_export_that_disagrees_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x.flatten(1)[:, :5]

    path = tmp_path / "model.onnx"
    path.write_bytes(b"what was there before")
    monkeypatch.setattr(exporting, "_write_onnx", lambda program, written, metadata: written.write_bytes(b"file"))
    monkeypatch.setitem(exporting.LOADERS, "onnx", lambda written: lambda x: 2.01 * x.flatten(1)[:, :5])
    with pytest.raises(ExportError, match=r"model.onnx was not written: it disagrees with the model \(median 5.0e-03"):
        export(Twice().eval(), path, images(), kind="onnx")
    assert path.read_bytes() == b"what was there before"
    assert list(tmp_path.iterdir()) == [path]


# Files that are not what they should be


def _archive(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


WRITER = {"version": "9.9", "torch": "2.99.0", "images": ["batch", 3, 64, 64], "dtype": "float32"}


def test_packages_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with pytest.raises(FileNotFoundError, match=r"no such file: .*model.pt2"):
        load_aoti(path)
    for content in (b"", b"\x7fELF not a package", b"PK\x03\x04 cut short"):
        path.write_bytes(content)
        with pytest.raises(ExportError, match=f"not a package, which is a zip archive \\({len(content)} bytes"):
            load(path)
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, path)
    with pytest.raises(ExportError, match=r"an archive without an AOTInductor model .* export it again"):
        load_aoti(path)
    inside = "model/data/aotinductor/model/x.wrapper_metadata.json"
    code = {inside.replace("_metadata.json", ".so"): b"machine code"}
    with pytest.raises(ExportError, match="an AOTInductor package of another program"):
        load_aoti(_archive(path, {inside: b'{"AOTI_DEVICE_KEY": "cpu"}', **code}))
    with pytest.raises(ExportError, match="corrupt, its machine code is missing"):
        load_aoti(_archive(path, {inside: b'{"gtp_vit": "{}"}'}))
    with pytest.raises(ExportError, match="corrupt"):
        load_aoti(_archive(path, {inside: b'{"gtp_vit": ', **code}))
    for about in (
        "{}",
        "{",
        "[]",
        json.dumps(WRITER | {"images": 3}),
        json.dumps(WRITER | {"images": ["batch", 3, 64]}),
        json.dumps(WRITER | {"images": ["many", 3, 64, 64]}),
        json.dumps(WRITER | {"dtype": None}),
        5,
    ):
        with pytest.raises(ExportError, match=r"corrupt, its metadata 'gtp_vit' is .*; export it again"):
            load_aoti(_archive(path, {inside: json.dumps({"gtp_vit": about}).encode(), **code}))
    _archive(path, {inside: b'{"gtp_vit": "{}"}' * 40, **code})
    broken = bytearray(path.read_bytes())
    broken[100] ^= 0xFF
    path.write_bytes(broken)
    with pytest.raises(ExportError, match="corrupt, .*wrapper_metadata.json does not have its checksum"):
        load_aoti(path)


def test_a_package_without_its_model_or_for_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = "model/data/aotinductor/model/x.wrapper_metadata.json"
    about = {"gtp_vit": json.dumps(WRITER), "AOTI_DEVICE_KEY": "cpu", "AOTI_CPU_ISA": "AVX512 AMX"}
    code = {inside.replace("_metadata.json", ".so"): b"no machine code"}
    path = _archive(tmp_path / "model.pt2", {inside: json.dumps(about).encode(), **code})
    monkeypatch.setattr(native, "missing", "the library was not built; build it")
    with pytest.raises(ExportError, match=r"its operators are not there: the library was not built; build it"):
        load_aoti(path)
    monkeypatch.setattr(native, "missing", None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(ExportError, match="compiled for AVX512 AMX, and this machine has AVX2: export it again on a"):
        load_aoti(path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with pytest.raises(
        ExportError, match=r"not load it \(written with torch 2.99.0, gtp-kernels 9.9\): .*; export it again with these"
    ):
        load_aoti(path)


def test_onnx_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    with pytest.raises(FileNotFoundError, match=r"no such file: .*model.onnx"):
        load_onnx(path)
    for content in (b"", b"not a model", b"\x08\x0a\x12"):
        path.write_bytes(content)
        with pytest.raises(
            ExportError, match=rf"does not read it as an ONNX model \({len(content)} bytes.*write it again"
        ):
            load(path)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value("x", 1, [1])], [value("y", 1, [1])]
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, producer_name="elsewhere", opset_imports=opset, ir_version=10)
    onnx.save(model, str(path))
    with pytest.raises(ExportError, match=r"another kind \(inputs x; producer elsewhere\); needed is one that gtp-vit"):
        load_onnx(path)
    model.graph.input[0].name = model.graph.node[0].input[0] = "images"
    onnx.save(model, str(path))
    with pytest.raises(ExportError, match=r"another kind \(inputs images; producer elsewhere\)"):
        load_onnx(path)
    model.metadata_props.add(key="gtp_vit", value='{"images": ["batch", 3')
    onnx.save(model, str(path))
    with pytest.raises(ExportError, match=r"corrupt, its metadata 'gtp_vit' is '\{\"images\": .*; export it again"):
        load_onnx(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ExportError, match="does not read it as an ONNX model"):
        load_onnx(path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'needs onnxruntime: pip install "gtp-kernels\[onnx\]"'):
        load_onnx(path)
    with pytest.raises(ValueError, match=r"path must end with .pt2 or .onnx; got 'model.bin'"):
        load(tmp_path / "model.bin")


def test_what_an_onnx_model_may_not_have() -> None:
    onnx = pytest.importorskip("onnx")
    from gtp_vit.onnx import refused

    def model(node: Any, domain: str = "") -> Any:
        return onnx.helper.make_model(
            onnx.helper.make_graph([node], "g", [], []), opset_imports=[onnx.helper.make_opsetid(domain, 18)]
        )

    make = onnx.helper.make_node
    assert refused(model(make("TopK", ["x", "k"], ["v", "i"]))) is None
    assert refused(model(make("ScatterElements", ["x", "i", "u"], ["y"]))) == "ScatterElements"
    assert refused(model(make("Gelu", ["x"], ["y"], domain="com.microsoft"))) == "com.microsoft::Gelu"
    assert refused(model(make("Relu", ["x"], ["y"]), "com.microsoft")) == "the domain 'com.microsoft'"
    inner = onnx.helper.make_graph([make("ScatterND", ["x", "i", "u"], ["y"])], "inner", [], [])
    assert refused(model(make("If", ["c"], ["y"], then_branch=inner, else_branch=inner))) == "ScatterND"


# The command


def test_the_command_is_listed_and_imported_on_use() -> None:
    script = (
        "import sys, gtp_vit.cli.app as a; assert 'export' in a.COMMANDS; print('gtp_vit.cli.export' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
    result = run("export", "--help")
    assert result.exit_code == 0
    for option in ("--format", "--num-prop", "--sparsity", "--semantics", "--report", "--unpatched"):
        assert option in result.output


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--batch", "many"), "'many' is neither dynamic nor a number from 1 on"),
        (("--batch", "0"), "'0' is neither"),
        (("--format", "onnx", "--device", "cuda"), "an ONNX file is written on the cpu; got 'cuda'"),
        (("--format", "onnx", "--dtype", "bfloat16"), "onnx takes float32, float16; got bfloat16"),
        (("--format", "onnx", "-o", "model.pt2"), "must end with .onnx for onnx; got 'model.pt2'"),
        (("-o", "missing/model.pt2"), "missing does not exist"),
        (("--report", "missing/report.json"), "missing does not exist"),
        (("--num-prop", "4"), "num_prop = 4 does not fit block 0"),
        (("--sparsity", "0"), "sparsity"),
        (("--weights", "nowhere.pth"), "no such file: nowhere.pth"),
        (
            ("--format", "onnx", "--propagation", "LiveGraph", "--num-prop", "1", "--img-size", "64"),
            "propagation must be one of None, Mean, GraphProp for onnx; got 'LiveGraph'",
        ),
    ],
)
def test_wrong_command_lines_are_one_message(
    arguments: tuple[str, ...], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*TINY, *arguments)
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit)
    assert match in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model_is_one_message() -> None:
    result = run("export", "vit_tiny_patch16_225")
    assert result.exit_code == 2
    assert "has no model 'vit_tiny_patch16_225'; close to it: vit_tiny_patch16_224" in " ".join(result.output.split())


@pytest.mark.slow
@needs_native
def test_the_command_writes_a_file_and_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from gtp_vit.cli import export as command

    monkeypatch.setattr(command, "load_model", lambda name, source, img_size: (tiny(), source))
    out, report = tmp_path / "tiny.onnx", tmp_path / "tiny.json"
    result = run(*TINY, "--num-prop", "3", "--format", "onnx", "-o", out, "--report", report, "--rounds", "2")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "The weights of vit_tiny_patch16_224 are random" in text
    assert (
        "random weights, any batch of 3 × 64 × 64, float32. Loaded and compared with PyTorch on 8 photographs" in text
    )
    about = json.loads(report.read_text())
    assert len(about["parity"]["errors"]) == 8
    assert about["parity"]["median"] <= about["parity"]["tolerance"]
    assert {(row["runtime"], row["model"], row["batch"]) for row in about["latency"]} == {
        (runtime, model, batch)
        for runtime in ("PyTorch", "onnx")
        for model in ("patched", "unpatched")
        for batch in (1, 8)
    }
    assert all(row["ms"] > 0 for row in about["latency"])
    assert load(out)(images(2)).shape == (2, 7)


# Packages


@pytest.fixture(scope="module", params=["GraphProp", "LiveGraph"])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    if native.missing is not None or shutil.which("g++") is None:
        pytest.skip("AOTInductor needs the native library and a C++ compiler")
    model = patched(propagation=request.param)
    path = tmp_path_factory.mktemp("package") / "tiny.pt2"
    assert export(model, path, images(8)).agrees
    return path, model


@pytest.mark.slow
def test_a_package_takes_any_batch_and_serves_several_threads(package: tuple[Path, nn.Module]) -> None:
    path, model = package
    run_package = load(path)
    batches = {count: images(count, seed=count) for count in (1, 2, 3, 9)}
    results: dict[int, Tensor] = {}

    def work(count: int) -> None:
        results[count] = run_package(batches[count])

    threads = [threading.Thread(target=work, args=(count,)) for count in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for count, x in batches.items():
        with torch.no_grad():
            errors = errors_of(results[count], model(x))
        assert Parity(errors, exporting.TOLERANCE).agrees, errors
    for wrong in (torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 128, 32), images().double(), torch.zeros(0, 3, 64, 64)):
        with pytest.raises(ValueError, match=r"images must be float32 \[batch, 3, 64, 64\] on cpu; got"):
            run_package(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["GraphProp"], indirect=True)
def test_the_check_of_a_package_sees_another_model(package: tuple[Path, nn.Module]) -> None:
    path, model = package
    other = copy.deepcopy(model)
    other.head.bias.data[0] += 0.5
    with torch.no_grad():
        assert not Parity(errors_of(load(path)(images(8)), other(images(8))), exporting.TOLERANCE).agrees


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/cpp, built."""
    cmake, ninja = (
        shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin")
        for name in ("cmake", "ninja")
    )
    if cmake is None or ninja is None or shutil.which("g++") is None:
        pytest.skip("building needs cmake, ninja and a C++ compiler")
    folder = tmp_path_factory.mktemp("example")
    torch_folder = Path(torch.__file__).parent
    configure = [cmake, "-S", ROOT / "examples/cpp", "-B", folder, "-G", "Ninja", f"-DTORCH_DIR={torch_folder}",
                 f"-DCMAKE_MAKE_PROGRAM={ninja}"]  # fmt: skip
    for command in (configure, [cmake, "--build", folder]):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "gtp_infer"


def infer(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_the_cpp_program_gives_the_same_logits(program: Path, package: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, model = package
    for count in (1, 5):
        x = images(count, seed=7)
        x.numpy().tofile(tmp_path / "images.f32")
        done = infer(program, path, native.LIBRARY, tmp_path / "images.f32", count, 64, 64, tmp_path / "logits.f32")
        assert done.returncode == 0, done.stderr
        assert f"[{count}, 7]" in done.stdout
        found = torch.from_numpy(np.fromfile(tmp_path / "logits.f32", dtype=np.float32)).reshape(count, 7)
        with torch.no_grad():
            errors = errors_of(found, model(x))
        assert Parity(errors, exporting.TOLERANCE).agrees, errors
        assert torch.equal(found, load(path)(x))
    linked = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    assert "libpython" not in linked
    assert "libtorch_python" not in linked


@pytest.mark.slow
@pytest.mark.parametrize("package", ["GraphProp"], indirect=True)
def test_the_cpp_program_says_what_is_wrong(program: Path, package: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, _ = package
    data, out = tmp_path / "images.f32", tmp_path / "logits.f32"
    images(2).numpy().tofile(data)
    library = native.LIBRARY
    wrong = tmp_path / "wrong.pt2"
    wrong.write_bytes(b"not a package")
    foreign = _archive(tmp_path / "foreign.pt2", {"a/data/x": b"1"})
    cases = [
        ((path, library, data, 2, 64, 64), 2, "usage: gtp_infer"),
        ((path, library, data, 3, 64, 64, out), 1, "needed 147456 bytes, found 98304"),
        ((path, library, data, "two", 64, 64, out), 1, "BATCH must be a number from 1 to 1048576; got two"),
        ((path, tmp_path / "lib.so", data, 2, 64, 64, out), 1, "libgtp_kernels does not load: "),
        ((wrong, library, data, 2, 64, 64, out), 1, "not a package, which is a zip archive"),
        ((tmp_path / "no.pt2", library, data, 2, 64, 64, out), 1, "no.pt2: cannot be opened"),
        ((foreign, library, data, 2, 64, 64, out), 1, "foreign.pt2: an archive without a compiled model"),
        ((path, library, tmp_path / "no.f32", 2, 64, 64, out), 1, "no.f32: cannot be opened"),
        ((path, library, data, 2, 32, 128, out), 1, "images [2, 3, 32, 128]: "),
        ((path, library, data, 2, 64, 64, tmp_path / "no" / "out"), 1, "cannot be written"),
    ]
    for arguments, code, message in cases:
        done = infer(program, *arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert message in done.stderr
        assert done.stderr.count("\n") < 8
    assert not out.exists()
