"""Text to token ids and back, from the `tokenizer/` directory that a checkpoint or engine carries.

`tokenizer.json` says how text is cut, and whether a beginning-of-sequence token is put in front (its post-processor).
The files beside it name the special tokens, the tokens that end an answer, and the chat template.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_cli.artifact import read_json
from trtllm_cli.errors import EngineError, RequestError, UsageError
from trtllm_cli.run.detokenizer import Detokenizer, pieces_factory
from trtllm_cli.tokenizer_file import largest_id, open_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from trtllm_cli.run.chat_template import ChatTemplate

Message = Mapping[str, Any]  # {"role": ..., "content": ...}, and whatever else the chat template reads

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer. Thread-safe."""

    backend: Backend
    directory: Path
    special_tokens: dict[str, str]  # "bos_token" -> "<s>", those of SPECIAL that the files name
    eos_token_ids: frozenset[int]  # any of them ends an answer
    templates: dict[str, tuple[str, Path]]  # chat template's name -> source and the file that it is in

    @classmethod
    def load(cls, directory: Path, *, vocab_size: int | None = None) -> Tokenizer:
        """Reads the directory. Raises EngineError if it is none, or has ids that a model of `vocab_size` lacks."""
        backend = open_tokenizer(directory)
        if vocab_size is not None and (largest := largest_id(backend)) >= vocab_size:
            raise EngineError(
                f"wrong tokenizer: its token ids go up to {largest}, the model has only {vocab_size} tokens",
                where=str(directory / "tokenizer.json"),
                fix="give the tokenizer of the model that the engine was built from: --tokenizer-dir DIR",
            )
        config = _optional_json(directory / "tokenizer_config.json")
        special = _special_tokens([_optional_json(directory / "special_tokens_map.json"), config])
        return cls(
            backend, directory, special, _eos_token_ids(directory, backend, special), _templates(directory, config)
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`. With `add_special_tokens`, those that the model expects around a plain prompt."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            text.encode(errors="surrogatepass")  # a str that is none is our own bug, and fails here
            raise RequestError("the prompt is not valid Unicode text: it holds a lone surrogate") from None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; ids that stand for nothing are left out."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """The token ids of a conversation as the chat template writes it, up to where the answer begins.

        `variables` (`tools`, `enable_thinking`, ...) are the template's. Raises UsageError where there is no template.
        """
        return self.encode(self.render_chat(messages, **variables), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Message], **variables: Any) -> str:
        """The text behind `encode_chat`."""
        template = self.chat_template("tool_use" if variables.get("tools") else "default")
        return template.render(messages, **{**self.special_tokens, **variables})

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was tuned to chat, as far as its files say."""
        return bool(self.templates)

    def chat_template(self, name: str = "default") -> ChatTemplate:
        """The chat template of that name, or the only one; compiled once."""
        if not self.templates:
            raise UsageError(
                "the tokenizer has no chat template: this is a model that continues text, or a file was not copied",
                where=str(self.directory),
                fix="give plain prompts (--no-chat-template), or put a chat_template.jinja there",
            )
        if name not in self.templates:
            name = "default" if "default" in self.templates else next(iter(self.templates))
        if name not in self._compiled:
            from trtllm_cli.run.chat_template import ChatTemplate

            source, file = self.templates[name]
            self._compiled[name] = ChatTemplate(source, where=str(file))
        return self._compiled[name]

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A new one, for one sequence; its pieces joined are what `decode` gives."""
        return Detokenizer(self.backend, self._new_pieces(), self.special_token_ids if skip_special_tokens else ())

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """The ids that `decode` skips."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _new_pieces(self) -> Any:
        return pieces_factory(self.backend)

    @cached_property
    def _compiled(self) -> dict[str, ChatTemplate]:
        return {}


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file, EngineError) if file.is_file() else {}


def _special_tokens(files: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The special tokens' text by name; a later file has the last word."""
    found: dict[str, str] = {}
    for file in files:
        for name in SPECIAL:
            value = file.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                found[name] = value
    return found


def _eos_token_ids(directory: Path, backend: Backend, special: dict[str, str]) -> frozenset[int]:
    """Those of generation_config.json (or config.json where it has none) and the tokenizer's own."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _optional_json(directory / name).get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(v, int) or isinstance(v, bool) for v in values):
            raise EngineError(f"`eos_token_id` is {value!r}, not an id or a list of ids", where=str(directory / name))
        if values:
            ids.update(values)
            break
    own = special.get("eos_token")
    if own is not None and (own_id := backend.token_to_id(own)) is not None:
        ids.add(own_id)
    return frozenset(ids)


def _templates(directory: Path, config: dict[str, Any]) -> dict[str, tuple[str, Path]]:
    """The chat templates by name: chat_template.jinja, or those in tokenizer_config.json."""
    found: dict[str, tuple[str, Path]] = {}
    file = directory / "tokenizer_config.json"
    match config.get("chat_template"):
        case str() as source:
            found["default"] = (source, file)
        case list() as named:
            for entry in named:
                match entry:
                    case {"name": str() as name, "template": str() as source}:
                        found[name] = (source, file)
                    case _:
                        raise EngineError("an entry of `chat_template` lacks its name or template", where=str(file))
        case None:
            pass
        case other:
            raise EngineError(f"`chat_template` is a {type(other).__name__}, not text", where=str(file))
    more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    for path in [*more, directory / "chat_template.jinja"]:
        if path.is_file():
            try:
                source = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as e:
                raise EngineError(f"{path.name} cannot be read: {e}", where=str(path)) from None
            found["default" if path.name == "chat_template.jinja" else path.stem] = (source, path)
    return found
