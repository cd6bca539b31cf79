import io
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline import tokenize
from pipeline.sources.corpus import document_id, is_heldout
from pipeline.sources.sequences import TokenSequence, batches, overlapping, padded, pieces, read
from pipeline.stage import Committed
from pipeline.tokenize import SPLITS, bos_id, eos_id
from schemas.errors import IntegrityError, ManifestError
from schemas.layouts import TOKEN_INDEX
from tests.support.fixtures import CONTEXT, documents, manifest_tree
from tests.support.stages import manifest_of, run_stage

BOS = 0


@dataclass(frozen=True)
class Sequence:
    """One row of a token file."""

    document: int
    offset: int
    tokens: list[int]


def tokenized(folder: Path, model: Path, corpus: Path, **changes: Any) -> Committed:
    tree = manifest_tree(model, corpus, folder / "root")
    tree["corpus"] |= changes
    return run_stage("tokenize", manifest_of(tree), folder / "tokenize", {})


def stored(committed: Committed, split: str) -> list[Sequence]:
    """All sequences of a split in the order of their rows, read with nothing but Parquet."""
    index = pq.read_table(io.BytesIO((committed.path / TOKEN_INDEX).local.read_bytes())).to_pylist()
    found = []
    for line in sorted((line for line in index if line["split"] == split), key=lambda line: line["first_row"]):
        table = pq.ParquetFile((committed.path / line["key"]).local).read_row_group(line["row_group"])
        group = [Sequence(**row) for row in table.to_pylist()]
        assert len(group) == line["sequences"]
        assert sum(len(sequence.tokens) for sequence in group) == line["rows"]
        found += group
    return found


def by_document(committed: Committed) -> dict[int, list[Sequence]]:
    found = defaultdict(list)
    for split in SPLITS:
        for sequence in stored(committed, split):
            found[sequence.document].append(sequence)
    return found


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def texts(tiny_corpus: Path) -> list[str]:
    lines = [line for path in sorted(tiny_corpus.iterdir()) for line in path.read_text().splitlines()]
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def every_token(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_corpus: Path) -> Committed:
    """The tiny corpus, where even a tail of one token is kept; in parts and row groups of a few sequences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "GROUP_SEQUENCES", 5)
        patch.setattr(tokenize, "PART_SEQUENCES", 20)
        return tokenized(tmp_path_factory.mktemp("every"), tiny_model, tiny_corpus, min_tokens=1)


def test_tokenize_sequences_decode_to_the_text_of_one_document_each(
    every_token: Committed, texts: list[str], tokenizer: Any
) -> None:
    found = by_document(every_token)
    assert sorted(found) == sorted(document_id(text) for text in texts)
    for text in texts:
        decoded = ""
        offset = 0
        for sequence in found[document_id(text)]:
            assert sequence.tokens[0] == BOS
            assert sequence.offset == offset
            assert 1 < len(sequence.tokens) <= CONTEXT
            decoded += tokenizer.decode(sequence.tokens[1:], clean_up_tokenization_spaces=False)
            offset += len(sequence.tokens) - 1
        assert decoded == text


def test_tokenize_only_a_document_last_sequence_is_short(every_token: Committed) -> None:
    for sequences in by_document(every_token).values():
        assert all(len(sequence.tokens) == CONTEXT for sequence in sequences[:-1])


@pytest.mark.parametrize("min_tokens", [2, 8, CONTEXT, 10 * CONTEXT])
def test_tokenize_min_tokens_leaves_out_exactly_the_short_tails(
    tmp_path: Path, tiny_model: Path, tiny_corpus: Path, every_token: Committed, min_tokens: int
) -> None:
    found = by_document(tokenized(tmp_path, tiny_model, tiny_corpus, min_tokens=min_tokens))
    for document, sequences in by_document(every_token).items():
        kept = [sequence for sequence in sequences if len(sequence.tokens) >= min(min_tokens, CONTEXT)]
        assert found.get(document, []) == kept


def test_tokenize_rows_are_numbered_without_a_gap(every_token: Committed) -> None:
    for split in SPLITS:
        found = pieces(every_token, split)
        assert len({piece.file.key for piece in found}) > 3 if split == "train" else found
        next_row = 0
        for piece in found:
            assert piece.first_row == next_row
            next_row += piece.rows
        assert next_row == every_token.facts[f"{split}_rows"]
        assert next_row == sum(len(sequence.tokens) for sequence in stored(every_token, split))
        assert every_token.facts[f"{split}_sequences"] == len(stored(every_token, split))


def test_tokenize_counts_every_document(every_token: Committed, texts: list[str]) -> None:
    assert every_token.facts["documents"] == len(texts)
    assert every_token.record.rows == every_token.facts["train_rows"] + every_token.facts["heldout_rows"]


def test_tokenize_heldout_documents_are_those_of_the_hash(every_token: Committed) -> None:
    train, heldout = ({sequence.document for sequence in stored(every_token, split)} for split in SPLITS)
    assert not train & heldout
    assert all(is_heldout(document, 0.2) for document in heldout)
    assert not any(is_heldout(document, 0.2) for document in train)


def test_tokenize_no_heldout_share_holds_nothing_out(tmp_path: Path, tiny_model: Path, tiny_corpus: Path) -> None:
    committed = tokenized(tmp_path, tiny_model, tiny_corpus, heldout=0.0)
    assert committed.facts["heldout_rows"] == 0
    assert pieces(committed, "heldout") == []


def test_tokenize_twice_has_one_digest_and_other_parameters_another(
    tmp_path: Path, tiny_model: Path, tiny_corpus: Path
) -> None:
    first = tokenized(tmp_path / "1", tiny_model, tiny_corpus)
    again = tokenized(tmp_path / "2", tiny_model, tiny_corpus)
    other = tokenized(tmp_path / "3", tiny_model, tiny_corpus, context=CONTEXT - 1)
    assert first.record.digest == again.record.digest
    assert first.record.units == again.record.units
    assert other.record.digest != first.record.digest


def test_tokenize_max_documents_counts_in_each_file(tmp_path: Path, tiny_model: Path, tiny_corpus: Path) -> None:
    committed = tokenized(tmp_path, tiny_model, tiny_corpus, max_documents=4)
    assert committed.facts["documents"] == 4 * len(list(tiny_corpus.iterdir()))


@pytest.mark.parametrize("bos", ["auto", "always", "never"])
@pytest.mark.parametrize("eos", ["always", "never"])
def test_tokenize_bos_and_eos_stand_where_the_policy_says(
    tmp_path: Path, tiny_model: Path, tiny_corpus: Path, tokenizer: Any, texts: list[str], bos: str, eos: str
) -> None:
    found = by_document(tokenized(tmp_path, tiny_model, tiny_corpus, bos=bos, eos=eos, min_tokens=1))
    for text in texts[:40]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        bodies = []
        for sequence in found[document_id(text)]:
            assert len(sequence.tokens) <= CONTEXT
            if bos != "never":
                assert sequence.tokens[0] == tokenizer.bos_token_id
            bodies += sequence.tokens[bos != "never" :]
        assert bodies == ids + ([tokenizer.eos_token_id] if eos == "always" else [])


def test_tokenize_corpus_without_training_tokens_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    held = next(text for text in documents(100, seed=9) if is_heldout(document_id(text), 0.2))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/only.txt").write_text(held)
    with pytest.raises(ManifestError, match="no training tokens"):
        tokenized(tmp_path, tiny_model, tmp_path / "corpus")


def test_bos_and_eos_of_an_encoder_are_its_own_tokens(tiny_model: Path) -> None:
    file = str(tiny_model / "tokenizer.json")
    encoder = PreTrainedTokenizerFast(tokenizer_file=file, cls_token="the", sep_token="cat")
    assert bos_id(encoder, "auto") == bos_id(encoder, "always") == encoder.cls_token_id
    assert eos_id(encoder, "always") == encoder.sep_token_id
    assert bos_id(encoder, "never") is eos_id(encoder, "never") is None


def test_bos_and_eos_that_are_not_there_are_refused_only_if_asked_for(tiny_model: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_file=str(tiny_model / "tokenizer.json"))
    assert bos_id(bare, "auto") is None
    with pytest.raises(ManifestError, match="no BOS token"):
        bos_id(bare, "always")
    with pytest.raises(ManifestError, match="no EOS token"):
        eos_id(bare, "always")


# Sequences, read back


@settings(derandomize=True, deadline=None, database=None, max_examples=40)
@given(first=st.floats(0, 1), length=st.integers(1, 700))
def test_read_gives_whole_the_sequences_with_rows_in_the_span(
    every_token: Committed, first: float, length: int
) -> None:
    rows = every_token.facts["train_rows"]
    start = min(int(first * rows), rows - 1)
    end = min(rows, start + length)
    wanted, row = [], 0
    for sequence in stored(every_token, "train"):
        if row < end and row + len(sequence.tokens) > start:
            wanted.append((row, sequence.tokens))
        row += len(sequence.tokens)
    near = overlapping(pieces(every_token, "train"), start, end)
    found = [(sequence.first_row, sequence.tokens.tolist()) for sequence in read(every_token.path, near, start, end)]
    assert found == wanted


def test_read_absent_token_file_names_the_key(tmp_path: Path, tiny_model: Path, tiny_corpus: Path) -> None:
    committed = tokenized(tmp_path, tiny_model, tiny_corpus)
    found = pieces(committed, "train")
    (committed.path / found[-1].file.key).local.unlink()
    with pytest.raises(IntegrityError, match=rf"{found[-1].file.key} is committed, but absent"):
        read(committed.path, found, 0, committed.facts["train_rows"])


def test_read_changed_token_file_is_refused(tmp_path: Path, tiny_model: Path, tiny_corpus: Path) -> None:
    committed = tokenized(tmp_path, tiny_model, tiny_corpus)
    found = pieces(committed, "train")
    path = (committed.path / found[0].file.key).local
    table = pq.read_table(path)
    changed = [[token ^ 1 for token in tokens] for tokens in table["tokens"].to_pylist()]
    path.write_bytes(tokenize.parquet_body(table.set_column(2, "tokens", pa.array(changed, pa.list_(pa.int32())))))
    with pytest.raises(IntegrityError):
        read(committed.path, found, 0, committed.facts["train_rows"])


def test_pieces_changed_index_is_refused(tmp_path: Path, tiny_model: Path, tiny_corpus: Path) -> None:
    committed = tokenized(tmp_path, tiny_model, tiny_corpus)
    path = (committed.path / TOKEN_INDEX).local
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    with pytest.raises(IntegrityError, match=r"index\.parquet is not what was committed"):
        pieces(committed, "train")


@settings(derandomize=True, deadline=None, database=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), batch_tokens=st.integers(1, 200))
def test_batches_hold_every_sequence_once_and_no_more_than_asked(lengths: list[int], batch_tokens: int) -> None:
    sequences = [TokenSequence(100 * index, np.arange(length, dtype=np.int32)) for index, length in enumerate(lengths)]
    made = list(batches(sequences, batch_tokens))
    assert sorted(sequence.first_row for batch in made for sequence in batch) == [100 * i for i in range(len(lengths))]
    for batch in made:
        longest = max(len(sequence) for sequence in batch)
        assert len(batch) == 1 or longest * len(batch) <= batch_tokens


def test_padded_inputs_hold_the_tokens_and_mask_the_rest() -> None:
    short, long = TokenSequence(0, np.array([5, 6], np.int32)), TokenSequence(2, np.array([7, 8, 9], np.int32))
    inputs = padded([long, short])
    assert inputs["input_ids"].tolist() == [[7, 8, 9], [5, 6, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert sorted(padded([long, long])) == ["input_ids"]
