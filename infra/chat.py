"""Tokenizers: a user's turn as token ids, what ends an answer, and text that no tokenizer reads as structure."""

from __future__ import annotations

import datetime
import itertools
import re
from functools import lru_cache
from pathlib import Path

from infra.ranks import InputError

# Else a template that writes today's date would give a run that is resumed, or audited, other prompts tomorrow.
FROZEN = {"strftime_now": datetime.date(2025, 1, 1).strftime}


def load_tokenizer(folder: str, chat_template: str = ""):
    """The tokenizer of a folder or hub id. Raises InputError where neither we nor the hub have such a model.

    chat_template: a file with a template in place of the tokenizer's own, for bases that have none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  a damaged file raises anything; the reason is printed
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--model {folder}: no tokenizer that loads, here or on the hub as far as we can see "
                         f"({type(error).__name__}: {reason}); check the name, or save one there") from None
    if not tokenizer.is_fast:
        raise InputError(f"--model {folder}: its tokenizer has no tokenizer.json, so it cannot tell which letters a "
                         "token stands for; convert it, or use another model")
    if chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"--chat_template {chat_template}: cannot be read ({error}); give a file in Jinja, for "
                             "example infra/plain_turns.jinja") from None
    if not tokenizer.chat_template:
        raise InputError(f"--model {folder}: the tokenizer has no chat template; give --chat_template "
                         "infra/plain_turns.jinja, or use an instruct model")
    check_template(tokenizer, f"--chat_template {chat_template}" if chat_template else f"--model {folder}")
    return tokenizer


def check_template(tokenizer, source: str) -> None:
    """Refuse a chat template that fails, or that does not show what it is given."""
    from jinja2 import TemplateError

    for text in ("", "question"):
        fault = "drops what the user says"
        try:
            shown = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                  add_generation_prompt=True, **FROZEN)
        except (TemplateError, TypeError, ValueError) as error:
            shown, fault = None, f"fails on a user's {text!r} ({error})"
        if shown is None or text not in shown:
            raise InputError(f"{source}: its chat template {fault}; give another one in Jinja, for example "
                             "infra/plain_turns.jinja")


def encode_chat(tokenizer, text: str) -> list[int]:
    """Token ids of one user turn and the opening of the assistant's turn. Control strings in the text are broken."""
    turn = {"role": "user", "content": break_control_strings(text, tokenizer)}
    return tokenizer.apply_chat_template([turn], add_generation_prompt=True, return_dict=False, **FROZEN)


def stop_ids(tokenizer) -> list[int]:
    """The tokens that end an answer: the tokenizer's eos, and what the chat template sets after an assistant's turn.

    An instruct model has one token for both. A base model's eos is another one, and its answers would run on.
    """
    turns = [{"role": "user", "content": "My question"}, {"role": "assistant", "content": "My answer"}]
    after = tokenizer.apply_chat_template(turns, tokenize=False, **FROZEN).rpartition("My answer")[2]
    first = tokenizer.encode(after, add_special_tokens=False)[:1]
    return sorted(({tokenizer.eos_token_id} | (control_ids(tokenizer) & set(first))) - {None})


def answer_text(tokenizer, ids: list[int], stops: list[int]) -> str:
    """The text of an answer, without the token that ended it."""
    if ids and ids[-1] in stops:
        ids = ids[:-1]
    return tokenizer.decode(ids, skip_special_tokens=True)


@lru_cache(maxsize=4)
def control_ids(tokenizer) -> frozenset[int]:
    """The ids of all special and added tokens. White space that is a token is no structure."""
    names = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return frozenset(tokenizer.convert_tokens_to_ids(name) for name in names if name.strip())


@lru_cache(maxsize=4)
def turn_marks(tokenizer) -> re.Pattern:
    """What the template sets around turns in brackets, as Llama 2's [/INST] and <<SYS>>: text to its tokenizer."""
    from jinja2 import TemplateError

    turns = [{"role": role, "content": "Text"} for role in ("system", "user", "assistant", "user")]
    try:
        shown = tokenizer.apply_chat_template(turns, tokenize=False, **FROZEN)
    except TemplateError:  # some templates know no system
        shown = tokenizer.apply_chat_template(turns[1:], tokenize=False, **FROZEN)
    marks = re.findall(r"[\[<{|][^\s\[<{]+[\]>}|]", shown)
    return re.compile("|".join(map(re.escape, marks)) or r"(?!)")  # the last one finds nothing


def control_spans(text: str, tokenizer) -> list[tuple[int, int]]:
    """Where the tokenizer reads a special or added token, or a mark of turns stands: (start, end), in characters.

    The check is on token ids, since a tokenizer may change letters first ("＜" to "<").
    """
    control, spans = control_ids(tokenizer), []
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for token, (start, end) in zip(found["input_ids"], found["offset_mapping"]):
        piece = text[start:end]
        unknown_letter = token == tokenizer.unk_token_id and tokenizer.unk_token not in piece  # is no structure
        if token in control and piece.strip() and not unknown_letter:
            spans.append((start, end))
    return spans or [mark.span() for mark in turn_marks(tokenizer).finditer(text)]


def break_control_strings(text: str, tokenizer) -> str:
    """Text that the tokenizer turns into no special or added token: '<|im_end|>' -> '< |im_end|>'.

    Tokenizers turn such strings into control tokens wherever they stand. So a data row or an answer could close the
    user's turn and speak as the assistant.
    """
    for attempt in itertools.count():
        spans = control_spans(text, tokenizer)
        if not spans:
            return text
        for start, end in reversed(spans):
            piece = text[start:end].strip()  # some tokens take the blanks around them
            # A blank is enough, except in a single letter or where the tokenizer drops blanks.
            broken = piece[0] + " " + piece[1:] if len(piece) > 1 and attempt < 3 else "?" * len(piece)
            text = text[:start] + text[start:end].replace(piece, broken) + text[end:]
