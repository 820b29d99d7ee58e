"""What the compile checks share: results that are kept by the content they are of, and the table of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]


def cache_folder() -> Path:
    """Where results are kept by the content they are of: under ``XDG_CACHE_HOME``, so that they outlive a checkout.

    ``build/compile-check`` where that cannot be written.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(home) if home else Path.home() / ".cache") / "gtp-kernels" / "compile-check"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ROOT / "build" / "compile-check"
    return folder if os.access(folder, os.W_OK | os.X_OK) else ROOT / "build" / "compile-check"


def load(path: Path | None) -> dict[str, Any] | None:
    """What ``store`` wrote; None where there is nothing, or not that."""
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def store(path: Path, result: Mapping[str, Any]) -> None:
    """Whoever else checks at the same time does not read half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(result) + "\n")
    partial.replace(path)


def span(values: Iterable[float], form: str = "{}") -> str:
    """The smallest to the largest of them."""
    values = list(values)
    if not values:
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def coloured(size: int) -> str:
    """A number that should be 0."""
    return f"[{'yellow' if size else 'none'}]{size}"


def verdict(failures: int) -> str:
    """The last column."""
    return f"[red]{failures} fail" if failures else "[green]ok"


def table_of(
    title: str, keys: Sequence[str], columns: Sequence[str], rows: Mapping[tuple[str, ...], Sequence[str]]
) -> Table:
    """Rows by their keys, with a line between kernels (the first key); a last column of no name holds the verdict."""
    table = Table(*keys, title=title)
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("")
    last: str | None = None
    for key, cells in sorted(rows.items()):
        if last not in (None, key[0]):
            table.add_section()
        last = key[0]
        table.add_row(*key, *cells)
    return table
