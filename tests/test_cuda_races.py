"""No two threads of an emulated CUDA kernel meet in memory with nothing to order them (tests/native/emulated_races.h).

Some of the tests of every stem run again under the race detector; ``make sanitize-races`` runs all of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import CSRC, build

TESTS = Path(__file__).parent
# Of each stem the tests, by pytest's -k: every kernel and form, in seconds.
WATCHED = {
    "attention": "not order_of_threads and not bracket and not edge_of",
    "graph": "matches_definition or strided or equal_rows or overtake or grid3-32",
    "live": "matches_definition or all_but_one or many_tokens or one_form or no_number",
    "propagate": "residual_step or many_edges or merge_of_few or test_select[37 "
    "or (select_propagate and Mean and dtype0 and grid)",
}
ORDER, COPY = "nothing to order the two", "on its way"
# (stem, file, what stands there, what takes its place, the test that meets it, what is said of it).
MUTATIONS = [
    (
        "attention",
        "attention_threshold.cuh",
        "      sync_warp();\n      for (int i = lane_id(); i < kBins",
        "      for (int i = lane_id(); i < kBins",
        "every_rank",
        ORDER,
    ),
    ("attention", "attention.cuh", "    sync_block();\n    load_values(", "    load_values(", "arguments1", ORDER),
    (
        "attention",
        "attention.cuh",
        "    wait_copies<1>();\n    sync_block();\n    // Some",
        "    // Some",
        "arguments3",
        COPY,
    ),
    (
        "attention",
        "attention_sweep.cuh",
        "    wait_copies<1>();\n    sync_block();\n",
        "    sync_block();\n",
        "order_of_threads and sweeps",
        COPY,
    ),
    ("attention", "attention.cuh", "scratch[i] = 0;", "(void)i;", "arguments1", "has not written"),
    ("attention", "attention.cuh", "+ kScratch;", "+ kScratch / 2;", "arguments1", "beyond the shared memory"),
    (
        "live",
        "live.cuh",
        "    sync_warp();  // all lanes have read what others write\n",
        "",
        "matches_definition",
        ORDER,
    ),
]


def run(stem: str, tests: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider", f"test_cuda_{stem}.py"]
    return subprocess.run(
        [*command, "-k", tests],
        cwd=TESTS,
        env={**os.environ, "GTP_EMULATED_RACES": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("stem", WATCHED)
def test_no_races(stem: str) -> None:
    done = run(stem, WATCHED[stem])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("mutation", range(len(MUTATIONS)))
def test_what_is_missing_is_reported(tmp_path: Path, mutation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stem, file, old, new, tests, said = MUTATIONS[mutation]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    text = (csrc / "cuda" / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} of {old!r}"
    (csrc / "cuda" / file).write_text(text.replace(old, new))
    monkeypatch.setenv("GTP_EMULATED_RACES", "1")
    done = run(stem, tests, GTP_EMULATED_SHIM=str(build(f"cuda_{stem}_shim.cpp", tmp_path, csrc=csrc)))
    assert done.returncode < 0, done.stdout[-2000:]
    assert said in done.stderr, done.stderr[-2000:]
