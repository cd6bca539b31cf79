"""The manifest: everything a run needs to know, parsed once at the door into frozen values.

Every field of `model`, `corpus`, `harvest` and `dictionaries` can change the bits of a result and is part
of a stage's fingerprint. Nothing in `compute` can: it says where and how fast, never what.

This module describes and cross-checks; it opens nothing. Reading YAML, overrides and the environment is
`jobs.manifest`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from schemas.compute import Compute
from schemas.examination import Catalog, Evaluate, Transcode
from schemas.quantities import Bytes, Count, Fraction, Name, Section, Seed, multiples
from schemas.sweep import SWEEP_SCHEMA, expanded
from schemas.synthetic import Synthetic
from schemas.training import Train
from schemas.tree import Tree, require_tree


class Model(Section):
    """The transformer whose activations are factorized."""

    source: str = Field(min_length=1, description="A local folder, or a name on the Hugging Face hub.")
    revision: str | None = Field(
        default=None, description="Commit of a hub model. Without one, the commit found by the first plan is pinned."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Precision of the forward pass."
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run the model's own Python code; one of the hub then needs a revision of 40 hex digits.",
    )

    @model_validator(mode="after")
    def _code_needs_a_pin(self) -> Self:
        # A branch and a tag can be moved to other code, and what looks like a short commit can be either. A local
        # folder needs none: its code is part of the fingerprint.
        local = self.source.startswith(("/", ".", "~"))
        if self.trust_remote_code and not local and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                "trust_remote_code runs code that can change; pin model.revision to a commit (40 hex digits) as well"
            )
        return self


class Corpus(Section):
    """The text, and how it becomes sequences."""

    source: str = Field(min_length=1, description="A file, a folder or a glob; any URL that fsspec opens.")
    text_field: str = Field(default="text", description="JSONL key or Parquet column that holds the text.")
    context: int = Field(default=256, ge=2, le=2**31, description="Most tokens in a sequence.")
    bos: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Begin every sequence with the BOS token; auto does so if the tokenizer has one.",
    )
    eos: Literal["always", "never"] = Field(default="never", description="End every document with the EOS token.")
    min_tokens: int = Field(
        default=8,
        ge=1,
        le=2**31,
        description="A document's last sequence is left out if it has fewer tokens than this.",
    )
    max_documents: Count | None = Field(default=None, description="Read at most so many documents of each file.")
    heldout: Fraction = Field(
        default=0.1, description="Share of documents, chosen by hash, that only evaluation may see."
    )


class Harvest(Section):
    """What is taken out of the model, and how it lies in the store."""

    hook_points: tuple[str, ...] = Field(
        default=(),
        description="Module paths of the model; ':in' behind one takes the module's input. Of synthetic, all of its "
        "hook points if left out.",
    )
    tokens: Count | None = Field(default=None, description="Rows to harvest; all of the training split if left out.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="bfloat16", description="Precision of the store.")
    batch_tokens: Count = Field(default=4096, description="Tokens in one forward pass.")
    unit_rows: Count | None = Field(default=None, description="Rows of a unit (one shard); chosen if left out.")
    chunk_rows: Count | None = Field(default=None, description="Rows of an inner chunk; chosen if left out.")
    loader_memory: Bytes = Field(
        default=2**30, description="Two slabs of the shuffle fit in this, on every training rank."
    )
    seed: Seed = 0

    @field_validator("hook_points")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for hook_point in value:
            if value.count(hook_point) > 1:
                raise ValueError(f"{hook_point!r} is named {value.count(hook_point)} times, expected once")
        return value

    @model_validator(mode="after")
    def _chunks_divide_units(self) -> Self:
        if self.unit_rows and self.chunk_rows and self.unit_rows % self.chunk_rows:
            below = self.unit_rows - self.unit_rows % self.chunk_rows
            raise ValueError(
                f"unit_rows {self.unit_rows} is not a multiple of chunk_rows {self.chunk_rows}; "
                f"nearest that is: {below or self.chunk_rows} or {below + self.chunk_rows}"
            )
        return self


class Dictionary(Section):
    """One dictionary: what it factorizes, its shape and its training."""

    name: Name
    hook_point: str | None = Field(default=None, description="Whose activations are factorized.")
    transcode: Transcode | None = Field(
        default=None, description="Instead of hook_point: encode one hook point's activations, explain another's."
    )
    features: Count | None = Field(default=None, description="F, the number of features.")
    expansion: Count | None = Field(default=None, description="F / d, instead of `features`.")
    activation: Literal["topk", "batch_topk", "jumprelu", "relu"] = Field(
        default="topk", description="What decides which features fire."
    )
    k: Count = Field(
        description="Active features per token; on average for batch_topk and jumprelu, at the start for relu."
    )
    tree: Tree | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="Features in two levels, of which each token looks at few: a thousand times more features than d.",
    )
    train: Train
    evaluate: Evaluate = Evaluate()
    catalog: Catalog = Catalog()
    export: tuple[Literal["saelens"], ...] = ("saelens",)
    sweep: Annotated[None, WithJsonSchema(SWEEP_SCHEMA)] = Field(
        default=None,
        exclude=True,
        description="Fields of this dictionary, such as k or train.seed, with a list of values each: there is a "
        "dictionary for every combination, and its name says which.",
    )

    @property
    def encoded(self) -> str:
        """The hook point whose activations are encoded."""
        return self.transcode.from_ if self.transcode is not None else str(self.hook_point)

    @property
    def explained(self) -> str:
        """The hook point whose activations are explained: the same, but for a transcoder."""
        return self.transcode.to if self.transcode is not None else str(self.hook_point)

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.hook_point is None) == (self.transcode is None):
            raise ValueError("give either hook_point or transcode")
        if self.transcode is not None and self.train.optimizer == "adam":
            raise ValueError("transcode needs train.optimizer row_adam; found adam")
        return self

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.features is None) == (self.expansion is None):
            raise ValueError("give either features or expansion")
        if self.features is not None and self.k > self.features:
            raise ValueError(f"k {self.k} exceeds features {self.features}")
        return self

    @model_validator(mode="after")
    def _trained_so(self) -> Self:
        train, name = self.train, self.activation
        if train.sparsity is not None and name in ("topk", "batch_topk"):
            raise ValueError(f"train.sparsity does nothing for {name}, which has k; leave it out")
        if train.resample and name == "relu":
            raise ValueError(
                "train.resample gives features a bias of 0, with which relu has half of them fire; leave it out"
            )
        if train.sparsity is None and name == "relu":
            raise ValueError("relu needs train.sparsity, the weight of its L1 loss; try 1")
        if train.sparsity is not None and train.sparsity.bandwidth is not None and name != "jumprelu":
            raise ValueError(f"train.sparsity.bandwidth is jumprelu's, found activation {name}; leave it out")
        if train.optimizer == "adam" and (name != "topk" or train.prefixes):
            what = "train.prefixes need" if train.prefixes else f"activation {name} needs"
            raise ValueError(f"{what} train.optimizer row_adam; found adam")
        if train.prefixes and self.features is not None and train.prefixes[-1] >= self.features:
            raise ValueError(
                f"train.prefixes has {train.prefixes[-1]}, expected less than features {self.features}; "
                "the whole dictionary comes by itself"
            )
        return self

    @model_validator(mode="after")
    def _tree_fits(self) -> Self:
        if self.tree is not None:
            require_tree(self, self.tree)
        return self

    def size(self, width: int) -> int:
        """F for a hook point of this width."""
        return self.features if self.features is not None else width * (self.expansion or 0)


class Manifest(Section):
    """One model and corpus, or a synthetic source, one harvest, and any number of dictionaries trained from it."""

    name: Name
    root: str = Field(min_length=1, description="Folder or bucket URL that holds everything the run makes.")
    model: Model | None = None
    corpus: Corpus | None = None
    synthetic: Synthetic | None = Field(
        default=None, description="Activations with known features, instead of model and corpus."
    )
    harvest: Harvest = Harvest()
    dictionaries: tuple[Dictionary, ...] = Field(min_length=1)
    compute: Compute = Compute()

    @field_validator("dictionaries", mode="before")
    @classmethod
    def _swept(cls, value: Any) -> Any:
        return expanded(value)

    @property
    def wanted(self) -> tuple[Dictionary, ...]:
        """The dictionaries that this run makes."""
        only = self.compute.only
        return tuple(each for each in self.dictionaries if not only or each.name in only)

    @property
    def hook_points(self) -> tuple[str, ...]:
        """The hook points that are harvested."""
        if self.synthetic is None or self.harvest.hook_points:
            return self.harvest.hook_points
        return tuple(self.synthetic.widths)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.synthetic is None:
            for name in ("model", "corpus", "harvest"):
                if name not in self.model_fields_set:
                    raise ValueError(f"{name}: this field is required, where synthetic is not given")
                if getattr(self, name) is None:
                    raise ValueError(f"{name}: expected a mapping of fields, found 'None'; or give synthetic instead")
            if not self.harvest.hook_points:
                raise ValueError("harvest.hook_points has none, expected module paths of the model")
            return self
        for name in ("model", "corpus"):
            if getattr(self, name) is not None:
                raise ValueError(f"synthetic and {name} are both given; give either synthetic, or model and corpus")
        known = list(self.synthetic.widths)
        for hook_point in self.harvest.hook_points:
            if hook_point not in known:
                raise ValueError(f"harvest.hook_points has {hook_point!r}, this synthetic source has {known}")
        if self.harvest.tokens is not None:
            raise ValueError("harvest.tokens does nothing for synthetic; set synthetic.rows instead")
        for index, dictionary in enumerate(self.dictionaries):
            if dictionary.transcode is not None:
                raise ValueError(
                    f"dictionaries.{index}.transcode: hook points of synthetic have no rows in common; give hook_point"
                )
            if dictionary.train.filter.skip_positions:
                raise ValueError(
                    f"dictionaries.{index}.train.filter.skip_positions {dictionary.train.filter.skip_positions} leaves "
                    "no row of synthetic, whose positions are all 0; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        sharding = self.compute.sharding
        if self.compute.pool == "inline" and sharding.ranks > 1:
            raise ValueError(
                f"compute.sharding has {sharding.ranks} ranks ({sharding.features} x {sharding.data}), the inline pool "
                f"has 1; use compute.pool ray"
            )
        names = [dictionary.name for dictionary in self.dictionaries]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two dictionaries are named {name!r}")
        for name in self.compute.only:
            if name not in names:
                raise ValueError(f"compute.only names {name!r}, which is no dictionary; there are {names}")
        for index, dictionary in enumerate(self.dictionaries):
            where = f"dictionaries.{index}"
            places = {"hook_point": dictionary.hook_point}
            if dictionary.transcode is not None:
                places = {"transcode.from": dictionary.encoded, "transcode.to": dictionary.explained}
            for field, place in places.items():
                if place not in self.hook_points:
                    raise ValueError(
                        f"{where}.{field} {place!r} is not harvested; harvest.hook_points has {list(self.hook_points)}"
                    )
            if dictionary.train.batch % sharding.data:
                raise ValueError(
                    f"{where}.train.batch {dictionary.train.batch} is not divisible by compute.sharding.data "
                    f"{sharding.data}; set it to {multiples(dictionary.train.batch, sharding.data)}"
                )
            self._optimizer_fits(where, dictionary.train)
        return self

    def _optimizer_fits(self, where: str, train: Train) -> None:
        compute = self.compute
        if train.optimizer == "row_adam":
            if compute.zero.stage:
                raise ValueError(
                    f"{where}.train.optimizer row_adam has no dense gradient, and its state is sharded with the "
                    f"features; found compute.zero.stage {compute.zero.stage}, expected 0: set "
                    "compute.sharding.features instead, or use adam"
                )
            if compute.accumulate > 1:
                raise ValueError(
                    f"{where}.train.optimizer row_adam has no gradient to add up, it keeps codes and errors of the "
                    f"whole batch; found compute.accumulate {compute.accumulate}, expected 1: lower train.batch "
                    "instead, or use adam"
                )
            return
        if compute.sharding.features > 1:
            raise ValueError(
                f"{where}.train.optimizer adam is dense; "
                f"compute.sharding.features {compute.sharding.features} needs row_adam"
            )
        parts = compute.sharding.data * compute.accumulate
        if train.batch % parts:
            raise ValueError(
                f"{where}.train.batch {train.batch} is not divisible by compute.sharding.data times "
                f"compute.accumulate, {parts}; set it to {multiples(train.batch, parts)}"
            )
        if train.weights == "bfloat16" and compute.zero.stage < 2:
            # Stage 1 would keep the whole gradient in float32, and take more memory than bfloat16 saves.
            raise ValueError(
                f"{where}.train.weights bfloat16 with adam needs the float32 copy that ZeRO shards; found "
                f"compute.zero.stage {compute.zero.stage}, expected 2 or 3"
            )

    def identity(self) -> dict[str, Any]:
        """The manifest without what cannot change a result."""
        return self.model_dump(mode="json", exclude={"root", "compute"})
