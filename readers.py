"""Where prompts come from: the formats of public data sets, .jsonl files, the hub, and the laptop's toy world.

Every row becomes a data.Prompt, or is refused with its file, line, field and what to do. A new format is one more
field name, or one more branch, in the reader of its kind.
"""

from __future__ import annotations

import json
import math
import os
import re

from tqdm import tqdm

from data import FLAGS, InputError, Prompt, checksum, encode_judgement, encode_prompt, swapped
from rewards import check_answer, final_answer

# ------------------------------------------------------------------------------- formats


def text_of(name: str, value) -> str:
    """The text of a field. Some data sets store chat messages there: the last one counts."""
    if isinstance(value, list) and value and isinstance(value[-1], dict) and "content" in value[-1]:
        value = value[-1]["content"]
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {type(value).__name__}, expected text")
    if re.search("[\ud800-\udfff]", value):  # JSON can escape them, and no tokenizer takes them
        raise ValueError(f"field {name!r} holds half a surrogate pair (\\ud800 to \\udfff), which is no text")
    return value


SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}  # the words of HH-RLHF


def transcript(name: str, turns: list[dict]) -> str:
    """A conversation up to the last turn of the user, as HH-RLHF writes it. A lone question stays as it is.

    >>> transcript("prompt", [{"role": "user", "content": "I own 3 cats."}, {"role": "assistant", "content": "Nice."},
    ...                       {"role": "user", "content": "How many?"}])
    'I own 3 cats.\\n\\nAssistant: Nice.\\n\\nHuman: How many?'
    """
    lines, asked = [], 0
    for turn in turns:
        if turn.get("role") not in SPEAKERS:
            raise ValueError(f"field {name!r}: a turn's role is {turn.get('role')!r}; use {', '.join(SPEAKERS)}")
        lines.append(f"{SPEAKERS[turn['role']]}: {text_of(name, turn.get('content'))}")
        if turn["role"] == "user":
            asked = len(lines)
    if not asked:
        raise ValueError(f"field {name!r} has no turn of the user")
    return "\n\n".join(lines[:asked]).removeprefix("Human: ")


def question_of(name: str, value) -> str:
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        value = transcript(name, value)
    text = text_of(name, value)
    if not text.strip():
        raise ValueError(f"field {name!r} is empty")
    return text


def first_field(record: dict, *names: str):
    """(name, value) of the first of several fields that a record holds."""
    for name in names:
        if record.get(name) is not None:
            return name, record[name]
    raise ValueError(f"no field {' or '.join(names)!r}; it has {', '.join(record) or 'none'}")


def read_pair(record: dict) -> tuple[str, str, list[str]]:
    """(instruction, [chosen response, rejected response]) of a record with the fields chosen and rejected."""
    _, chosen = first_field(record, "chosen")
    _, rejected = first_field(record, "rejected")
    if "prompt" in record:
        question = record["prompt"]
    elif isinstance(chosen, list):  # Skywork: all turns but the last one are the prompt
        question = chosen[:-1]
    else:  # HH-RLHF: one transcript in each field
        question, _, chosen = text_of("chosen", chosen).rpartition("\n\nAssistant:")
        question = re.sub(r"^\s*Human:\s*", "", question)
        rejected = text_of("rejected", rejected).rpartition("\n\nAssistant:")[2]
    responses = [text_of("chosen", chosen).strip(), text_of("rejected", rejected).strip()]
    return question_of("prompt", question), responses


def read_preference(record: dict) -> Prompt:
    """{prompt, responses, scores} | {prompt, chosen, rejected} (texts or messages) | UltraFeedback's completions"""
    if "completions" in record:  # openbmb/UltraFeedback: N = 4 ranked completions
        question = question_of(*first_field(record, "instruction", "prompt"))
        responses, truth = [], []
        for completion in record["completions"]:
            responses.append(completion["response"])
            # The mean of four ratings. The set's overall_score is wrong in places: it turns the worst, 1, into 10.
            score = completion.get("fine-grained_score")
            truth.append(completion["overall_score"] if score is None else score)
    elif "responses" in record:
        question = question_of(*first_field(record, "prompt", "instruction"))
        responses, truth = record["responses"], record.get("scores")
    else:
        question, responses = read_pair(record)
        truth = [1.0, 0.0]
    if not isinstance(responses, list) or not isinstance(truth, list) or len(responses) != len(truth):
        raise ValueError("field 'responses' or 'scores': expected two lists of equal length")
    if not 2 <= len(responses) <= 8:
        raise ValueError(f"field 'responses': {len(responses)} of them, and 2 to 8 are ranked together (D5)")
    for i, (text, score) in enumerate(zip(responses, truth), 1):
        text_of(f"response {i}", text)
        if not isinstance(score, (int, float)) or not abs(score) < 1e300:
            raise ValueError(f"field 'scores': {score!r} is no finite number")
    return Prompt("preference", question, tuple(responses), tuple(map(float, truth)))


# DAPO-Math-17k asks for the answer in a form of its own. One prompt must not ask for two forms, so this goes.
ASKS_FOR_ANSWER = re.compile(
    r"^Solve the following math problem step by step\. The last line of your response should be of the form "
    r"Answer: \$Answer \(without quotes\) where \$Answer is the answer to the problem\.\s+"
    r"|\s+Remember to put your answer on its own line after \"Answer:\"\.\s*$")


def read_reasoning(record: dict) -> Prompt:
    """{question, answer} | GSM8K ("... #### 42") | DAPO-Math-17k {prompt, reward_model: {ground_truth}}"""
    question = question_of(*first_field(record, "question", "problem", "prompt"))
    question = ASKS_FOR_ANSWER.sub("", question)
    if isinstance(record.get("reward_model"), dict):
        name, answer = first_field(record["reward_model"], "ground_truth")
    else:
        name, answer = first_field(record, "answer", "solution")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        if not abs(answer) < math.inf:
            raise ValueError(f"field {name!r}: {answer!r} is not finite")
        answer = str(answer)
    answer = text_of(name, answer).rpartition("####")[2].strip()
    if "\\boxed{" in answer:  # a whole solution
        answer = final_answer(answer)
    elif name == "solution" and "####" not in record["solution"]:
        raise ValueError("field 'solution': no \\boxed{} and no ####, so nobody knows which of it is the answer")
    try:
        check_answer(answer)
    except ValueError as error:
        raise ValueError(f"field {name!r}: {error}") from None
    return Prompt("reasoning", question, answer=answer)


def read_instruction(record: dict) -> Prompt:
    """{instruction} | {prompt} (text or messages) | {messages} (up to the last user turn)"""
    name, value = first_field(record, "instruction", "prompt", "messages")
    return Prompt("instruction", question_of(name, value), check=text_of("check", record.get("check", "")))


READERS = {"preference": read_preference, "reasoning": read_reasoning, "instruction": read_instruction}


def read_row(kind: str, where: str, record) -> Prompt:
    """A prompt of one record, a dict or a line of JSON. Raises InputError that begins with `where`."""
    try:
        if isinstance(record, bytes):
            record = json.loads(record)
        if not isinstance(record, dict):
            raise ValueError(f"expected an object, found {type(record).__name__}")
        return READERS[kind](record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{where}: {reason}; correct or remove this row. --{FLAGS[kind]} reads one JSON object a "
                         f"line, in UTF-8: {READERS[kind].__doc__}") from None


# ------------------------------------------------------------------------------- files, the hub, the toy world


def hub_records(kind: str, source: str, split: str):
    """Rows of a Hugging Face data set; `name:config` picks a configuration, as in openai/gsm8k:main."""
    import datasets

    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # unknown id, no network, no such split or configuration
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"--{FLAGS[kind]} {source}: neither a local file nor a data set the hub gave us "
                         f"({reason}); check the id and the network, or use a .jsonl file or toy") from None


def file_records(kind: str, source: str):
    """The lines of a local file, one at a time. Empty ones are left out, and counted as lines."""
    if not os.path.isfile(source):
        raise InputError(f"--{FLAGS[kind]} {source}: no such file; give a .jsonl file, a hub id, or toy")
    with open(source, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line


def progress(rows, what: str):
    """The same rows, with a bar on rank 0 when it takes long."""
    return tqdm(rows, what, delay=10, leave=False, disable=os.environ.get("RANK", "0") != "0")


MOST_UNREADABLE = 0.02  # of the rows of a hub's set; above that our reader is wrong for it


def source_records(kind: str, source: str, split: str, count: int):
    """((number, record) of every row, whether they come from the hub).

    `source`: `toy`, `count` rows of our own small world; `toy:2`, its pairs alone; a local .jsonl; or a hub id.
    """
    name, _, n = source.partition(":")
    if name == "toy":
        from toy import world

        if n and (kind != "preference" or not re.fullmatch("[2-8]", n)):
            raise InputError(f"--{FLAGS[kind]} {source}: toy takes a number of responses, 2 to 8, for --preferences "
                             "alone; for example toy:2")
        return enumerate(world.records(kind, split, count, int(n or 0)), 1), False
    if source.endswith((".jsonl", ".json")) or os.path.exists(source):
        return file_records(kind, source), False
    return enumerate(hub_records(kind, source, split), 1), True


def load_source(kind: str, source: str, split: str = "train", count: int = 4096) -> list[Prompt]:
    """All prompts of one kind, read by the fields that a record has.

    Repeated rows of the hub are read once (DAPO-Math-17k holds each question a hundred times), and a few unreadable
    rows of the hub are left out and counted. Raises InputError naming file, line, field and what to do.
    """
    records, from_hub = source_records(kind, source, split, count)
    prompts, seen, unreadable, number = [], set(), [], 0
    for number, record in progress(records, f"reading {source}"):
        try:
            prompt = read_row(kind, f"{source}:{number}", record)
        except InputError as error:
            if not from_hub:
                raise
            unreadable.append(error)  # a row of the hub, which the user cannot correct
            continue
        if not (from_hub and prompt in seen):
            prompts.append(prompt)
            seen.add(prompt)
    if len(unreadable) > MOST_UNREADABLE * number:
        raise unreadable[0]
    if unreadable and os.environ.get("RANK", "0") == "0":
        print(f"{source}: {len(unreadable)} of {number} rows cannot be read and are left out, the first: "
              f"{unreadable[0]}", flush=True)
    if not prompts:
        raise InputError(f"{source}: no rows for --{FLAGS[kind]}")
    return prompts


def each_row(fits, rows: list[Prompt]) -> list[bool]:
    return [fits(row) for row in progress(rows, "measuring prompts")]


def drop_overlong(prompts: list[Prompt], tokenizer, limit: int, judge_limit: int, listed: int,
                  each=each_row) -> tuple[list[Prompt], int]:
    """(rows whose prompt fits `limit` tokens, how many were dropped). Rows are never silently cut.

    An instruction or a question must also leave room for its judgement in `judge_limit` tokens: the referee's prompt
    over `listed` answers, each of them cut to its shortest form. `each` may share the work out over the ranks.
    """

    def fits(prompt: Prompt) -> bool:
        if len(encode_prompt(tokenizer, prompt)) > limit:
            return False
        try:
            if prompt.kind != "preference":
                encode_judgement(tokenizer, prompt.instruction, ["word " * 12] * listed, judge_limit)
        except InputError:
            return False
        return True

    kept = [prompt for prompt, good in zip(prompts, each(fits, prompts)) if good]
    return kept, len(prompts) - len(kept)


def load_sources(names: dict[str, list[str]], counts: dict[str, int], tokenizer, limit: int, judge_limit: int,
                 listed: int, toy_rows: int, each=each_row):
    """({kind: rows of all its sources}, {kind: how many were dropped as too long}) of each kind that the mix draws."""
    sources, dropped = {}, {}
    for kind, count in counts.items():
        if count:
            rows = []
            for name in names[kind]:
                rows += load_source(kind, name, count=toy_rows)
            sources[kind], dropped[kind] = drop_overlong(rows, tokenizer, limit, judge_limit, listed, each)
            if not sources[kind]:
                raise InputError(f"--{FLAGS[kind]}: all {len(rows)} rows are longer than --max_prompt_tokens {limit}, "
                                 f"or leave no room for a judgement in --max_judge_tokens {judge_limit}: raise it")
    return sources, dropped


def checksums(sources: dict[str, list[Prompt]]) -> dict[str, int]:
    """That of the rows of each kind."""
    return {kind: checksum(rows) for kind, rows in sources.items()}


def better_first(row: Prompt) -> Prompt | None:
    """A pair with its better response first; None for a row that is no pair of unequal responses."""
    if len(row.truth) != 2 or row.truth[0] == row.truth[1]:
        return None
    return row if row.truth[0] > row.truth[1] else swapped(row)
