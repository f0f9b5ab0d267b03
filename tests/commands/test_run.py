import _thread
import dataclasses
import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import threading

import pytest

from tests.fake_runner import FakeRunner
from tests.run.tiny import byte_level, fake_runners, write_engine  # noqa: F401
from trtllm_cli import cli
from trtllm_cli.commands.prompts import PromptItem, params_of, read_prompts
from trtllm_cli.commands.run import RunOptions, generate
from trtllm_cli.commands.run_interactive import Conversation, converse
from trtllm_cli.commands.run_output import Lines, View, harmless, title_of
from trtllm_cli.errors import UsageError
from trtllm_cli.run.llm import LLM
from trtllm_cli.run.request import CompletionOutput, RequestOutput, SamplingParams

pytestmark = pytest.mark.usefixtures("fake_runners")
FLAGS = ["--max-tokens", "10", "--ignore-eos"]
PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)


@pytest.fixture
def engine(tmp_path):
    return write_engine(tmp_path / "engine", byte_level())


@pytest.fixture
def llm(engine):
    with LLM(engine) as llm:
        yield llm


def run(engine, *args):
    return cli.call(["run", "--engine-dir", str(engine), *args])


def chat(llm, prompt):
    """What the model answers to a user's message."""
    return llm.generate([{"role": "user", "content": prompt}], PARAMS)[0].outputs[0].text


def with_newline(text):
    return text if text.endswith("\n") else text + "\n"


def stdin_of(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))


# --- one prompt and several


def test_one_prompt_prints_its_text_and_nothing_else(engine, llm, capsys):
    assert run(engine, "hello", *FLAGS) == 0
    printed = capsys.readouterr()
    assert printed.out == with_newline(chat(llm, "hello"))
    assert "10 output tokens" in printed.err
    assert "TTFT" in printed.err
    assert printed.err.count("\n") == 1


def test_what_the_gpu_is_found_to_compute_wrongly_is_told(engine, capsys, monkeypatch):
    monkeypatch.setattr("trtllm_cli.run.llm.gpu_notes", lambda _: ["a kernel [3] computes wrong numbers"])
    assert run(engine, "hello", "--no-stats", *FLAGS) == 0
    assert capsys.readouterr().err == "note: a kernel [3] computes wrong numbers\n"


@pytest.mark.parametrize("streaming", ["--streaming", "--no-streaming"])
def test_several_prompts_never_mix_in_a_line(engine, llm, capsys, streaming):
    prompts = [f"hello {i}" for i in range(6)]
    assert run(engine, *prompts, streaming, "--no-stats", *FLAGS) == 0
    out, err = capsys.readouterr()
    answers = {str(i): [] for i in range(6)}
    for line in out.removesuffix("\n").split("\n"):
        label, text = line.split("] ", 1)
        answers[label.removeprefix("[")].append(text)
    for i, prompt in enumerate(prompts):
        assert "\n".join(answers[str(i)]) == chat(llm, prompt).removesuffix("\n")
    assert err == ""


def test_flags_of_tensorrt_llms_users(engine, llm, capsys):
    args = ["--input_text", "hello", "--max_output_len", "10", "--random_seed", "3", "--stop_words", "\x00\x00"]
    assert run(engine, *args, "--num_return_sequences", "1", "--ignore_eos", "--no-stats") == 0
    assert capsys.readouterr().out == with_newline(chat(llm, "hello"))


def test_text_as_it_is_without_the_chat_template(engine, llm, capsys):
    assert run(engine, "hello", "--no-chat-template", *FLAGS) == 0
    assert capsys.readouterr().out == with_newline(llm.generate("hello", PARAMS)[0].outputs[0].text)


def test_the_system_message_comes_first(engine, llm, capsys):
    assert run(engine, "hello", "--system", "Be terse.", *FLAGS) == 0
    messages = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "hello"}]
    assert capsys.readouterr().out == with_newline(llm.generate(messages, PARAMS)[0].outputs[0].text)


def test_every_sampling_parameter_is_a_flag(engine, llm, capsys):
    flags = {
        "temperature": 0.9, "top_k": 40, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.1, "seed": 5, "min_tokens": 4, "max_tokens": 9, "n": 2,
        "logprobs": 1, "stop": ("zzz",), "stop_token_ids": (299, 298), "include_stop_str_in_output": True,
        "ignore_eos": True, "skip_special_tokens": False,
    }  # fmt: skip
    assert set(flags) == {f.name for f in dataclasses.fields(SamplingParams)}
    args = [
        "--include-stop",
        "--ignore-eos",
        "--no-skip-special-tokens",
        "--stop",
        "zzz",
        "--stop-token-ids",
        "299,298",
    ]
    for name, value in flags.items():
        if not isinstance(value, bool | tuple):
            args += ["--" + name.replace("_", "-"), str(value)]
    assert run(engine, "hello", "--json", *args) == 0
    record = json.loads(capsys.readouterr().out)
    [expected] = llm.generate([{"role": "user", "content": "hello"}], SamplingParams(**flags))
    assert [o["token_ids"] for o in record["outputs"]] == [o.token_ids for o in expected.outputs]
    assert record["outputs"][0]["text"] == expected.outputs[0].text
    logprob = expected.outputs[1].logprobs[0][0]
    assert record["outputs"][1]["logprobs"][0][0] == {
        "token_id": logprob.token_id, "token": logprob.token, "logprob": pytest.approx(logprob.logprob)
    }  # fmt: skip


def test_token_ids_need_no_tokenizer(tmp_path, capsys):
    engine = write_engine(tmp_path / "bare", None)
    assert run(engine, "--input-token-ids", "1, 2 3", *FLAGS) == 0
    with LLM(engine) as llm:
        ids = llm.generate([[1, 2, 3]], PARAMS)[0].outputs[0].token_ids
    assert capsys.readouterr().out.split() == [str(i) for i in ids]


# --- files and standard streams


def test_json_lines_in_and_out(engine, llm, tmp_path, capsys):
    lines = [
        {"prompt": "hello", "task_id": "a", "max_tokens": 3},
        {"messages": [{"role": "user", "content": "hello"}], "seed": 1},
        {"input_ids": [1, 2], "output_tokens": 2, "stop": "zzz"},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert run(engine, "--input-file", str(source), "--output-file", str(target), "--no-streaming", *FLAGS) == 0
    assert capsys.readouterr().out == ""
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert [len(r["outputs"][0]["token_ids"]) for r in records] == [3, 10, 2]
    assert [r["index"] for r in records] == [0, 1, 2]
    assert records[0]["task_id"] == "a"
    assert records[1]["messages"] == lines[1]["messages"]
    assert records[1]["outputs"][0]["text"] == chat(llm, "hello")
    assert records[2]["prompt_tokens"] == 2
    assert records[2]["outputs"][0]["finish_reason"] == "length"
    assert records[2]["e2e"] >= records[2]["ttft"] > 0


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\n\n  two  \nthr\x0bee\n".encode())
    items = read_prompts([], str(tmp_path / "p.txt"), None)
    assert [i.prompt for i in items] == ["one", "  two  ", "thr\x0bee"]
    assert items[1].where.endswith("p.txt, line 3")


def test_standard_input_is_one_prompt(engine, llm, monkeypatch, capsys):
    stdin_of(monkeypatch, "hello\n")
    assert run(engine, *FLAGS) == 0
    assert capsys.readouterr().out == with_newline(chat(llm, "hello"))


@pytest.mark.parametrize("text", ["hello\nx\n", '{"prompt": "hello"}\n{"prompt": "x"}\n'])
def test_a_dash_is_standard_input_line_by_line(monkeypatch, text):
    stdin_of(monkeypatch, text)
    assert [i.prompt for i in read_prompts([], "-", None)] == ["hello", "x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a JSON list"),
        ("{}", "the line has no prompt"),
        ('{"prompt": "a", "input_ids": [1]}', "the line has prompt and input_ids"),
        ('{"prompt": 1}', "`prompt` must be text"),
        ('{"messages": "x"}', "`messages` must be a list of messages"),
        ('{"input_ids": [1.5]}', "`input_ids` must be a list of token ids"),
        ('{"prompt": "a", "max_tokns": 1}', "unknown field `max_tokns`"),
        ('{"prompt": "a", "max_tokens": "many"}', "field `max_tokens`.*many"),
        ('{"prompt": "a", "top_p": 7}', "top_p is 7"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text('{"prompt": "ok"}\n' + line + "\n")
    with pytest.raises(UsageError, match=message) as raised:
        [params_of(item, SamplingParams()) for item in read_prompts([], str(tmp_path / "p.jsonl"), None)]
    assert "p.jsonl, line 2" in raised.value.where


def test_a_line_that_the_engine_cannot_serve_is_named(engine, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"input_ids": [1]}\n' + json.dumps({"input_ids": [1] * 65}))
    assert run(engine, "--input-file", str(tmp_path / "p.jsonl")) == 7
    printed = capsys.readouterr()
    assert "p.jsonl, line 2: the prompt has 65 tokens" in printed.err.replace("\n", "")
    assert printed.out == ""


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["x", "--model", "m"], 2, "both given"),
        (["x", "--interactive"], 2, "takes no prompts"),
        (["x", "--weight-dtype", "int8"], 2, "chosen when an engine is built"),
        (["--input-file", "missing.txt"], 2, "cannot read missing.txt"),
        (["--input-file", "prompts.csv"], 2, "neither a .txt"),
        (["x", "--top-p", "0"], 2, "--top-p is 0.0"),
        (["x", "--stop-token-ids", "a"], 2, "no list of token ids"),
        (["x", "--scheduler-policy", "max"], 2, "--scheduler-policy"),
        (["x", "--kv-cache-memory", "big"], 2, "no amount of memory"),
        (["x", "--max-tokens", "5000"], 7, "max_seq_len is 64"),
        (["x" * 100], 7, "max_input_len is 64"),
        (["x", "--system", "y", "--no-chat-template"], 2, "--system"),
        (["x", "--output-file", "no/such/dir/out.jsonl"], 6, "cannot write"),
        ([], 2, "no prompt"),
    ],
)
def test_errors_say_what_is_wrong(engine, monkeypatch, capsys, args, code, message):
    stdin_of(monkeypatch, "")
    assert run(engine, *args) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_no_engine_is_an_error(capsys):
    assert cli.call(["run", "x"]) == 2
    assert "no engine" in capsys.readouterr().err


def test_a_model_is_built_first(engine, llm, monkeypatch, capsys):
    monkeypatch.setattr("trtllm_cli.commands.stages.ensure_engine", lambda model, **_: {"org/model": engine}[model])
    assert cli.call(["run", "--model", "org/model", "hello", *FLAGS]) == 0
    assert capsys.readouterr().out == with_newline(chat(llm, "hello"))


# --- what can go wrong while printing


class Closed(io.StringIO):
    """A pipe whose reader went after some text."""

    def write(self, text):
        if self.tell() > 20:
            raise BrokenPipeError
        return super().write(text)


def test_a_closed_pipe_ends_the_run(llm):
    options = RunOptions(PARAMS, out=Closed(), err=io.StringIO())
    with pytest.raises(BrokenPipeError):
        generate(llm, [PromptItem(f"hello {i}", "p") for i in range(5)], options)
    assert llm.generate([[1]], PARAMS)
    assert llm.stats.num_running == 0


def test_ctrl_c_ends_with_130_and_a_whole_line(engine, monkeypatch, capsys):
    printed, interrupted = threading.Event(), threading.Event()
    forward, write = FakeRunner.forward, sys.stdout.write

    def telling(text):
        if text.strip():
            printed.set()
        return write(text)

    def interrupting(self, inputs):
        # The interrupt waits for some of the answer to be on the screen, and the answer for the interrupt.
        if printed.wait(0.5) and not interrupted.is_set():
            interrupted.set()
            _thread.interrupt_main()
        return forward(self, inputs)

    monkeypatch.setattr(sys.stdout, "write", telling)
    monkeypatch.setattr(FakeRunner, "forward", interrupting)
    assert run(engine, "hello", "--max-tokens", "30", "--ignore-eos", "--no-chat-template") == 130
    text = capsys.readouterr().out
    assert text.strip()
    assert text.endswith("\n")


def test_what_a_terminal_would_obey_is_made_visible():
    assert harmless("a\x1b[31mred\x07\r\x9b2J\x7f\tb\n") == "a␛[31mred␇␍\ufffd2J␡\tb\n"


def test_lines_of_answers_that_grow_together():
    out = io.StringIO()
    printer = Lines(out, View(["a", "b"], [1, 2]))
    for index, sub, text, reason in (
        (0, 0, "one\ntw", None), (1, 1, "x", None), (0, 0, "o [bold]\n\n", None), (1, 0, "y\nz", "stop"),
        (1, 1, "", "stop"), (0, 0, "end", None),
    ):  # fmt: skip
        one = CompletionOutput(sub, text, finish_reason=reason)
        printer.delta(index, RequestOutput(0, None, [], [one]))
    printer.close()
    assert out.getvalue() == "[0] one\n[0] two [bold]\n[0] \n[1.0] y\n[1.0] z\n[1.1] x\n[0] end\n"


def test_titles_are_short_lines():
    assert title_of(PromptItem("a\n b", "")) == "a b"
    assert title_of(PromptItem([{"role": "user", "content": "x" * 99}], "")) == "x" * 59 + "…"
    assert title_of(PromptItem([1, 2], "")) == "2 token ids"


@pytest.fixture
def terminal():
    """A terminal of 24 x 80, and all that was written to it so far."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    seen = bytearray()

    def read():
        while True:
            try:
                if not (data := os.read(ours, 65536)):
                    return
            except OSError:
                return
            seen.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    stream = open(theirs, "w", encoding="utf-8")  # noqa: SIM115
    yield stream, seen
    if not stream.closed:
        stream.close()
    reader.join()
    os.close(ours)


def on_terminal(llm, terminal, prompts, **options):
    stream, seen = terminal
    generate(llm, [PromptItem(p, "p") for p in prompts], RunOptions(PARAMS, out=stream, err=io.StringIO(), **options))
    stream.close()
    threading.Event().wait(0.2)  # the reader empties the terminal
    return seen.decode().replace("\r\n", "\n")


def test_panes_on_a_terminal_then_the_whole_answers(llm, terminal):
    text = on_terminal(llm, terminal, ["hello 1", "hello 2"])
    assert "╭─ [0] hello 1 ─" in text
    end = text[text.rindex("── [0] hello 1") :]
    for i, prompt in enumerate(["hello 1", "hello 2"]):
        assert f"── [{i}] {prompt}\n{harmless(chat(llm, prompt)).rstrip()}\n" in end
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is back


def test_lines_on_a_terminal_that_is_too_low(llm, terminal):
    text = on_terminal(llm, terminal, [f"hello {i}" for i in range(9)])
    assert "╭" not in text
    assert f"[8] {harmless(chat(llm, 'hello 8')).splitlines()[0]}" in text


def test_whole_answers_on_a_terminal(llm, terminal):
    text = on_terminal(llm, terminal, ["hello 1", "hello 2"], streaming=False)
    assert "╭" not in text
    assert text.index("── [0] hello 1") < text.index("── [1] hello 2")


def test_one_answer_on_a_terminal_has_no_control_characters(llm, terminal):
    assert on_terminal(llm, terminal, ["hello"]) == with_newline(harmless(chat(llm, "hello")))


# --- interactive


def talk(llm, monkeypatch, lines, **options):
    """Types the lines (an exception is raised instead); what went to standard output and to standard error."""
    left = iter(lines)

    def typed(_prompt):
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    run_options = RunOptions(PARAMS, out=io.StringIO(), err=io.StringIO(), **options)
    converse(llm, run_options)
    return run_options.out.getvalue(), run_options.err.getvalue()


def test_a_conversation_is_kept(tmp_path, monkeypatch):
    with LLM(write_engine(tmp_path / "e", byte_level(), max_seq_len=400, max_input_len=400)) as llm:
        out, err = talk(llm, monkeypatch, ["hello", "", "why"])
        first = chat(llm, "hello")
        messages = [("user", "hello"), ("assistant", first), ("user", "why")]
        second = llm.generate([{"role": r, "content": c} for r, c in messages], PARAMS)[0]
        assert out == with_newline(first) + with_newline(second.outputs[0].text)
        assert err.count("output tokens") == 2
        assert "cached" in err.splitlines()[-1]


def test_commands(llm, monkeypatch):
    out, err = talk(llm, monkeypatch, ["/help", "/system Terse.", "/system", "/reset", "/nonsense", "/exit", "hello"])
    assert out == ""
    for text in (
        "/reset          forget",
        "a new conversation",
        "Terse.",
        "is forgotten",
        "no such command: /nonsense",
    ):
        assert text in err


def test_reset_forgets(llm):
    options = RunOptions(PARAMS, out=io.StringIO(), err=io.StringIO())
    conversation = Conversation(llm, options)
    conversation.answer("hi")
    assert len(conversation.messages) == 2
    conversation.reset(None)
    conversation.answer("hello")
    assert conversation.messages[1]["content"] == chat(llm, "hello")


def test_a_message_that_does_not_fit_is_not_kept(llm, monkeypatch):
    out, err = talk(llm, monkeypatch, ["x" * 100, "hello"])
    assert "the conversation has" in err
    assert "shorten it" in err
    assert out == with_newline(chat(llm, "hello"))


def test_two_ctrl_cs_at_the_prompt_leave_one_does_not(llm, monkeypatch):
    out, _ = talk(llm, monkeypatch, [KeyboardInterrupt(), "hello", KeyboardInterrupt(), KeyboardInterrupt(), "never"])
    assert out == with_newline(chat(llm, "hello"))


def test_ctrl_c_stops_an_answer_and_keeps_it(llm, monkeypatch):
    steps = []
    forward = FakeRunner.forward

    def interrupting(self, inputs):
        steps.append(1)
        if len(steps) == 8:
            _thread.interrupt_main()
            threading.Event().wait(0.1)
        return forward(self, inputs)

    monkeypatch.setattr(FakeRunner, "forward", interrupting)
    params = dataclasses.replace(PARAMS, max_tokens=30)
    conversation = Conversation(llm, RunOptions(params, out=io.StringIO(), err=io.StringIO()))
    conversation.answer("hi")
    partial = conversation.messages[1]["content"]
    monkeypatch.setattr(FakeRunner, "forward", forward)
    whole = llm.generate([{"role": "user", "content": "hi"}], params)[0].outputs[0].text
    assert whole.startswith(partial)
    assert len(partial) < len(whole)


def test_without_a_chat_template_the_text_goes_on(llm, monkeypatch):
    out, err = talk(llm, monkeypatch, ["hello", "/system x"], chat_template=False)
    assert out == with_newline(llm.generate("hello", PARAMS)[0].outputs[0].text)
    assert "no system message" in err


# --- start-up


def test_the_run_path_imports_no_torch():
    code = (
        "import sys, trtllm_cli.commands.run\n"
        "print([m for m in ('numpy', 'pydantic', 'tokenizers', 'jinja2', 'torch') if m in sys.modules])\n"
        "import trtllm_cli.run.llm, trtllm_cli.run.executor, trtllm_cli.run.chat_template\n"
        "import trtllm_cli.run.backends.cpu\n"
        "import tokenizers\n"
        "print([m for m in ('torch', 'transformers', 'asyncio', 'triton', 'mpi4py', 'gguf') if m in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n[]\n"
