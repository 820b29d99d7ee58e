"""``python -m benchmarks.compile_lines attention_bfloat16.cu "attention_in_registers<BFloat16, 64, 24, 22>"``.

The instructions of one CUDA C++ kernel, by the line of the source that they come from, as a profile that needs no GPU:
the line in the kernel, and where that calls a function of the same file the innermost line there. What is in a loop
counts once, what is on no usual path counts too.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import compile_check_cuda
from benchmarks.compile_check_cuda import FLAGS, SOURCES
from benchmarks.compile_report import ROOT


@dataclass
class Line:
    """Instructions by name; the path of a file and the lines in it, the one in the kernel first."""

    path: Path | None
    lines: tuple[int, ...]
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def text(self) -> str:
        """What stands in the last of the lines."""
        if self.path is None or not self.path.is_file():
            return ""
        return self.path.read_text().splitlines()[self.lines[-1] - 1].strip()


def disassembly(source: Path, arch: str, nvcc: str, nvdisasm: str) -> str:
    """The machine code of a source, with the lines that it comes from.

    Raises:
        RuntimeError: it does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc, *FLAGS, "-lineinfo", f"-arch={arch}", "-cubin", "-I", str(ROOT / "csrc"), "-o", str(cubin)]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        done = subprocess.run([nvdisasm, "-gi", "-c", str(cubin)], capture_output=True, text=True, check=True)
    return done.stdout


def kernels_of(text: str) -> dict[str, str]:
    """The code of every kernel by its name."""
    _, *parts = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)
    names = ("".join(compile_check_cuda.split_name(name)) for name in compile_check_cuda.demangled(parts[::2]))
    return dict(zip(names, parts[1::2], strict=True))


def lines_of(code: str) -> list[Line]:
    """The lines of a kernel's code in the order of the source."""
    found: dict[tuple[Path | None, tuple[int, ...]], Line] = {}
    calls: list[tuple[Path, int]] = []
    begins = True
    for text in code.splitlines():
        if text.lstrip().startswith("//## File"):
            # A line and those that it is inlined at, from the innermost one on.
            calls = [] if begins else calls
            calls += [(Path(path), int(line)) for path, line in re.findall(r'## File "([^"]+)", line (\d+)', text)]
            begins = False
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", text):
            begins = True
            path = calls[-1][0] if calls else None
            own = [line for file, line in calls if file == path]
            key = (path, tuple(dict.fromkeys((own[-1], own[0]))) if own else ())
            found.setdefault(key, Line(*key)).instructions[match[1]] += 1
    return sorted(found.values(), key=lambda line: (str(line.path), line.lines))


def table_of(lines: list[Line], least: int) -> Table:
    """Those with at least so many instructions."""
    total = sum(line.instructions.total() for line in lines)
    table = Table("line", "instructions", "share", "source", "most of them", title=f"{total} instructions")
    for line in lines:
        count = line.instructions.total()
        if count >= least:
            where = f"{line.path.name if line.path else ''}:{' > '.join(map(str, line.lines))}"
            most = ", ".join(f"{name} {number}" for name, number in line.instructions.most_common(4))
            table.add_row(where, str(count), f"{count / total:.1%}", line.text[:60].replace("[", "\\["), most)
    return table


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_lines", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", help="a file of csrc/cuda")
    parser.add_argument("kernel", help="its name, or how that begins; with template arguments")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--least", type=int, default=20, help="instructions of a line that is shown (%(default)s)")
    options = parser.parse_args(arguments)
    nvcc, tried = compile_check_cuda.find_nvcc()
    nvdisasm = compile_check_cuda.find_nvdisasm()
    if nvcc is None or nvdisasm is None:
        print(f"nvcc and nvdisasm are needed; tried {', '.join(tried)}", file=sys.stderr)
        return 2
    try:
        kernels = kernels_of(disassembly(SOURCES / options.source, options.arch, nvcc, nvdisasm))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    chosen = [name for name in kernels if name.startswith(options.kernel)]
    if len(chosen) != 1:
        print(
            f"{len(chosen)} kernels begin with {options.kernel!r}; there are",
            *sorted(kernels),
            file=sys.stderr,
            sep="\n  ",
        )
        return 2
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"{chosen[0]}, {options.arch}", table_of(lines_of(kernels[chosen[0]]), options.least), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
