"""docs/models.md says what the tests test."""

from __future__ import annotations

import models_table
import pytest

timm = pytest.importorskip("timm")
pytest.importorskip("transformers")


@pytest.mark.skipif(
    not hasattr(timm.models.eva, "vit_base_patch16_sapiens2"), reason="this timm lacks a model that the table has"
)
def test_the_page_is_in_step_with_the_tests() -> None:
    _, found, _ = models_table.parts(models_table.PAGE.read_text())
    assert found == models_table.table(), "run: python tests/models_table.py"


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="models: end"):
        models_table.parts(f"text {models_table.BEGIN} text")
