"""The check of what a wheel's native files need; `make matrix` runs the wheel itself."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from gtp_kernels import native

FOLDER = Path(__file__).resolve().parent / "wheels"

pytestmark = pytest.mark.skipif(
    native.missing is not None or shutil.which("readelf") is None, reason="no native library, or no readelf"
)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("check", FOLDER / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def libraries() -> list[Path]:
    extension = native.extension()
    assert extension is not None
    assert extension.__file__ is not None
    return [native.LIBRARY, Path(extension.__file__)]


def test_the_native_files_name_nothing_unexpected(check: ModuleType) -> None:
    for path in libraries():
        names = check.needed(path)
        assert "libc.so.6" in names
        assert names <= check.NEEDED
        assert not any("cuda" in name or "python" in name for name in names)
    assert check.needed(native.LIBRARY) >= {"libtorch_cpu.so"}


def test_faults_are_found(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check.POLICIES, "old", {"GLIBC": "2.2", "GLIBCXX": "3.4", "CXXABI": "1.2"})
    monkeypatch.setattr(check, "NEEDED", check.NEEDED - {"libtorch_cpu.so"})
    monkeypatch.setitem(check.RUN_PATHS, "libgtp_kernels", "/usr/lib")
    found = check.faults(native.LIBRARY, "old")
    assert "libgtp_kernels.so needs libtorch_cpu.so, which is not on the list" in found
    assert any("needs GLIBC_" in fault and "manylinux_old has 2.2" in fault for fault in found)
    assert any("needs GLIBCXX_" in fault for fault in found)
    assert "libgtp_kernels.so looks for libraries in ['$ORIGIN/../torch/lib']" in found


def test_versions_are_compared_by_number(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Version needs section '.gnu.version_r'\n  Name: GLIBC_2.9\n  Name: GLIBC_2.34\n  Name: GLIBC_2.4\n"
    monkeypatch.setattr(check, "readelf", lambda option, path: text)
    assert check.versions(Path("any")) == {"GLIBC": "2.34"}


def test_a_wheel_is_complete_and_for_its_python(
    check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tag = sys.implementation.cache_tag.replace("cpython-", "cp")
    good = tmp_path / f"gtp_kernels-1.0-{tag}-{tag}-linux_x86_64.whl"
    with zipfile.ZipFile(good, "w") as archive:
        for path in libraries():
            archive.write(path, f"gtp_kernels/{path.name}")
    faults = [fault for fault in check.check(good, "2_34") if "manylinux_" not in fault]
    assert faults == []
    assert "libgtp_kernels.so: " in capsys.readouterr().out
    other = tmp_path / "gtp_kernels-1.0-cp39-cp39-linux_x86_64.whl"
    shutil.copy(good, other)
    assert any("is for cp39, and has gtp_kernels/_C." in fault for fault in check.check(other, "2_34"))
    empty = tmp_path / "gtp_kernels-1.0-py3-none-any.whl"
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("gtp_kernels/__init__.py", "")
    assert check.main([str(empty)]) == 1
    assert "must hold libgtp_kernels.so and one _C" in capsys.readouterr().err
