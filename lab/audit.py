"""Why the rewards of a run are what they are: its record derived again, by the functions of training.

    python -m lab.audit runs/urpo --all                    every reward, advantage and figure of the log
    python -m lab.audit runs/urpo --step 3 --prompt 5      one prompt in words

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
from infra.ranks import InputError, stop
from infra.runs import read_about, read_log
from rewards import read_judgements, step_figures


def audit(run: Path, step: int | None = None, prompt: int | None = None) -> bool:
    """Check every number of a run; or with `step` and `prompt` print this one in words, and check it.

    False if there is a difference. Raises InputError where nothing can be derived.
    """
    path, repairs, wrong = run / "rollouts.jsonl", [], []
    lines, found, answers = read_log(run, repairs), [], 0  # found: the steps in rollouts.jsonl
    config, tokenizers, sources = witnesses(run, with_sources=step is None)
    for at, pairs in groupby(data.read_groups(path, repairs), key=lambda pair: pair[0]):
        found.append(at)
        groups = []
        for _, group in pairs:
            if step is None or (at, group.index) == (step, prompt):
                derived, differences = derive(config, at, group)
                wrong += differences + record_differences(config, at, group, *tokenizers)
                groups.append(derived)
                answers += len(group.texts)
                if step is not None:
                    print(in_words(at, derived), end="")
        for line in lines:
            if step is None and line["step"] == at:
                wrong += step_differences(config, line, groups, sources)
    if step is None:
        wrong += missing_steps([line["step"] for line in lines], found, repairs)
    elif not answers:
        raise InputError(f"{path}: no prompt {prompt} of step {step}; it holds steps {found}")
    for line in repairs + wrong:
        print(line, file=sys.stderr)
    if step is None and not wrong:
        print(f"{run}: all {answers} rewards and advantages are as the texts make them")
    return not wrong


def witnesses(run: Path, with_sources: bool) -> tuple:
    """(settings, tokenizers of the model and of its judge, rows by kind) of a run.

    None, and a note, for what is not there any more, or is another one by now. The model's tokenizer is that of the
    newest checkpoint, or without one that of --model.
    """
    about, saved, sources = read_about(run), run / "checkpoints" / "last" / "model", None
    settings = about.get("config", {})
    if not (run / "rollouts.jsonl").is_file() or not settings:
        raise InputError(f"{run}: no rollouts.jsonl, or no settings in config.json: nothing to derive from")
    if missing := vars(urpo.Config()).keys() - settings.keys():
        raise InputError(f"{run}: its config.json has no {', '.join(sorted(missing))}: another version of urpo.py "
                         "wrote it, and that version's audit derives it")
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
        if with_sources:
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
        urpo.reward(config, [derived])
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
        if not judge or config.judge and judgement["prompt"] is None:  # a reward model reads no prompt
            continue
        shown = [group.texts[i] for i in judgement["order"]]
        ids, cut = data.encode_judgement(config, judge, group.prompt.instruction, shown)
        if (judge.decode(ids), cut) != (judgement["prompt"], judgement["cut"]):
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


def in_words(step: int, group: Group) -> str:
    """One group: what was asked, what was answered, what that earned, and who judged it how."""
    prompt, rewards, read = group.prompt, group.rewards, read_judgements(group)
    truth = list(prompt.truth) or prompt.answer or "unknown, so the model itself judges"
    text = f"step {step}, prompt {group.index}: {prompt.kind}\n{indented(data.prompt_text(prompt))}truth: {truth!r}\n"
    for i, answer in enumerate(group.texts):
        earned = f"{rewards[i]:.4g}" if rewards else "none, no judgement can be read"
        text += f"answer {i + 1}: reward {earned}, advantage {group.advantages[i]:.4g}\n{indented(answer)}"
        if prompt.kind == "preference":
            text += f"scores: {read[i] or 'unreadable'}\n"
    for judgement, scores in zip(group.judgements, read):
        order = [answer + 1 for answer in judgement["order"]]
        text += f"judge prompt over answers {order}, in this order\n{indented(judgement['prompt'] or 'none')}"
        text += f"judge text\n{indented(judgement['text'])}scores: {scores or 'unreadable'}\n"
    return text


def indented(text: str) -> str:
    return "".join(f"    | {line}\n" for line in printable(text).split("\n"))


def printable(text: str) -> str:
    """A text of a run as a terminal may show it: its control characters are spelled out."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="its folder, for example runs/urpo")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--all", action="store_true", help="check every number of the run")
    what.add_argument("--step", type=int, help="show one prompt of this step")
    parser.add_argument("--prompt", type=int, default=0, help="its position in the batch, from 0")
    args = parser.parse_args(arguments)
    try:
        if not audit(args.run, args.step, args.prompt):
            sys.exit(1)
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
