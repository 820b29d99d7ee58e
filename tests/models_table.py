"""``python tests/models_table.py``: writes the table of models into docs/models.md, from the lists of the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- models: begin, written by tests/models_table.py -->", "<!-- models: end -->"


def table() -> str:
    """The tables, in Markdown, with their markers."""
    import test_full_size
    import test_patch_timm
    import test_patch_timm_eva
    import test_patch_transformers

    from gtp_vit import lvvit

    lines = [BEGIN, "", "### timm, `VisionTransformer` and `Eva`", ""]
    lines += ["| what is special | model in timm | prefix tokens | test |", "|---|---|---|---|"]
    for module in (test_patch_timm, test_patch_timm_eva):
        for key, (name, _, prefix) in module.MODELS.items():
            lines.append(f"| {key} | `{name}` | {'any' if prefix is None else prefix} | `{module.__name__}.py` |")
    lines += ["", "### timm, at full size", "", "| family | model in timm | test |", "|---|---|---|"]
    lines += [f"| {family} | `{name}` | `test_full_size.py` |" for family, name in test_full_size.FAMILIES.items()]
    lines += ["", "### transformers", "", "| what is special | class | patched tower | prefix tokens | test |"]
    lines += ["|---|---|---|---|---|"]
    for key, (build, tower, prefix) in test_patch_transformers.MODELS.items():
        kind = type(build()).__name__
        where = f"`{tower}`" if tower else "the model"
        lines.append(f"| {key} | `{kind}` | {where} | {prefix} | `test_patch_transformers.py` |")
    lines += ["", "### transformers, at full size", "", "| family | class | test |", "|---|---|---|"]
    for family, (build, _, _) in test_patch_transformers.FULL_SIZE.items():
        with torch.device("meta"):
            kind = type(build()).__name__
        lines.append(f"| {family} | `{kind}` | `test_patch_transformers.py` |")
    lines += ["", "### LV-ViT", "", "| model | test |", "|---|---|"]
    lines += [f"| `gtp_vit.lvvit.{name}` | `test_lvvit.py` |" for name in lvvit.MODELS]
    return "\n".join([*lines, "", END])


def parts(page: str) -> tuple[str, str, str]:
    """What stands before the table, the table, and what stands after it."""
    before, begin, rest = page.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page lacks {BEGIN if not begin else END}")
    return before, begin + inside + end, after


def main() -> int:
    before, _, after = parts(PAGE.read_text())
    PAGE.write_text(before + table() + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
