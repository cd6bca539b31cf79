"""Tensors that are too large for one file: cut by rows, put together again, in checkpoints and in dictionaries."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dictionary import pieces
from tests.pipeline.test_train import DiesAtStepError, crash_at, train_folder
from tests.support.fixtures import write_manifest
from tests.support.runs import run_inline

# Of the tiny dictionary about a third, of a checkpoint of it less.
SMALL = 3_000


@settings(deadline=None)
@given(rows=st.integers(1, 40), width=st.integers(1, 5), limit=st.integers(1, 3000), data=st.data())
def test_pieces_together_are_what_was_cut(rows: int, width: int, limit: int, data: st.DataObject) -> None:
    tensors = {"a": torch.randn(rows, width), "b": torch.arange(rows), "alone": torch.randn(3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", limit)
        made = list(pieces.cut(tensors, "ab".__contains__))
    assert [(piece.index, piece.count) for piece in made] == [(at, len(made)) for at in range(len(made))]
    size = sum(value.nbytes for value in tensors.values())
    assert len(made) == min(rows, -(-size // limit))
    first = data.draw(st.integers(0, rows - 1))
    count = data.draw(st.integers(1, rows - first))
    found, there = pieces.join((piece.body for piece in made), "ab".__contains__, first, count)
    assert there == rows
    assert torch.equal(found.pop("alone"), tensors.pop("alone"))
    assert found.keys() == tensors.keys()
    for name, value in found.items():
        assert torch.equal(value, tensors[name][first : first + count])


def test_run_whose_files_are_cut_is_resumed_and_makes_the_same_dictionary(
    tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tree["compute"]["checkpoint_seconds"] = 1e-9
    run_inline(write_manifest(tmp_path / "whole.yaml", tiny_tree))
    cut_root = tmp_path / "cut"
    manifest = write_manifest(tmp_path / "cut.yaml", {**tiny_tree, "root": str(cut_root)})
    monkeypatch.setattr(pieces, "PIECE_BYTES", SMALL)
    crash_at(monkeypatch, 20, slots=3, root=cut_root)
    with pytest.raises(DiesAtStepError):
        run_inline(manifest)
    saved = sorted(path.name for path in train_folder(cut_root).glob("checkpoints/*/*"))
    assert {"state.safetensors", "state.00001.safetensors", "state.00004.safetensors"} <= set(saved)
    run_inline(manifest)
    whole, cut = (train_folder(root) for root in (tmp_path / "root", cut_root))
    names = sorted(path.name for path in cut.glob("dictionary*.safetensors"))
    assert len(names) > 2
    assert names == [f"dictionary-{at + 1:05d}-of-{len(names):05d}.safetensors" for at in range(len(names))]
    parts = [safetensors.torch.load_file(cut / name) for name in names]
    for name, value in safetensors.torch.load_file(whole / "dictionary.safetensors").items():
        assert torch.equal(torch.cat([part[name] for part in parts if name in part]), value), name
    # Whoever reads it sees the same dictionary.
    judged = [next(root.glob("dictionaries/tiny/evaluate/*/metrics.json")) for root in (tmp_path / "root", cut_root)]
    assert judged[0].read_bytes() == judged[1].read_bytes()
    exported = [
        next(root.glob("dictionaries/tiny/export/*/saelens/sae_weights.safetensors"))
        for root in (tmp_path / "root", cut_root)
    ]
    assert exported[0].read_bytes() == exported[1].read_bytes()
