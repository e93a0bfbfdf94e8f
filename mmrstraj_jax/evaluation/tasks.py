"""The tasks of `python -m mmrstraj_jax.evaluate`: whose items, asked in which words, scored how."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmrstraj_jax.data.records import resolve_inside
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import readers
from mmrstraj_jax.evaluation.readers import Item

ONE_SENTENCE = "Describe this image in one short sentence."  # scored sets have eleven words a caption
SHORT = "Answer the question using a single word or phrase."  # GeoChat's words for RSVQA
TEXTS = ("caption", "description")  # item types that ask for text; all others are questions
Loader = Callable[[Path | None, Path | None], list[Item]]


@dataclass(frozen=True)
class Task:
    """How a task is read, asked and scored."""

    name: str
    title: str
    load: Loader  # (data, images) -> items
    train: Loader | None  # the training split: caption baselines are taken from it
    scorer: str  # "meaning": captions and the VQA rules; "rsvqa-lr", "rsvqa-hr": exact match in Lobry's bins
    ask: str = "{question}"  # the prompt; {question} is the item's
    max_new_tokens: int = 256
    closed: frozenset[str] = frozenset()  # all answers there are: any other than the reference is wrong
    structured: bool = False  # answers are JSON lists of semantic units (evaluation.traffic)

    def prompt(self, item: Item) -> str:
        """The text that a model is asked; part of the protocol, recorded with every prediction."""
        return self.ask.replace("{question}", item.question or "")


def _need(data: Path | None, what: str) -> Path:
    if data is None:
        raise UserError(f"--data PATH: expected {what}; it is not shipped with this package")
    if not data.exists():
        raise UserError(f"--data {data}: no such file or folder; expected {what}")
    return data


def _karpathy(name: str, split: str) -> Loader:
    file = f"dataset_{'RSITMD' if name == 'rsitmd' else name}.json"
    what = f"{file} or its folder"

    def load(data: Path | None, images: Path | None) -> list[Item]:
        path = _need(data, what)
        if path.is_dir():  # UCM_captions/ and Sydney_captions/ came with plain dataset.json
            path = next((path / n for n in (file, "dataset.json") if (path / n).is_file()), path / file)
        return readers.karpathy(path, split, images)

    return load


def _simple(reader: Callable, what: str, **options) -> Loader:
    return lambda data, images: reader(_need(data, what), images=images, **options)


def _rsvqa(variant: str, split: str = "test") -> Loader:
    what = "the folder with the question and answer files of RSVQA"
    return lambda data, images: readers.rsvqa(_need(data, what), variant, split, images)


def _nwpu(split: str) -> Loader:
    def load(data: Path | None, images: Path | None) -> list[Item]:
        path = _need(data, "dataset_nwpu.json or its folder")
        return readers.nwpu(path / "dataset_nwpu.json" if path.is_dir() else path, split, images)

    return load


# ---- SynthCity ----


def synthcity_rows(path: Path, images: Path | None = None) -> list[Item]:
    """Single-turn LLaVA-OneVision rows with "type" and "truth" as items; id "<file stem>/<row id>".

    Raises UserError: not such a file.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as rows of an evaluation sample ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list of rows")
    items = []
    for number, row in enumerate(rows):
        try:
            (human, answer), kind = row["conversations"], row["type"]
            question = human["value"].removeprefix("<image>").strip()
            image = resolve_inside(images or path.parent, row["image"], must_exist=False)
            items.append(
                Item(
                    f"{path.stem}/{row['id']}",
                    (image,),
                    question,
                    kind,
                    (answer["value"],),
                    {"truth": row["truth"]},
                )
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: row {number}: expected id, image, type, truth and one turn ({error})"
            ) from None
    return items


def _synthcity(data: Path | None, images: Path | None) -> list[Item]:
    if data is not None:
        return synthcity_rows(_need(data, "a file of write_sample's evaluation rows"), images)
    from mmrstraj_jax.synthcity.sample import ensure_sample

    sample = ensure_sample()
    return [
        item for split in ("eval_stage1", "eval_stage2") for item in synthcity_rows(sample[split], images)
    ]


def _synthcity_train(data: Path | None, images: Path | None) -> list[Item]:
    if data is not None:
        return []
    from mmrstraj_jax.synthcity import captions, traffic
    from mmrstraj_jax.synthcity.sample import ensure_sample

    sample, prompts = ensure_sample(), {**dict.fromkeys(captions.PROMPTS, "caption")}
    prompts |= dict.fromkeys(traffic.PROMPTS, "description")
    items = []
    for split in ("stage1", "stage2"):
        for row in json.loads(sample[split].read_text(encoding="utf-8")):
            turns = row["conversations"]
            for human, answer in zip(turns[::2], turns[1::2], strict=True):
                kind = prompts.get(human["value"].removeprefix("<image>").strip())
                if kind:
                    image = sample[split].parent / row["image"]
                    items.append(Item(f"{split}/{row['id']}", (image,), None, kind, (answer["value"],)))
    return items


def _traffic_semantics(data: Path | None, images: Path | None) -> list[Item]:
    """Descriptions of SynthCity's held-out images, or the captions of RSIEval."""
    if data is None:
        return [item for item in _synthcity(None, images) if item.type == "description"]
    return readers.rsieval_captions(_need(data, "annotations.json of RSIEval or its folder"), images=images)


def _bench(data: Path | None, images: Path | None) -> list[Item]:
    """SynthTraffic-Bench's questions, id "<file>#<position>"; drawn and checked on first use."""
    from mmrstraj_jax.synthcity.bench import ensure_bench

    path = ensure_bench() if data is None else _need(data, "annotations.json of SynthTraffic-Bench")
    path = path / "annotations.json" if path.is_dir() else path
    items, number = [], -1
    try:
        for row in json.loads(path.read_text(encoding="utf-8"))["annotations"]:
            number += 1
            image = resolve_inside(images or path.parent / "images", row["filename"], must_exist=False)
            for n, pair in enumerate(row["qa_pairs"]):
                meta = {"domain": row["domain"], "truth": pair["truth"]}
                name, answer = f"{row['filename']}#{n}", (pair["answer"],)
                items.append(Item(name, (image,), pair["question"], pair["type"], answer, meta))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: row {max(number, 0)}: expected filename, domain and qa_pairs with truth, as "
            f"SynthTraffic-Bench has them ({type(error).__name__}: {error}); RSIEval's is --task rsieval-vqa"
        ) from None
    return items


# fixed, and not what the evaluated items happen to have: a verdict must not depend on --limit
_CLOSED = frozenset(
    "yes|no|light|moderate|heavy|sparse|medium|dense|motorway|arterial|collector|local|peak hour|"
    "quiet hour|residential|industrial|commercial|apartments|park|farmland|harbor|airport|sports field|"
    "urban|rural|river|grass|roads|water|buildings|trees|color|panchromatic|north-south|east-west|diagonal|"
    "crossroads|T-junction|roundabout|dead end|overpass|interchange|above|below|"
    "white|red|gray|blue|black|brown|yellow|"
    "top left|top|top right|left|center|right|bottom left|bottom|bottom right".split("|")
) | {str(n) for n in range(24)}
TASKS = {
    task.name: task
    for task in (
        Task(
            "synthcity",
            "SynthCity, held-out cities",
            _synthcity,
            _synthcity_train,
            "meaning",
            closed=_CLOSED,
        ),
        Task(
            "synthtraffic-bench",
            "SynthTraffic-Bench",
            _bench,
            None,
            "meaning",
            max_new_tokens=16,
            closed=_CLOSED,
        ),
        Task(
            "traffic-semantics",
            "Traffic semantics",
            _traffic_semantics,
            None,
            "meaning",
            "Describe the traffic here: road structure, bottlenecks, flow density and functional zoning.",
        ),
        Task(
            "rsieval-caption",
            "RSIEval, captions",
            _simple(readers.rsieval_captions, "annotations.json of RSIEval or its folder"),
            None,
            "meaning",
            "Describe this image in detail.",
        ),
        Task(
            "rsieval-vqa",
            "RSIEval, questions",
            _simple(readers.rsieval_questions, "annotations.json of RSIEval or its folder"),
            None,
            "meaning",
            max_new_tokens=64,
        ),
        *(
            Task(name, title, _karpathy(name, "test"), _karpathy(name, "train"), "meaning", ONE_SENTENCE, 64)
            for name, title in (
                ("ucm", "UCM-Captions"), ("sydney", "Sydney-Captions"), ("rsicd", "RSICD"),
                ("rsitmd", "RSITMD"),
            )
        ),
        Task("nwpu", "NWPU-Captions", _nwpu("test"), _nwpu("train"), "meaning", ONE_SENTENCE, 64),
        Task("rsvqa-lr", "RSVQA, low resolution", _rsvqa("lr"), None, "rsvqa-lr", "{question}\n" + SHORT, 16),
        *(
            Task(name, title, _rsvqa("hr", split), None, "rsvqa-hr", "{question}\n" + SHORT, 16)
            for name, title, split in (
                ("rsvqa-hr", "RSVQA, high resolution", "test"),
                ("rsvqa-hr-phili", "RSVQA, high resolution, Philadelphia", "test_phili"),
            )
        ),
        Task(
            "levir-cc",
            "LEVIR-CC, changes between two images",
            _simple(readers.levir_cc, "LevirCCcaptions.json or its folder"),
            _simple(readers.levir_cc, "LevirCCcaptions.json or its folder", split="train"),
            "meaning",
            "The first image was taken before the second. Describe in one short sentence what has changed.",
            64,
        ),
    )
}  # fmt: skip


def get(name: str) -> Task:
    """The task of a name. Raises UserError with all names."""
    if name not in TASKS:
        raise UserError(f"--task {name}: expected one of {', '.join(TASKS)}")
    return TASKS[name]


def limited(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items, evenly drawn over the whole list: a quick look, never a score to publish."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]
