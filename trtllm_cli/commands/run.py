"""`trtllm run`: prompts in, text out, with an engine."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from trtllm_cli.commands import launch_flags, memory_flags, model_flags
from trtllm_cli.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from trtllm_cli.commands.prompts import PromptItem
    from trtllm_cli.commands.run_output import Printer, View
    from trtllm_cli.run.llm import LLM
    from trtllm_cli.run.request import RequestOutput, SamplingParams

_ENGINE, _SAMPLING, _OUTPUT = "Engine", "Sampling", "Output"


def run(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What to answer or go on from; several are generated side by side.")
    ] = None,
    engine_dir: Annotated[
        Path | None, typer.Option(help="The engine, as `trtllm build` writes it.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Instead of an engine: a hub id, snapshot, .gguf file or checkpoint; its engine is made and cached.",
            show_default=False,
        ),
    ] = None,
    revision: model_flags.Revision = None,
    offline: model_flags.Offline = False,
    token: model_flags.Token = None,
    dtype: model_flags.Dtype = None,
    weight_dtype: model_flags.WeightDtype = None,
    max_seq_len: model_flags.MaxSeqLen = None,
    max_batch_size: model_flags.MaxBatchSize = None,
    input_text: Annotated[
        list[str] | None, typer.Option("--input-text", help="A prompt, as an option; may be given several times.")
    ] = None,
    input_file: Annotated[
        str | None,
        typer.Option(
            help="A .txt file (a prompt a line) or .jsonl (objects with prompt, messages or input_ids, and sampling "
            "parameters for this line); - reads standard input."
        ),
    ] = None,
    input_token_ids: Annotated[
        str | None, typer.Option(help="A prompt as token ids, such as 1,2,3. Needs no tokenizer.")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="A conversation: type, read the answer, go on.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="The system message that conversations begin with.")] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            help="Give text prompts to the model as a user's message, or as they are. Default: as a message where the "
            "tokenizer has a chat template."
        ),
    ] = None,
    tokenizer_dir: Annotated[Path | None, typer.Option(help="A tokenizer in place of the engine's own.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", "--max-output-len", rich_help_panel=_SAMPLING, help="Most tokens to generate. Default: 128."
        ),
    ] = None,
    min_tokens: Annotated[int, typer.Option(rich_help_panel=_SAMPLING, help="No end before so many tokens.")] = 0,
    temperature: Annotated[
        float, typer.Option(rich_help_panel=_SAMPLING, help="How random: 0 is greedy, 1 as the model has it.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(rich_help_panel=_SAMPLING, help="Draw of the k likeliest tokens; 0: of all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option(rich_help_panel=_SAMPLING, help="Draw of the likeliest that together make up p.")
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(rich_help_panel=_SAMPLING, help="Draw of those at least this likely, against the likeliest."),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(rich_help_panel=_SAMPLING, help="Above 1: fewer tokens of prompt and output again.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(rich_help_panel=_SAMPLING, help="Above 0: fewer tokens of the output again.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(rich_help_panel=_SAMPLING, help="The same, for each time that they came.")
    ] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option("--seed", "--random-seed", rich_help_panel=_SAMPLING, help="Makes sampling repeatable."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            "--stop-words",
            rich_help_panel=_SAMPLING,
            help="Ends before this text; may be given several times.",
        ),
    ] = None,
    stop_token_ids: Annotated[
        str | None, typer.Option(rich_help_panel=_SAMPLING, help="Ends at one of these, such as 2,13.")
    ] = None,
    include_stop: Annotated[
        bool, typer.Option("--include-stop", rich_help_panel=_SAMPLING, help="Show the text that ended it.")
    ] = False,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", rich_help_panel=_SAMPLING, help="Go on after the end token.")
    ] = False,
    n: Annotated[
        int, typer.Option("--n", "--num-return-sequences", rich_help_panel=_SAMPLING, help="Answers to each prompt.")
    ] = 1,
    logprobs: Annotated[
        int | None,
        typer.Option(rich_help_panel=_SAMPLING, help="With --json: log probabilities, and of so many other tokens."),
    ] = None,
    skip_special_tokens: Annotated[
        bool, typer.Option(rich_help_panel=_SAMPLING, help="Leave special tokens out of the text.")
    ] = True,
    streaming: Annotated[
        bool, typer.Option(rich_help_panel=_OUTPUT, help="Print tokens as they come, or whole answers.")
    ] = True,
    json_: Annotated[
        bool, typer.Option("--json", rich_help_panel=_OUTPUT, help="Print a JSON object a prompt, with ids and times.")
    ] = False,
    output_file: Annotated[
        str | None, typer.Option(rich_help_panel=_OUTPUT, help="Write those JSON lines to a file too; - is --json.")
    ] = None,
    stats: Annotated[
        bool, typer.Option(rich_help_panel=_OUTPUT, help="A line of statistics at the end, on standard error.")
    ] = True,
    threads: Annotated[
        int | None,
        typer.Option(
            "--num-threads",
            "--threads",
            rich_help_panel=_ENGINE,
            help="CPU threads, of an engine for CPUs. Default: all cores.",
        ),
    ] = None,
    kv_cache_memory: memory_flags.KvCacheMemory = None,
    kv_cache_free_gpu_memory_fraction: memory_flags.GpuMemoryFraction = None,
    max_gpu_memory: memory_flags.MaxGpuMemory = None,
    max_num_blocks: memory_flags.MaxNumBlocks = None,
    prefix_cache: Annotated[
        bool, typer.Option(rich_help_panel=_ENGINE, help="Compute what prompts have in common once.")
    ] = True,
    chunked_prefill: Annotated[
        bool, typer.Option(rich_help_panel=_ENGINE, help="Let long prompts take several steps.")
    ] = True,
    scheduler_policy: Annotated[
        str,
        typer.Option(rich_help_panel=_ENGINE, help="max_utilization, or guaranteed_no_evict: none is ever put back."),
    ] = "max_utilization",
    launch: launch_flags.Launch = False,
    hostfile: launch_flags.Hostfile = None,
    mpirun_args: launch_flags.MpirunArgs = "",
) -> None:
    """Generate text with an engine.

    The text goes to standard output, as it comes, and nothing else does. Several prompts are generated together: on a
    terminal each in its pane, elsewhere line by line with the prompt's number in front.

    Examples:

        trtllm run --engine-dir engine "Why is the sky blue?"

        trtllm run --engine-dir engine --interactive --system "You are terse."

        trtllm run --engine-dir engine --no-chat-template --max-tokens 32 "Once upon a time" "In the beginning"

        trtllm run --engine-dir engine --input-file prompts.jsonl --output-file answers.jsonl --no-streaming

        echo "Why is the sky blue?" | trtllm run --engine-dir engine --temperature 0.7 --top-p 0.9 --seed 1

    An engine of several ranks, here or on several hosts:

        mpirun -n 4 trtllm run --engine-dir engine_tp2_pp2 "Why is the sky blue?"

        trtllm run --engine-dir engine_tp2_pp2 --launch "Why is the sky blue?"

        trtllm run --engine-dir engine_tp2_pp2 --launch --hostfile hosts "Why is the sky blue?"
    """
    from trtllm_cli.commands.choices import choice
    from trtllm_cli.commands.prompts import STDIN, parse_ids, read_prompts

    how = model_flags.ModelFlags(revision, offline, token, dtype, weight_dtype, max_seq_len, max_batch_size)
    how.check(engine_dir, model)
    has_prompts = bool(prompts or input_text or input_file or input_token_ids)
    _check_prompts(interactive, has_prompts=has_prompts)
    params = _sampling_params(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        stop_token_ids=tuple(parse_ids(stop_token_ids or "", "--stop-token-ids")),
        include_stop_str_in_output=include_stop,
        ignore_eos=ignore_eos,
        n=n,
        logprobs=logprobs,
        skip_special_tokens=skip_special_tokens,
    )
    options = RunOptions(
        params=params,
        system=system,
        chat_template=chat_template,
        streaming=streaming,
        json=json_ or output_file == "-",
        output_file=None if output_file in (None, "-") else Path(output_file),
        stats=stats,
    )
    llm_options: dict[str, Any] = {
        "num_threads": threads,
        "kv_cache_memory": kv_cache_memory,
        "max_num_blocks": max_num_blocks,
        "kv_cache_free_gpu_memory_fraction": kv_cache_free_gpu_memory_fraction,
        "max_gpu_memory": max_gpu_memory,
        "enable_prefix_cache": prefix_cache,
        "enable_chunked_prefill": chunked_prefill,
        "scheduler_policy": choice(scheduler_policy, ("max_utilization", "guaranteed_no_evict"), "--scheduler-policy"),
    }
    ranks = launch_flags.LaunchFlags(launch, hostfile, mpirun_args)
    reads_stdin = input_file == STDIN or not (interactive or has_prompts)
    if ranks.start_or_follow(engine_dir, llm_options, reads_stdin=reads_stdin):
        return
    items = []
    if not interactive:
        arguments = [*(prompts or ()), *(input_text or ())]
        items = read_prompts(arguments, input_file, input_token_ids, stdin=not sys.stdin.isatty())
        if not items:
            raise UsageError(
                "no prompt", where="PROMPTS", fix='give one: trtllm run ... "Why is the sky blue?", or --interactive'
            )
    if engine_dir is None:
        assert model is not None
        engine_dir = how.engine(model)
    from trtllm_cli.commands.console import tell
    from trtllm_cli.run.llm import LLM

    try:
        with LLM(engine_dir, tokenizer_dir=tokenizer_dir, **llm_options) as llm:
            tell(llm.notes)
            if interactive:
                from trtllm_cli.commands.run_interactive import converse

                converse(llm, options)
            else:
                generate(llm, items, options)
    except BrokenPipeError:  # whoever read our output has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@dataclass(frozen=True)
class RunOptions:
    """How to generate and where the text goes."""

    params: SamplingParams
    system: str | None = None
    chat_template: bool | None = None  # None: where the tokenizer has one
    streaming: bool = True
    json: bool = False
    output_file: Path | None = None
    stats: bool = True
    out: TextIO = field(default_factory=lambda: sys.stdout)
    err: TextIO = field(default_factory=lambda: sys.stderr)


def generate(llm: LLM, items: Sequence[PromptItem], options: RunOptions) -> list[RequestOutput]:
    """Generates for all prompts together, showing what comes as the options say; the whole answers."""
    from trtllm_cli.commands.prompts import as_chat, params_of
    from trtllm_cli.commands.run_output import View, quiet_keyboard, title_of
    from trtllm_cli.run.outputs import accumulate

    chat = wants_chat(llm, options)
    view = View(
        [title_of(item) for item in items], [params_of(i, options.params).n for i in items], llm.tokenizer is None
    )
    asked = [as_chat(item, options.system) if chat else item for item in items]
    names = [item.where if len(items) > 1 else "" for item in items]
    each = [params_of(item, options.params) for item in items]
    view = View([title_of(item) for item in items], [one.n for one in each], ids=llm.tokenizer is None)
    stream = llm.stream([item.prompt for item in asked], each, names=names)
    outputs = [request.empty_output() for request in stream.requests]
    with stream, quiet_keyboard(), _printer(items, outputs, view, options) as printer:
        for delta in stream:
            index = stream.index(delta)
            accumulate(outputs[index], delta)
            printer.delta(index, delta)
            if delta.finished:
                printer.finished(index, outputs[index])
    if options.stats:
        from trtllm_cli.commands.run_stats import summary

        options.err.write(summary(outputs, llm) + "\n")
    return outputs


def wants_chat(llm: LLM, options: RunOptions) -> bool:
    """Whether text prompts go through the chat template. Raises UsageError where it is needed and missing."""
    has = llm.tokenizer is not None and llm.tokenizer.has_chat_template
    if options.chat_template is False:
        if options.system is not None:
            raise UsageError("--system is part of a conversation, which --no-chat-template turns off", where="--system")
        return False
    if not has and (options.chat_template or options.system is not None):
        flag = "--system" if options.system is not None else "--chat-template"
        raise UsageError(
            f"{flag} needs a chat template, and this engine's tokenizer has none",
            where=flag,
            fix="leave it out: the model goes on from plain prompts",
        )
    return has


def _sampling_params(**values: Any) -> SamplingParams:
    """Raises UsageError that names the flag."""
    from trtllm_cli.run.request import SamplingParams

    try:
        return SamplingParams(**values)
    except UsageError as e:
        flag = "--" + str(e.where).replace("_", "-")
        raise UsageError(e.message.replace(str(e.where), flag, 1), where=flag, fix=e.fix) from None


@contextlib.contextmanager
def _printer(
    items: Sequence[PromptItem], outputs: Sequence[RequestOutput], view: View, options: RunOptions
) -> Iterator[Printer]:
    from trtllm_cli.commands.run_output import Both, InOrder, JsonLines

    with contextlib.ExitStack() as stack:
        printer = _shown_on(items, outputs, view, options)
        if options.output_file is not None:
            try:
                file = stack.enter_context(options.output_file.open("w", encoding="utf-8"))
            except OSError as e:
                raise ResourceError(
                    f"cannot write {options.output_file}: {e.strerror}", where="--output-file"
                ) from None
            printer = Both(printer, InOrder(JsonLines(file, items)))
        yield stack.enter_context(printer)


def _shown_on(
    items: Sequence[PromptItem], outputs: Sequence[RequestOutput], view: View, options: RunOptions
) -> Printer:
    """The printer for standard output."""
    from trtllm_cli.commands.run_output import Headed, InOrder, JsonLines, Lines, Panes, Plain, Printer

    out = options.out
    count = sum(view.counts)
    if options.json:
        return InOrder(JsonLines(out, items))
    if options.output_file is not None and count > 1 and not options.streaming:
        return Printer()
    if count == 1:
        return Plain(out, view) if options.streaming else InOrder(Plain(out, view))
    if options.streaming and out.isatty() and Panes.fit(count, out):
        return Panes(out, view, outputs)
    if options.streaming:
        return Lines(out, view)
    return InOrder(Headed(out, view) if out.isatty() else Lines(out, view))


def _check_prompts(interactive: bool, *, has_prompts: bool) -> None:
    if interactive and has_prompts:
        raise UsageError("--interactive takes no prompts: type them", where="--interactive")
