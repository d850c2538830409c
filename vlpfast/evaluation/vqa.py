"""How right short answers are: the VQA challenge's accuracy, with its normalisation of answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBERS = {
    name: str(n) for n, name in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"))
}
_NUMBERS |= {"none": "0", "ten": "10"}
_ARTICLES = {"a", "an", "the"}
# What is written without its apostrophe; the challenge's list, but for "its", "were" and others that are words of their own.
_CONTRACTED = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'm "
    "i've isn't it'd it'll ma'am mightn't might've mustn't must've needn't o'clock oughtn't shan't should've shouldn't "
    "somebody's someone's that'd that's there'd there're there's they'd they'll they're they've wasn't we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's "
    "won't would've wouldn't y'all you'd you'll you're you've"
)
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}
_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`?!]")
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")


def normalize_answer(answer: str) -> str:
    """Lower case, without articles and punctuation, number words as digits, contractions with their apostrophes.

    Marks become spaces, but commas in numbers go, and full stops stay in numbers alone, as in the challenge's script."""
    text = " ".join(answer.split()).lower()
    text = _COMMA_IN_NUMBER.sub("", text)
    text = re.sub(r",", " ", text)
    text = _PUNCTUATION.sub(" ", text)
    text = _FULL_STOP.sub("", text)
    kept = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept if word not in _ARTICLES)


def vqa_accuracy(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Antol et al. 2015. answers [N], references: what people answered to each -> share in 0 .. 1.

    An answer that n of the other people gave counts min(n / 3, 1), averaged over leaving out each person in turn. With fewer
    than four references, where nobody could reach 1 so, it counts 1 if it is among them: exact match.
    ValueError: no answers, lengths that do not fit, a question without references."""
    if not answers or len(answers) != len(references):
        raise ValueError(f"answers and references: expected as many of both, at least one, got {len(answers)}, {len(references)}")
    total = 0.0
    for place, (answer, group) in enumerate(zip(answers, references, strict=True)):
        if not group:
            raise ValueError(f"references: question {place} has none")
        own, theirs = normalize_answer(answer), [normalize_answer(one) for one in group]
        same = sum(one == own for one in theirs)
        if len(theirs) < 4:
            total += same > 0
        else:
            total += sum(min((same - (one == own)) / 3, 1.0) for one in theirs) / len(theirs)
    return total / len(answers)
