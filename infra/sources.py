"""Where rows come from: .jsonl files and the hub; and the texts in a row's fields."""

from __future__ import annotations

import json
import os
import re

from tqdm import tqdm

from infra.ranks import InputError

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".gz": "json", ".zst": "json"}  # of `datasets`


def source_records(source: str, *, split: str, flag: str):
    """((number, record) of every row, whether they come from the hub). A record is a dict, or a line of JSON in bytes.

    source: a local file: JSON objects, one a line or all in an array, or what BUILDERS reads; or a hub id, whose
    configuration follows a colon, as in openai/gsm8k:main. flag: the setting that names it, for messages.
    """
    builder = BUILDERS.get(os.path.splitext(source)[1])
    if not builder and (source.endswith((".jsonl", ".json")) or os.path.exists(source)):
        return file_records(source, flag), False
    import datasets  # slow

    name, _, config = source.partition(":")
    options = {"data_files": source, "split": "train"} if builder else {"name": config or None, "split": split}
    try:
        return enumerate(datasets.load_dataset(builder or name, **options), 1), not builder
    except Exception as error:  # noqa: BLE001  an unknown id or split, no network, a damaged set: anything is raised
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"--{flag} {source}: neither a local file nor a data set the hub gave us ({reason}); check "
                         "the id and the network, or use a .jsonl file") from None


MARK = b"\xef\xbb\xbf"  # with which some editors begin a file


def file_records(source: str, flag: str):
    """The lines of a local file, one at a time, or the items of its array. Empty lines are left out, and counted."""
    if not os.path.isfile(source):
        what = "a folder or a pipe, and no file" if os.path.exists(source) else "no such file"
        raise InputError(f"--{flag} {source}: {what}; give a .jsonl file or a hub id. `python -m lab.toy` writes the "
                         "laptop's, in toy/")
    try:
        lines = open(source, "rb")
    except OSError as error:
        raise InputError(f"--{flag} {source}: cannot be read ({error.strerror}); mend its permissions") from None
    with lines:
        begins = lines.peek(40).removeprefix(MARK).lstrip()
        if begins.startswith(b"["):
            try:
                yield from enumerate(json.loads(lines.read().removeprefix(MARK)), 1)
            except (ValueError, RecursionError) as error:
                raise InputError(f"--{flag} {source}: begins as a JSON array, and is none ({error})") from None
            return
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(MARK)
            if line.strip():
                yield number, line


def progress(rows, what: str):
    """The rows, with a bar on rank 0 when it takes long."""
    return tqdm(rows, what, delay=10, leave=False, disable=os.environ.get("RANK", "0") != "0")


class LeftOut(ValueError):
    """A row that is read as it is meant, and teaches nothing: it is left out, and counted by this reason."""


def text_of(name: str, value) -> str:
    """The text of a field. Some data sets store chat messages there: the last one counts, if it is an assistant's."""
    if isinstance(value, list) and value and isinstance(value[-1], dict) and "content" in value[-1]:
        if value[-1].get("role", "assistant") != "assistant":
            raise ValueError(f"field {name!r}: its last turn is one of {value[-1]['role']!r}, and no response")
        value = value[-1]["content"]
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {type(value).__name__}, expected text, or turns of role and content")
    if re.match(r"\s*\[\s*\{\s*['\"](role|content)['\"]", value):
        raise ValueError(f"field {name!r} holds messages as a text: write them as a list of objects")
    if re.search("[\ud800-\udfff]", value):  # JSON can escape them, and no tokenizer takes them
        raise ValueError(f"field {name!r} holds half a surrogate pair (\\ud800 to \\udfff), which is no text")
    return value


SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}  # the words of HH-RLHF


def transcript(name: str, turns: list[dict]) -> str:
    """A conversation up to the last turn of the user, as HH-RLHF writes it. A lone question stays as it is."""
    lines, asked = [], 0
    for turn in turns:
        if turn.get("role") not in SPEAKERS:
            raise ValueError(f"field {name!r}: a turn's role is {turn.get('role')!r}; use {', '.join(SPEAKERS)}")
        lines.append(f"{SPEAKERS[turn['role']]}: {text_of(name, turn.get('content'))}")
        if turn["role"] == "user":
            asked = len(lines)
    if not asked or name != "messages" and asked < len(lines):  # messages may go on with the answer
        raise ValueError(f"field {name!r} has no turn of the user, or none at its end")
    return "\n\n".join(lines[:asked]).removeprefix("Human: ")


BEFORE, BEHIND = ("system", "system_prompt"), ("input", "context")  # fields that belong to a question
# Fields that would belong to it, too, in a form that we do not know.
NOT_READ = ("history", "chat_history", "conversation_history", "system_message", "choices", "answer_choices", "options",
            "option_a", "A", "body", "passage", "document", "table", "image", "images", "tools", "functions")


def question_of(record: dict, *names: str) -> str:
    """The question of a record: its messages, else the first field of `names`; with what stands beside it.

    >>> question_of({"instruction": "Classify.", "input": "a shark", "system": ""}, "instruction")
    'Classify.\\n\\na shark'
    """
    name, value = first_field(record, "messages", *names)
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        value = transcript(name, value)
    parts = [text_of(name, value)]
    if not parts[0].strip():
        raise ValueError(f"field {name!r} is empty")
    for field in NOT_READ:
        if record.get(field):
            raise ValueError(f"field {field!r} belongs to the question and is not read: write it out in {name!r}")
    for field in BEFORE + BEHIND:
        if record.get(field) and text_of(field, record[field]).strip():
            parts.insert(0 if field in BEFORE else len(parts), record[field])
    return "\n\n".join(parts)


def first_field(record: dict, *names: str):
    """(name, value) of the first of several fields that a record holds. A null field is an absent one."""
    for name in names:
        if record.get(name) is not None:
            return name, record[name]
    raise ValueError(f"no field {' or '.join(names)!r}; it has {', '.join(record) or 'none'}")
