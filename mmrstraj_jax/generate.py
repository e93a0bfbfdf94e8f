"""Text from images: a prompt, a conversation, a folder, a trip, or held-out images of the embedded sample.

python -m mmrstraj_jax.generate --run runs/stage2 --image tile.png --prompt "Is there a bridge?"
python -m mmrstraj_jax.generate --weights DIR --image a.png --image b.png --chat
python -m mmrstraj_jax.generate --run runs/stage2 --video frames/ --prompt "What moves?"
python -m mmrstraj_jax.generate --run runs/stage1 --folder tiles/ --prompt "Describe it." --out out.jsonl
python -m mmrstraj_jax.generate --run runs/stage2 --held-out 3
python -m mmrstraj_jax.generate --run runs/stage2 --trajectory trip.plt --provider folder --tiles DIR \\
    --title NAME --attribution TEXT --licence TEXT --draw-track --out trip/
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from mmrstraj_jax.config import AnyResConfig
from mmrstraj_jax.construction import trip_image
from mmrstraj_jax.construction.files import dump
from mmrstraj_jax.construction.trip_image import TripImage
from mmrstraj_jax.errors import CommandParser, UserError, run_command
from mmrstraj_jax.inference.options import DecodeOptions

TRIP_PROMPT = "Describe the traffic and the road layout."
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".jp2", ".ppm"}


def _arguments(args: list[str]) -> argparse.Namespace:
    """The checked command line. Raises UserError: unknown, missing or contradicting options."""
    parser = CommandParser("generate", __doc__)
    add, defaults = parser.add_argument, DecodeOptions()
    add("--run", metavar="DIR", help="run directory of training")
    add("--weights", metavar="DIR", help="weights in our format, or an HF or lmms-lab folder")
    add(
        "--image",
        metavar="FILE",
        action="append",
        default=[],
        help="one is seen in Higher AnyRes; repeatable",
    )
    add("--video", metavar="DIR", help="folder of frames, in the order of their names")
    add("--prompt", help="the question; with --chat the first one")
    add("--chat", action="store_true", help="several turns about the same images; an empty line ends it")
    add("--folder", metavar="DIR", help="ask --prompt about every image of a folder")
    add(
        "--out",
        metavar="PATH",
        help="file of --folder's answers, one JSON object a line; folder of --trajectory's image and answer",
    )
    add("--held-out", metavar="N", type=int, help="a caption and an answer for N images no model has seen")
    add("--anyres", metavar="POLICY", help="tau or anyres_max_N; default: what the model was trained with")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on an accelerator, else float32")
    add("--batch-size", type=int, default=8, help="images at a time in --folder and --held-out (default 8)")
    for field in dataclasses.fields(DecodeOptions):
        value = getattr(defaults, field.name)
        add(f"--{field.name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    add("--trajectory", metavar="FILE", help="a GPS trip: fetches its image and describes its traffic")
    trip = parser.add_argument_group("the trip and its imagery, with --trajectory")
    for field in dataclasses.fields(TripImage):
        words = {"dest": field.name, "default": argparse.SUPPRESS, "help": trip_image.HELP[field.name]}
        kind = type(field.default)
        words |= {bool: {"action": "store_true"}, tuple: {"nargs": "+"}}.get(kind, {"type": kind})
        trip.add_argument(f"--{field.name.replace('_', '-')}", **words)
    options = parser.parse_args(args)

    given = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(TripImage)}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    if given and options.trajectory is None:
        raise UserError(f"--{next(iter(given)).replace('_', '-')}: goes with --trajectory FILE")
    options.trip_image = TripImage(**given)
    if options.trajectory is not None and options.prompt is None:
        options.prompt = TRIP_PROMPT
    if (options.run is None) == (options.weights is None):
        raise UserError("expected one of --run DIR and --weights DIR")
    modes = [options.folder is not None, options.held_out is not None]
    modes += [bool(options.image or options.video), options.trajectory is not None]
    if options.image and options.video:
        raise UserError("--image and --video: expected one of the two")
    if sum(modes) > 1 or (options.chat and any(modes[:2])):
        raise UserError(
            "--image or --video, --folder, --held-out, --trajectory: expected one of these, "
            "--chat with images and trajectories only"
        )
    if (options.folder is None and options.trajectory is None) != (options.out is None):
        raise UserError("--folder DIR and --out FILE belong together, as do --trajectory FILE and --out DIR")
    if options.prompt is None and not options.chat and options.held_out is None:
        raise UserError('--prompt "...": what should the model answer?')
    if options.held_out is not None and options.prompt is not None:
        raise UserError("--prompt: --held-out asks the sample's own questions; drop one of the two")
    for name in ("held_out", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected 1 or more")
    if options.anyres is not None:
        AnyResConfig(policy=options.anyres)
    if options.run is not None and not (Path(options.run) / "base.json").is_file():
        raise UserError(
            f"--run {options.run} is no run directory (it lacks base.json); weights go to --weights"
        )
    if options.weights is not None and (Path(options.weights) / "base.json").is_file():
        raise UserError(f"--weights {options.weights}: is a run directory; name it with --run")
    return options


def _files(folder: str, option: str) -> list[Path]:
    """Image files of a folder by name. Raises UserError where there is none."""
    if not Path(folder).is_dir():
        raise UserError(f"{option} {folder}: no such folder")
    files = sorted(
        path
        for path in Path(folder).iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise UserError(f"{option} {folder}: no image in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def _say(text: str) -> None:
    print(text, end="", flush=True)


def _converse(model, options: argparse.Namespace, decode: dict) -> list[dict]:
    """One answer, or with --chat one a line of stdin, written to stdout as it comes; the messages."""
    media = {"images": options.image}
    if options.video is not None:
        media["videos"] = [_files(options.video, "--video")]
    messages = []
    question = options.prompt
    while True:
        if question is None:
            try:
                question = input("> ")
            except (EOFError, KeyboardInterrupt):
                break
            if not question.strip():
                break
        # Typed parts: an "<image>" in a question is text.
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        answer = model.generate(messages, **media, **decode, stream=_say)
        print(flush=True)
        messages.append({"role": "assistant", "content": answer})
        if not options.chat:
            break
        question = None
    return messages


def _trip_image(options: argparse.Namespace) -> Path:
    """Fetches the trip's image into --out."""
    out = Path(options.out)
    if out.is_file():
        raise UserError(f"--out {out}: a file; expected a folder")
    path = out / f"{Path(options.trajectory).stem}.png"
    record = trip_image.write(path, Path(options.trajectory), options.trip_image)
    window, used = record["window"], record["fixes"]
    print(
        f"{path}: {window['width']} x {window['height']} px at zoom {window['zoom']}, "
        f"{record['gsd_metres']:.2f} m a pixel, {used['used']} of {used['read']} fixes used; "
        f"imagery: {record['provider']['attribution']}",
        file=sys.stderr,
    )
    return path


def _write_answer(path: Path, messages: list[dict], decode: dict) -> None:
    """The conversation about an image, in its `.answer.json`."""
    turns = []
    for message in messages:
        content = message["content"]
        text = content if isinstance(content, str) else content[0]["text"]
        turns.append({"role": message["role"], "text": text})
    path.with_suffix(".answer.json").write_bytes(dump({"image": path.name, "turns": turns, "decode": decode}))


def _check_files(options: argparse.Namespace) -> None:
    """Raises UserError for files and folders that cannot serve: the weights may take minutes to load."""
    for path in options.image:
        if not Path(path).is_file():
            raise UserError(f"--image {path}: no such file")
    if options.video is not None:
        _files(options.video, "--video")
    if options.folder is None:
        return
    _files(options.folder, "--folder")
    out = Path(options.out)
    if out.exists():
        raise UserError(f"--out {out}: exists already; remove it or name another file")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: no such folder as {out.parent}")


def _ask_folder(model, options: argparse.Namespace, decode: DecodeOptions) -> None:
    """One row of the Predictions contract per image, in the order in which answers finish."""
    files, out = _files(options.folder, "--folder"), Path(options.out)
    question = [{"role": "user", "content": [{"type": "text", "text": options.prompt}]}]
    requests = [model.request(question, [path], name=str(path)) for path in files]
    answers = model.engine.complete(requests, decode)
    # The first answer comes after every image was checked: before it, no file appears.
    for number, done in enumerate(answers, start=1):
        path = files[done.index]
        row = {
            "id": path.name,
            "image": str(path),
            "question": options.prompt,
            "type": None,
            "prediction": model.tokenizer.decode(done.ids),
            "references": [],
            "prompt": model.tokenizer.decode(requests[done.index].ids, skip_special=False),
            "decode": dataclasses.asdict(decode),
        }
        with out.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"\r{number} of {len(files)} images", end="", file=sys.stderr, flush=True)
    print(f"\n{out}: {len(files)} answers", file=sys.stderr)


def _held_out(model, options: argparse.Namespace, decode: dict) -> None:
    """A caption and one question for each of N images of the embedded evaluation sample, beside the truth."""
    from mmrstraj_jax.synthcity.sample import ensure_sample

    split = "eval_stage1"
    if options.run is not None:
        from mmrstraj_jax.training.run import read_config

        if read_config(Path(options.run)).name == "stage2":
            split = "eval_stage2"
    source = ensure_sample()[split]
    by_image: dict[str, list[dict]] = {}
    for row in json.loads(source.read_text(encoding="utf-8")):
        by_image.setdefault(row["image"], []).append(row)
    asked = []
    for number, rows in enumerate(list(by_image.values())[: options.held_out]):
        texts = [row for row in rows if row["type"] in ("caption", "description")]
        questions = [row for row in rows if row not in texts]
        # another kind of question for each image
        asked += texts[:1] + questions[number % max(len(questions), 1) :][:1]
    prompts = [row["conversations"][0]["value"] for row in asked]
    images = [[source.parent / row["image"]] for row in asked]
    answers = model.generate(prompts, images=images, **decode)
    shown = None
    for row, prompt, (image,), answer in zip(asked, prompts, images, answers, strict=True):
        if image != shown:
            print(f"{image}")
            shown = image
        print(f"  question  {prompt.removeprefix('<image>').strip()}")
        print(f"  answer    {answer}")
        print(f"  truth     {row['truth']['answer']}")
    print(
        f"{len(by_image)} images of {source} were never trained on. Model: {options.run or options.weights}"
    )


def main(args: list[str]) -> int:
    """The command. Raises UserError for whatever the user can put right."""
    options = _arguments(args)
    decode = DecodeOptions(**{f.name: getattr(options, f.name) for f in dataclasses.fields(DecodeOptions)})
    _check_files(options)
    # before the weights: a wrong trip or provider must not wait for them
    if options.trajectory is not None:
        options.image = [str(_trip_image(options))]
    from mmrstraj_jax.api import load  # JAX takes seconds: --help and typing errors must not wait for it

    model = load(
        options.run or options.weights,
        dtype=options.dtype,
        anyres=options.anyres,
        batch_size=options.batch_size,
    )
    if options.folder is not None:
        _ask_folder(model, options, decode)
    elif options.held_out is not None:
        _held_out(model, options, dataclasses.asdict(decode))
    else:
        messages = _converse(model, options, dataclasses.asdict(decode))
        if options.trajectory is not None:
            _write_answer(Path(options.image[0]), messages, dataclasses.asdict(decode))
    return 0


if __name__ == "__main__":
    run_command(main)
