"""`trtx run`: continue prompts, or chat."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtx.cli.common import Device, Json, Verbose, json_line, note, progress, warn
from trtx.cli.repl import converse, print_stream, write
from trtx.converters.errors import InputError, RequestError

if TYPE_CHECKING:
    from trtx.runtime.jobs import Job
    from trtx.runtime.llm import LLM, Completion

STDIN = "-"


def run(
    engine: Annotated[
        Path, typer.Argument(metavar="ENGINE", help="A folder written by trtx build.", show_default=False)
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Texts to continue, run together. Default: all of stdin, as one."),
    ] = None,
    input: Annotated[
        str | None,
        typer.Option("--input", "-i", metavar="JSONL", help="Read prompts from a file of JSON lines; - is stdin."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are a user's messages. On a terminal, without one: a conversation.")
    ] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message of --chat.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="The most tokens to generate. Default: 128; --chat: what fits."),
    ] = None,
    min_tokens: Annotated[int | None, typer.Option(min=0, metavar="N", help="Do not end before so many.")] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", help="0 takes the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Choose among the K likeliest; 0: all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Choose among the likeliest that add up to P.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(metavar="P", help="Only tokens at least P times as likely as the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(metavar="R", help="Above 1: make tokens seen before less likely.")
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="Subtract X from logits of generated tokens.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="The same, for each time they were generated.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="The same seed gives the same text, whatever the batch.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", min=1, metavar="N", help="Continuations of each prompt.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; can be given several times.")
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="End with this token; can be given several times.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the model's end-of-sequence tokens.")
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --json: log-probabilities of each token and the N likeliest."),
    ] = None,
    stats: Annotated[
        bool | None,
        typer.Option("--stats/--no-stats", help="Say on stderr how fast it was. Default: on a terminal."),
    ] = None,
    device: Device = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Continue prompts, or chat.

    Sampling options that are not given are the model's own (generation_config.json); a model that has none, or does
    not say do_sample, takes the likeliest token. A single prompt is printed as it comes, several in their order.

    A line of --input is an object with "prompt", "messages" or "input_ids"; it may have an "id" and sampling options
    of its own ("max_tokens", "top_p", ...). Lines that can't be served are reported, and the others finish.
    """
    conversing = chat and not prompts and input is None and sys.stdin.isatty()
    if prompts and input is not None:
        raise typer.BadParameter("prompts are given twice: leave out --input or PROMPT.")
    if system is not None and not chat:
        raise typer.BadParameter("--system is for conversations: give --chat too.")
    if logprobs is not None and not as_json:
        raise typer.BadParameter("--logprobs are printed with --json only.")
    if conversing and (as_json or n is not None):
        raise typer.BadParameter("--json and -n need a prompt: give one, or pipe it in.")
    options = _sampling_options(
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        n=n,
        stop=tuple(stop) if stop else None,
        stop_token_ids=tuple(stop_token_id) if stop_token_id else None,
        ignore_eos=ignore_eos or None,
        logprobs=logprobs,
        max_tokens=max_tokens,
    )
    if chat and max_tokens is None:
        options["max_tokens"] = None  # a chat model says itself where its answer ends
    name = "stdin" if input == STDIN else input or ""
    objects = None if input is None else _read_objects(input, name)
    texts = prompts or ([] if conversing or objects is not None else [_read_prompt()])

    from trtx.runtime.jobs import JobReader

    llm = _load(engine, device)
    if not as_json:
        _require_text(llm)
    params = replace(llm.default_params(), **options)
    if conversing:
        converse(llm, params, system)
        return
    reader = JobReader(llm, params, chat, system)
    jobs = reader.texts(texts) if objects is None else reader.lines(objects, name)
    completions = _print_single(llm, jobs[0]) if _is_single(jobs, as_json) else _print_in_order(llm, jobs, as_json)
    if stats if stats is not None else sys.stderr.isatty():
        note(_summary(completions))
    _raise_failures(completions)


def _sampling_options(**options: Any) -> dict[str, Any]:
    """The options that were given, as fields of `SamplingParams`. Refused here, before the engine is loaded."""
    from trtx.runtime.sampling import SamplingParams

    given = {name: value for name, value in options.items() if value is not None}
    try:
        SamplingParams(**given)
    except RequestError as error:
        raise typer.BadParameter(f"{error.cause} {error.remedy}") from error
    return given


def _read_prompt() -> str:
    """The prompt on stdin, without its last line break, which is the shell's."""
    if sys.stdin.isatty():
        raise typer.BadParameter("PROMPT is missing. Give one, pipe one in, or give --input or --chat.")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"stdin: not UTF-8 ({error.reason} at byte {error.start}).", "Give the prompt as UTF-8."
        ) from error


def _read_objects(file: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a batch file."""
    from trtx.converters.jsonl import read_objects

    try:
        content = sys.stdin.buffer.read() if file == STDIN else Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"{name}: can't be read ({error.strerror}).", "Give a file of JSON lines.") from error
    objects = list(read_objects(content.splitlines(), name))
    if not objects:
        raise InputError(f"{name}: no prompts in it.", "Write one JSON object a line.")
    return objects


def _load(engine: Path, device: str | None) -> LLM:
    from trtx.builder.engine import Engine
    from trtx.runtime.llm import LLM

    with progress("Loading", Engine(engine).config.ledger.get("weights")) as advance:
        llm = LLM(engine, device=device, advance=advance)
    for difference in llm.notes:
        warn(difference)
    if llm.config.has_random_weights:
        warn("random weights: the output means nothing.")
    return llm


def _require_text(llm: LLM) -> None:
    try:
        _ = llm.tokenizer
    except InputError as error:
        raise InputError(
            f"{llm.path}: the engine has no tokenizer.json, so there is no text to print.",
            "Give prompts as token ids (--input with input_ids) and add --json.",
        ) from error


def _is_single(jobs: Sequence[Job], as_json: bool) -> bool:
    """Whether there is one text to print, and so nothing to tell apart."""
    return not as_json and len(jobs) == 1 and (jobs[0].request is None or jobs[0].request.params.n == 1)


def _print_single(llm: LLM, job: Job) -> list[Completion]:
    """Print the one continuation as it comes."""
    if job.request is None:
        assert job.error is not None
        raise job.error
    return [print_stream(llm, job.request)]


def _print_in_order(llm: LLM, jobs: Sequence[Job], as_json: bool) -> list[Completion]:
    """Print each continuation when it and all before it have ended: a JSON line, or as `head` prints several files."""
    from trtx.cli.app import report
    from trtx.runtime.jobs import complete

    completions: list[Completion] = []
    for job, completion in complete(llm, jobs):
        if as_json:
            json_line(_record(job, completion))
        elif completion.error is not None:
            report(completion.error)
        else:
            index = f" #{completion.index}" if job.request is not None and job.request.params.n > 1 else ""
            gap = "\n" if completions else ""
            write(f"{gap}==> {job.id}{index} <==\n{completion.text}\n")
        completions.append(completion)
    return completions


def _record(job: Job, completion: Completion) -> dict[str, Any]:
    """A completion as `--json` prints it."""
    record: dict[str, Any] = {
        "id": job.id,
        "index": completion.index,
        "prompt_tokens": completion.prompt_tokens,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason.value if completion.finish_reason else None,
        "ttft_s": completion.ttft,
        "seconds": completion.seconds,
    }
    if completion.logprobs:
        record["logprobs"] = [
            {"token": token, "logprob": logprob, "top": [vars(other) for other in top]}
            for token, logprob, top in zip(
                completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True
            )
        ]
    if completion.error is not None:
        record |= {"error": completion.error.cause, "remedy": completion.error.remedy}
    return record


def _summary(completions: Sequence[Completion]) -> str:
    prompt = sum(completion.prompt_tokens for completion in completions if completion.index == 0)
    tokens = sum(len(completion.token_ids) for completion in completions)
    seconds = max(completion.seconds for completion in completions)
    parts = [f"{prompt} prompt tokens, {tokens} tokens in {seconds:.2f} s"]
    if seconds:
        parts.append(f"{tokens / seconds:.1f} tokens/s")
    firsts = [completion.ttft for completion in completions if completion.ttft is not None]
    if firsts:
        parts.append(f"{'median ' if len(firsts) > 1 else ''}TTFT {median(firsts):.3f} s")
    return ", ".join(parts)


def _raise_failures(completions: Sequence[Completion]) -> None:
    failed = [completion.error for completion in completions if completion.error is not None]
    if failed and len(completions) == 1:
        raise failed[0]
    if failed:
        raise RequestError(
            f"{len(failed)} of {len(completions)} requests failed.", "Read their errors; the others have finished."
        )
