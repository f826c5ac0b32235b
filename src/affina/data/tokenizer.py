"""Loads a tokenizer and finds out what its own chat template does: how it ends a turn, which texts are control tokens.

Nothing about a model family is assumed. The end-of-turn token is read off the template by rendering small probe
conversations, because it often differs from the tokenizer's `eos_token`, and a reply that is trained without it is a
model that never stops.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from affina.errors import ModelError

EMBEDDED_PREFIX = "affina/"

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "tekken.json")
"""Files of which a tokenizer has at least one; SentencePiece's may have any name that ends in .model."""

PROBE_TEXTS = (
    "The quick brown fox, 1234.5 times!\n\nNaïve café – 日本語 🙂",
    "  def f(x):\n\treturn x ** 2  # comment\r\n",
    "È così; perché no? €10,00",
)
"""Texts whose ids go into the fingerprint: two tokenizers with one vocabulary but other merges differ here."""


@dataclass(frozen=True)
class LoadedTokenizer:
    """A fast tokenizer and the facts about it that training depends on.

    name:            what the user wrote
    hf:              the Hugging Face tokenizer object
    control_tokens:  texts that become a special token wherever they stand, longest first
    end_of_turn:     texts of the tokens with which the template ends a reply; (eos,) without a template
    end_of_turn_ids: their ids
    pad_id:          fills the rest of a row; never an end-of-turn id when the vocabulary offers another token
    fingerprint:     sha256 of vocabulary, segmentation, special tokens and template
    notes:           sentences for the user about choices made here
    """

    name: str
    hf: Any
    control_tokens: tuple[str, ...]
    end_of_turn: tuple[str, ...]
    end_of_turn_ids: tuple[int, ...]
    eos_id: int
    pad_id: int
    fingerprint: str
    notes: tuple[str, ...] = field(default=())

    @property
    def has_template(self) -> bool:
        return bool(self.hf.chat_template)

    @property
    def template_text(self) -> str:
        """The chat template's source, in one string whatever form the tokenizer keeps it in; "" without one."""
        template = self.hf.chat_template
        if not template:
            return ""
        return template if isinstance(template, str) else json.dumps(template, sort_keys=True)

    def special_tokens(self) -> dict[str, list[Any]]:
        """Role → [id, text] of the special tokens that shape a sample."""
        tokens: dict[str, list[Any]] = {}
        for role in ("bos_token", "eos_token", "unk_token"):
            text = getattr(self.hf, role, None)
            if text is not None:
                tokens[role] = [int(self.hf.convert_tokens_to_ids(text)), str(text)]
        tokens["end_of_turn"] = [list(self.end_of_turn_ids), list(self.end_of_turn)]
        return tokens


def load_tokenizer(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    local: bool = False,
) -> LoadedTokenizer:
    """The tokenizer of a directory, a hub id, or an embedded model (`affina/nano`).

    local: never ask the hub, use what is on this machine.

    Raises ModelError: `tokenizer-not-found`, `model-gated`, `tokenizer-not-fast`, `tokenizer-without-end`,
    `template-without-end-of-turn`.
    """
    from transformers import AutoTokenizer

    folder = _resolve(path)
    _require_tokenizer_files(folder)
    try:
        hf = AutoTokenizer.from_pretrained(
            folder,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=local,
            use_fast=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loaded(path, error) from error
    except Exception as error:
        # tokenizers raises exactly this, and no class of its own, for a tokenizer.json that it cannot read.
        if type(error) is not Exception:
            raise
        raise _not_loaded(path, error) from error
    return describe_tokenizer(hf, name=path)


def describe_tokenizer(hf: Any, *, name: str) -> LoadedTokenizer:
    """The facts about a Hugging Face tokenizer that is already in memory."""
    if not getattr(hf, "is_fast", False):
        raise ModelError(
            "tokenizer-not-fast",
            f"the tokenizer of {name!r} is not a fast one ({type(hf).__name__})",
            why="the loss mask needs to know which characters every token stands for; only tokenizer.json gives that",
            fix="convert it once with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...)) "
            "and use that folder",
        )
    control_tokens = _control_tokens(hf)
    eos = getattr(hf, "eos_token", None)
    end_of_turn = _find_ends_of_turn(hf, control_tokens, name) if hf.chat_template else ()
    if not end_of_turn:
        if eos is None:
            raise ModelError(
                "tokenizer-without-end",
                f"the tokenizer of {name!r} has neither a chat template nor an end-of-sequence token",
                why="without one, no sample has an end and the model never learns to stop",
                fix='set "eos_token" in tokenizer_config.json',
            )
        end_of_turn = (str(eos),)
    ids = tuple(int(hf.convert_tokens_to_ids(text)) for text in end_of_turn)
    eos_id = int(hf.convert_tokens_to_ids(eos)) if eos is not None else ids[0]
    pad_id, notes = _choose_pad(hf, forbidden={*ids, eos_id}, fallback=ids[0])
    return LoadedTokenizer(
        name=name,
        hf=hf,
        control_tokens=control_tokens,
        end_of_turn=end_of_turn,
        end_of_turn_ids=ids,
        eos_id=eos_id,
        pad_id=pad_id,
        fingerprint=_fingerprint(hf),
        notes=notes,
    )


def _not_loaded(path: str, error: Exception) -> ModelError:
    if _asks_for_licence(error):
        return ModelError(
            "model-gated",
            f"{path} asks you to accept its licence first",
            fix=f"accept it on https://huggingface.co/{path}, then: hf auth login",
        )
    return ModelError(
        "tokenizer-not-found",
        f"no tokenizer could be loaded from {path!r}",
        why=_first_line(error),
        fix="point model.path to a folder that holds tokenizer.json and tokenizer_config.json, "
        "or to a model id that the hub knows",
    )


def _asks_for_licence(error: BaseException | None) -> bool:
    """Whether the hub's refusal of a gated model is among the causes of `error`, which transformers wraps it in."""
    from huggingface_hub.errors import GatedRepoError

    while error is not None and not isinstance(error, GatedRepoError):
        error = error.__cause__ or error.__context__
    return error is not None


def _resolve(path: str) -> str:
    if path.startswith(EMBEDDED_PREFIX) and not Path(path).exists():
        from affina.catalog.embedded import embedded_model_path

        return str(embedded_model_path(path))
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise ModelError(
            "tokenizer-not-found",
            f"{path} is not a directory",
            fix="check the spelling of model.path; a relative path starts at the folder you call affina from",
        )
    return str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path


def _require_tokenizer_files(path: str) -> None:
    """Refuse a folder without a vocabulary: transformers would make up an empty one for it."""
    folder = Path(path)
    if not folder.is_dir() or any((folder / name).is_file() for name in _VOCABULARIES):
        return
    if any(folder.glob("*.model")) or any(folder.glob("*.py")):
        return
    raise ModelError(
        "tokenizer-not-found",
        f"{path} holds no tokenizer",
        why=f"it has none of {', '.join(_VOCABULARIES)}",
        fix="copy tokenizer.json and tokenizer_config.json of the model into it",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _control_tokens(hf: Any) -> tuple[str, ...]:
    texts = {str(token) for token in hf.all_special_tokens}
    texts |= {token.content for token in hf.added_tokens_decoder.values() if token.special}
    return tuple(sorted((text for text in texts if text), key=lambda text: (-len(text), text)))


# What the template does, read off probe conversations

_PROBE_QUESTION = "affinaprobequestion"
_PROBE_REPLY = "affinaprobereply"


def render_probe(hf: Any, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """The rendering of a probe conversation, or None where the template refuses it."""
    from jinja2.exceptions import TemplateError

    try:
        return str(hf.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return None


def _find_ends_of_turn(hf: Any, control_tokens: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Tokens that close a reply: at the end of a conversation, before another question, after a tool call."""
    user = {"role": "user", "content": _PROBE_QUESTION}
    reply = {"role": "assistant", "content": _PROBE_REPLY}
    call = {
        "role": "assistant",
        "content": _PROBE_REPLY,
        "tool_calls": [{"type": "function", "function": {"name": "affinaprobecall", "arguments": {"n": 1}}}],
    }
    found: list[str] = []
    last = render_probe(hf, [user, reply])
    if last is not None and _PROBE_REPLY in last:
        found += _first_control(last.rpartition(_PROBE_REPLY)[2], control_tokens)
    if not found:
        raise ModelError(
            "template-without-end-of-turn",
            f"the chat template of {name!r} ends a reply without a special token",
            why="the model would never learn to stop",
            fix="correct the template in tokenizer_config.json so that it writes the end-of-turn token after a reply",
        )
    middle = render_probe(hf, [user, reply, user, reply])
    if middle is not None and middle.count(_PROBE_REPLY) == 2:
        header = middle.partition(_PROBE_QUESTION)[0]
        between = middle.partition(_PROBE_REPLY)[2].partition(_PROBE_QUESTION)[0]
        found += _end_before_header(between, header, control_tokens, known=found)
    with_call = render_probe(hf, [user, call])
    if with_call is not None and "affinaprobecall" in with_call:
        found += _first_control(with_call.rpartition("affinaprobecall")[2], control_tokens)
    return tuple(dict.fromkeys(found))


def _first_control(text: str, control_tokens: tuple[str, ...]) -> list[str]:
    if not control_tokens:
        return []
    match = re.search("|".join(map(re.escape, control_tokens)), text)
    return [match.group()] if match else []


def _end_before_header(between: str, header: str, control_tokens: tuple[str, ...], *, known: list[str]) -> list[str]:
    """The end-of-turn token in the text between a reply and the next question.

    The text also holds the opening of the next turn, which must not be taken for an end. What it shares with the
    opening of the first turn is cut off, unless a known end comes first anyway.
    """
    first = _first_control(between, control_tokens)
    if not first or first[0] in known:
        return first
    shared = 0
    while shared < min(len(between), len(header)) and between[-1 - shared] == header[-1 - shared]:
        shared += 1
    return _first_control(between[: len(between) - shared], control_tokens)


# Padding and fingerprint


def _choose_pad(hf: Any, *, forbidden: set[int], fallback: int) -> tuple[int, tuple[str, ...]]:
    """A padding id that no reply ends with.

    Collators that hide the padding by its id hide the end of every reply when both coincide. Ours hides padding by
    position, so that the id can do no harm here, but exported settings must be right too.
    """
    pad = getattr(hf, "pad_token", None)
    if pad is not None and (pad_id := int(hf.convert_tokens_to_ids(pad))) not in forbidden:
        return pad_id, ()
    reason = "the tokenizer has no padding token" if pad is None else f"the padding token {pad} also ends replies"
    bos = getattr(hf, "bos_token", None)
    for text in _pad_candidates(hf):
        candidate = int(hf.convert_tokens_to_ids(text))
        if candidate not in forbidden and text != bos:
            return candidate, (f"{reason}; rows are padded with {text} instead",)
    return fallback, (f"{reason} and there is no other special token; padding is masked by position, never by id",)


def _pad_candidates(hf: Any) -> list[str]:
    special = [token.content for _, token in sorted(hf.added_tokens_decoder.items()) if token.special]
    named = [text for text in special if "pad" in text.lower()]
    unknown = [str(hf.unk_token)] if getattr(hf, "unk_token", None) else []
    return named + unknown + [text for text in special if text not in named and text not in unknown]


def _fingerprint(hf: Any) -> str:
    digest = hashlib.sha256()
    for text, token_id in sorted(hf.get_vocab().items()):
        digest.update(f"{token_id}\t{text}\n".encode("utf-8", "surrogatepass"))
    for token_id, token in sorted(hf.added_tokens_decoder.items()):
        digest.update(f"{token_id} {token.content} {token.special} {token.lstrip} {token.rstrip}\n".encode())
    for text in PROBE_TEXTS:
        digest.update(json.dumps(_ids(hf, text)).encode())
    template = hf.chat_template or ""
    digest.update((template if isinstance(template, str) else json.dumps(template, sort_keys=True)).encode())
    return digest.hexdigest()


def _ids(hf: Any, text: str) -> Sequence[int]:
    return list(hf(text)["input_ids"])
