"""RSIEval: captions and questions on aerial images, for evaluation."""

from pathlib import Path

from datasets_builders import base
from mmrstraj_jax.evaluation import readers


class Builder(base.ImageText):
    """RSIEval (RSGPT). test: 100 images, a caption each, 943 questions. No licence stated; DOTA images."""

    LICENCE = "None stated; images from DOTA: academic use only"
    HOMEPAGE = "https://github.com/Lavender105/RSGPT"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "manual_dir/rsieval/: annotations.json and images/, from dataset/RSIEval of RSGPT."
    )
    FEATURES = {"captions": base.tfds.features.Sequence(base.Text()), "questions": base.QUESTIONS}

    def examples(self, folder: Path):
        def test():
            questions = dict(base.by_image(readers.rsieval_questions(folder)))
            for name, path, values in base.captions(readers.rsieval_captions(folder)):
                yield name, path, {**values, "questions": questions.get(path, [])}

        return {"test": test}
