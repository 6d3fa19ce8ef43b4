"""Tokenizer files beside the weights: copied where they are there, rebuilt where they can be.

trtx encodes with a `tokenizer.json` (the `tokenizers` library). Checkpoints from before it, and GGUF files, hold a
vocabulary and merges; `byte_level_bpe` and `sentencepiece_bpe` make a tokenizer of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from trtx.converters.artifact import Draft
from trtx.converters.checkpoint import TOKENIZER_FILES
from trtx.converters.errors import InputError
from trtx.converters.hf_config import read_json_object

TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip
VOCAB, MERGES, SENTENCEPIECE = "vocab.json", "merges.txt", "tokenizer.model"
TOKENIZER_SOURCES = (*TOKENIZER_FILES, VOCAB, MERGES, SENTENCEPIECE)
"""Every file that `copy_tokenizer` looks for."""

NO_TOKENIZER = (
    "no tokenizer.json was written ({}): the engine will take token ids, not text. To run text prompts, put the "
    "model's tokenizer.json beside the source and convert again."
)

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN_LETTERS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
_TEKKEN_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level BPE tokenizer cuts text before merging.

    Attributes:
        pattern: what counts as one piece; None: GPT-2's.
        single_digits: each digit is a piece before anything else.
        nfc: normalize to NFC first.
        ignore_merges: a piece that is a token as it stands is that token.
        adds_bos: whether the model's own tokenizer begins every text with BOS.
    """

    pattern: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(single_digits=True),
    "starcoder": PreTokenizer(single_digits=True),
    "llama-bpe": PreTokenizer(rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", ignore_merges=True, adds_bos=True),
    "qwen2": PreTokenizer(rf"{_LETTERS}|\p{{N}}|{_REST}", nfc=True),
    "tekken": PreTokenizer(rf"{_TEKKEN_LETTERS}|\p{{N}}|{_TEKKEN_REST}", ignore_merges=True, adds_bos=True),
}
"""By llama.cpp's name (`tokenizer.ggml.pre`); the patterns are those of the models' own tokenizer.json."""

_CLASSES = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
"""Tokenizer classes of transformers whose vocab.json and merges.txt define the whole tokenizer."""


def byte_level_bpe(
    vocab: Mapping[str, int], merges: Sequence[str], kind: PreTokenizer, added: Sequence[AddedToken], where: str
) -> Tokenizer:
    """A byte-level BPE tokenizer (GPT-2, Llama 3, Qwen).

    Args:
        merges: 'LEFT RIGHT', the first to be merged first.
        added: tokens that text is searched for before anything else.
        where: the file they come from, for errors.

    Raises:
        InputError: the merges do not fit the vocabulary.
    """
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(_bpe(where, vocab=dict(vocab), merges=pairs, ignore_merges=kind.ignore_merges))
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if kind.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if kind.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(kind.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_tokens(list(added))
    return tokenizer


def sentencepiece_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    unknown: str | None,
    space_prefix: bool,
    added: Sequence[AddedToken],
    where: str,
) -> Tokenizer:
    """A SentencePiece BPE tokenizer with byte fallback (Llama 2, Mistral).

    Args:
        pieces: in the order of their ids, spaces as ▁.
        scores: of the pieces; the higher, the earlier they are merged.
        unknown: the piece for what no other piece or byte covers.
        space_prefix: text gets a space in front.
        added: tokens that text is searched for before anything else.
        where: the file they come from, for errors.

    Raises:
        InputError: pieces and scores do not fit together.
    """
    if len(pieces) != len(scores):
        raise InputError(f"{where}: {len(scores)} scores for {len(pieces)} tokens.", "Download the file again.")
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = _merges_from_scores(dict(zip(pieces, scores, strict=True)))
    model = _bpe(where, vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if space_prefix else [spaces])
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        steps.append(decoders.Strip(" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_tokens(list(added))
    return tokenizer


def surround(tokenizer: Tokenizer, before: str | None, after: str | None) -> None:
    """Let the tokenizer put the special tokens `before` and `after` every text."""
    special = [(token, tokenizer.token_to_id(token)) for token in (before, after) if token is not None]
    if special:
        single = " ".join(part for part in (before, "$A", after) if part is not None)
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)


def copy_tokenizer(source: Path, draft: Draft, config: Mapping[str, Any]) -> list[str]:
    """Copy a folder's tokenizer files, and make those that trtx needs and the folder lacks.

    Args:
        config: the model's config.json, whose token ids stand in for a missing generation_config.json.

    Returns:
        Warnings: what could not be made.
    """
    draft.copy(source, TOKENIZER_FILES)
    if not (source / GENERATION_CONFIG).is_file():
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        draft.write_json(GENERATION_CONFIG, {key: config[key] for key in keys if config.get(key) is not None})
    if (source / TOKENIZER).is_file():
        return []
    if (source / VOCAB).is_file() and (source / MERGES).is_file():
        settings = read_json_object(source / TOKENIZER_CONFIG) if (source / TOKENIZER_CONFIG).is_file() else {}
        name = str(settings.get("tokenizer_class", "no tokenizer_class")).removesuffix("Fast")
        if name not in _CLASSES:
            return [NO_TOKENIZER.format(f"how {name} cuts text is not known from vocab.json and merges.txt")]
        _rebuild(source, settings, PRE_TOKENIZERS[_CLASSES[name]]).save(str(draft.path / TOKENIZER))
        return []
    if (source / SENTENCEPIECE).is_file():
        return [NO_TOKENIZER.format(f"the source has {SENTENCEPIECE} only")]
    return [NO_TOKENIZER.format("the source has no tokenizer")]


def _rebuild(source: Path, settings: Mapping[str, Any], kind: PreTokenizer) -> Tokenizer:
    lines = (source / MERGES).read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    added = [
        AddedToken(**{key: value for key, value in token.items() if key != "content"}, content=token["content"])
        for _, token in sorted(settings.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    ]
    return byte_level_bpe(read_json_object(source / VOCAB), merges, kind, added, str(source / MERGES))


def _bpe(where: str, **settings: Any) -> BPE:
    try:
        return BPE(**settings)
    except Exception as error:  # `tokenizers` raises plain `Exception`
        raise InputError(
            f"{where}: vocabulary and merges do not make a tokenizer ({error}).", "Download the checkpoint again."
        ) from error


def _merges_from_scores(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others; the best piece first, then the best parts."""
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((score, scores[left], scores[right], left, right))
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in found]
