"""Tokenizer, chat templates and text streams against transformers."""

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer

from trtx.converters.artifact import Draft
from trtx.converters.errors import InputError, RequestError
from trtx.runtime import tokenizer as ours
from trtx.runtime.text_stream import TextStream

TEXTS = [
    "",
    "Hello, world!",
    " two  spaces and\n\nlines\t",
    "naïve café, 東京, Ελλάδα, עברית",
    "👩‍👩‍👧 family, 🇩🇪 flag, e\u0301 combining",
    "x = 12345 # code",
]
CORPUS = [*TEXTS, "the quick brown fox says hello to the lazy dog", "Hello there, hello again"]

LLAMA_2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = false %}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if loop.first and system %}{% set content = '<<SYS>>' + system + '<</SYS>>' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

QUESTION = [{"role": "user", "content": "What is 1 < 2?"}]
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello\n"},
    {"role": "assistant", "content": "Hi & <bye>"},
    {"role": "user", "content": "naïve 東京 👩‍👩‍👧"},
]


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory):
    """A small byte-level BPE (GPT-2 style) whose tokens are mostly single bytes."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return save(tokenizer, tmp_path_factory.mktemp("byte_level"), bos_token="<|begin|>", eos_token="<|end|>")


@pytest.fixture(scope="session")
def byte_fallback(tmp_path_factory):
    """A SentencePiece-like BPE with byte fallback (Llama 2 style): a space in front, BOS before the text."""
    words = ["▁", *"Helowrdtai ,.!", "He", "ll", "Hell", "Hello", "▁Hello", "▁w", "lo"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(words)]
    merges = [("H", "e"), ("l", "l"), ("He", "ll"), ("Hell", "o"), ("▁", "Hello"), ("▁", "w"), ("l", "o")]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return save(
        tokenizer,
        tmp_path_factory.mktemp("byte_fallback"),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=LLAMA_2_TEMPLATE,
    )


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory, smollm2_gguf):
    """The tokenizer of SmolLM2-135M-Instruct, as `trtx convert` writes it."""
    from trtx.converters.gguf_file import GgufSource

    folder = tmp_path_factory.mktemp("smollm2")
    GgufSource(smollm2_gguf).write_tokenizer(Draft(folder))
    return folder


@pytest.fixture(scope="session", params=["byte_level", "byte_fallback", "smollm2"])
def model(request):
    return request.getfixturevalue(request.param)


def save(tokenizer, folder, **settings):
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", **settings)
    return folder


def write(folder, name, **content):
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


@cache
def pair(folder):
    """Ours and the oracle. Kept, for hypothesis runs a test many times."""
    return ours.Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


def variant(folder, tmp_path, **settings):
    """A copy of a tokenizer with other settings in tokenizer_config.json."""
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write(tmp_path, "tokenizer_config.json", **{**config, **settings})
    return tmp_path


class TestEncode:
    def test_equals_transformers(self, model):
        tokenizer, oracle = pair(model)
        for text in TEXTS:
            assert tokenizer.encode(text) == oracle(text)["input_ids"]

    def test_decoding_equals_transformers_and_gives_the_text_back(self, model):
        tokenizer, oracle = pair(model)
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True) == text

    def test_bos_that_the_prompt_begins_with_is_not_added_again(self, byte_fallback):
        tokenizer = ours.Tokenizer.load(byte_fallback)
        written = tokenizer.encode("<s>Hello")
        assert written.count(1) == 1
        assert written[0] == 1
        assert tokenizer.encode("Hello<s>").count(1) == 2

    def test_the_post_processor_says_what_is_added(self, byte_fallback, tmp_path):
        tokenizer, oracle = pair(variant(byte_fallback, tmp_path, add_bos_token=False, add_eos_token=True))
        assert tokenizer.encode("Hello") == oracle("Hello")["input_ids"]

    def test_truncation_and_padding_of_the_file_are_not_applied(self, byte_level, tmp_path):
        backend = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
        whole = backend.encode("Hello, world!").ids
        backend.enable_truncation(3)
        backend.enable_padding(length=50)
        backend.save(str(tmp_path / "tokenizer.json"))
        assert ours.Tokenizer.load(tmp_path).encode("Hello, world!") == whole

    def test_special_tokens_named_in_the_config_alone_are_special(self, byte_level, tmp_path):
        folder = variant(byte_level, tmp_path, pad_token="<think>")
        tokenizer, oracle = pair(folder)
        ids = tokenizer.encode("a<think>b")
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True) == "ab"

    def test_lone_surrogates_are_refused(self, byte_level):
        with pytest.raises(RequestError, match=r"not valid Unicode.*character 2"):
            ours.Tokenizer.load(byte_level).encode("ab\ud83d")

    def test_no_tokenizer(self, tmp_path):
        with pytest.raises(InputError, match=r"has no tokenizer\.json"):
            ours.Tokenizer.load(tmp_path)

    def test_damaged_tokenizer(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text('{"version": ')
        with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
            ours.Tokenizer.load(tmp_path)


class TestChat:
    @pytest.mark.parametrize("prompted", [True, False])
    @pytest.mark.parametrize("messages", [QUESTION, DIALOGUE])
    @pytest.mark.parametrize("kind", ["byte_fallback", "smollm2"])
    def test_equals_transformers(self, request, kind, messages, prompted):
        tokenizer, oracle = pair(request.getfixturevalue(kind))
        expected = oracle.apply_chat_template(messages, add_generation_prompt=prompted)["input_ids"]
        assert tokenizer.chat(messages, add_generation_prompt=prompted) == expected

    def test_one_bos_where_both_template_and_post_processor_write_it(self, byte_fallback):
        ids = ours.Tokenizer.load(byte_fallback).chat(QUESTION)
        assert ids[0] == 1
        assert ids.count(1) == 1

    @pytest.mark.parametrize(
        "template",
        [
            "{{ tools | tojson(indent=2) }}{{ messages | tojson }}",
            "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
            "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ eos_token }}{{ pad_token }}|",
            "  {% if true %}\n  x\n  {%- endif %}\n{{ strftime_now('%Y') }}",
            "{{ unknown }}{{ messages[0].missing }}{{ bos_token }}{{ add_generation_prompt }}",
        ],
    )
    def test_environment_is_that_of_transformers(self, byte_level, tmp_path, template):
        tokenizer, oracle = pair(variant(byte_level, tmp_path, chat_template=template))
        tools = [{"type": "function", "function": {"name": "add", "description": "<b> & 東"}}]
        expected = oracle.apply_chat_template(DIALOGUE, tools=tools)["input_ids"]
        assert tokenizer.chat(DIALOGUE, tools=tools, add_generation_prompt=False) == expected

    def test_named_templates(self, byte_level, tmp_path):
        named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
        tokenizer = ours.Tokenizer.load(variant(byte_level, tmp_path, chat_template=named))
        assert tokenizer.decode(tokenizer.chat(QUESTION)) == "plain"
        assert tokenizer.decode(tokenizer.chat(QUESTION, tools=[{}])) == "tools"

    def test_the_file_of_its_own_counts_first(self, byte_level, tmp_path):
        folder = variant(byte_level, tmp_path, chat_template="old")
        (folder / "chat_template.jinja").write_text("new")
        tokenizer, oracle = pair(folder)
        assert tokenizer.decode(tokenizer.chat(QUESTION)) == "new"
        assert oracle.apply_chat_template(QUESTION, tokenize=False) == "new"

    def test_no_template(self, byte_level):
        with pytest.raises(InputError, match="no chat template"):
            ours.Tokenizer.load(byte_level).chat(QUESTION)

    def test_template_with_a_syntax_error(self, byte_level, tmp_path):
        folder = variant(byte_level, tmp_path, chat_template="{% if %}")
        with pytest.raises(InputError, match=r"tokenizer_config\.json: .*syntax error on line 1"):
            ours.Tokenizer.load(folder).chat(QUESTION)

    def test_chat_template_of_the_wrong_type(self, byte_level, tmp_path):
        with pytest.raises(InputError, match="chat_template is neither"):
            ours.Tokenizer.load(variant(byte_level, tmp_path, chat_template=[{"name": "default"}]))

    def test_template_that_is_not_utf8(self, byte_level, tmp_path):
        folder = variant(byte_level, tmp_path)
        (folder / "chat_template.jinja").write_bytes(b"\xff")
        with pytest.raises(InputError, match=r"chat_template\.jinja: not UTF-8"):
            ours.Tokenizer.load(folder)

    def test_the_template_refuses(self, byte_fallback):
        with pytest.raises(RequestError, match="roles must alternate"):
            ours.Tokenizer.load(byte_fallback).chat([{"role": "assistant", "content": "Hi"}])

    @pytest.mark.parametrize(
        "template",
        ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}", "{{ messages[0].content + 1 }}"],
    )
    def test_what_fails_or_leaves_the_sandbox_is_a_request_error(self, byte_level, tmp_path, template):
        with pytest.raises(RequestError, match="chat template refuses"):
            ours.Tokenizer.load(variant(byte_level, tmp_path, chat_template=template)).chat(QUESTION)

    @pytest.mark.parametrize("messages", [[], 3, "Hello", {"role": "user"}, ["Hello"], [{"content": "Hello"}]])
    def test_malformed_messages(self, byte_fallback, messages):
        with pytest.raises(RequestError, match=r"no messages|no role"):
            ours.Tokenizer.load(byte_fallback).chat(messages)


class TestGenerationConfig:
    @pytest.mark.parametrize(("listed", "expected"), [(7, {1, 7}), ([7, 9], {1, 7, 9}), (None, {1})])
    def test_eos_ids(self, byte_level, tmp_path, listed, expected):
        folder = variant(byte_level, tmp_path)
        write(folder, "generation_config.json", eos_token_id=listed)
        assert ours.Tokenizer.load(folder).eos_ids == expected

    def test_eos_ids_without_the_file(self, byte_level):
        assert ours.Tokenizer.load(byte_level).eos_ids == {1}

    def test_smollm2_ends_its_turn(self, smollm2):
        tokenizer = ours.Tokenizer.load(smollm2)
        assert tokenizer.encode("<|im_end|>")[0] in tokenizer.eos_ids

    @pytest.mark.parametrize("listed", ["</s>", [1, "2"], True])
    def test_malformed_eos_ids(self, byte_level, tmp_path, listed):
        folder = variant(byte_level, tmp_path)
        write(folder, "generation_config.json", eos_token_id=listed)
        with pytest.raises(InputError, match="eos_token_id is"):
            ours.Tokenizer.load(folder)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ({}, {"temperature": 0.0}),
            ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}),
            ({"repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
            ({"do_sample": True}, {"temperature": 1.0}),
            (
                {"do_sample": True, "temperature": 0.6, "top_p": 1, "top_k": 20, "min_p": None},
                {"temperature": 0.6, "top_p": 1.0, "top_k": 20},
            ),
        ],
    )
    def test_sampling_defaults(self, byte_level, tmp_path, content, expected):
        folder = variant(byte_level, tmp_path)
        write(folder, "generation_config.json", **content)
        assert ours.Tokenizer.load(folder).defaults() == expected

    def test_malformed_sampling_default(self, byte_level, tmp_path):
        folder = variant(byte_level, tmp_path)
        write(folder, "generation_config.json", do_sample=True, top_k="many")
        with pytest.raises(InputError, match=r"generation_config\.json: top_k is 'many'"):
            ours.Tokenizer.load(folder).defaults()


def streamed(stream, ids):
    """What a stream pushes, piece by piece, and what it had held back."""
    return [*(stream.push(token) for token in ids), stream.finish()]


class TestStream:
    @settings(max_examples=200, deadline=None)
    @given(data=st.data())
    def test_pieces_make_up_the_decoded_text(self, model, data):
        tokenizer, oracle = pair(model)
        size = len(oracle)  # ids beyond it: a padded vocabulary
        byte_tokens = st.integers(3, 3 + 255)  # in the small tokenizers: runs of bytes, valid UTF-8 or not
        ids = data.draw(st.lists(st.one_of(st.integers(0, size + 3), byte_tokens), max_size=60))
        expected = oracle.decode([i for i in ids if i < size], skip_special_tokens=True)
        assert tokenizer.decode(ids) == expected
        assert "".join(streamed(tokenizer.stream(), ids)) == expected

    @settings(max_examples=100, deadline=None)
    @given(text=st.text(st.one_of(st.sampled_from("Helo w👩‍é東\ufffd"), st.characters(codec="utf-8")), max_size=40))
    def test_no_character_is_split(self, model, text):
        tokenizer, oracle = pair(model)
        ids = tokenizer.encode(text)
        assert "".join(streamed(tokenizer.stream(), ids)) == oracle.decode(ids, skip_special_tokens=True)

    def test_text_comes_at_once(self, smollm2):
        tokenizer = ours.Tokenizer.load(smollm2)
        ids = tokenizer.encode("The capital of France is Paris.")
        assert streamed(tokenizer.stream(), ids) == [*(tokenizer.decode([i]) for i in ids), ""]

    def test_a_character_of_several_tokens_comes_with_its_last(self, byte_level):
        tokenizer = ours.Tokenizer.load(byte_level)
        backend = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
        ids = [backend.token_to_id(symbol) for symbol in "ðŁĺĢ"]  # 😀, a token a byte
        assert streamed(tokenizer.stream(), ids) == ["", "", "", "😀", ""]
        assert streamed(tokenizer.stream(), ids[:2]) == ["", "", "\ufffd"]

    def test_the_leading_space_goes_once(self, byte_fallback):
        tokenizer = ours.Tokenizer.load(byte_fallback)
        hello = tokenizer.encode("Hello")[1]
        assert streamed(tokenizer.stream(), [1, hello, 1, 2, hello]) == ["", "Hello", "", "", " Hello", ""]

    def test_each_token_costs_the_same(self, byte_level):
        """A window of the last tokens is decoded, never the whole text."""
        longest = 0

        def decode(ids):
            nonlocal longest
            longest = max(longest, len(ids))
            return "\ufffd" * len(ids)  # bytes that never become a character: the worst case

        text = "".join(streamed(TextStream(decode, lambda token: True), range(1000)))
        assert text == "\ufffd" * 1000
        assert longest < 12


class TestStopStrings:
    def stream(self, *stop, min_tokens=0):
        """A stream over characters as tokens."""
        return TextStream(lambda ids: "".join(map(chr, ids)), lambda token: True, stop=stop, min_tokens=min_tokens)

    def run(self, stream, text):
        return streamed(stream, map(ord, text))

    def test_text_ends_before_it(self):
        stream = self.stream("END")
        assert "".join(self.run(stream, "an E, an EN, an END and more")) == "an E, an EN, an "
        assert stream.stopped

    def test_only_its_possible_beginning_is_held_back(self):
        stream = self.stream("aab")
        assert self.run(stream, "xaaay") == ["x", "", "", "a", "aay", ""]
        assert not stream.stopped

    def test_what_was_held_back_comes_at_the_end(self):
        assert self.run(self.stream("\n\n"), "a\n") == ["a", "", "\n"]

    def test_it_may_be_the_last_character_held_back(self, byte_level):
        tokenizer = ours.Tokenizer.load(byte_level)
        stream = tokenizer.stream(stop=["\ufffd"])
        backend = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
        assert streamed(stream, [backend.token_to_id("x"), backend.token_to_id("ð")]) == ["x", "", ""]
        assert stream.stopped

    def test_not_before_min_tokens(self):
        stream = self.stream("ab", min_tokens=3)
        assert "".join(self.run(stream, "ababab")) == "aba" + "b"

    @given(
        text=st.text("abc", max_size=30),
        stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
        cuts=st.lists(st.integers(1, 5), min_size=30, max_size=30),
    )
    def test_how_the_text_is_cut_into_tokens_does_not_matter(self, text, stop, cuts):
        pieces, rest = [], text
        for cut in cuts:
            pieces.append(rest[:cut])
            rest = rest[cut:]
        stream = TextStream(lambda ids: "".join(pieces[i] for i in ids), lambda i: True, stop=stop)
        out = "".join(streamed(stream, range(len(pieces))))

        ends = [end for end in range(1, len(text) + 1) if text[:end].endswith(tuple(stop))]
        if not ends:
            assert out == text
            assert not stream.stopped
        else:
            first = text[: ends[0]]
            longest = max(len(s) for s in stop if first.endswith(s))
            assert out == first[: len(first) - longest]
            assert stream.stopped
