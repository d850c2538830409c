"""BLEU, ROUGE-L and CIDEr-D of generated texts against references, as the COCO caption evaluation defines them, without Java.

That evaluation cuts texts into words with Stanford's PTBTokenizer, a Java program, and leaves punctuation out. Here `words` does:
letters, digits and what ties them ("don't" is do + n't as there, "well-known" one word). On captions the two differ in rare cases
(abbreviations with full stops, fractions), so figures can differ in the third digit from those of the Java program.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\d+(?:[.,:]\d+)+|[^\W_]+(?:[-/&][^\W_]+)*")
_CONTRACTED = re.compile(r"(?<=[^\W\d_])n't\b|'(?=(?:s|m|d|re|ve|ll)\b)")
_ORDERS = 4  # n-grams of up to so many words
_SIGMA = 6.0  # CIDEr-D: how far lengths may differ
_BETA = 1.2  # ROUGE-L: weight of recall over precision


def words(text: str) -> list[str]:
    """Lower-case words, without punctuation."""
    text = _CONTRACTED.sub(lambda found: " " + found.group(), text.lower().replace("’", "'"))
    return _WORD.findall(text)


def caption_metrics(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """texts [N] against the references of each -> {"BLEU-1": ..., "BLEU-4", "ROUGE-L", "CIDEr"} of the whole set.

    BLEU is of the corpus, with the reference length closest to each text's; ROUGE-L and CIDEr-D are means over samples. CIDEr
    is on the scale of the papers divided by 100 (1.2 for "120"), and weighs n-grams by how few of the N samples' references have
    them: of one sample it is 0. Raises ValueError: no texts, lengths that do not fit, a sample without references."""
    if not texts or len(texts) != len(references):
        raise ValueError(f"texts and references: expected as many of both, at least one, got {len(texts)}, {len(references)}")
    if lonely := [place for place, own in enumerate(references) if not own]:
        raise ValueError(f"references: sample {lonely[0]} has none")
    own = [words(text) for text in texts]
    theirs = [[words(text) for text in group] for group in references]
    return bleu(own, theirs) | {
        "ROUGE-L": sum(map(rouge_l, own, theirs)) / len(own),
        "CIDEr": sum(cider_d(own, theirs)) / len(own),
    }


def bleu(texts: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> dict[str, float]:
    """Papineni et al. 2002, of words: BLEU-1 to BLEU-4 of the corpus. An order that nothing matches gives nearly 0."""
    matches, totals = [0] * _ORDERS, [0] * _ORDERS
    length = closest = 0
    for text, group in zip(texts, references, strict=True):
        length += len(text)
        closest += min((abs(len(one) - len(text)), len(one)) for one in group)[1]
        most: Counter[tuple[str, ...]] = Counter()
        for one in group:
            most |= _ngrams(one)
        for ngram, count in _ngrams(text).items():
            matches[len(ngram) - 1] += min(count, most[ngram])
        for order in range(_ORDERS):
            totals[order] += max(0, len(text) - order)
    product, out = 1.0, {}
    penalty = 1.0 if length >= closest else math.exp(1 - closest / max(length, 1e-9))
    for order in range(_ORDERS):
        product *= (matches[order] + 1e-15) / (totals[order] + 1e-9)
        out[f"BLEU-{order + 1}"] = penalty * product ** (1 / (order + 1))
    return out


def rouge_l(text: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Lin 2004, sentence level: F of the longest common subsequence, its precision and recall each the best over references."""
    if not text:
        return 0.0
    common = [_longest_common(text, one) for one in references]
    precision = max(common) / len(text)
    recall = max(size / len(one) if one else 0.0 for size, one in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def cider_d(texts: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """Vedantam et al. 2015, CIDEr-D with n = 1 .. 4 and sigma = 6, for each text; 10 is the largest that a sample can have."""
    seen_in: Counter[tuple[str, ...]] = Counter()  # samples whose references have the n-gram
    for group in references:
        seen_in.update(set().union(*(_ngrams(one) for one in group)))
    samples = math.log(len(references))

    def weighted(tokens: Sequence[str]) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(_ORDERS)]
        for ngram, count in _ngrams(tokens).items():
            vectors[len(ngram) - 1][ngram] = count * (samples - math.log(max(1, seen_in[ngram])))
        return vectors

    scores = []
    for text, group in zip(texts, references, strict=True):
        own = weighted(text)
        total = 0.0
        for one in group:
            gaussian = math.exp(-((len(text) - len(one)) ** 2) / (2 * _SIGMA**2))
            total += gaussian * sum(map(_clipped_cosine, own, weighted(one)))
        scores.append(10 * total / (_ORDERS * len(group)))
    return scores


def _clipped_cosine(own: dict[tuple[str, ...], float], theirs: dict[tuple[str, ...], float]) -> float:
    norms = math.sqrt(sum(v * v for v in own.values()) * sum(v * v for v in theirs.values()))
    dot = sum(min(value, theirs[ngram]) * theirs[ngram] for ngram, value in own.items() if ngram in theirs)
    return dot / norms if norms else 0.0


def _ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[start : start + n]) for n in range(1, _ORDERS + 1) for start in range(len(tokens) - n + 1))


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for one in a:
        before = 0
        for place, other in enumerate(b, 1):
            before, row[place] = row[place], before + 1 if one == other else max(row[place], row[place - 1])
    return row[-1]
