"""Where everything lies. Keys are relative to a stage's folder unless they say otherwise.

<root>/tokenize/<fp16>/                      fp16: first 16 digits of the stage's fingerprint
SPEC.json  units/  COMMITTED.json        what the folder is for, what is in it, that it is whole
train/ heldout/                          token sequences, Parquet
index.parquet                            rows of every row group, in corpus order
<root>/harvest/<fp16>/
activations.zarr/                        a plain Zarr v3 group
<root>/dictionaries/<name>/<stage>/<fp16>/   train, evaluate, catalog, export
log/  beats/                             leases and checkpoints, and signs of life (also of the stages above)
checkpoints/                             train only
<root>/runs/<run>/                           manifest and events of every run
"""

from __future__ import annotations

from collections.abc import Iterable

SPEC = "SPEC.json"
COMMITTED = "COMMITTED.json"
UNITS = "units"
LOG = "log"
BEATS = "beats"
CHECKPOINTS = "checkpoints"
RUNS = "runs"

TOKEN_INDEX = "index.parquet"
STORE_OBJECTS = "objects.parquet"
STORE_HASHES = "hashes.parquet"
STORE = "activations.zarr"
ROW, TOKEN, POSITION = "row", "token", "position"

DICTIONARY = "dictionary.safetensors"
DICTIONARY_CONFIG = "dictionary.json"
CURVES = "curves.parquet"
METRICS = "metrics.json"
FEATURES = "features.parquet"
EXAMPLES = "examples.parquet"
REPORT = "report.html"

# Of synthetic sources: what is known of them, and which feature is which known one.
FIRES = "fires.safetensors"
KNOWN = "known.parquet"
MATCHES = "matches.parquet"


def dictionary_key(piece: int, pieces: int) -> str:
    """Key of a dictionary's weights, or of a piece of them where one file would be too large.

    >>> dictionary_key(0, 1), dictionary_key(1, 3)
    ('dictionary.safetensors', 'dictionary-00002-of-00003.safetensors')
    """
    if pieces == 1:
        return DICTIONARY
    stem, _, suffix = DICTIONARY.partition(".")
    return f"{stem}-{piece + 1:05d}-of-{pieces:05d}.{suffix}"


def dictionary_keys(keys: Iterable[str]) -> list[str]:
    """Those of a stage's keys that are a dictionary's weights, in order; the one key where it is in one file.

    >>> dictionary_keys(["curves.parquet", "dictionary-00002-of-00002.safetensors",
    ...     "dictionary-00001-of-00002.safetensors", "dictionary.json"])
    ['dictionary-00001-of-00002.safetensors', 'dictionary-00002-of-00002.safetensors']
    """
    stem, _, suffix = DICTIONARY.partition(".")
    return sorted(key for key in keys if key.startswith(f"{stem}-") and key.endswith(suffix)) or [DICTIONARY]


def unit_key(unit: str) -> str:
    """Key of a unit's record."""
    return f"{UNITS}/{unit}.json"


def slot_key(slot: int) -> str:
    """Key of a slot of a stage's log."""
    return f"{LOG}/{slot:06d}.json"


def beat_key(epoch: int, nonce: str) -> str:
    """Key of the heartbeat of a lease's owner."""
    return f"{BEATS}/{epoch:06d}-{nonce[:8]}.json"


def array_name(hook_point: str) -> str:
    """Name of a hook point's array in the store; ':' is not safe in every file system or URL.

    >>> array_name("layers.2.mlp:in")
    'layers.2.mlp-in'
    """
    return hook_point.replace(":", "-")


def truth_key(hook_point: str) -> str:
    """Key of a hook point's true directions, or of the toy model that has them."""
    return f"truth/{array_name(hook_point)}.safetensors"


def norm_name(hook_point: str) -> str:
    """Name of the array with the L2 norm of a hook point's rows."""
    return f"{array_name(hook_point)}-norm"


def shard_key(array: str, unit: int, ndim: int) -> str:
    """Key of a unit's shard in an array of the store."""
    return f"{STORE}/{array}/c/{unit}" + "/0" * (ndim - 1)
