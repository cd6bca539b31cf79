"""Looks at what a manifest names: the model's shape and the corpus's files, before anything is written."""

from __future__ import annotations

from contextlib import closing
from itertools import islice

from cluster import interruption
from cluster.storage import foreign, objects, probe
from cluster.storage.attempts import patience
from cluster.storage.path import StoragePath
from jobs.workspace import reaching
from pipeline import generate
from pipeline.sources import corpus, models
from pipeline.stage import CorpusFacts, ModelFacts, Sources
from pipeline.tokenize import sequences
from schemas.errors import ManifestError
from schemas.manifest import Corpus, Manifest

SAMPLE_FILES = 4
SAMPLE_DOCUMENTS = 32


def survey(manifest: Manifest) -> Sources:
    """The sources as they are now.

    Raises:
        ManifestError: a model, hook point or corpus cannot be used.
    """
    if manifest.synthetic is not None:
        return generate.known_sources(manifest.synthetic, manifest.hook_points)
    assert manifest.model is not None
    assert manifest.corpus is not None
    model = models.inspect(manifest.model, manifest.harvest.hook_points)
    source = StoragePath.parse(manifest.corpus.source)
    with reaching(f"corpus.source {source}", source), patience(probe.DOOR_SECONDS):
        return Sources(model, _corpus(manifest, manifest.corpus, model))


def _corpus(manifest: Manifest, section: Corpus, model: ModelFacts) -> CorpusFacts:
    """Files with their signatures; rows are estimated from a few documents of a few files."""
    source, root = StoragePath.parse(section.source), StoragePath.parse(manifest.root)
    if f"{root}/".startswith(f"{source}/"):
        raise ManifestError(
            f"root {root} lies inside corpus.source {source}, so a run would read what it writes", "choose another root"
        )
    paths = corpus.files(source)
    tokenizer = models.load_tokenizer(model.place)
    stored = {path: objects.size(path) for path in paths}
    characters, tokens, shares = 0, 0, []
    for path in paths[:: max(1, len(paths) // SAMPLE_FILES)][:SAMPLE_FILES]:
        read = 0
        with closing(corpus.documents(path, section.text_field)) as texts:
            for text in islice(texts, SAMPLE_DOCUMENTS):
                interruption.check()
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                tokens += sum(len(cut) for _, cut in sequences(ids, tokenizer, section))
                characters += len(text)
                read += len(text)
        shares.append(read)
    if not characters:
        raise ManifestError(
            f"corpus.source {section.source} has no text in the files looked at ({len(shares)} of {len(paths)})",
            "check corpus.text_field and the files",
        )
    if not tokens:
        raise ManifestError(
            f"corpus.source {section.source} gives no sequence: no document looked at has corpus.min_tokens "
            f"{section.min_tokens} tokens",
            "lower corpus.min_tokens, or use longer documents",
        )
    per_character = tokens / characters
    total = round(sum(_characters(path, size) for path, size in stored.items()) * per_character)
    heldout = round(total * section.heldout)
    return CorpusFacts(
        files=tuple((str(path), foreign.signature(path)) for path in paths),
        stored_bytes=sum(stored.values()),
        train_rows=max(1, total - heldout),
        heldout_rows=heldout,
        exact=False,
    )


# Text packs about so well; only an estimate before tokenizing.
_RATIO = {".gz": 4.0, ".zst": 4.5, ".parquet": 2.5}


def _characters(path: StoragePath, size: int) -> float:
    return size * next((ratio for suffix, ratio in _RATIO.items() if path.name.endswith(suffix)), 1.0)
