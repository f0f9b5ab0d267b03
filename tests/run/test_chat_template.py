"""Against transformers on templates like those of well-known models, and on templates that mean harm."""

import contextlib
import time
from pathlib import Path

import pytest

from trtllm_cli.errors import EngineError, RequestError
from trtllm_cli.run import template_sandbox
from trtllm_cli.run.chat_template import ChatTemplate

# The features template has macros, {% generation %}, break and continue, set blocks, ~, %, format, dict, many filters.
TEMPLATES = {
    name: (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    for name in ("smollm2", "llama3", "qwen3", "mistral", "gemma", "features")
}
CHAT = [
    {"role": "user", "content": "  Hi <b>there</b> & 'co' \"x\"\nüber 日本 "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello!"},
    {"role": "user", "content": "What now?"},
]
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds é", "parameters": {"type": "object", "properties": {"a": {}}}},
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
CONVERSATIONS = {
    "chat": (CHAT, {}),
    "system": ([{"role": "system", "content": " Be terse. "}, *CHAT], {}),
    "one": (CHAT[:1], {"enable_thinking": False}),
    "tools": (CHAT, {"tools": [TOOL, TOOL]}),
    "tool call": (
        [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}],
        {"tools": [TOOL]},
    ),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]}], {}),
}
WRITTEN = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generate", [True, False])
def test_renders_as_under_transformers(name, conversation, generate):
    from transformers.utils.chat_template_utils import render_jinja_template

    messages, options = CONVERSATIONS[conversation]
    options = {**WRITTEN, **options}
    failed = None
    try:
        [expected], _ = render_jinja_template(
            [messages], chat_template=TEMPLATES[name], add_generation_prompt=generate, tools=options.pop("tools", None),
            **options,
        )  # fmt: skip
    except Exception as e:
        failed = e
    options = {**WRITTEN, **CONVERSATIONS[conversation][1]}
    template = ChatTemplate(TEMPLATES[name], where="t")
    if failed is not None:
        with pytest.raises(RequestError):
            template.render(messages, add_generation_prompt=generate, **options)
        return
    assert template.render(messages, add_generation_prompt=generate, **options) == expected


def test_the_comparison_covers_success_for_every_template():
    for source in TEMPLATES.values():
        assert "What now?" in ChatTemplate(source, where="t").render(CHAT, **WRITTEN)


def test_a_refusal_of_the_template_is_the_users_to_mend():
    with pytest.raises(RequestError, match=r"refuses this conversation: After the optional system message.*alternate"):
        ChatTemplate(TEMPLATES["mistral"], where="t").render([CHAT[0], CHAT[0]], **WRITTEN)


def test_a_failure_names_the_line_and_the_file():
    template = ChatTemplate("a\n{{ messages[0].nothing.more }}", where="dir/chat_template.jinja")
    with pytest.raises(RequestError, match=r"nothing.*\(line 2\)") as raised:
        template.render(CHAT)
    assert raised.value.where == "dir/chat_template.jinja"


@pytest.mark.parametrize("source", ["{% for x in %}", "{{ x | nofilter }}", "{% nothing %}", "{% endfor %}", "{{ 'a"])
def test_a_broken_template_is_an_error_of_the_file(source):
    with pytest.raises(EngineError, match=r"broken.*\(line 1\)"):
        ChatTemplate(source, where="t")


@pytest.mark.parametrize(
    "messages", [[], "hi", [{"content": "x"}], ["hi"], [{"role": 1}], [{"role": "user", "content": object()}]]
)
def test_messages_of_another_shape_are_an_error(messages):
    with pytest.raises(RequestError):
        ChatTemplate(TEMPLATES["smollm2"], where="t").render(messages)


def test_a_long_conversation_is_within_the_budget():
    long = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 100} for i in range(1001)]
    for name in ("smollm2", "llama3", "qwen3", "mistral"):
        assert len(ChatTemplate(TEMPLATES[name], where="t").render(long, **WRITTEN)) > 400_000


def _doubling(step, start="'a'"):
    loop = "{% for i in range(100) %}{% set ns.x = " + step + " %}{% endfor %}"
    return "{% set ns = namespace(x=" + start + ") %}" + loop + "{{ ns.x }}"


HOSTILE = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "long range": "{{ range(10 ** 10) | list }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "static text": "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "times": "{{ 'a' * 10 ** 10 }}",
    "times list": "{{ [1] * 10 ** 10 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": _doubling("ns.x * ns.x", "9"),
    "plus": _doubling("ns.x + ns.x"),
    "tilde": _doubling("ns.x ~ ns.x"),
    "set block": _doubling("y").replace("{% set ns.x", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x"),
    "list of lists": _doubling("[ns.x, ns.x]"),
    "dict of dicts": _doubling("dict(a=ns.x, b=ns.x)"),
    "batch of batches": _doubling("ns.x | batch(2, ns.x) | list", "[1]"),
    "filter center": "{{ 'a' | center(10 ** 10) }}",
    "method center": "{{ 'a'.center(10 ** 10) }}",
    "map center": "{{ ['a'] | map('center', 10 ** 10) | join }}",
    "percent format": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10 ** 10, 1) }}",
    "filter format": "{{ '%10000000000d' | format(1) }}",
    "method format": "{{ '{:10000000000d}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 10 ** 10) }}",
    "method replace": "{% set s = 'a' * 10 ** 6 %}{{ s.replace('a', s) }}",
    "filter replace": "{% set s = 'a' * 10 ** 6 %}{{ s | replace('a', s) }}",
    "method join": "{% set s = 'a' * 10 ** 6 %}{{ s.join(s) }}",
    "filter join": "{% set s = 'a' * 10 ** 5 %}{{ s | join(s) }}",
    "filter indent": "{{ 'a\nb' | indent(10 ** 10) }}",
    "filter batch": "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "filter slice": "{{ [1] | slice(10 ** 10) | list }}",
    "filter tojson": "{{ [1, [2]] | tojson(indent=10 ** 10) }}",
    "filter sum": "{% set l = [[1] * 1000] * 1000 %}{{ l | sum(start=[]) }}",
    "tabs": "{{ '\t'.expandtabs(10 ** 10) }}",
    "bytes": "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "dates": "{{ strftime_now('%Y' * 100000) }}",
    "lipsum": "{{ lipsum(10 ** 7) }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long": "x" * (1 << 21),
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "include": "{% include '/etc/passwd' %}",
    "mutation": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_soon_with_an_error(name, monkeypatch):
    monkeypatch.setattr(template_sandbox, "SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises((EngineError, RequestError)):
        ChatTemplate(HOSTILE[name], where="t").render(CHAT)
    assert time.monotonic() - started < 8


@pytest.mark.parametrize(
    "expression",
    ["'' | attr('__class__')", "'{0.__class__}'.format(1)", "raise_exception.__globals__", "messages.__class__"],
)
def test_pythons_internals_are_out_of_sight(expression):
    template = ChatTemplate("{{ (" + expression + ") is defined and (" + expression + ") }}", where="t")
    with contextlib.suppress(RequestError):
        assert template.render(CHAT) in ("False", "")


def test_what_time_alone_stops(monkeypatch):
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.05)
    slow = "{% set s = 'a' * 10 ** 6 %}{% for i in range(99999) %}{% if 'b' in s %}{% endif %}{% endfor %}"
    with pytest.raises(EngineError, match="it runs for more than"):
        ChatTemplate(slow, where="t").render(CHAT)
