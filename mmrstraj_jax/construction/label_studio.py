"""Verdicts in the JSON of Label Studio, an open annotation tool: tasks out, annotations back in.

Its JSON export is a list of tasks, each with `data` and `annotations` of {completed_by, was_cancelled,
updated_at, result: [{from_name, to_name, type, value}]}. JSON-MIN drops who said what and is refused.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmrstraj_jax.errors import UserError

VERDICTS = ("supported", "plausible inference", "unsupported", "wrong")
# for a project's labelling set-up
CONFIG = (
    """<View>
  <Image name="image" value="$image" zoom="true" zoomControl="true"/>
  <Header value="$question"/>
  <Text name="answer" value="$answer"/>
  <Choices name="verdict" toName="answer" choice="single-radio" required="true">
"""
    + "".join(f'    <Choice value="{verdict}"/>\n' for verdict in VERDICTS)
    + """  </Choices>
  <TextArea name="edit" toName="answer" rows="6" maxSubmissions="1" placeholder="A better answer, if needed"/>
</View>
"""
)


def tasks(
    items: Iterable[Mapping[str, Any]], verdicts: Mapping[str, list[dict[str, str]]], image_prefix: str
) -> list[dict[str, Any]]:
    """A task per item, with the verdicts that are known as annotations."""
    return [
        {
            "data": {
                "item": item["item"],
                "text": item["text"],
                "image": image_prefix + item["image"],
                "question": item["question"],
                "answer": item["answer"],
            },
            "annotations": [_annotation(row) for row in verdicts.get(item["item"], ())],
        }
        for item in items
    ]


def _annotation(row: Mapping[str, str]) -> dict[str, Any]:
    result = [
        {
            "from_name": "verdict",
            "to_name": "answer",
            "type": "choices",
            "value": {"choices": [row["verdict"]]},
        }
    ]
    if row["edit"]:
        value = {"text": [row["edit"]]}
        result.append({"from_name": "edit", "to_name": "answer", "type": "textarea", "value": value})
    return {"completed_by": {"email": row["reviewer"]}, "was_cancelled": False, "result": result}


def read(path: Path) -> Iterator[dict[str, str]]:
    """{item, text, reviewer, verdict, edit} of every annotation. Raises UserError: another form."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected Label Studio's JSON export") from None
    except ValueError:
        raise UserError(f"{path}: not JSON; expected Label Studio's JSON export") from None
    if not isinstance(found, list):
        raise UserError(f"{path}: expected a list of tasks; choose the export format JSON")
    for number, task in enumerate(found):
        where = f"{path}: task {number}"
        data = task.get("data") if isinstance(task, dict) else None
        if not isinstance(data, dict) or not isinstance(task.get("annotations"), list):
            raise UserError(f"{where}: expected data and annotations: Label Studio's JSON")
        for annotation in task["annotations"]:
            if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
                continue
            row = {"item": data.get("item"), "text": data.get("text"), "reviewer": _who(annotation)}
            row |= {"verdict": _value(annotation, "verdict", "choices")}
            row |= {"edit": _value(annotation, "edit", "text")}
            if not all(isinstance(value, str) for value in row.values()) or row["verdict"] not in VERDICTS:
                raise UserError(
                    f"{where}: expected item, text, a reviewer and one verdict of {', '.join(VERDICTS)}; use "
                    "the tasks and the set-up that `build review --tasks` wrote"
                )
            yield row


def _who(annotation: Mapping[str, Any]) -> str | None:
    by = annotation.get("completed_by")
    if isinstance(by, dict):
        by = by.get("email") or by.get("id")
    return str(by) if isinstance(by, str | int) and str(by) else None


def _value(annotation: Mapping[str, Any], name: str, key: str) -> str:
    """The one text of a control, "" where it was left empty."""
    for part in annotation.get("result") or ():
        if isinstance(part, dict) and part.get("from_name") == name:
            values = (part.get("value") or {}).get(key) or [""]
            return values[0] if isinstance(values, list) else values
    return ""
