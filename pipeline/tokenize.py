"""tokenize: text becomes sequences of at most `context` tokens, training split and held-out split apart.

Documents are kept apart: no sequence holds two of them, so no token attends to another document. A long
document becomes several sequences, each beginning with BOS where the policy says so. Whether a document
is held out is decided by the hash of its text.

A unit is one corpus file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from cluster.pool import Resources
from cluster.storage.create import create_or_adopt
from cluster.storage.path import StoragePath
from pipeline.sources import corpus, models
from pipeline.stage import Committed, Estimate, Out, Params, Sources, Task
from schemas.errors import ManifestError
from schemas.layouts import TOKEN_INDEX
from schemas.manifest import Corpus, Dictionary, Manifest, Model
from schemas.records import ObjectEntry, Outputs, Unit
from schemas.tables import TOKEN_INDEX as TOKEN_INDEX_SCHEMA
from schemas.tables import TOKENS

SPLITS = ("train", "heldout")
GROUP_SEQUENCES = 1024
PART_SEQUENCES = 16 * GROUP_SEQUENCES
# A tokenizer works on several documents at once, and takes many times the memory of their text.
DOCUMENTS_AT_ONCE = 64
CHARACTERS_AT_ONCE = 4 * 2**20

# Measured: a worker that has imported torch, transformers and pyarrow and holds a tokenizer.
WORKER_MEMORY = 800 * 2**20


class TokenizeParams(Params):
    """Identity of a tokenization. File paths are no part of it, their contents are."""

    tokenizer_digest: str
    text_field: str
    context: int
    bos: str
    eos: str
    min_tokens: int
    max_documents: int | None
    heldout: float
    contents: tuple[str, ...]
    files: tuple[str, ...] = Field(exclude=True)
    model: Model = Field(exclude=True)


class FileTask(Task):
    """One corpus file."""

    file: str
    params: TokenizeParams


def params(manifest: Manifest, _dictionary: Dictionary | None, sources: Sources) -> TokenizeParams:
    """See `Stage.params`."""
    assert manifest.corpus is not None
    section = manifest.corpus.model_dump(exclude={"source"})
    return TokenizeParams(
        **section,
        tokenizer_digest=sources.model.tokenizer_digest,
        contents=tuple(signature for _, signature in sources.corpus.files),
        files=tuple(path for path, _ in sources.corpus.files),
        model=sources.model.place,
    )


def check(manifest: Manifest, _dictionary: Dictionary | None, sources: Sources) -> None:
    """Refuse a context that the model cannot take, and BOS or EOS tokens that are not there."""
    assert manifest.corpus is not None
    longest = sources.model.max_context
    if longest is not None and manifest.corpus.context > longest:
        raise ManifestError(
            f"corpus.context is {manifest.corpus.context}, the model takes at most {longest}",
            f"set corpus.context to {longest} or less",
        )
    tokenizer = models.load_tokenizer(sources.model.place)
    bos_id(tokenizer, manifest.corpus.bos)
    eos_id(tokenizer, manifest.corpus.eos)
    if len(tokenizer) > sources.model.vocabulary:
        raise ManifestError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {sources.model.vocabulary}",
            "use the tokenizer that belongs to the model",
        )


def estimate(manifest: Manifest, _dictionary: Dictionary | None, sources: Sources) -> Estimate:
    """See `Stage.estimate`."""
    assert manifest.corpus is not None
    rows = sources.corpus.train_rows + sources.corpus.heldout_rows
    return Estimate(
        units=len(sources.corpus.files),
        rows=rows,
        stored_bytes=rows * 5,
        objects=3 * len(sources.corpus.files) + 3,
        memory=WORKER_MEMORY + PART_SEQUENCES * manifest.corpus.context * 12,
        workers=manifest.compute.workers,
    )


def run(inputs: Mapping[str, Committed], params: TokenizeParams, out: Out) -> Outputs:
    """Tokenize every file, then write the index that gives every row its number."""
    tasks = [FileTask(unit=f"{index:06d}", file=file, params=params) for index, file in enumerate(params.files)]
    records = out.map(tokenize_file, tasks, Resources(threads=out.compute.threads))
    lines: list[dict[str, Any]] = []
    totals = dict.fromkeys(SPLITS, 0)
    sequences = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        for unit in sorted(records):
            entries = {entry.key: entry.model_dump() for entry in records[unit].made.objects}
            for group in records[unit].made.facts["groups"][split]:
                lines.append({"split": split, **entries[group["key"]], **group, "first_row": totals[split]})
                totals[split] += group["rows"]
                sequences[split] += group["sequences"]
    if not totals["train"]:
        raise ManifestError(
            "the corpus has no training tokens once it is tokenized and split",
            "use more text, or lower corpus.heldout or corpus.min_tokens",
        )
    index = out.write(TOKEN_INDEX, parquet_body(pa.Table.from_pylist(lines, TOKEN_INDEX_SCHEMA)))
    documents = sum(record.made.facts["documents"] for record in records.values())
    facts = {
        "documents": documents,
        **{f"{split}_rows": totals[split] for split in SPLITS},
        **{f"{split}_sequences": sequences[split] for split in SPLITS},
    }
    return Outputs(objects=(index,), facts=facts)


def tokenize_file(task: FileTask, path: StoragePath) -> Unit:
    """Tokenize one file; writes `train/` and `heldout/` parts of at most `PART_SEQUENCES` sequences."""
    settings = task.params
    tokenizer = models.load_tokenizer(settings.model)
    section = Corpus(source=task.file, **{name: getattr(settings, name) for name in _CORPUS_FIELDS})
    parts = {split: _Part(path, split, task.unit) for split in SPLITS}
    source = StoragePath.parse(task.file)
    documents = 0
    with closing(corpus.documents(source, settings.text_field)) as every:
        for block in _blocks(islice(every, settings.max_documents)):
            encoded = tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"]
            for text, ids in zip(block, encoded, strict=True):
                document = corpus.document_id(text)
                part = parts["heldout" if corpus.is_heldout(document, settings.heldout) else "train"]
                for offset, tokens in sequences(ids, tokenizer, section):
                    part.add(document, offset, tokens)
                documents += 1
    for part in parts.values():
        part.flush()
    return Unit(
        objects=tuple(entry for split in SPLITS for entry in parts[split].objects),
        rows=sum(group["rows"] for split in SPLITS for group in parts[split].groups),
        facts={"documents": documents, "groups": {split: parts[split].groups for split in SPLITS}},
    )


def _blocks(texts: Iterator[str]) -> Iterator[list[str]]:
    """Some documents at a time: at most so many, and no more text than the last of them brings."""
    block: list[str] = []
    characters = 0
    for text in texts:
        block.append(text)
        characters += len(text)
        if len(block) == DOCUMENTS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield block
            block, characters = [], 0
    if block:
        yield block


_CORPUS_FIELDS = ("text_field", "context", "bos", "eos", "min_tokens", "max_documents", "heldout")


def sequences(ids: list[int], tokenizer: Any, section: Corpus) -> Iterator[tuple[int, list[int]]]:
    """Cut a document's token ids into sequences; yields (offset in the document, tokens with BOS)."""
    bos, eos = bos_id(tokenizer, section.bos), eos_id(tokenizer, section.eos)
    body = [*ids, *([eos] if eos is not None else [])]
    head = [bos] if bos is not None else []
    step = section.context - len(head)
    for offset in range(0, len(body), step):
        tokens = [*head, *body[offset : offset + step]]
        if len(tokens) >= min(section.min_tokens, section.context):
            yield offset, tokens


def bos_id(tokenizer: Any, policy: str) -> int | None:
    """The token that begins a sequence: BOS, or the classification token of an encoder.

    Raises:
        ManifestError: the policy is `always` and the tokenizer has none.
    """
    found: int | None = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    if found is None and policy == "always":
        raise ManifestError("corpus.bos is always, but the tokenizer has no BOS token", "set corpus.bos to never")
    return None if policy == "never" else found


def eos_id(tokenizer: Any, policy: str) -> int | None:
    """The token that ends a document: EOS, or the separator of an encoder.

    Raises:
        ManifestError: the policy is `always` and the tokenizer has none.
    """
    if policy == "never":
        return None
    found: int | None = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if found is None:
        raise ManifestError("corpus.eos is always, but the tokenizer has no EOS token", "set corpus.eos to never")
    return found


def parquet_body(table: pa.Table, row_group_size: int | None = None) -> bytes:
    """A table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=row_group_size)
    return buffer.getvalue()


class _Part:
    """Collects one split's sequences of one file, and writes them out part by part."""

    def __init__(self, path: StoragePath, split: str, unit: str) -> None:
        self._path, self._split, self._unit = path, split, unit
        self._documents: list[int] = []
        self._offsets: list[int] = []
        self._tokens: list[npt.NDArray[np.int32]] = []
        self.objects: list[ObjectEntry] = []
        self.groups: list[dict[str, Any]] = []

    def add(self, document: int, offset: int, tokens: list[int]) -> None:
        self._documents.append(document)
        self._offsets.append(offset)
        self._tokens.append(np.asarray(tokens, np.int32))
        if len(self._tokens) == PART_SEQUENCES:
            self.flush()

    def flush(self) -> None:
        if not self._tokens:
            return
        key = f"{self._split}/{self._unit}-{len(self.objects):04d}.parquet"
        columns = {"document": self._documents, "offset": self._offsets, "tokens": self._tokens}
        body = parquet_body(pa.Table.from_pydict(columns, TOKENS), GROUP_SEQUENCES)
        create_or_adopt(self._path / key, body)
        self.objects.append(ObjectEntry.of(key, body))
        for group, start in enumerate(range(0, len(self._tokens), GROUP_SEQUENCES)):
            lengths = [len(tokens) for tokens in self._tokens[start : start + GROUP_SEQUENCES]]
            self.groups.append({"key": key, "row_group": group, "sequences": len(lengths), "rows": sum(lengths)})
        self._documents, self._offsets, self._tokens = [], [], []
