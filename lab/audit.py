"""Why the rewards of a run are what they are: its record derived again, by the functions of training.

    python -m lab.audit runs/urpo

The numbers are made again from the texts; the texts are decoded from the token ids; prompts, and the judges' prompts,
are built and encoded again; and prompts are drawn again from the sources, by the seed and the mix. Each difference is
a line on standard error, and the exit status is then 1. That a model wrote the ids is not shown: nobody signed the run.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from itertools import groupby, zip_longest
from pathlib import Path
from types import SimpleNamespace

import data
import urpo
from data import Group
from infra import chat
from infra.ranks import InputError, one_line_errors
from infra.runs import read_about, read_log
from rewards import step_figures


def audit(run: Path) -> bool:
    """Check every number of a run. False if there is a difference. Raises InputError where nothing can be derived."""
    repairs, wrong = [], []
    lines, found, answers = read_log(run, repairs), [], 0  # found: the steps in rollouts.jsonl
    config, tokenizers, sources = witnesses(run)
    for step, pairs in groupby(data.read_groups(run / "rollouts.jsonl", repairs), key=lambda pair: pair[0]):
        found.append(step)
        groups = []
        for _, group in pairs:
            derived, differences = derive(config, step, group)
            wrong += differences + record_differences(config, step, group, *tokenizers)
            groups.append(derived)
            answers += len(group.texts)
        for line in lines:
            if line["step"] == step:
                wrong += step_differences(config, line, groups, sources)
    wrong += missing_steps([line["step"] for line in lines], found, repairs)
    for line in repairs + wrong:
        print(line, file=sys.stderr)
    if not wrong:
        print(f"{run}: all {answers} rewards and advantages are as the texts make them")
    return not wrong


def witnesses(run: Path) -> tuple:
    """(settings, tokenizers of the model and of its judge, rows by kind) of a run.

    None, and a note, for what is not there any more, or is another one by now. The model's tokenizer is that of the
    newest checkpoint, or without one that of --model.
    """
    about, saved, sources = read_about(run), run / "checkpoints" / "last" / "model", None
    settings = about.get("config", {})
    if not (run / "rollouts.jsonl").is_file() or not settings:
        raise InputError(f"{run}: no rollouts.jsonl, or no settings in config.json: nothing to derive from")
    if settings.get("program") == "sft":
        raise InputError(f"{run}: a run of sft, which no reward has taught: nothing to derive")
    if other := vars(urpo.Config()).keys() ^ settings.keys() - {"program", "judge", "errors"}:
        raise InputError(f"{run}: its settings differ from today's by {', '.join(sorted(other))}: another version of "
                         "urpo.py wrote it, and that version's audit derives it")
    config = SimpleNamespace(**{"judge": ""} | settings)  # a frozen judge is a setting of the baselines
    own = (str(saved), "") if saved.is_dir() else (config.model, config.chat_template)
    tokenizer = judge = chat.load_tokenizer(*own)
    try:
        if config.judge:
            judge = chat.load_tokenizer(config.judge, config.chat_template)
    except InputError as error:
        judge = None
        print(f"not compared: the judge's prompts ({error})")
    try:
        sources, _ = data.load_sources(config, tokenizer)
        if data.checksums(sources) != about.get("rows"):
            raise InputError("others than when the run began")
    except InputError as error:
        sources = None
        print(f"not compared: prompts with their sources ({error})")
    return config, (tokenizer, judge), sources


def derive(config, step: int, group: Group) -> tuple[Group, list[str]]:
    """The group with its rewards and advantages made again, and where its record says otherwise."""
    where, wrong = f"step {step}, prompt {group.index}", []
    derived = replace(group, rewards=None, advantages=[0.0] * len(group.texts))
    try:
        (derived,) = urpo.reward(config, [derived])
    except ValueError as error:  # of an order that no judgement can have
        return derived, [f"{where}: {error}"]
    for name in ("rewards", "advantages"):
        recorded, own = getattr(group, name) or [], getattr(derived, name) or []
        for i, (a, b) in enumerate(zip_longest(recorded, own), 1):
            if not agree(a, b):
                wrong.append(f"{where}, answer {i}: {name} holds {a!r}, and {b!r} is derived")
    return derived, wrong


def agree(a, b) -> bool:
    """Equal but for float32 rounding. None, which is unknown, equals None alone."""
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) or math.isnan(a) and math.isnan(b)
    return a == b


def record_differences(config, step: int, group: Group, tokenizer, judge) -> list[str]:
    """Where ids, texts, limits and judgements of a group do not go together."""
    wrong, where, kind, stops = [], f"step {step}, prompt {group.index}", group.prompt.kind, chat.stop_ids(tokenizer)
    counts = [len(group.answers), len(group.texts), len(group.finished)]
    if counts != 3 * [config.group]:
        return [f"{where}: {counts} answers, texts and ends, and --group is {config.group}"]
    if group.prompt_ids != data.encode_prompt(tokenizer, group.prompt):
        wrong.append(f"{where}: prompt_ids are not the token ids of this prompt")
    limit = config.max_referee_tokens if kind == "preference" else config.max_answer_tokens
    for i, (ids, text, finished) in enumerate(zip(group.answers, group.texts, group.finished), 1):
        if len(ids) > limit or not finished and len(ids) < limit:
            wrong.append(f"{where}, answer {i}: {len(ids)} tokens of at most {limit}, finished: {finished}")
        known = all(token in range(len(tokenizer)) for token in ids)
        if not known or chat.answer_text(tokenizer, ids, stops) != text:
            wrong.append(f"{where}, answer {i}: the text is not what the token ids say")
    orders = data.judgement_orders(config, group.index, step) if kind == "instruction" else []
    recorded = [judgement["order"] for judgement in group.judgements]
    if recorded != orders:
        return [*wrong, f"{where}: judgements over the answers {recorded}, and the seed gives {orders}"]
    for k, judgement in enumerate(group.judgements, 1):
        if not judge:
            break
        shown = [group.texts[i] for i in judgement["order"]]
        if judge.decode(data.encode_judgement(judge, group.prompt.instruction, shown)) != judgement["prompt"]:
            wrong.append(f"{where}, judgement {k}: the judge's prompt is not the one over these answers")
    return wrong


def step_differences(config, line: dict, groups: list[Group], sources: dict | None) -> list[str]:
    """Where a line of the log does not follow from the groups of its step, or these are not the step's batch."""
    step, wrong, groups = line["step"], [], sorted(groups, key=lambda group: group.index)
    indices = [group.index for group in groups]
    if indices != list(range(config.batch)):
        return [f"step {step}: rollouts.jsonl holds prompts {indices}, and --batch is {config.batch}"]
    counts = data.mix_counts(config, step < config.warmup_steps)
    kinds = data.interleave({kind: [kind] * count for kind, count in counts.items() if count})
    if [group.prompt.kind for group in groups] != kinds:
        return [f"step {step}: the kinds of the prompts are not those of --mix {config.mix}"]
    for group, prompt in zip(groups, data.draw(config, sources, step) if sources else []):
        if group.prompt != prompt:
            wrong.append(f"step {step}, prompt {group.index}: not the prompt that sources and seed give")
    derived = step_figures(config, groups)
    tokens, seconds = sum(figures["tokens"] for figures in derived.values()), sum(line.get("seconds", {}).values())
    skipped, size = line.get("nonfinite_updates") or 0, config.batch // config.minibatches
    for first in range(0, len(groups), size):  # a minibatch without a signal is skipped
        skipped += not any(group.has_signal for group in groups[first : first + size])
    derived["step"] = {"tokens_per_second": tokens / seconds if seconds else None,
                       "skipped_updates": skipped, "updates": config.minibatches - skipped}
    for part in ("step", *data.KINDS):
        own, logged = derived.get(part, {}), line if part == "step" else line.get(part, {})
        for name in own if part == "step" else own | logged:
            a, b = logged.get(name), own.get(name)
            if not agree(a, b):
                wrong.append(f"step {step}: {part}.{name} is {a!r} in log.jsonl, and {b!r} is derived")
    return wrong


def missing_steps(steps: list[int], found: list[int], repairs: list[str]) -> list[str]:
    """Where log.jsonl and rollouts.jsonl do not hold the same steps. Trajectories are on the disk before the line.

    So a crash can leave trajectories of one step more. It never leaves a line without its trajectories.
    """
    wrong = []
    if steps != list(range(len(steps))):
        wrong.append(f"log.jsonl: its steps are {steps}, and not 0 to {len(steps) - 1}, each once and in order")
    for step in set(steps) - set(found):
        wrong.append(f"step {step}: in log.jsonl, and no prompt in rollouts.jsonl")
    for step in set(found) - set(steps):
        said = repairs if step == max(steps) + 1 else wrong
        said.append(f"step {step}: in rollouts.jsonl, and no line in log.jsonl; its figures were left out")
    return wrong


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="its folder, for example runs/urpo")
    with one_line_errors():
        if not audit(parser.parse_args(arguments).run):
            sys.exit(1)


if __name__ == "__main__":
    main()
