"""How the next token is chosen, as data. The arithmetic is in `runtime.sampler`."""

from __future__ import annotations

from dataclasses import dataclass

from trtx.converters.errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """The parameters of one request.

    Attributes:
        max_tokens: the most tokens to generate; None: as many as the engine's sequence length allows.
        min_tokens: no end of sequence and no stop string before so many.
        temperature: 0 is greedy.
        top_k: only the k most likely tokens; 0: all.
        top_p: the smallest set of tokens whose probability reaches p (Holtzman et al. 2019, arXiv:1904.09751).
        min_p: only tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in the prompt or output
            (Keskar et al. 2019, arXiv:1909.05858).
        presence_penalty, frequency_penalty: subtracted from logits of generated tokens, once and per occurrence.
        seed: the same seed gives the same text whatever the batch; None: a fresh one.
        n: how many continuations of the prompt.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: tokens that end it.
        ignore_eos: go on past the model's end-of-sequence tokens.
        logprobs: how many of the likeliest tokens to report at each position, of the model's own distribution
            (before temperature, penalties and truncation); None: none, 0: only the chosen token.
    """

    max_tokens: int | None = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
            RequestError: names the parameter.
        """
        rules = {
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            "min_tokens": (0 <= self.min_tokens <= (self.max_tokens or self.min_tokens), "from 0 to max_tokens"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "from -2 to 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            "n": (self.n >= 1, "at least 1"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= 20, "from 0 to 20"),
            "stop": (all(self.stop), "without empty strings"),
        }
        for name, (holds, range_) in rules.items():
            if not holds:
                raise RequestError(f"{name} is {getattr(self, name)!r}.", f"Give a value that is {range_}.")

    @property
    def penalizes(self) -> bool:
        """Whether the tokens so far change what is likely."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0
