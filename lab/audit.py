"""Why the rewards of a run are what they are: its record derived again, by the functions of training.

    the numbers    rewards, advantages and the log's figures, from the texts
    the texts      decoded from the token ids; the prompts, and the judges' prompts, built and encoded again
    the prompts    drawn again from the sources by the seed; the kinds and the number of prompts by the mix

docs/evaluation.md says what no record can prove. That a model wrote the ids is not shown: nobody signed the run.
"""
import math
import sys
from collections import Counter
from dataclasses import replace
from itertools import groupby, zip_longest
from pathlib import Path
from statistics import mean, stdev

import torch

import data
import plan
import readers
from data import FLAGS, KINDS, Group, InputError, prompt_text
from rewards import REWARD_RANGE, group_advantages, group_rewards, parse_scores
from runs import figures_of_step, is_recorded, read_about, read_groups, read_log

SETTINGS = """tau advantage loss minibatches rollouts_every seed mix batch warmup_steps both_orders group judgements
    judge_list audit_judge max_prompt_tokens max_answer_tokens max_referee_tokens max_judge_tokens model chat_template
    toy_rows preferences reasoning instructions""".split()  # what is read here of those in config.json


def explain(run: str, step: int | None = None, prompt: int | None = None, check_all: bool = False) -> bool:
    """Print one prompt of one step in full, or with `check_all` check every number of the run.

    Each difference is printed to stderr; False if there is one. Raises InputError where nothing can be derived.
    """
    path, repairs, notes = Path(run) / "rollouts.jsonl", [], []
    log, about = read_log(Path(run), repairs), read_about(Path(run))
    settings = about.get("config", {})
    missing = [name for name in SETTINGS if name not in settings]
    if not path.is_file() or not settings:
        raise InputError(f"{run}: no rollouts.jsonl, or no settings in config.json: nothing to derive from")
    if missing:
        raise InputError(f"{run}: its config.json has no {', '.join(missing)}: another version of urpo.py wrote it, "
                         "and that version's explain derives it")
    tokenizer = find_tokenizer(Path(run), settings["model"], settings["chat_template"], notes)
    sources = find_sources(settings, about, tokenizer, notes) if check_all and tokenizer else None
    lines = {line["step"]: line for line in log}
    wrong, answers, found = [], 0, Counter()  # found: prompts of each step in rollouts.jsonl
    for at, pairs in groupby(read_groups(path, repairs), key=lambda pair: pair[0]):
        groups, recorded = [], [group for _, group in pairs]
        spreads = batch_spreads(recorded, settings["tau"]) if settings["advantage"] == "batch" else {}
        for group in recorded:
            found[at] += 1
            if check_all or (at, group.index) == (step, prompt):
                derived, differences = derive(at, group, settings, spreads)
                groups.append(derived)
                wrong += differences + record_differences(at, group, settings, tokenizer)
                answers += len(group.texts)
                if not check_all:
                    print(in_words(at, derived, settings))
        if check_all and at in lines:
            wrong += step_differences(lines[at], groups, settings, sources)
    if check_all:
        wrong += missing_steps(log, found, settings["rollouts_every"], repairs)
    elif not answers:
        raise InputError(f"{path}: no prompt {prompt} of step {step}; it holds steps {sorted(found)}")
    for line in repairs + wrong:
        print(line, file=sys.stderr)
    print(*notes, sep="\n", end="\n" * bool(notes))
    if check_all and not wrong:
        print(f"{run}: all {answers} rewards and advantages are as the texts make them")
    return not wrong


# ------------------------------------------------------------------------------- what a run is compared with


def find_tokenizer(run: Path, model: str, chat_template: str, notes: list[str]):
    """The tokenizer of the run's newest checkpoint, else of its model. Where there is none: None, and a note."""
    last = run / "checkpoints" / "last" / "model"
    try:
        if last.is_dir():
            return plan.load_tokenizer(str(last))
        return plan.load_tokenizer(plan.model_folder(model), chat_template)
    except InputError as error:
        notes.append(f"not compared: token ids with texts, judges' prompts and sources with the record ({error})")
        return None


def find_sources(settings: dict, about: dict, tokenizer, notes: list[str]) -> dict | None:
    """The rows that the run drew from. Where they cannot be had, or are others by now: None, and a note."""
    try:
        sources, _ = readers.load_sources(
            {kind: settings[name] for kind, name in FLAGS.items()},
            data.mix_counts(settings["mix"], settings["batch"], warmup=False), tokenizer,
            settings["max_prompt_tokens"], settings["max_judge_tokens"], settings["judge_list"] or settings["group"],
            settings["toy_rows"])
    except InputError as error:
        notes.append(f"not compared: prompts with their sources ({error})")
        return None
    if readers.checksums(sources) != about.get("sources"):
        notes.append("not compared: prompts with their sources, which are others than when the run began")
        return None
    return sources


# ------------------------------------------------------------------------------- one prompt


def batch_spreads(groups: list[Group], tau: str) -> dict[str, float]:
    """The standard deviation of all rewards of each kind in a step, for `--advantage batch`."""
    rewards: dict[str, list[float]] = {}
    for group in groups:
        try:
            own = group_rewards(group.prompt, group.texts, group.judgements, tau, group.finished)
        except ValueError:
            continue  # `derive` says what is wrong with it
        rewards.setdefault(group.prompt.kind, []).extend(own or [])
    return {kind: stdev(values) if len(values) > 1 else 0.0 for kind, values in rewards.items()}


def derive(step: int, group: Group, settings: dict, spreads: dict[str, float]) -> tuple[Group, list[str]]:
    """The group with its rewards and advantages made again, and where its record says otherwise."""
    where = f"step {step}, prompt {group.index}"
    try:
        rewards = group_rewards(group.prompt, group.texts, group.judgements, settings["tau"], group.finished)
    except ValueError as error:
        return group, [f"{where}: {error}"]
    advantages = [0.0] * len(group.texts)  # stays so where no judgement could be read (D8)
    if rewards is not None:
        kind = group.prompt.kind
        advantages = group_advantages(
            torch.tensor(rewards), settings["advantage"], REWARD_RANGE[kind], spreads.get(kind)).tolist()
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


def record_differences(step: int, group: Group, settings: dict, tokenizer) -> list[str]:
    """Where ids, texts, limits and judgements of a group do not go together. Ids and texts: with a tokenizer alone."""
    wrong, where = [], f"step {step}, prompt {group.index}"
    for name in ("answers", "texts", "finished"):
        if len(getattr(group, name)) != settings["group"]:
            wrong.append(f"{where}: {len(getattr(group, name))} {name}, and --group is {settings['group']}")
    limit = settings["max_referee_tokens" if group.prompt.kind == "preference" else "max_answer_tokens"]
    for i, (ids, finished) in enumerate(zip(group.answers, group.finished), 1):
        if len(ids) > limit or not finished and len(ids) < limit:
            wrong.append(f"{where}, answer {i}: {len(ids)} tokens, {'' if finished else 'not '}finished; "
                         f"the limit is {limit}")
    orders = data.judgement_orders(
        group, step, settings["seed"], settings["judge_list"] or settings["group"], settings["judgements"],
        settings["audit_judge"])
    recorded = [judgement["order"] for judgement in group.judgements]
    if recorded != orders:
        return [*wrong, f"{where}: judgements over the answers {recorded}, and the seed gives {orders}"]
    if tokenizer:
        wrong += text_differences(where, group, settings, tokenizer)
    return wrong


def text_differences(where: str, group: Group, settings: dict, tokenizer) -> list[str]:
    """Where the texts of a group are not those of its token ids, and prompts not those of its texts."""
    wrong, stops = [], data.stop_ids(tokenizer)
    if group.prompt_ids != data.encode_prompt(tokenizer, group.prompt):
        wrong.append(f"{where}: prompt_ids are not the token ids of this prompt")
    for i, (ids, text) in enumerate(zip(group.answers, group.texts), 1):
        known = all(isinstance(token, int) and 0 <= token < len(tokenizer) for token in ids)
        if not known or data.answer_text(tokenizer, ids, stops) != text:
            wrong.append(f"{where}, answer {i}: the text is not what the token ids say")
    for k, judgement in enumerate(group.judgements, 1):
        if settings.get("judge") and judgement["prompt"] is None:  # a reward model scored them: baselines.py rm_score
            continue
        shown = [group.texts[i] for i in judgement["order"]]
        ids, cut = data.encode_judgement(tokenizer, group.prompt.instruction, shown, settings["max_judge_tokens"])
        if (tokenizer.decode(ids), cut) != (judgement["prompt"], judgement.get("cut")):
            wrong.append(f"{where}, judgement {k}: the judge's prompt is not the one over these answers")
    return wrong


# ------------------------------------------------------------------------------- one step


def step_differences(line: dict, groups: list[Group], settings: dict, sources: dict | None) -> list[str]:
    """Where a line of the log does not follow from the groups of its step, or these are not the step's batch."""
    step, wrong = line["step"], []
    indices = Counter(group.index for group in groups)
    whole = range(settings["batch"])
    odd = {index for index in whole if indices[index] != 1} | indices.keys() - set(whole)
    if odd:
        return [f"step {step}: prompts {sorted(odd, key=str)} are missing, doubled or too many in rollouts.jsonl; "
                f"--batch is {settings['batch']}"]
    groups = sorted(groups, key=lambda group: group.index)
    counts = data.mix_counts(settings["mix"], settings["batch"], step < settings["warmup_steps"])
    kinds = data.interleave({kind: [kind] * count for kind, count in counts.items() if count})
    if [group.prompt.kind for group in groups] != kinds:
        wrong.append(f"step {step}: the kinds of the prompts are not those of --mix {settings['mix']}")
    if sources:
        batch = data.draw(sources, settings["mix"], settings["batch"], settings["warmup_steps"], settings["seed"], step,
                          settings["both_orders"])
        for group, prompt in zip(groups, batch):
            if group.prompt != prompt:
                wrong.append(f"step {step}, prompt {group.index}: not the prompt that sources and seed give")
    return wrong + figure_differences(line, groups, settings)


def figure_differences(line: dict, groups: list[Group], settings: dict) -> list[str]:
    """Where the figures of a line of the log are not those of its groups."""
    try:
        derived = figures_of_step(groups, settings["minibatches"], settings["loss"])
    except ValueError as error:  # of an order that no judgement can have
        return [f"step {line['step']}: its figures cannot be derived: {error}"]
    pairs, size = [], settings["batch"] // settings["minibatches"]
    for kind in KINDS:
        logged, own = line.get(kind, {}), derived.get(kind, {})
        for name in own | logged:
            pairs.append((f"{kind}.{name}", logged.get(name), own.get(name)))
    tokens, seconds = sum(figures["tokens"] for figures in derived.values()), sum(line.get("seconds", {}).values())
    pairs.append(("tokens_per_second", line.get("tokens_per_second"), tokens / seconds if seconds else None))
    silent = 0  # minibatches without a signal, which are skipped
    for first in range(0, len(groups), size):
        silent += not any(group.has_signal for group in groups[first : first + size])
    skipped = silent + (line.get("nonfinite_updates") or 0)
    pairs += [("skipped_updates", line.get("skipped_updates"), skipped),
              ("updates", line.get("updates"), settings["minibatches"] - skipped)]
    wrong = []
    for name, logged, own in pairs:
        if not agree(logged, own):
            wrong.append(f"step {line['step']}: {name} is {logged!r} in log.jsonl, {own!r} derived")
    return wrong


def missing_steps(log: list[dict], found: Counter, every: int, repairs: list[str]) -> list[str]:
    """Where the two files do not hold the same steps. Trajectories are on the disk before the line of the log.

    So a crash can leave trajectories of one step more. It never leaves a line without its trajectories.
    """
    wrong, steps = [], [line["step"] for line in log]
    if steps != list(range(len(steps))):
        wrong.append(f"log.jsonl: its steps are {steps}, and not 0 to {len(steps) - 1}, each once and in order")
    for line in log:
        if is_recorded(line["step"], line, every) and not found[line["step"]]:
            wrong.append(f"step {line['step']}: 0 prompts in rollouts.jsonl, and its line in log.jsonl")
        if found[line["step"]] and not is_recorded(line["step"], line, every):
            wrong.append(f"step {line['step']}: in rollouts.jsonl, in spite of --rollouts_every {every}")
    for step in sorted(found.keys() - set(steps)):
        said = f"step {step}: {found[step]} prompts in rollouts.jsonl, and no line in log.jsonl"
        if step == max(steps) + 1 and step == max(found):
            repairs.append(f"{said}: the run ended before it was written; its figures were left out")
        else:
            wrong.append(said)
    return wrong


# ------------------------------------------------------------------------------- in words


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
        scales = {"std": "(std + 1e-6)", "center": f"{highest - lowest:g}", "batch": "(std of the batch + 1e-6)"}
        scale = scales[settings["advantage"]]
        lines.append(f"advantage = (reward - mean) / {scale}, mean {mean(rewards):.4g}, unbiased std "
                     f"{stdev(rewards):.4g}; 0 at std 0")
    return "\n".join(lines)


def indented(text: str) -> str:
    """A text of the run as a terminal may show it: its control characters are spelled out."""
    safe = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return "\n".join("    | " + line for line in safe.split("\n"))
