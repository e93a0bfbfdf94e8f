"""SynthCity: images of a drawn city with true captions, questions and answers."""

import json
from pathlib import Path

from datasets_builders import base
from mmrstraj_jax.synthcity import sample


class Builder(base.ImageText):
    """SynthCity's embedded sample, rendered on first use. Apache-2.0.

    stage1: 320 images with a dialogue each, stage2: 1,280; eval_stage1 and eval_stage2: a row per question
    about 120 images each.
    """

    LICENCE = "Apache-2.0"
    HOMEPAGE = ""
    FEATURES = {"conversations": base.CONVERSATIONS, "type": base.Text(), "truth": base.Text()}

    def _folder(self, dl_manager) -> Path:
        return next(iter(sample.ensure_sample().values())).parent

    def examples(self, folder: Path):
        def split(name: str):
            file = folder / f"{name}.json"
            asked = {row["id"]: row for row in json.loads(file.read_text(encoding="utf-8"))}

            def more(row, path):
                given = asked[row.id]
                return {"type": given.get("type", ""), "truth": json.dumps(given.get("truth", {}))}

            return base.conversations(file, more)

        return {name: lambda name=name: split(name) for name in sample.EMBEDDED}
