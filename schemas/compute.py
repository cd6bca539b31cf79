"""The manifest's section about where a run happens: what can never change a result."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from schemas.quantities import Bytes, Processes, Section


class Sharding(Section):
    """The mesh of training ranks, features x data: each has a part of the features and a part of each batch."""

    features: Processes = Field(default=1, description="Ranks that share the features of a dictionary.")
    data: Processes = Field(default=1, description="Ranks that share a batch.")
    auto: bool = Field(
        default=False, description="Choose both from the devices and their memory; `sharding: auto` says the same."
    )

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return {"auto": True} if value == "auto" else value

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.auto and self.ranks > 1:
            raise ValueError("give either auto or features and data")
        return self

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.features * self.data


class Zero(Section):
    """What DeepSpeed shards of a dense optimizer over the ranks that share a batch."""

    stage: Literal[0, 1, 2, 3] = Field(
        default=0, description="1 shards moments, 2 gradients as well, 3 weights as well; 0 nothing."
    )
    offload: Literal["none", "cpu"] = Field(
        default="none", description="Where moments and the weights that the optimizer moves are kept."
    )

    @model_validator(mode="after")
    def _something_to_offload(self) -> Self:
        if self.offload == "cpu" and self.stage == 0:
            raise ValueError("offload cpu needs stage 1, 2 or 3; found 0")
        return self


class Compute(Section):
    """Where the run happens. Nothing here can change a result, so nothing here enters a fingerprint."""

    pool: Literal["ray", "inline"] = Field(
        default="ray", description="inline runs everything in this process, for tests and debugging."
    )
    address: str | None = Field(
        default=None, description="An existing Ray cluster; a local one is started and stopped if left out."
    )
    workers: Processes = Field(default=2, description="Workers for tokenize, harvest, evaluate and catalog.")
    threads: Processes = Field(default=1, description="CPU threads of each worker.")
    gpus: float = Field(
        default=0.0,
        ge=0.0,
        description="GPUs of each worker of harvest, evaluate and catalog: a part of one lets several share it, and "
        "on several a model is spread. Where it is not 0 every training rank has a GPU.",
    )
    sharding: Sharding = Sharding()
    zero: Zero = Zero()
    accumulate: Processes = Field(
        default=1, description="Parts of a rank's share of a batch whose gradients adam adds up, one after the other."
    )
    rank_threads: Processes = Field(default=2, description="CPU threads of each training rank.")
    memory: Bytes | None = Field(
        default=None, description="Memory that the run may take on a machine; that of the machine if left out."
    )
    gpu_memory: Bytes | None = Field(
        default=None,
        description="Memory of one GPU; that of this machine's if left out. A cluster's are asked once it is joined; "
        "sharding auto, and dictionaries that share a pass there, need to know it before.",
    )
    attempts: int = Field(
        default=3,
        ge=1,
        le=2**20,
        description="Times that a unit which fails by itself is tried. Lost workers are replaced without end.",
    )
    unit_seconds: float = Field(
        default=3600.0,
        gt=0.0,
        description="Time that a unit may take. Then its worker is killed, and the unit has failed once more.",
    )
    rank_seconds: float = Field(
        default=600.0,
        gt=0.0,
        description="Time that training may stand still while a rank reads or saves. Then all ranks are started again "
        "from the last checkpoint.",
    )
    only: tuple[str, ...] = Field(
        default=(),
        description="Dictionaries that this run makes, so that several runs of one root can have some each; all if "
        "left out.",
    )
    share_reads: bool = Field(
        default=True,
        description="Train dictionaries that see the same activations in the same order in one pass of the store, as "
        "many as there is memory for.",
    )
    checkpoint_seconds: float = Field(default=30.0, gt=0.0, description="Time between training checkpoints.")
    lease_seconds: float = Field(
        default=90.0, ge=1.0, description="Silence after which a run counts as dead and another one may take over."
    )
    single_writer: bool = Field(
        default=False, description="Vouch that no two runs write below this root at once; for stores that overwrite."
    )
    deterministic: bool = Field(default=True, description="Use only kernels that give the same bits every time.")

    @property
    def rank_gpus(self) -> float:
        """GPUs of a training rank: one for itself where workers have any, because ranks cannot share one."""
        return 1.0 if self.gpus else 0.0

    @field_validator("address")
    @classmethod
    def _the_cluster_itself(cls, value: str | None) -> str | None:
        if value is not None and value.startswith("ray://"):
            raise ValueError(
                f"{value} is a Ray Client address; give that of the cluster itself (host:6379), from a machine of it"
            )
        return value
