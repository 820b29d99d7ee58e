"""That the tests of the emulated CUDA kernels can fail: each runs on kernels in which one line was changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import CSRC, build

TESTS = Path(__file__).parent
# For each stem the tests that notice, by pytest's -k.
NOTICED_BY = {
    "attention": "matches_definition or every_rank or ties or images or edge_of or bracket",
    "graph": "ties or numbers_of_neighbours",
    "live": "matches_definition or graph or all_but_one or many_tokens or no_number",
    "propagate": "residual_step or test_select or test_propagate or merge",
}
# (stem, file, what stands there, what takes its place): errors that a reader could overlook.
MUTATIONS = [
    ("attention", "attention_map.cuh", "2 * step + lane / 8 % 2", "2 * step + lane / 16"),
    ("attention", "attention_map.cuh", "load_matrices<true>", "load_matrices<false>"),
    ("attention", "attention_map.cuh", "p[1] = pack(left[2], left[3], T());", "p[1] = pack(right[0], right[1], T());"),
    ("attention", "attention_map.cuh", "int half = 4, mask = 16", "int half = 4, mask = 8"),
    ("attention", "attention_map.cuh", "+ head) >> image_shift", ") >> image_shift"),
    ("attention", "attention_map.cuh", "r + kStep <= kSure || row < tokens", "r <= kSure || row < tokens"),
    ("attention", "attention_threshold.cuh", "bin += b.upto[i] < here;", "bin += b.upto[i] <= here;"),
    ("attention", "attention_threshold.cuh", "before == rank - 1", "before == rank"),
    ("attention", "attention_threshold.cuh", "(other == key && i < lane_id())", "other == key"),
    ("attention", "attention_threshold.cuh", "    rank -= state[1];\n", ""),
    ("attention", "attention.cuh", " && inside <= Form::kRoom", ""),
    ("attention", "attention.cuh", "query = first_query() + 8 * i;", "query = first_query() + 8 * (i ^ 1);"),
    ("attention", "attention.cuh", "k);\n    sync_block();\n    load_keys(", "k);\n    load_keys("),
    ("attention", "attention.cuh", "i * 2 + 1]", "i * 2]"),
    ("attention", "attention.cuh", "      sync_block();  // the logits of the edge are where the sums will be\n", ""),
    ("attention", "attention_edge.cuh", "lane % 4 * kQueries + 8 * group", "lane % 4 * kQueries"),
    ("attention", "attention_edge.cuh", "+ 1] * exp2_fast(there[i * kNext] - largest[group])", "+ 1]"),
    ("attention", "attention_edge.cuh", "tile == 2 && warp > 1", "tile == 2 && warp >= kGroups"),
    ("attention", "attention_edge.cuh", "s[2][2 * kGroups - 1] : s[2][2 * kGroups - 2]", "s[2][1] : s[2][0]"),
    ("attention", "attention_edge.cuh", "lane % kQueries * kStride + lane / 16 * 8", "lane % kQueries * kStride"),
    ("attention", "attention_edge.cuh", "i / (2 * kHeld) * 2 + i % 2", "i % 2"),
    ("attention", "attention_edge.cuh", "largest[group] == -kInfinity ? 0.0f : largest[group]", "largest[group]"),
    ("attention", "attention_run.cuh", "    ranked.ranks.high += zeros;\n", ""),
    ("attention", "attention_run.cuh", "rank + Form::kCount", "rank + 1 + Form::kCount"),
    ("attention", "attention_sweep.cuh", "sum[half] *= ", "sum[half] += 0 * "),
    (
        "attention",
        "attention_sweep.cuh",
        "visit(block * kSweepKeys, s);\n    sync_block();",
        "visit(block * kSweepKeys, s);",
    ),
    ("attention", "attention_sweep.cuh", " && inside <= p.room", ""),
    ("attention", "attention_sweep.cuh", "first_key + kSweepKeys <= p.a.tokens", "first_key <= p.a.tokens"),
    ("attention", "attention_sweep.cuh", "shuffle(at, kLanes - 1) + last - inside", "shuffle(at, kLanes - 1) + last"),
    ("attention", "attention_sweep.cuh", "if (first == place.first)", "if (first > place.first)"),
    ("attention", "attention.cu", "int block = 0; block < p.row_blocks", "int block = 1; block < p.row_blocks"),
    ("graph", "graph.cuh", " || column == own_row + r", ""),
    ("graph", "graph.cuh", "before < key ? before : key", "before > key ? before : key"),
    ("graph", "graph.cuh", "place += shuffle(other, l) < column", "place += shuffle(other, l) <= column"),
    ("live", "live.cuh", "targets == task.kept", "targets > task.kept"),
    ("live", "live.cuh", "        sync_warp();  // all lanes have read what one of them writes\n", ""),
    ("live", "live.cuh", "(1u << lane_id()) - 1)) < prop) into", "(2u << lane_id()) - 1)) < prop) into"),
    ("live", "live.cuh", "  image.begin_walk();\n  sync_block();", "  image.begin_walk();"),
    ("live", "live.cuh", "atomic_max(at<uint32_t>(task.key) + row, best)", "at<uint32_t>(task.key)[row] = best"),
    ("live", "live.cuh", "fabsf(cosine) < kInfinity ? cosine : -1.f", "cosine"),
    ("live", "live.cu", "return range.begin < end && indices[range.begin] == to;", "return range.begin < end;"),
    (
        "propagate",
        "propagate.cuh",
        "    sync_block();\n    if (r < last) block.load_batch",
        "    if (r < last) block.load_batch",
    ),
    ("propagate", "propagate.cuh", "sources.mean ? 1 : static_cast<double>(sources.value)", "1.0"),
    ("propagate", "propagate.cuh", "sources.mean ? 1.f : alpha * sources.value", "alpha * sources.value"),
    ("propagate", "propagate.cuh", "if (count == 0 && hits) weigh", "if (hits) weigh"),
    ("propagate", "propagate.cuh", "ballot(factor != 0)", "ballot(n >= 0)"),
    ("propagate", "propagate.cuh", "channels == 128 * kChunks", "channels <= 128 * kChunks"),
    ("propagate", "select.cuh", "four.key[k] > key", "four.key[k] >= key"),
    ("propagate", "select.cuh", "w < warp_id() ? of_warp[w] : 0", "w <= warp_id() ? of_warp[w] : 0"),
]


@pytest.mark.parametrize("mutation", range(len(MUTATIONS)))
def test_a_changed_line_is_noticed(tmp_path: Path, mutation: int) -> None:
    stem, file, old, new = MUTATIONS[mutation]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    text = (csrc / "cuda" / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} of {old!r}"
    (csrc / "cuda" / file).write_text(text.replace(old, new))
    # That it compiles is not the question.
    library = build(f"cuda_{stem}_shim.cpp", tmp_path, csrc=csrc, optimize="-O1")
    pytest_of_stem = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"test_cuda_{stem}.py"]
    done = subprocess.run(
        [*pytest_of_stem, "-k", NOTICED_BY[stem]],
        cwd=TESTS,
        env={**os.environ, "GTP_EMULATED_SHIM": str(library)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    # 1: tests failed; anything else below 0: the emulated GPU ended the process.
    assert done.returncode == 1 or done.returncode < 0, done.stdout + done.stderr
