"""The questions and conversations of the tiny base as token arrays.

Legend: N images, M most questions of an image, L tokens, K supervised positions.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.vocabulary import shown_facts, stated_question, text_row
from mmrstraj_jax.training.pointing import pack_places
from mmrstraj_jax.training.shared_prefix import Prefix, Segments, pack, segment
from mmrstraj_jax.training.tiny_data import Group

QUESTION, ANSWER = 26, 6  # most tokens of one question with its answer, of an answer with its end
TALK = 160  # most tokens of a conversation about an image
TALK_QUESTIONS, TALK_CAPTION = 4, 0.6  # in a conversation; its chance of a caption
TALK_STATED = 0.3  # of the conversations: about facts that the question states, with the image beside them
TEXT = 192  # most tokens of a text-only row
TEXT_ROWS = 6000
SHOWN, SHOWN_ROWS = 32, 6000  # most words among the image tokens, and how many sets of them
SHOWN_SCALE = 0.5, 3.0  # least and greatest size of a shown word, of the image token's it is added to
STATED, STATED_ROWS = 64, 12000  # most tokens of a short one, and their number


class Said(NamedTuple):
    """Words whose embeddings are added to tokens of the visual pool."""

    words: Int[np.ndarray, "B W"]
    slots: Int[np.ndarray, "B W"]  # of the pool
    scale: Float[np.ndarray, "B W"]  # size in sizes of the token there; 0: nothing


@dataclass(frozen=True)
class ShownFacts:
    """Made-up facts as words that stand among the image tokens, and questions about them.

    A language model that reads words there can later be shown them by a tower that has learned to say them,
    as one that was pre-trained on captions can.
    """

    words: Int[np.ndarray, "R W"]  # -1: none
    questions: Segments  # [R, Q, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, skip: int, count: int) -> "ShownFacts":
        words, questions = [], []
        for k in range(SHOWN_ROWS):
            said, turns = shown_facts(Stream(0, 16, k))
            ids = tokenizer.encode(" " + said)
            if len(ids) > SHOWN:
                continue
            words.append(np.pad(ids, (0, SHOWN - len(ids)), constant_values=-1))
            turns = [turns[j % len(turns)] for j in range(count)]
            questions.append(pack([segment([t], tokenizer, skip, "clean") for t in turns], QUESTION, ANSWER))
        return cls(np.stack(words), Segments(*map(np.stack, zip(*questions, strict=True))))

    def show(
        self,
        asked: tuple[Segments, Float[np.ndarray, "B Q n 2"], Segments],
        image: Int[np.ndarray, " S"],
        share: float,
        rng: np.random.Generator,
    ) -> Said:
        """Picks images of a batch that are shown words; in `asked` (GroupText.draw) their questions become
        those about the words, in place, and they lose their conversation.

        Args:
            image: the pool's tokens of the image itself.
            share: of the images.
        """
        questions, places, talk = asked
        rows = len(places)
        slots = np.tile(image[:SHOWN], (rows, 1)).astype(np.int32)
        words, scale = np.zeros((rows, SHOWN), np.int32), np.zeros((rows, SHOWN), np.float32)
        for row in range(rows):
            if rng.random() >= share:
                continue
            k, start = rng.integers(len(self.words)), rng.integers(len(image) - SHOWN)
            at = np.arange(start, start + SHOWN)
            if rng.random() < 0.5:  # with others in between
                at = np.sort(rng.choice(len(image), SHOWN, replace=False))
            slots[row] = image[at]
            words[row] = np.maximum(self.words[k], 0)
            scale[row] = np.where(self.words[k] >= 0, rng.uniform(*SHOWN_SCALE), 0.0)
            for mine, theirs in zip(questions, self.questions.at(k), strict=True):
                mine[row] = theirs
            places[row] = np.nan
            talk.weights[row] = 0
        return Said(words, slots, scale)


@dataclass(frozen=True)
class GroupText:
    """Texts of images of one size."""

    prefix: Prefix
    questions: Segments  # [N, M, ...]: each alone, its answer supervised
    num: Int[np.ndarray, " N"]
    places: Float[np.ndarray, "N M n 2"]  # where to look for the answer to each question
    talks: Segments  # [N, ...]: several turns with the mask that training uses

    @classmethod
    def of(cls, group: Group, tokenizer: Tokenizer) -> "GroupText":
        """The last text of each image is its caption."""
        prefix, rng, known = Prefix.of(group.plan, tokenizer), np.random.default_rng(0), {}
        most = max(map(len, group.texts)) - 1
        questions, places, talks = [], [], []
        for texts, where in zip(group.texts, group.places, strict=True):
            turns = [(question, answer) for _, question, answer in texts]
            for turn in turns[:-1]:
                if turn not in known:
                    known[turn] = segment([turn], tokenizer, prefix.num_ids, "clean")
            packed = pack([known[turn] for turn in turns[:-1]], QUESTION, ANSWER)
            missing = most - len(packed.ids)
            questions.append([np.pad(x, ((0, missing), (0, 0))) for x in packed])
            places.append(np.pad(pack_places(where), ((0, missing), (0, 0), (0, 0))))
            if rng.random() < TALK_STATED:
                turns = text_row(Stream(0, 14, int(rng.integers(2**31))))
                talks.append(_shortened(turns, tokenizer, prefix.num_ids, rng))
            else:
                talks.append(_talk(turns, tokenizer, prefix.num_ids, rng))
        num = np.array([len(texts) - 1 for texts in group.texts])
        questions = Segments(*map(np.stack, zip(*questions, strict=True)))
        return cls(prefix, questions, num, np.stack(places), pack(talks, TALK, TALK))

    def draw(
        self, rows: Int[np.ndarray, " B"], count: int, rng: np.random.Generator
    ) -> tuple[Segments, Float[np.ndarray, "B count n 2"], Segments]:
        """Segments [B, count, ...] of random questions of each image with their places, [B, 1, ...] of its
        conversation."""
        picked = [
            rng.choice(n, count, replace=n < count) if n else np.zeros(count, int) for n in self.num[rows]
        ]
        at = rows[:, None], np.stack(picked)
        return self.questions.at(at), self.places[at].astype(np.float32), self.talks.at((rows, None))


def _talk(
    turns: list, tokenizer: Tokenizer, skip: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A few turns in random order, often with the caption at the front, as the training rows of a stage."""
    chosen = [turns[k] for k in rng.permutation(len(turns) - 1)[:TALK_QUESTIONS]]
    if not chosen or rng.random() < TALK_CAPTION:
        chosen.insert(0 if rng.random() < 0.7 else len(chosen), turns[-1])
    return _shortened(chosen, tokenizer, skip, rng)


def _shortened(turns: list, tokenizer: Tokenizer, skip: int, rng: np.random.Generator):
    """The first turn may state what the others rest on, so it goes last."""
    while True:
        found = segment(turns, tokenizer, skip, "original")
        if len(found[0]) - 1 <= TALK or len(turns) == 1:
            return found
        dropped = rng.integers(1, len(turns))
        turns = [*turns[:dropped], *turns[dropped + 1 :]]


def text_rows(tokenizer: Tokenizer) -> Segments:
    """Text-only conversations on the words of traffic, with the mask that training uses."""
    rows = (text_row(Stream(0, 13, k)) for k in range(TEXT_ROWS))
    found = [segment(turns, tokenizer, 0, "original", image=False) for turns in rows]
    return pack([row for row in found if len(row[0]) - 1 <= TEXT], TEXT, TEXT)


def stated_rows(tokenizer: Tokenizer) -> Segments:
    """Single short questions whose facts stand in them, most of them numbers to compare."""
    rows = (stated_question(Stream(0, 15, k)) for k in range(STATED_ROWS))
    found = [segment([turn], tokenizer, 0, "clean", image=False) for turn in rows]
    return pack([row for row in found if len(row[0]) - 1 <= STATED], STATED, ANSWER)
