"""``python -m benchmarks.peak``: the most float32 products and sums a second that this processor's registers allow.

Compiles a loop of independent fused multiply-adds with the C compiler at hand (AVX-512, or AVX2), runs it on each of
``--threads`` threads at once, and prints GFLOP/s, the best and the median of the rounds. No kernel can do more: what a
number of products costs at this rate is the floor that docs/performance.md compares with.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import click

from benchmarks.measure import provenance

# 12 sums cover the latency of a fused multiply-add on any processor: up to 5 cycles, two at a time.
SOURCE = """
#include <immintrin.h>
#if defined(__AVX512F__)
#define VECTOR __m512
#define SET _mm512_set1_ps
#define FMA _mm512_fmadd_ps
#else
#define VECTOR __m256
#define SET _mm256_set1_ps
#define FMA _mm256_fmadd_ps
#endif
#define SUMS 12
int width(void) { return SUMS * (int)(sizeof(VECTOR) / sizeof(float)); }
void run(long count, float* out) {
  VECTOR sums[SUMS], a = SET(1.0001f), b = SET(1e-6f);
  for (int i = 0; i < SUMS; ++i) sums[i] = SET((float)i);
  for (long step = 0; step < count; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; ++i) sums[i] = FMA(sums[i], a, b);
    __asm__ volatile("" : "+v"(a));
  }
  for (int i = 0; i < SUMS; ++i) out[i] = ((float*)&sums[i])[0];
}
"""


def compiled(folder: Path) -> ctypes.CDLL:
    """The loop as a library."""
    source, library = folder / "peak.c", folder / "peak.so"
    source.write_text(SOURCE)
    command = [*shlex.split(os.environ.get("CC", "cc")), "-O2", "-march=native", "-shared", "-fPIC"]
    try:
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise click.ClickException(f"needs a C compiler (CC) and a processor with AVX2 and FMA: {error}") from error
    return ctypes.CDLL(str(library))


def gflops(library: ctypes.CDLL, threads: int, count: int) -> float:
    """GFLOP/s of ``threads`` loops of ``count`` steps at once; ctypes lets go of the interpreter's lock."""
    loops = [
        threading.Thread(target=library.run, args=(ctypes.c_long(count), (ctypes.c_float * 64)()))
        for _ in range(threads)
    ]
    start = time.perf_counter()
    for loop in loops:
        loop.start()
    for loop in loops:
        loop.join()
    return 2 * library.width() * count * threads / (time.perf_counter() - start) / 1e9


@click.command(help=__doc__)
@click.option("--threads", type=click.IntRange(min=1), default=os.cpu_count(), show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True)
@click.option("--count", type=click.IntRange(min=1), default=20_000_000, show_default=True, help="Steps of a loop.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path))
def main(threads: int, rounds: int, count: int, path: Path | None) -> None:
    """Compiles, runs, prints."""
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        rates = [gflops(library, threads, count) for _ in range(rounds)]
    report = {**provenance(), "threads": threads, "gflops": {"best": max(rates), "median": statistics.median(rates)}}
    click.echo(f"{threads} threads: {max(rates):.1f} GFLOP/s at best, {statistics.median(rates):.1f} in the median")
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
