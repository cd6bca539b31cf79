"""Arrow schemas of every Parquet file that a run writes."""

from __future__ import annotations

import pyarrow as pa

TOKENS = pa.schema(
    [
        pa.field("document", pa.int64(), nullable=False),
        pa.field("offset", pa.int32(), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
    ],
    metadata={"offset": "place in the document of the sequence's first token, BOS not counted"},
)

TOKEN_INDEX = pa.schema(
    [
        pa.field("split", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("sequences", pa.int64(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("first_row", pa.int64(), nullable=False),
    ]
)

FEATURE_STATISTICS = pa.schema(
    [
        pa.field("feature", pa.int64(), nullable=False),
        pa.field("fires", pa.int64(), nullable=False),
        pa.field("density", pa.float64(), nullable=False),
        pa.field("mean", pa.float64(), nullable=False),
        pa.field("std", pa.float64(), nullable=False),
        pa.field("max", pa.float32(), nullable=False),
        pa.field("decoder_norm", pa.float32(), nullable=False),
        pa.field("encoder_norm", pa.float32(), nullable=False),
        pa.field("encoder_decoder_cosine", pa.float32()),
        pa.field("nearest_feature", pa.int64(), nullable=False),
        pa.field("nearest_cosine", pa.float32(), nullable=False),
        pa.field("top_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("bottom_tokens", pa.list_(pa.int32()), nullable=False),
    ],
    metadata={"mean": "over the tokens on which the feature fires", "std": "likewise"},
)

EXAMPLES = pa.schema(
    [
        pa.field("feature", pa.int64(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("activation", pa.float32(), nullable=False),
        pa.field("peak", pa.int32(), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("activations", pa.list_(pa.float32()), nullable=False),
    ],
    metadata={"peak": "index of the activating token in `tokens`"},
)

CURVES = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        *(
            pa.field(name, pa.float64(), nullable=False)
            for name in ("loss", "fvu", "l0", "dead", "aux_loss", "learning_rate", "gradient_norm")
        ),
    ]
)

# One line for each unit and hook point of a harvest: the hash sum of every chunk's rows.
STORE_HASHES = pa.schema([("unit", pa.int64()), ("hook_point", pa.string()), ("sums", pa.list_(pa.uint64()))])

# How often known features fired in a unit; those that did not are left out.
UNIT_FIRES = pa.schema([("hook_point", pa.string()), ("feature", pa.int64()), ("fires", pa.int64())])

KNOWN = pa.schema(
    [
        pa.field("feature", pa.int64(), nullable=False),
        pa.field("represented", pa.bool_(), nullable=False),
        pa.field("norm", pa.float32(), nullable=False),
        pa.field("parent", pa.int64(), nullable=False),
        pa.field("fires", pa.int64(), nullable=False),
        pa.field("nearest", pa.int64(), nullable=False),
        pa.field("cosine", pa.float32(), nullable=False),
        pa.field("matched", pa.int64()),
        pa.field("precision", pa.float32()),
        pa.field("recall", pa.float32()),
        pa.field("f1", pa.float32()),
    ],
    metadata={
        "fires": "in the training split",
        "nearest": "feature of the dictionary whose decoder row is nearest, -1 if none fired",
        "cosine": "with it",
        "matched": "feature, dead or alive, whose decoder row has the largest cosine of either sign",
        "precision": "of that feature's firing, on held-out rows; recall and f1 likewise",
    },
)

MATCHES = pa.schema(
    [
        pa.field("feature", pa.int64(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("known", pa.int64(), nullable=False),
        pa.field("cosine", pa.float32(), nullable=False),
        pa.field("known_fires", pa.int64(), nullable=False),
    ],
    metadata={"known": "known feature whose direction is so near to the decoder row"},
)
