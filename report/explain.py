"""Why the rewards of a run are what they are: made again from the recorded texts, by the functions of training.

This shows that the numbers follow from the texts. That a model wrote the texts is not shown: nobody signed the run.
"""
import math
import sys
from collections import Counter
from dataclasses import replace
from itertools import groupby, zip_longest
from pathlib import Path
from statistics import mean, stdev

import torch

from data import KINDS, Group, InputError, prompt_text
from rewards import REWARD_RANGE, group_advantages, group_rewards, parse_scores
from runs import figures_of_kind, read_about, read_groups, read_log


def explain(run: str, step: int | None = None, prompt: int | None = None, check_all: bool = False) -> bool:
    """Print one prompt of one step in full, or with `check_all` check every number of the run.

    Each difference is printed to stderr; False if there is one. Raises InputError where nothing can be derived.
    """
    path, repairs, wrong = Path(run) / "rollouts.jsonl", [], []
    log, expected = {}, {}  # of each step: its line; its number of prompts
    for line in read_log(Path(run), repairs):
        log[line["step"]] = line
        expected[line["step"]] = sum(line[kind]["prompts"] for kind in KINDS if kind in line)
    settings = read_about(Path(run)).get("config", {})
    if not path.is_file() or not {"tau", "advantage", "rollouts_every"} <= settings.keys():
        raise InputError(f"{run}: no rollouts.jsonl, or no config.json with the run's settings: nothing to derive from")
    answers, found = 0, Counter()  # found: prompts of each step in rollouts.jsonl
    for at, pairs in groupby(read_groups(path, repairs), key=lambda pair: pair[0]):
        groups = []
        for _, group in pairs:
            found[at] += 1
            if check_all or (at, group.index) == (step, prompt):
                derived, differences = derive(at, group, settings)
                groups.append(derived)
                wrong += differences
                answers += len(group.texts)
                if not check_all:
                    print(in_words(at, derived, settings))
        if check_all and found[at] == expected.get(at):
            wrong += figure_differences(log[at], groups)
    if check_all:
        wrong += missing_prompts(run, expected, found, settings["rollouts_every"], repairs)
    elif not answers:
        raise InputError(f"{path}: no prompt {prompt} of step {step}; it holds steps {sorted(found)}")
    for line in repairs + wrong:
        print(line, file=sys.stderr)
    if check_all and not wrong:
        print(f"{run}: all {answers} rewards and advantages are as the texts make them")
    return not wrong


def derive(step: int, group: Group, settings: dict) -> tuple[Group, list[str]]:
    """The group with its rewards and advantages made again, and where its record says otherwise."""
    where = f"step {step}, prompt {group.index}"
    try:
        rewards = group_rewards(group.prompt, group.texts, group.judgements, settings["tau"])
    except ValueError as error:
        return group, [f"{where}: {error}"]
    advantages = [0.0] * len(group.texts)  # stays so where no judgement could be read (D8)
    if rewards is not None:
        reward_range = REWARD_RANGE[group.prompt.kind]
        advantages = group_advantages(torch.tensor(rewards), settings["advantage"], reward_range).tolist()
    wrong = []
    for name, recorded, own in (("reward", group.rewards, rewards), ("advantage", group.advantages, advantages)):
        for i, (a, b) in enumerate(zip_longest(recorded or [], own or []), 1):
            if not agree(a, b):
                wrong.append(f"{where}, answer {i}: {name} {a!r} recorded, {b!r} derived")
    return replace(group, rewards=rewards, advantages=advantages), wrong


def agree(a, b) -> bool:
    """Equal but for float32 rounding. None, which is unknown, equals None alone."""
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) or math.isnan(a) and math.isnan(b)
    return a == b


def figure_differences(line: dict, groups: list[Group]) -> list[str]:
    """Where the figures of a line of the log are not those of its groups."""
    wrong = []
    for kind in KINDS:
        logged = line.get(kind, {})
        derived = figures_of_kind([group for group in groups if group.prompt.kind == kind])
        for name in derived | logged:
            a, b = logged.get(name), derived.get(name)
            if not agree(a, b):
                wrong.append(f"step {line['step']}: {kind}.{name} is {a!r} in log.jsonl, {b!r} derived")
    return wrong


def missing_prompts(run: str, expected: dict[int, int], found: Counter, every: int, repairs: list[str]) -> list[str]:
    """The steps whose number of recorded prompts is not that of the log. In the last one it may be a crash."""
    wrong, steps = [], sorted(expected.keys() | found.keys())
    for step in steps:
        number = expected.get(step, 0) if step % every == 0 else 0
        counted = f"{found[step]} prompts in rollouts.jsonl, {number} in log.jsonl"
        if found[step] != number and step == steps[-1]:
            repairs.append(f"{run}: step {step} is the last and incomplete ({counted}): its figures were left out")
        elif found[step] != number:
            wrong.append(f"step {step}: {counted}")
    return wrong


def in_words(step: int, group: Group, settings: dict) -> str:
    """One group: what was asked, what was answered, what that earned, and who judged it how."""
    prompt, rewards = group.prompt, group.rewards or [None] * len(group.texts)
    truth = list(prompt.truth) or prompt.answer or "unknown, so the model itself judges"
    lines = [f"step {step}, prompt {group.index}: {prompt.kind}", indented(prompt_text(prompt)), f"truth: {truth!r}"]
    columns = zip(group.texts, group.answers, group.finished, rewards, group.advantages)
    for i, (text, ids, finished, reward, advantage) in enumerate(columns, 1):
        earned = "none, no judgement can be read (D8)" if reward is None else f"{reward:.4g}"
        lines.append(f"answer {i}, {len(ids)} tokens{'' if finished else ', cut off'}: reward {earned}, "
                     f"advantage {advantage:.4g}\n{indented(text)}")
        if prompt.kind == "preference":
            lines.append(f"scores: {parse_scores(text, len(prompt.truth)) or 'unreadable, which earns -1 (D4)'}")
    for judgement in group.judgements:
        order = ", ".join(str(answer + 1) for answer in judgement["order"])
        scores = parse_scores(judgement["text"], len(judgement["order"]))
        lines += [f"judge prompt over answers {order}, in this order", indented(judgement["prompt"]),
                  "judge text", indented(judgement["text"]), f"scores: {scores or 'unreadable'}"]
    if len(group.rewards or []) > 1:
        lowest, highest = REWARD_RANGE[prompt.kind]
        rule = f"(reward - mean) / {highest - lowest:g}" if settings["advantage"] == "center" else (
            "(reward - mean) / (std + 1e-6)")
        lines.append(f"advantage = {rule}, mean {mean(rewards):.4g}, unbiased std {stdev(rewards):.4g}; 0 at std 0")
    return "\n".join(lines)


def indented(text: str) -> str:
    """A text of the run as a terminal may show it: its control characters are spelled out."""
    safe = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return "\n".join("    | " + line for line in safe.split("\n"))
