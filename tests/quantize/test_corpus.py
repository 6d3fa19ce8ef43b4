"""Texts to windows of token ids."""

import json

import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from tests.converters import tiny
from tests.quantize import models
from trtx.converters.checkpoint import Checkpoint
from trtx.converters.errors import InputError
from trtx.quantize.corpus import CALIBRATION, EVALUATION, random_corpus, read_corpus, same_content


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model whose tokenizer knows the words 'w0' to 'w95'."""
    path = tiny.checkpoint_of(models.make(num_hidden_layers=1), tmp_path_factory.mktemp("model"))
    tokenizer = tokenizers.Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    return Checkpoint(path)


def words(*ids):
    return " ".join(f"w{i}" for i in ids)


def test_a_text_file_is_cut_from_the_beginning(checkpoint, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(words(*range(10)))
    assert read_corpus(file, checkpoint, 2, 4).tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert read_corpus(file, checkpoint, 9, 4).tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_jsonl_documents_of_every_kind_are_joined(checkpoint, tmp_path):
    file = tmp_path / "text.jsonl"
    chat = [{"role": "user", "content": words(5, 6)}, {"role": "assistant", "content": words(7)}]
    lines = [{"text": words(1, 2)}, {"prompt": words(3, 4)}, {"messages": chat}, {"input_ids": [8]}, {"text": "never"}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert read_corpus(file, checkpoint, 2, 4).tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.txt", b"w1 w2", "has 2 tokens, and one window takes 4"),
        ("a.txt", b"w1 \xff", "not UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl:1: not UTF-8"),
        ("a.jsonl", b'{"text": "w1"}\n{"text"', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"tokens": [1]}', r"a\.jsonl:1: has no document"),
        ("a.jsonl", b'{"messages": ["hello"]}', r"a\.jsonl:1: has no document"),
        ("a.jsonl", b'{"input_ids": [1, 96]}', r"a\.jsonl:1: 96 is not a token id"),
        ("a.jsonl", b'{"input_ids": [true]}', r"a\.jsonl:1: True is not a token id"),
        ("a.jsonl", b"", "has 0 tokens"),
    ],
)
def test_bad_files(name, content, cause, checkpoint, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=cause):
        read_corpus(tmp_path / name, checkpoint, 2, 4)


def test_a_missing_file(checkpoint, tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_corpus(tmp_path / "absent.txt", checkpoint, 2, 4)


def test_random_tokens_repeat_by_seed():
    assert random_corpus(96, 4, 8, seed=0).tokens.equal(random_corpus(96, 4, 8, seed=0).tokens)
    assert not random_corpus(96, 4, 8, seed=0).tokens.equal(random_corpus(96, 4, 8, seed=1).tokens)


def test_the_texts_that_come_with_trtx_share_no_sentence():
    calibration, evaluation = (file.read_text(encoding="utf-8") for file in (CALIBRATION, EVALUATION))
    assert len(calibration) > 30_000
    assert len(evaluation) > 12_000
    assert not {line for line in calibration.splitlines() if len(line) > 40} & set(evaluation.splitlines())
    assert not same_content(CALIBRATION, EVALUATION)
