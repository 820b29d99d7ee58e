"""setup.py: where it looks for nvcc, and what it makes of one that does not work."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("setuptools")

ROOT = Path(__file__).resolve().parents[1]
WORKS = "#!/bin/sh\nexit 0\n"
BROKEN = "#!/bin/sh\necho 'ptxas fatal   : Unsupported .version 9.5' >&2\nexit 1\n"


def program(path: Path, text: str = WORKS) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, on a machine that has nothing but a shell, in a tree with one CUDA source."""
    spec = importlib.util.spec_from_file_location("setup_under_test", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "GTP_CUDA", "LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(module, "USUAL_CUDA", tmp_path / "usual")
    monkeypatch.setattr(module, "nvidia_packages", lambda: [tmp_path / "site" / "nvidia"])
    monkeypatch.setattr(module, "ROOT", tmp_path / "tree")
    (tmp_path / "tree" / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "tree" / "csrc" / "cuda" / "kernel.cu").touch()
    return module


def test_nvcc_is_looked_for_in_this_order(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.nvcc_candidates() == []
    pip = [program(tmp_path / "site" / "nvidia" / name / "bin" / "nvcc") for name in ("cu14", "cu13")]
    assert build.nvcc_candidates() == pip
    usual = program(tmp_path / "usual" / "bin" / "nvcc")
    assert build.nvcc_candidates() == [usual, *pip]
    on_path = program(tmp_path / "path" / "nvcc")
    assert build.nvcc_candidates() == [on_path, usual, *pip]
    for name in ("CUDA_PATH", "CUDA_HOME"):
        home = program(tmp_path / name / "bin" / "nvcc")
        monkeypatch.setenv(name, str(tmp_path / name))
        assert build.nvcc_candidates() == [home]
    monkeypatch.setenv("CUDACXX", "nvcc")
    assert build.nvcc_candidates() == [on_path]
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    assert build.nvcc_candidates() == ["/nowhere/nvcc"]
    assert build.find_nvcc() == (None, ("/nowhere/nvcc: not there",))


def test_an_nvcc_that_does_not_work_counts_as_none(
    build: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = program(tmp_path / "path" / "nvcc", BROKEN)
    assert build.cuda_compiler() is None
    said = " ".join(capsys.readouterr().err.split())
    assert "the CUDA kernels are NOT built" in said
    assert f"{broken}: does not work: ptxas fatal : Unsupported .version 9.5" in said
    build.find_nvcc.cache_clear()
    works = program(tmp_path / "usual" / "bin" / "nvcc")
    assert build.cuda_compiler() == works
    assert capsys.readouterr().err == ""


def test_what_is_not_a_program_counts_as_none(build: ModuleType, tmp_path: Path) -> None:
    path = program(tmp_path / "path" / "nvcc", "neither a script nor a binary")
    (found, (reason,)) = build.find_nvcc()
    assert found is None
    assert reason.startswith(f"{path}: does not run: ")


def test_none_is_told_only_where_it_is_asked_for(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.cuda_compiler() is None
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("GTP_CUDA", "1")
    assert build.cuda_compiler() is None
    assert "There is none; looked in CUDACXX, CUDA_HOME, the PATH" in capsys.readouterr().err


def test_without_cuda_sources_nothing_is_tried(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(tmp_path / "path" / "nvcc", BROKEN)
    monkeypatch.setenv("GTP_CUDA", "0")
    assert build.cuda_compiler() is None
    monkeypatch.delenv("GTP_CUDA")
    (tmp_path / "tree" / "csrc" / "cuda" / "kernel.cu").unlink()
    assert build.cuda_compiler() is None
    assert capsys.readouterr().err == ""


def test_libraries_that_are_not_in_lib64_are_named(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "site" / "nvidia" / "cu13"
    nvcc = program(
        root / "bin" / "nvcc", "#!/bin/sh\n[ -n \"$LIBRARY_PATH\" ] || { echo 'cannot find -lcudart' >&2; exit 1; }\n"
    )
    assert build.cuda_environment(nvcc) == {}
    assert build.nvcc_fault(nvcc) == "does not work: cannot find -lcudart"
    (root / "lib").mkdir()
    (root / "lib" / "libcudart_static.a").touch()
    assert build.cuda_environment(nvcc) == {"LIBRARY_PATH": str(root / "lib")}
    assert build.nvcc_fault(nvcc) is None
    monkeypatch.setenv("LIBRARY_PATH", "/mine")
    assert build.cuda_environment(nvcc) == {"LIBRARY_PATH": f"{root / 'lib'}:/mine"}
    (root / "lib64").mkdir()
    assert build.cuda_environment(nvcc) == {}
