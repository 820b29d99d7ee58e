"""The compile check of the CUDA C++ kernels: what it reads off ptxas, what it calls a failure, and what it keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("click")
from click.testing import CliRunner

from benchmarks import compile_check, compile_check_cuda, compile_lines
from benchmarks.compile_check_cuda import Kernel, Result

needs_nvdisasm = pytest.mark.skipif(
    compile_check_cuda.find_nvdisasm() is None, reason="nvdisasm, which the extra dev installs, is not there"
)
needs_names = pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt: names stay as in the object file")

# What nvcc 13.0 prints for sm_120, of three kernels, the last with a
# name made short; `helper` is not inlined.
LOG = """\
ptxas warning : Value of threads per SM for entry _ZN3gtp4cuda5spillEPf is out of range. .minnctapersm will be ignored
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3gtp4cuda5spillEPf' for 'sm_120'
ptxas info    : Function properties for _ZN3gtp4cuda5spillEPf
    496 bytes stack frame, 592 bytes spill stores, 596 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 496 bytes cumulative stack size
ptxas info    : Compile time = 30.731 ms
ptxas info    : Compiling entry function '_ZN3gtp4cuda3mmaILi8EEEvNS0_1PE' for 'sm_120'
ptxas info    : Function properties for _ZN3gtp4cuda3mmaILi8EEEvNS0_1PE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 1 barriers, 256 bytes smem, 368 bytes cmem[0]
ptxas info    : Compile time = 2.748 ms
ptxas info    : Compiling entry function '_ZN13_GLOBAL__N__b3twoILNS_1EE1ELi5EiEEvPf' for 'sm_120'
ptxas info    : Function properties for _ZN13_GLOBAL__N__b3twoILNS_1EE1ELi5EiEEvPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 31 registers, used 0 barriers
ptxas info    : Compile time = 5.406 ms
ptxas info    : Function properties for _Z6helperPfi
    256 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads
"""

SPILLS = """
__global__ void __launch_bounds__(1024) spills(float *p) {
  float x[128];
#pragma unroll
  for (int i = 0; i < 128; i++) x[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; i++) p[i * 1024 + threadIdx.x] = x[127 - i] * x[(i * 7) % 128];
}
"""


@pytest.fixture
def nvcc() -> str:
    """One that works."""
    found, tried = compile_check_cuda.find_nvcc()
    if found is None:
        pytest.skip("; ".join(["no nvcc", *tried]))
    return found


@needs_names
def test_the_report_of_ptxas_is_read() -> None:
    counts = {"_ZN3gtp4cuda3mmaILi8EEEvNS0_1PE": 8, "_ZN3gtp4cuda5spillEPf": 0}
    assert compile_check_cuda.kernels_of(LOG, counts) == (
        Kernel("spill", "", 64, 1188, 496, 0, 0),
        Kernel("mma", "<8>", 18, 0, 0, 256, 8),
        Kernel("two", "<(E)1, 5, int>", 31, 4, 256, 0, None),
    )
    assert compile_check_cuda.warnings_of(LOG) == (
        "ptxas warning : Value of threads per SM for entry spill is out of range. .minnctapersm will be ignored",
    )
    with pytest.raises(ValueError, match="no registers for mma"):
        compile_check_cuda.kernels_of("ptxas info    : Compiling entry function 'mma' for 'sm_90'\n")
    assert compile_check_cuda.kernels_of("ptxas info    : 0 bytes gmem\n") == ()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("void gtp::cuda::rows<gtp::cuda::BFloat16, 4>(gtp::Params)", ("rows", "<BFloat16, 4>")),
        ("void gtp::cuda::rows<(gtp::DType)2, Tile<1> >(gtp::Params)", ("rows", "<(DType)2, Tile<1> >")),
        ("gtp::cuda::plain(Rows<int>, float*)", ("plain", "")),
        ("_Z3foo", ("_Z3foo", "")),
    ],
)
def test_names_are_those_of_the_source(name: str, expected: tuple[str, str]) -> None:
    assert compile_check_cuda.split_name(name) == expected


def test_local_memory_warnings_and_errors_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    good, spills, stack = (Kernel("k", "<4>", 40, *memory, 0) for memory in ((0, 0), (8, 8), (0, 16)))
    assert Result("a.cu", "sm_80", (good,)).failures == []
    assert Result("a.cu", "sm_80", (good, spills)).failures == ["a.cu on sm_80: k<4>: spills: 8 bytes"]
    assert Result("a.cu", "sm_80", (stack,)).failures == ["a.cu on sm_80: k<4>: stack: 16 bytes"]
    assert Result("a.cu", "sm_80", (good,), ("ignored",)).failures == ["a.cu on sm_80: ignored"]
    assert Result("a.cu", "sm_80", error="no").failures == ["a.cu on sm_80: no"]
    monkeypatch.setitem(compile_check_cuda.MAY_SPILL, "k", "a reason")
    assert Result("a.cu", "sm_80", (spills, stack)).failures == []


@pytest.fixture
def fake(tmp_path: Path) -> tuple[str, Path]:
    """An nvcc that prints the report above, and the file in which it counts its calls."""
    (tmp_path / "log").write_text(LOG)
    calls = tmp_path / "calls"
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo fake && exit\necho x >>{calls}\ncat {tmp_path / "log"} >&2\n'
    )
    nvcc.chmod(0o755)
    return str(nvcc), calls


def test_results_are_kept_by_content(fake: tuple[str, Path], tmp_path: Path) -> None:
    nvcc, calls = fake
    source, header = tmp_path / "a.cu", tmp_path / "a.cuh"
    source.write_text('#include "a.cuh"\n#include <cstdio>\n')
    header.write_text("// one\n")

    def checked() -> list[bool]:
        results = compile_check_cuda.check([source], ["sm_80", "sm_90"], nvcc, jobs=1, cache=tmp_path / "cache")
        assert [(r.source, r.arch, len(r.kernels), len(r.warnings)) for r in results] == [
            ("a.cu", "sm_80", 3, 1), ("a.cu", "sm_90", 3, 1),
        ]  # fmt: skip
        return [r.cached for r in results]

    assert checked() == [False, False]
    assert checked() == [True, True]
    assert len(calls.read_text().split()) == 2
    header.write_text("// two\n")
    assert checked() == [False, False]
    header.write_text("// one\n")
    assert checked() == [True, True]
    Path(nvcc).write_text(Path(nvcc).read_text().replace("echo fake", "echo newer"))
    assert checked() == [False, False]
    for path in (tmp_path / "cache").iterdir():
        path.write_text('{"source": "a.cu"}')
    assert checked() == [False, False]


def test_a_kernel_that_spills_fails(nvcc: str, tmp_path: Path) -> None:
    good, bad, broken = (tmp_path / f"{name}.cu" for name in ("good", "bad", "broken"))
    good.write_text("__global__ void good(int *p) { *p = 1; }\n")
    bad.write_text(SPILLS)
    broken.write_text("__global__ void broken(int *p) { *p = x; }\n")
    cache = tmp_path / "cache"
    results = compile_check_cuda.check([good, bad, broken], ["sm_80"], nvcc, cache=cache)
    assert [len(result.kernels) for result in results] == [1, 1, 0]
    assert results[0].failures == []
    assert "spills: " in results[1].failures[0]
    assert 'identifier "x" is undefined' in results[2].failures[0]
    assert "x" in str(results[2].error)
    again = compile_check_cuda.check([good, bad, broken], ["sm_80"], nvcc, cache=cache)
    assert [result.cached for result in again] == [True, True, False]  # an error may be of the machine
    assert [result.failures for result in again] == [result.failures for result in results]


MULTIPLIES = """
#include "cuda/warp.cuh"
namespace gtp { namespace cuda {
GTP_GLOBAL(32, 1) multiplies(const uint32_t* a, float* o) {
  float c[4] = {0, 0, 0, 0};
  const uint32_t rows[4] = {a[threadIdx.x], a[1], a[2], a[3]};
  GTP_UNROLL
  for (int i = 0; i < 4; i++) multiply(c, rows, rows[i], rows[3], BFloat16{});
  o[threadIdx.x] = c[0];
}
} }
"""


@needs_nvdisasm
def test_tensor_core_instructions_are_counted(nvcc: str, tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text(MULTIPLIES)
    results = compile_check_cuda.check([tmp_path / "a.cu"], ["sm_80", "sm_90", "sm_120"], nvcc)
    assert [[kernel.tensor_core for kernel in result.kernels] for result in results] == [[4], [4], [4]]


@pytest.fixture
def only_cuda(fake: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The command sees one CUDA source and no Triton kernel; what it would compile with."""
    (tmp_path / "a.cu").touch()
    monkeypatch.setattr(compile_check, "capture", lambda target: [])
    monkeypatch.setattr(compile_check_cuda, "sources", lambda part: [tmp_path / "a.cu"])
    return fake[0]


def test_the_command_says_that_there_is_no_nvcc(only_cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check_cuda, "find_nvcc", lambda: (None, ("/usr/bin/nvcc: does not work: x",)))
    done = CliRunner().invoke(compile_check.main, ["--no-cache"])
    assert done.exit_code == 0
    expected = "CUDA C++ not compiled: there is no nvcc that works; /usr/bin/nvcc: does not work: x\n"
    assert done.output == expected


@needs_names
def test_the_command_fails_on_a_spill(only_cuda: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check_cuda, "find_nvcc", lambda: (only_cuda, ()))
    arguments = ["--no-cache", "--arch", "sm_90", "--arch", "gfx942", "--json", str(tmp_path / "report.json")]
    done = CliRunner().invoke(compile_check.main, arguments)
    assert done.exit_code == 1
    assert "a.cu on sm_90: spill: spills: 1188 bytes" in done.output
    assert "1 compilations, 0 of them known from before; 3 failures" in done.output
    (report,) = json.loads((tmp_path / "report.json").read_text())["cuda"]
    assert [kernel["name"] for kernel in report["kernels"]] == ["spill", "mma", "two"]


DISASSEMBLY = """\
\t.section\t.text._Z4rowsPf,"ax",@progbits
.text._Z4rowsPf:
\t//## File "/there/warp.cuh", line 7 inlined at "/there/rows.cuh", line 30
\t//## File "/there/rows.cuh", line 30 inlined at "/there/rows.cuh", line 90
\t//## File "/there/rows.cuh", line 90
        /*0000*/                   FADD R1, R2, R3 ;
        /*0010*/              @!P2 FADD R1, R2, R3 ;
\t//## File "/there/rows.cuh", line 80
        /*0020*/                   MUFU.EX2 R1, R2 ;
.L_x_1:
        /*0030*/             @UP0  ULDC UR4, c[0x0][0x210] ;
"""


def test_instructions_by_line() -> None:
    (code,) = compile_lines.kernels_of(DISASSEMBLY).values()
    first, second = compile_lines.lines_of(code)
    assert (first.lines, dict(first.instructions)) == ((80,), {"MUFU": 1, "ULDC": 1})
    assert (second.lines, dict(second.instructions)) == ((90, 30), {"FADD": 2})
    assert str(second.path) == "/there/rows.cuh"


@needs_nvdisasm
def test_instructions_of_a_kernel(nvcc: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_lines.main(["attention.cu", "attention_columns", "--least", "1"]) == 0
    assert "int block = 0; block < p.row_blocks" in capsys.readouterr().out
    assert compile_lines.main(["attention.cu", "no_kernel"]) == 2
    assert "attention_columns" in capsys.readouterr().err
