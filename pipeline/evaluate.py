"""evaluate: judges a dictionary, and two baselines, on documents that nothing was trained on.

A unit is a span of held-out rows. Its worker runs the model once untouched and once per contender with
the contender's reconstruction spliced in at the hook point, and keeps only sums; metrics come from the
sums of all units. Rows that training filters out by position keep their own activations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch
from pydantic import Field
from torch.nn.functional import cosine_similarity, log_softmax

from cluster.pool import Resources
from cluster.storage.create import create_or_adopt
from cluster.storage.formats import read_tensors
from cluster.storage.path import StoragePath
from pipeline import metrics
from pipeline.activations.source import open_store
from pipeline.device import CARD_MEMORY, device
from pipeline.dictionary import baselines
from pipeline.dictionary.audit import audit
from pipeline.dictionary.footprint import coding
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.refit import refit
from pipeline.dictionary.stored import open_dictionary
from pipeline.dictionary.tree import TreeDictionary
from pipeline.metrics import Moments
from pipeline.sources import models
from pipeline.sources.hooks import capture, spliced
from pipeline.sources.sequences import Piece, TokenSequence, batches, overlapping, padded, pieces, read
from pipeline.stage import Committed, Estimate, Out, Params, Sources, Task
from schemas.events import Event, Note
from schemas.layouts import METRICS
from schemas.manifest import Dictionary, Manifest, Model
from schemas.records import ObjectEntry, Outputs, Unit

UNIT_ROWS = 16_384
OURS = "dictionary"
PARENTS = "parents"
# Of each unit, for which values are fitted together and all features of a tree are searched; and how much worse a tree
# may be for not doing so.
AUDIT_ROWS = 512
AUDIT, AUDIT_OF_TREE = ("encoded", "refitted"), ("exact", "flat")
MOST_GAP = 0.1
BASELINES = "baselines.safetensors"

# Measured: a worker that has imported torch, transformers, zarr and pyarrow.
WORKER_MEMORY = 800 * 2**20


class EvaluateParams(Params):
    """Identity of an evaluation."""

    hook_point: str
    target: str | None
    features: int
    k: int
    tokens: int
    baselines: tuple[str, ...]
    batch_tokens: int
    skip_positions: int
    seed: int
    model_dtype: str
    model: Model = Field(exclude=True)


class BaselineTask(Task):
    """Fit the baselines on a sample of what the dictionary was trained on."""

    harvest: Committed
    params: EvaluateParams


class SpanTask(Task):
    """One span of held-out rows."""

    first: int
    end: int
    pieces: tuple[Piece, ...]
    tokens: Committed
    train: Committed
    baselines: ObjectEntry | None
    params: EvaluateParams
    gpus: float = 0.0


def params(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> EvaluateParams:
    """See `Stage.params`."""
    assert dictionary is not None
    assert manifest.model is not None
    return EvaluateParams(
        hook_point=dictionary.encoded,
        target=None if dictionary.transcode is None else dictionary.explained,
        features=dictionary.size(sources.model.widths[dictionary.encoded]),
        k=dictionary.k,
        tokens=dictionary.evaluate.tokens,
        baselines=dictionary.evaluate.baselines,
        batch_tokens=manifest.harvest.batch_tokens,
        skip_positions=dictionary.train.filter.skip_positions,
        seed=dictionary.train.seed,
        model_dtype=manifest.model.dtype,
        model=sources.model.place,
    )


def check(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> None:
    """Nothing to refuse that others do not refuse."""


def estimate(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> Estimate:
    """See `Stage.estimate`. Logits of one batch, thrice, are the largest thing in a language model."""
    assert manifest.corpus is not None
    assert dictionary is not None
    settings = params(manifest, dictionary, sources)
    rows = max(1, min(sources.corpus.heldout_rows, settings.tokens))
    width = sources.model.widths[settings.hook_point]
    logits = settings.batch_tokens * sources.model.vocabulary * 4 * 4 if sources.model.is_causal_lm else 0
    weights = (2 * width + 1) * settings.features * 4
    contenders = 1 + len(settings.baselines)
    forward = settings.batch_tokens * (width * 4 * 32 + manifest.corpus.context * 64)
    on_card = bool(manifest.compute.gpus)
    encoding = coding(dictionary, settings.features, width, settings.batch_tokens, on_card)
    loaded, step = weights * 2 * contenders, logits + forward + encoding
    # A random dictionary is there as it was read, and as it is used.
    on_cards = weights * (1 + 2 * ("random" in settings.baselines))
    return Estimate(
        units=-(-rows // UNIT_ROWS) + bool(settings.baselines),
        rows=rows,
        stored_bytes=-(-rows // UNIT_ROWS) * settings.features * 8,
        objects=2 * -(-rows // UNIT_ROWS) + 6,
        memory=WORKER_MEMORY + sources.model.parameters * 8 + loaded + (0 if on_card else step),
        workers=manifest.compute.workers,
        gpus=manifest.compute.gpus,
        card=CARD_MEMORY + sources.model.parameters * 4 + on_cards + step if on_card else 0,
    )


def run(inputs: Mapping[str, Committed], params: EvaluateParams, out: Out) -> Outputs:
    """Fit the baselines, judge every span, add up."""
    tokens, train = inputs["tokenize"], inputs["train"]
    rows = min(tokens.facts["heldout_rows"], params.tokens)
    resources = Resources(threads=out.compute.threads, gpus=out.compute.gpus)
    fitted = None
    if params.baselines:
        fitting = BaselineTask(unit="baselines", harvest=inputs["harvest"], params=params)
        (fitted,) = out.map(fit_baselines, [fitting], resources)["baselines"].made.objects
    every = pieces(tokens, "heldout")
    spans = [(first, min(first + UNIT_ROWS, rows)) for first in range(0, rows, UNIT_ROWS)]
    tasks = [
        SpanTask(
            unit=f"{index:06d}",
            first=first,
            end=end,
            pieces=overlapping(every, first, end),
            tokens=tokens,
            train=train,
            baselines=fitted,
            params=params,
            gpus=out.compute.gpus,
        )
        for index, (first, end) in enumerate(spans)
    ]
    records = out.map(judge_span, tasks, resources)
    judged = summarize(params, train, [(out.path, records[unit].made) for unit in sorted(records)])
    warn(judged, out.stage, out.emit)
    body = json.dumps(judged, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
    return Outputs(objects=(out.write(METRICS, body),), facts={"metrics": judged.get(OURS, {})})


def warn(judged: Mapping[str, Any], stage: str, emit: Callable[[Event], None]) -> None:
    """Say where a tree explains much less than it would if it searched all of its children."""
    gap = judged.get("audit", {}).get("gap", 0.0)
    if gap > MOST_GAP:
        emit(
            Note(
                stage,
                f"FVU is {gap:.0%} higher for searching the children of routed parents alone, where more would explain "
                "more -> raise tree.routed",
            )
        )


def fit_baselines(task: BaselineTask, path: StoragePath) -> Unit:
    """Fit and keep the baselines."""
    settings = task.params
    store = open_store(task.harvest)
    sample_ND = store.slab(settings.hook_point, 0).x_ND.float()
    target_NE = None if settings.target is None else store.slab(settings.target, 0).x_ND.float()
    body = safetensors.torch.save(baselines.fit(sample_ND, settings.features, settings.k, settings.seed, target_NE))
    create_or_adopt(path / BASELINES, body)
    return Unit(objects=(ObjectEntry.of(BASELINES, body),), rows=len(sample_ND))


def judge_span(task: SpanTask, path: StoragePath) -> Unit:
    """All sums of one span. Sums are kept as an object, because some of them are as wide as the dictionary."""
    settings = task.params
    loaded = models.load(settings.model, task.gpus)
    dictionary = open_dictionary(task.train, device(task.gpus)).dictionary
    fires_F = torch.zeros(dictionary.features, dtype=torch.int64, device=dictionary.b_dec.device)
    codes: dict[str, torch.Tensor] = {}

    def ours(x_ND: torch.Tensor) -> torch.Tensor:
        z_NK, indices_NK = dictionary.encode(x_ND)
        fires_F.add_(torch.bincount(indices_NK[z_NK > 0], minlength=dictionary.features))
        codes[OURS] = z_NK
        return dictionary.decode(z_NK, indices_NK)

    contenders: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {OURS: ours}
    tree = dictionary if isinstance(dictionary, TreeDictionary) else None
    if tree is not None:

        def parents(x_ND: torch.Tensor) -> torch.Tensor:
            x_hat_ND, codes[PARENTS] = tree.parents_alone(x_ND)
            return x_hat_ND

        contenders[PARENTS] = parents
    if task.baselines is not None:
        fitted = {name: value.to(fires_F.device) for name, value in read_tensors(path, task.baselines).items()}
        contenders |= {name: baselines.reconstructor(name, fitted, settings.k) for name in settings.baselines}
        mean_E = fitted["mean"]
        contenders["mean"] = lambda x_ND: mean_E.expand(len(x_ND), -1)
    contenders["zero"] = lambda x_ND: x_ND.new_zeros(len(x_ND), dictionary.W_dec.shape[1])
    judge = _Judge(loaded, settings, contenders, codes, dictionary)
    sequences = read(task.tokens.path, task.pieces, task.first, task.end)
    # A sequence belongs to the span that holds its first row, so that no token is judged twice.
    own = [sequence for sequence in sequences if task.first <= sequence.first_row < task.end]
    # One without a judged token says nothing of a contender; it must not count where it shares a batch.
    judged = [sequence for sequence in own if len(sequence) > settings.skip_positions]
    with torch.inference_mode():
        for batch in batches(judged, settings.batch_tokens):
            judge.batch(batch)
    tensors, numbers = judge.sums()
    tensors["fires"] = fires_F.cpu()
    key = f"sums/{task.unit}.safetensors"
    body = safetensors.torch.save(tensors)
    create_or_adopt(path / key, body)
    return Unit(
        objects=(ObjectEntry.of(key, body),), rows=sum(len(sequence) for sequence in own), facts={"sums": numbers}
    )


class _Judge:
    """Runs batches and adds up what they say."""

    def __init__(
        self,
        loaded: models.Loaded,
        settings: EvaluateParams,
        contenders: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
        codes: dict[str, torch.Tensor],
        dictionary: TopKDictionary,
    ) -> None:
        self._dictionary, self._audited = dictionary, 0
        self._loaded, self._model, self._is_causal_lm = loaded, loaded.model, loaded.is_causal_lm
        self._settings = settings
        self._contenders, self._codes = contenders, codes
        self._moments: dict[str, Moments] = {}
        self._numbers: dict[str, float] = {}

    def batch(self, batch: list[TokenSequence]) -> None:
        inputs = self._loaded.placed(padded(batch))
        # Masks stay on the CPU: from there they choose among what lies on any device.
        length_B = torch.tensor([len(sequence) for sequence in batch])
        position_S = torch.arange(inputs["input_ids"].shape[1])
        real_BS = position_S < length_B[:, None]
        judged_BS = real_BS & (position_S >= self._settings.skip_positions)
        source, target = self._settings.hook_point, self._settings.target or self._settings.hook_point
        # What comes last in the model is not known: all of it is run where there are two.
        stop_at = source if source == target else None
        seen = capture(self._model, list(dict.fromkeys((source, target))), inputs, stop_at=stop_at)
        x_ND, y_ND = (seen[place][judged_BS].float().to(self._loaded.device) for place in (source, target))
        if self._audited < AUDIT_ROWS:
            some = slice(AUDIT_ROWS - self._audited)
            self._audit(x_ND[some], y_ND[some])
        untouched = self._read_out(self._model(**inputs), inputs, real_BS)
        for name, contender in self._contenders.items():
            self._codes.clear()
            x_hat_ND = contender(x_ND)
            if name not in ("zero", "mean"):
                self._count(name, Moments.of(y_ND, x_hat_ND, self._codes.get(name)))

            def put(x_BSD: torch.Tensor, x_hat_ND: torch.Tensor = x_hat_ND) -> torch.Tensor:
                changed_BSD = x_BSD.clone()
                changed_BSD[judged_BS] = x_hat_ND.to(x_BSD)
                return changed_BSD

            with spliced(self._model, target, put):
                self._compare(name, untouched, self._read_out(self._model(**inputs), inputs, real_BS))

    def _audit(self, x_ND: torch.Tensor, y_ND: torch.Tensor) -> None:
        """What is lost on some tokens: by an encoder's values, and by searching few of a tree's features."""
        dictionary = self._dictionary
        z_NK, indices_NK = dictionary.encode(x_ND)
        refitted_NK = refit(dictionary, z_NK, indices_NK, y_ND)
        for name, values_NK in zip(AUDIT, (z_NK, refitted_NK), strict=True):
            self._count(f"audit-{name}", Moments.of(y_ND, dictionary.decode(values_NK, indices_NK)))
        self._audited += len(x_ND)
        if not isinstance(dictionary, TreeDictionary):
            return
        made = audit(dictionary, x_ND)
        for name in AUDIT_OF_TREE:
            self._count(f"audit-{name}", Moments.of(y_ND, getattr(made, f"{name}_ND")))
        self._add("audit.found", torch.tensor(float(made.found)))
        self._add("audit.wanted", torch.tensor(float(made.wanted)))

    def _count(self, name: str, made: Moments) -> None:
        self._moments[name] = self._moments[name] + made if name in self._moments else made

    def _read_out(self, output: Any, inputs: dict[str, torch.Tensor], real_BS: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the judged predictions (N, V), or sentence embeddings (B, D)."""
        if self._is_causal_lm:
            predicts_BS = real_BS[:, :-1] & real_BS[:, 1:]
            self._targets_N = inputs["input_ids"][:, 1:][predicts_BS].to(output.logits.device)
            return log_softmax(output.logits[:, :-1][predicts_BS].float(), dim=-1)
        real_BS = real_BS.to(output.last_hidden_state.device)
        hidden_BSD = output.last_hidden_state * real_BS[:, :, None]
        return torch.as_tensor(hidden_BSD.sum(1) / real_BS.sum(1, keepdim=True))

    def _compare(self, name: str, untouched: torch.Tensor, now: torch.Tensor) -> None:
        if self._is_causal_lm:
            if name == OURS:
                self._add("model.ce", -untouched.gather(1, self._targets_N[:, None]).double().sum())
                self._add("predictions", torch.tensor(float(len(untouched))))
            self._add(f"{name}.ce", -now.gather(1, self._targets_N[:, None]).double().sum())
            self._add(f"{name}.kl", (untouched.exp() * (untouched - now)).sum(1).double().sum())
        else:
            if name == OURS:
                self._add("sequences", torch.tensor(float(len(untouched))))
            self._add(f"{name}.output_cosine", cosine_similarity(untouched, now).double().sum())

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._numbers[name] = self._numbers.get(name, 0.0) + float(value)

    def sums(self) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Wide sums and single ones."""
        tensors, numbers = dict[str, torch.Tensor](), dict(self._numbers)
        for name, moments in self._moments.items():
            wide, single = moments.sums(name)
            tensors |= wide
            numbers |= single
        return tensors, numbers


def summarize(params: EvaluateParams, train: Committed, units: list[tuple[StoragePath, Unit]]) -> dict[str, Any]:
    """Metrics out of the sums of all units; empty of contenders where there is no held-out token."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, float] = {}
    for path, unit in units:
        for name, value in read_tensors(path, unit.objects[0]).items():
            tensors[name] = tensors[name] + value if name in tensors else value
        for name, number in unit.facts["sums"].items():
            numbers[name] = numbers.get(name, 0.0) + number
    judged: dict[str, Any] = {
        "hook_point": params.hook_point,
        **({} if params.target is None else {"target": params.target}),
        "width": train.facts["width"],
        "features": params.features,
        "k": params.k,
        "tokens": int(numbers.get(f"{OURS}.tokens", 0)),
        "dead_window_tokens": train.facts["dead_window_tokens"],
    }
    if not judged["tokens"]:
        return judged
    parents = (PARENTS,) if f"{PARENTS}.tokens" in numbers else ()
    for name in (OURS, *parents, *params.baselines):
        judged[name] = metrics.reconstruction(Moments.of_sums(name, tensors, numbers)) | _output(name, numbers)
        if name in params.baselines:
            # Baselines keep no code; PCA has k components on for every token, the random dictionary k features.
            judged[name] |= {"l0": float(params.k)}
            del judged[name]["l1"]
    judged["audit"] = _audited(tensors, numbers)
    judged[OURS]["dead"] = train.facts["dead"]
    judged[OURS]["never_fired_heldout"] = float((tensors["fires"] == 0).double().mean())
    judged["density_histogram"] = metrics.density_histogram(tensors["fires"], judged["tokens"])
    if "predictions" in numbers:
        per = {
            name: numbers[f"{name}.ce"] / numbers["predictions"]
            for name in ("model", "zero", "mean")
            if f"{name}.ce" in numbers
        }
        judged["model"] = {("ce_loss" if name == "model" else f"ce_{name}"): value for name, value in per.items()}
    return judged


def _audited(tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, float]) -> dict[str, float]:
    """What is lost by the values that an encoder gives, and, of a tree, by searching few of its features."""
    of_tree = AUDIT_OF_TREE if "audit.wanted" in numbers else ()
    fvu = {name: metrics.fvu(Moments.of_sums(f"audit-{name}", tensors, numbers)) for name in (*AUDIT, *of_tree)}
    made = {"tokens": int(numbers["audit-encoded.tokens"])} | {f"fvu_{name}": value for name, value in fvu.items()}
    if of_tree:
        made["routing_recall"] = numbers["audit.found"] / max(numbers["audit.wanted"], 1.0)
        made["gap"] = fvu["encoded"] / max(fvu["exact"], 1e-12) - 1.0
    return made


def _output(name: str, numbers: Mapping[str, float]) -> dict[str, float]:
    """What the splice does to the model's output."""
    if "sequences" in numbers:
        return {"output_cosine": numbers[f"{name}.output_cosine"] / numbers["sequences"]}
    if "predictions" not in numbers:
        return {}
    count = numbers["predictions"]
    found = {
        "ce_loss": numbers[f"{name}.ce"] / count,
        "ce_recovered": metrics.recovered(numbers[f"{name}.ce"], numbers["model.ce"], numbers["zero.ce"]),
        "kl": numbers[f"{name}.kl"] / count,
        "kl_recovered": metrics.recovered(numbers[f"{name}.kl"], 0.0, numbers["zero.kl"]),
    }
    if "mean.ce" in numbers:
        found["ce_recovered_mean"] = metrics.recovered(numbers[f"{name}.ce"], numbers["model.ce"], numbers["mean.ce"])
    return found
