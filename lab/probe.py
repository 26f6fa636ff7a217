"""What could a model learn, before any training? Parts 1 to 4 of one step, by the functions of urpo.py, no update.

    python -m lab.probe --model M [--rows 32] [--json F] [any flag of urpo.py]

Each kind whose share in --mix is above 0 has --rows prompts. A P row is drawn in both orders, which counts as two.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from itertools import combinations
from statistics import pstdev

import data
import urpo
from data import Group
from eval import open_model, pair_figures
from infra.ranks import InputError
from infra.results import check_writable, columns, known, summary, table
from infra.runs import write_whole
from infra.sampler import start_sampler
from infra.settings import parse
from rewards import kendall_tau, mean, parse_scores, read_judgements


def judged(group: Group) -> list:
    """The scores of each ranking, None where it cannot be read."""
    n = len(group.prompt.truth)
    return [parse_scores(text, n, finished) for text, finished in zip(group.texts, group.finished)]


def two(verdicts: list, first: int, second: int) -> list:
    """Of each ranking the scores at two positions; None, an unread one, stays None."""
    return [scores and [scores[first], scores[second]] for scores in verdicts]


def pairs_of(truth, forward: list, backward: list) -> dict[str, float | None]:
    """`pair_figures` of a row of N responses: the mean over its pairs of different scores, each in both orders.

    forward, backward: the rankings of the row, and of the row with its responses reversed.
    """
    found, last = [], len(truth) - 1
    for i, j in combinations(range(len(truth)), 2):
        # Response i stands before j in `forward`. In `backward` it stands at last - i, so behind j.
        better_first, worse_first = two(forward, i, j), two(backward, last - j, last - i)
        if truth[i] < truth[j]:
            better_first, worse_first = worse_first, better_first
        if truth[i] != truth[j]:
            found.append(pair_figures(better_first, worse_first))
    return {name: mean(known(values)) for name, values in columns(found).items()}


def preference_figures(groups: list[Group]) -> dict[str, dict]:
    """P: each row stands in both orders, one group after the other. The row is the unit: its orders are averaged."""
    rows = []
    for group, mirrored in zip(groups[::2], groups[1::2]):
        truth, taus = group.prompt.truth, []
        forward, backward = judged(group), judged(mirrored)
        for scores, reward in zip(forward + backward, group.rewards + mirrored.rewards):
            if scores:
                taus.append(reward)
        signal = mean([group.has_signal, mirrored.has_signal])
        row = {"gradient": signal, "format": len(taus) / len(forward + backward), "tau": mean(taus)}
        pair = pairs_of(truth, forward, backward)
        for name in ("single order", "order consistency", "first-position preference"):
            row[name] = pair.get(name)
        rows.append(row)
    return summary(rows)


def answer_figures(groups: list[Group]) -> dict[str, dict]:
    """R and I: which groups have a gradient, and what else can be seen of their answers."""
    rows = []
    for group in groups:
        row = {"gradient": group.has_signal, "cut off": 1 - mean(group.finished)}
        if group.prompt.kind == "reasoning":
            row["solved"] = mean(group.rewards)
        else:
            read = read_judgements(group)
            row["unparsed"] = read.count(None) / len(read)
            row["spread of self-scores"] = mean(map(pstdev, known(read)))
            row["correlation with length"] = group.rewards and kendall_tau(group.rewards, list(map(len, group.texts)))
        rows.append(row)
    return summary(rows)


def verdict(kind: str, figures: dict[str, dict]) -> str:
    """What a kind can teach this model in its first steps.

    >>> verdict("reasoning", {"gradient": {"value": 0.05, "count": 32}})
    'hardly any gradient from R: in 5% of 32 prompts the answers differ in reward'
    """
    share, count = figures["gradient"]["value"], figures["gradient"]["count"]
    size = "no" if share == 0 else "hardly any" if share < 0.1 else "a"  # the bound is ours
    return f"{size} gradient from {kind[0].upper()}: in {share:.0%} of {count} prompts the answers differ in reward"


def measure(config) -> dict[str, dict]:
    """{kind: its figures}, from one batch."""
    folder, tokenizer = open_model(config)
    sources, _ = data.load_sources(config, tokenizer)
    batch = data.draw(config, sources, 0)
    sampler = start_sampler(folder, max_tokens=data.longest_sequence(config), chat_template=tokenizer.chat_template)
    groups = urpo.rollout(config, sampler, tokenizer, list(enumerate(batch)), 0)
    urpo.self_score(config, sampler, tokenizer, groups, 0)
    urpo.reward(config, groups)
    figures = {}
    for kind in data.KINDS:
        part = [group for group in groups if group.prompt.kind == kind]
        if part:
            figures[kind] = preference_figures(part) if kind == "preference" else answer_figures(part)
    return figures


def read_config(arguments: list[str]):
    """(the settings of the one step, --json)."""
    own = argparse.ArgumentParser(prog="lab.probe", description=__doc__, add_help=False, allow_abbrev=False)
    own.add_argument("--rows", type=int, default=32)
    own.add_argument("--json", default="")
    asked, rest = own.parse_known_args(arguments)
    config = parse(urpo.Config, urpo.PRESETS, rest, __doc__)
    if asked.rows < 2 or asked.rows % 2:
        raise InputError(f"--rows {asked.rows}: give an even number of prompts of each kind, for example 32")
    config.both_orders, config.warmup_steps, config.minibatches, config.batch = True, 0, 1, 0
    data.mix_counts(config, warmup=False)  # refuses what is no mix
    shares = [min(1, int(share)) for share in config.mix.split(":")]
    config.mix, config.batch = ":".join(map(str, shares)), asked.rows * sum(shares)
    urpo.check(config, world=1)
    if asked.json:
        check_writable("json", asked.json)
    return config, asked.json


def main(arguments: list[str] | None = None) -> None:
    try:
        config, path = read_config(sys.argv[1:] if arguments is None else arguments)
        figures = measure(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(table({config.model: {"figures": figures}}, "n"), *map(verdict, figures, figures.values()), sep="\n")
    if path:
        write_whole(path, json.dumps({"model": config.model, "settings": asdict(config), "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
