"""`trtx run` on tiny random engines, as a shell sees it; the oracle is transformers."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from trtx.cli.app import app
from trtx.converters.errors import ExitCode

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ '<s>' + m.role + ': ' + m.content }}{% endfor %}{{ '<s>assistant: ' }}"
)
MAX_SEQ_LEN = 2048
PROMPT = "\n> "
"""What a conversation on a terminal shows when it waits for the user; answers end with a line break."""

runner = CliRunner()


def trtx(*arguments, stdin=None):
    return runner.invoke(app, [str(argument) for argument in arguments], input=stdin)


def records(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A Hugging Face folder: a random Llama that speaks single bytes, so most of its text is broken UTF-8."""
    folder = tmp_path_factory.mktemp("source")
    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(symbols),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_SEQ_LEN,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def oracle(source):
    return AutoTokenizer.from_pretrained(source)


@pytest.fixture(scope="session")
def engine(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return build(source, folder)


@pytest.fixture(scope="session")
def bare_engine(source, tmp_path_factory):
    """An engine without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return build(f"random:{folder / 'config.json'}", folder)


def build(source, folder):
    checkpoint = source
    if not str(source).startswith("random:"):
        checkpoint = folder / "checkpoint"
        assert trtx("convert", source, checkpoint).exit_code == 0
    limits = ("--max-batch-size", 4, "--max-seq-len", MAX_SEQ_LEN)
    assert trtx("build", checkpoint, folder / "engine", "--gpu", "cpu", "--dtype", "fp32", *limits).exit_code == 0
    return folder / "engine"


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


class TestPrompts:
    def test_greedy_tokens_are_those_of_transformers(self, engine, source, oracle):
        model = LlamaForCausalLM.from_pretrained(source)
        prompt = oracle("Hello", return_tensors="pt")
        expected = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, 5:].tolist()
        (record,) = records(trtx("run", engine, "Hello", "--json", "--max-tokens", 12))
        assert record["token_ids"] == expected
        assert record["text"] == oracle.decode(expected, skip_special_tokens=True)
        assert record["prompt_tokens"] == 5

    def test_one_text_is_printed_as_it_comes_and_nothing_else(self, engine):
        options = ("--temperature", 1, "--seed", 3, "--max-tokens", 60, "--ignore-eos")
        (record,) = records(trtx("run", engine, "naïve 😀", "--json", *options))
        shown = trtx("run", engine, "naïve 😀", *options)
        assert shown.stdout == record["text"] + "\n"
        assert shown.stderr == ""

    def test_several_are_printed_under_their_numbers(self, engine):
        texts = [r["text"] for r in records(trtx("run", engine, "a", "b", "--json", "--max-tokens", 4))]
        shown = trtx("run", engine, "a", "b", "--max-tokens", 4).stdout
        assert shown == f"==> 1 <==\n{texts[0]}\n\n==> 2 <==\n{texts[1]}\n"

    def test_continuations_are_printed_under_their_indexes(self, engine):
        shown = trtx("run", engine, "a", "-n", 2, "--max-tokens", 2).stdout
        assert "==> 1 #0 <==" in shown
        assert "==> 1 #1 <==" in shown

    def test_all_of_stdin_is_one_prompt_without_its_last_line_break(self, engine):
        piped = records(trtx("run", engine, "--json", "--max-tokens", 4, stdin="two\nlines\n"))
        given = records(trtx("run", engine, "two\nlines", "--json", "--max-tokens", 4))
        assert piped[0]["prompt_tokens"] == len("two\nlines")
        assert piped[0]["token_ids"] == given[0]["token_ids"]

    def test_stdin_that_is_not_utf8(self, engine):
        result = trtx("run", engine, stdin=b"abc\xff")
        assert result.exit_code == ExitCode.INPUT
        assert "stdin: not UTF-8" in result.stderr

    def test_stats(self, engine):
        result = trtx("run", engine, "Hello", "--max-tokens", 3, "--ignore-eos", "--stats")
        assert result.stderr.startswith("5 prompt tokens, 3 tokens in ")
        assert "tokens/s, TTFT " in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("a", "--input", "x.jsonl"), "prompts are given twice"),
            (("a", "--system", "b"), "give --chat too"),
            (("a", "--logprobs", "1"), "printed with --json only"),
            (("a", "--device", "gpu"), "'gpu' is no device"),
            (("a", "--top-p", "1.5"), "top_p is 1.5"),
            (("a", "--min-tokens", "5", "--max-tokens", "3"), "min_tokens is 5"),
        ],
    )
    def test_usage(self, engine, arguments, message):
        result = trtx("run", engine, *arguments)
        assert result.exit_code == ExitCode.USAGE
        assert message in " ".join(result.stderr.split())


class TestSampling:
    def test_a_seed_gives_the_same_text_whatever_the_batch(self, engine):
        options = ("--json", "--temperature", 1, "--seed", 7, "--max-tokens", 20)
        (alone,) = records(trtx("run", engine, "Hello", *options))
        among_others = records(trtx("run", engine, "x", "Hello", "a longer prompt", "y", *options, "-n", 2))
        assert next(r for r in among_others if r["id"] == 2)["token_ids"] == alone["token_ids"]
        (other_seed,) = records(trtx("run", engine, "Hello", *options[:-3], 8, *options[-2:]))
        assert other_seed["token_ids"] != alone["token_ids"]

    def test_text_ends_before_a_stop_string(self, engine):
        # Greedy text of a random model soon repeats itself, hence the temperature.
        options = ("--json", "--temperature", 1, "--seed", 5, "--max-tokens", 40, "--ignore-eos")
        (whole,) = records(trtx("run", engine, "Hello", *options))
        stop = whole["text"][10:13]
        (stopped,) = records(trtx("run", engine, "Hello", *options, "--stop", "never there", "--stop", stop))
        assert stopped["text"] == whole["text"][: whole["text"].index(stop)]
        assert stopped["finish_reason"] == "stop"
        assert len(stopped["token_ids"]) < 40

    def test_stop_token_id(self, engine):
        (whole,) = records(trtx("run", engine, "Hello", "--json", "--max-tokens", 8))
        token = whole["token_ids"][2]
        (stopped,) = records(trtx("run", engine, "Hello", "--json", "--max-tokens", 8, "--stop-token-id", token))
        assert stopped["token_ids"] == whole["token_ids"][: whole["token_ids"].index(token) + 1]
        assert stopped["finish_reason"] == "stop"

    def test_logprobs(self, engine):
        (record,) = records(trtx("run", engine, "Hello", "--json", "--max-tokens", 4, "--logprobs", 2))
        assert [entry["token"] for entry in record["logprobs"]] == record["token_ids"]
        for entry in record["logprobs"]:
            assert len(entry["top"]) == 2
            assert entry["top"][0] == {"token": entry["token"], "logprob": entry["logprob"]}

    def test_defaults_come_from_generation_config(self, source, tmp_path):
        for file in source.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        sampled = {"do_sample": True, "temperature": 5.0, "eos_token_id": 1}
        (tmp_path / "generation_config.json").write_text(json.dumps(sampled))
        engine = build(tmp_path, tmp_path / "out")
        outputs = {
            tuple(records(trtx("run", engine, "Hello", "--json", "--seed", seed, "--max-tokens", 8))[0]["token_ids"])
            for seed in range(3)
        }
        assert len(outputs) == 3


class TestChat:
    def test_prompts_go_through_the_template(self, engine, oracle):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        expected = oracle.apply_chat_template(messages, tokenize=False)
        options = ("--json", "--max-tokens", 4)
        (chatted,) = records(trtx("run", engine, "--chat", "--system", "Be brief.", "Hi", *options))
        (plain,) = records(trtx("run", engine, expected, *options))
        assert chatted["prompt_tokens"] == len(oracle(expected)["input_ids"])
        assert chatted["token_ids"] == plain["token_ids"]

    def test_without_max_tokens_an_answer_may_fill_the_sequence(self, engine):
        (record,) = records(trtx("run", engine, "--chat", "x" * (MAX_SEQ_LEN - 200), "--ignore-eos", "--json"))
        assert len(record["token_ids"]) + record["prompt_tokens"] == MAX_SEQ_LEN

    def test_a_conversation_on_a_terminal(self, engine):
        with Terminal(engine, "--chat", "--max-tokens", "4", "--ignore-eos") as terminal:
            terminal.wait_for(PROMPT)
            terminal.type("Hello")
            terminal.wait_for(PROMPT)
            terminal.type("y" * (2 * MAX_SEQ_LEN))
            terminal.wait_for("error:")
            terminal.wait_for(PROMPT)
            terminal.type("/exit")
            assert terminal.process.wait(20) == 0
        assert "Traceback" not in terminal.seen

    def test_ctrl_c_stops_the_answer_and_then_the_conversation(self, engine):
        with Terminal(engine, "--chat", "--ignore-eos") as terminal:
            terminal.wait_for(PROMPT)
            terminal.type("Hello")
            terminal.wait_for("Hello\r\n.")  # the answer has begun
            terminal.process.send_signal(signal.SIGINT)
            terminal.wait_for(PROMPT)
            assert terminal.interrupt() == ExitCode.INTERRUPTED
        assert "Traceback" not in terminal.seen


class TestInput:
    def test_each_line_has_its_own_prompt_id_and_parameters(self, engine, oracle, tmp_path):
        ids = oracle("Hello")["input_ids"]
        file = write_lines(
            tmp_path / "in.jsonl",
            {"prompt": "Hello", "id": "first", "max_tokens": 2},
            b"",
            {"input_ids": ids, "stop_token_ids": [], "stop": "never there"},
            {"messages": [{"role": "user", "content": "Hi"}], "id": 7, "n": 2},
        )
        result = trtx("run", engine, "--input", file, "--json", "--max-tokens", 3, "--ignore-eos")
        found = records(result)
        assert [(r["id"], r["index"], len(r["token_ids"])) for r in found] == [
            ("first", 0, 2),
            (3, 0, 3),
            (7, 0, 3),
            (7, 1, 3),
        ]
        assert found[1]["token_ids"][:2] == found[0]["token_ids"]
        assert found[2]["prompt_tokens"] == len("_user: Hi_assistant: ")
        assert result.exit_code == 0

    def test_from_stdin(self, engine):
        result = trtx("run", engine, "-i", "-", "--json", "--max-tokens", 1, stdin='{"prompt": "a"}\n{"prompt": "b"}\n')
        assert [r["id"] for r in records(result)] == [1, 2]

    def test_what_can_not_be_served_does_not_take_down_the_others(self, engine, tmp_path):
        file = write_lines(
            tmp_path / "in.jsonl",
            {"prompt": "x" * MAX_SEQ_LEN},
            {"prompt": "Hello"},
            {"prompt": "Hello", "temperature": -1},
            {"messages": [{"role": "tool", "content": ""}]},
            {"input_ids": [100000]},
            {"prompt": ""},
            b'{"prompt": "\\ud83d"}',
            {"prompt": "Hello"},
        )
        result = trtx("run", engine, "-i", file, "--json", "--max-tokens", 3)
        found = records(result)
        assert [r["id"] for r in found] == list(range(1, 9))
        assert [r["id"] for r in found if "error" not in r] == [2, 8]
        reasons = ("tokens", "temperature is -1", "no tools", "100000", "empty", "not valid Unicode")
        for record, reason in zip((r for r in found if "error" in r), reasons, strict=True):
            assert reason in record["error"]
            assert f"request '{record['id']}'" in record["error"]
            assert record["remedy"]
        assert result.exit_code == ExitCode.REQUEST
        assert "6 of 8 requests failed" in result.stderr

    def test_errors_among_texts_go_to_stderr(self, engine, tmp_path):
        file = write_lines(tmp_path / "in.jsonl", {"prompt": "a", "top_k": -1}, {"prompt": "b"})
        result = trtx("run", engine, "-i", file, "--max-tokens", 1)
        assert result.exit_code == ExitCode.REQUEST
        assert "request '1': top_k is -1" in result.stderr
        assert "==> 2 <==" in result.stdout

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b'{"prompt": ', "not JSON"),
            (b'{"prompt": "\xff"}', "not UTF-8"),
            (b"[1, 2]", "a JSON list"),
            (b"[" * 100_000, "not JSON"),
            ({}, "no prompt given"),
            ({"prompt": "a", "input_ids": [1]}, "prompt and input_ids given"),
            ({"prompt": "a", "temprature": 1}, "unknown key 'temprature'"),
            ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot'"),
            ({"prompt": "a", "ignore_eos": 1}, "ignore_eos is 1"),
            ({"prompt": 5}, "prompt is no text"),
            ({"input_ids": ["a"]}, "no list of token ids"),
            ({"prompt": "a", "tools": []}, "tools without messages"),
            ({"prompt": "a", "id": [1]}, "id is [1]"),
            ({"prompt": "a", "id": 1}, "the id 1 occurs twice"),
        ],
    )
    def test_malformed_lines_are_named_and_nothing_runs(self, engine, tmp_path, line, message):
        file = write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, line)
        result = trtx("run", engine, "-i", file, "--json")
        assert result.exit_code == ExitCode.INPUT
        assert "in.jsonl:2: " in result.stderr
        assert message in result.stderr
        assert result.stdout == ""

    @pytest.mark.parametrize(("content", "message"), [(None, "can't be read"), ("\n\n", "no prompts")])
    def test_no_file_and_no_lines(self, engine, tmp_path, content, message):
        file = tmp_path / "in.jsonl"
        if content is not None:
            file.write_text(content)
        result = trtx("run", engine, "-i", file)
        assert result.exit_code == ExitCode.INPUT
        assert message in result.stderr


class TestWithoutTokenizer:
    def test_token_ids_in_and_out(self, bare_engine):
        options = ("--json", "--max-tokens", 3, "--temperature", 0)
        result = trtx("run", bare_engine, "-i", "-", *options, stdin='{"input_ids": [5, 6]}')
        (record,) = records(result)
        assert len(record["token_ids"]) == 3
        assert record["text"] == ""
        assert "random weights" in result.stderr

    @pytest.mark.parametrize("line", [{"prompt": "a"}, {"input_ids": [1], "stop": "x"}])
    def test_text_is_refused(self, bare_engine, line):
        result = trtx("run", bare_engine, "-i", "-", "--json", stdin=json.dumps(line))
        assert result.exit_code == ExitCode.INPUT
        assert "no tokenizer.json" in result.stderr

    def test_there_is_no_text_to_print(self, bare_engine):
        result = trtx("run", bare_engine, "-i", "-", stdin='{"input_ids": [5, 6]}')
        assert result.exit_code == ExitCode.INPUT
        assert "no text to print" in result.stderr


class TestSignals:
    def start(self, engine, *arguments):
        return subprocess.Popen(
            program("run", engine, "Hello", "--ignore-eos", "--max-tokens", "2000", *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def test_ctrl_c_ends_cleanly(self, engine):
        process = self.start(engine)
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == ExitCode.INTERRUPTED
        assert errors == b"interrupted\n"

    def test_a_reader_that_leaves_ends_it_cleanly(self, engine):
        process = self.start(engine)
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(30) == ExitCode.PIPE
        assert process.stderr.read() == b""


def program(*arguments):
    return [sys.executable, "-c", "from trtx.cli.app import main; main()", *map(str, arguments)]


class Terminal:
    """`trtx run` on a pseudo-terminal."""

    def __init__(self, *arguments):
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            program("run", *arguments),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "dumb", "COLUMNS": "100"},
        )
        os.close(theirs)
        self.seen = ""
        self._read_to = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.ours)

    def type(self, line):
        os.write(self.ours, line.encode() + b"\n")

    def interrupt(self):
        """Send Ctrl-C until the process ends: readline misses one that comes just before it waits for a key."""
        for _ in range(10):
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(3)
        raise AssertionError(self.seen)

    def wait_for(self, pattern):
        """Read until `pattern` appears after what was waited for before."""
        deadline = time.monotonic() + 60
        while not (found := re.compile(pattern, re.DOTALL).search(self.seen, self._read_to)):
            assert time.monotonic() < deadline, self.seen
            if select.select([self.ours], [], [], 1)[0]:
                self.seen += os.read(self.ours, 4096).decode(errors="replace")
        self._read_to = found.end()
