"""`trtllm run --interactive`: a conversation at the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from trtllm_cli.commands.run import wants_chat
from trtllm_cli.commands.run_output import harmless, quiet_keyboard
from trtllm_cli.commands.run_stats import summary
from trtllm_cli.errors import RequestError, TrtllmError

if TYPE_CHECKING:
    from trtllm_cli.commands.run import RunOptions
    from trtllm_cli.run.llm import LLM

HELP = """\
  /reset          forget the conversation
  /system TEXT    start again with this system message; /system alone shows it
  /help           this
  /exit           leave, as Ctrl-D does
  Ctrl-C stops an answer; at the prompt, a second one leaves.
"""


class Conversation:
    """The messages so far, and how to have the next one answered."""

    def __init__(self, llm: LLM, options: RunOptions) -> None:
        self._llm = llm
        self._options = options
        self._chat = wants_chat(llm, options)
        self.system = options.system
        self.messages: list[dict[str, Any]] = []
        self._text = ""  # in place of messages, where there is no chat template: what was said, run together

    def reset(self, system: str | None) -> None:
        """Starts again, with this system message."""
        if system is not None and not self._chat:
            raise RequestError("this engine's tokenizer has no chat template, so there is no system message")
        self.system, self.messages, self._text = system, [], ""

    def answer(self, line: str) -> str:
        """Prints the answer to `line` as it comes, and keeps both; the statistics.

        Ctrl-C ends the answer, and what came of it is kept. Raises RequestError, and keeps nothing, where the
        conversation no longer fits the engine.
        """
        from trtllm_cli.run.outputs import accumulate

        ids = self._llm.tokenize(self._with(line))
        stream = self._llm.stream(
            [ids], dataclasses.replace(self._options.params, n=1, max_tokens=self._room(len(ids)))
        )
        total = stream.requests[0].empty_output()
        out = self._options.out
        clean = out.isatty()
        with stream, quiet_keyboard(), contextlib.suppress(KeyboardInterrupt):
            for delta in stream:
                accumulate(total, delta)
                text = delta.outputs[0].text
                out.write(harmless(text) if clean else text)
                out.flush()
        said = total.outputs[0]
        out.write("\n" if not said.text.endswith("\n") else "")
        out.flush()
        if said.finish_reason == "length":
            limit = self._llm.build_config.max_seq_len
            full = len(ids) + len(said.token_ids) >= limit
            why = f"the engine's max_seq_len of {limit} is reached" if full else f"--max-tokens {len(said.token_ids)}"
            self._options.err.write(f"(cut: {why})\n")
        self._keep(line, said.text)
        return summary([total], self._llm)

    def _with(self, line: str) -> Any:
        if not self._chat:
            return self._text + line
        first = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*first, *self.messages, {"role": "user", "content": line}]

    def _keep(self, line: str, answer: str) -> None:
        if self._chat:
            self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]
        else:
            self._text += line + answer

    def _room(self, length: int) -> int:
        """Tokens that the answer may have."""
        config = self._llm.build_config
        limit = min(config.max_seq_len - 1, config.max_input_len)
        if length > limit:
            again = (
                "/reset starts again, a shorter message may still fit" if self.messages or self._text else "shorten it"
            )
            raise RequestError(
                f"the conversation has {length} tokens now, this engine takes {limit} and its answer", fix=again
            )
        left = config.max_seq_len - length
        return min(left, self._options.params.max_tokens or left)


def converse(llm: LLM, options: RunOptions) -> None:
    """Reads lines and prints answers until the user leaves."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() its history and line editing

    conversation = Conversation(llm, options)
    terminal = options.out.isatty()
    if terminal:
        options.err.write(f"{llm.engine.path.name}: /help for what you can type, Ctrl-D to leave\n")
    interrupted = False
    while True:
        try:
            line = input(">>> " if terminal else "").strip()
            interrupted = False
        except EOFError:
            options.err.write("\n" if terminal else "")
            return
        except KeyboardInterrupt:
            if interrupted:
                options.err.write("\n")
                return
            interrupted = True
            options.err.write("\n(Ctrl-C again, or Ctrl-D, leaves)\n")
            continue
        if line in ("/exit", "/quit"):
            return
        try:
            note = _obey(conversation, line) if line.startswith("/") else conversation.answer(line) if line else ""
        except TrtllmError as e:
            note = f"error: {e}"
        if note and (options.stats or not note[0].isdigit()):
            options.err.write(f"{note}\n")


def _obey(conversation: Conversation, line: str) -> str:
    """Does what a line that begins with a slash says; what to tell the user."""
    command, _, rest = line.partition(" ")
    match command:
        case "/help":
            return HELP.rstrip("\n")
        case "/reset":
            conversation.reset(conversation.system)
            return "(the conversation is forgotten)"
        case "/system" if rest.strip():
            conversation.reset(rest.strip())
            return "(a new conversation, with this system message)"
        case "/system":
            return conversation.system or "(no system message but the chat template's own)"
    return f"no such command: {command}; /help lists them"
