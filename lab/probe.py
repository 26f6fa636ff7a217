"""What could a model learn, before any training? Parts 1 to 4 of one step, by the functions of urpo.py, no update.

    python -m lab.probe --model M [--rows 32] [--json F] [any flag of urpo.py]

Each kind whose share in --mix is above 0 has --rows prompts. A P row is drawn in both orders, which counts as two.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from itertools import combinations

import data
import urpo
from data import Group
from eval import open_model, pair_figures
from infra.ranks import InputError, stop
from infra.results import check_writable, columns, known, summary, table
from infra.runs import write_whole
from infra.sampler import start_sampler
from infra.settings import parse, setting
from rewards import kendall_tau, kind_figures, mean, parse_scores


@dataclass
class Probe(urpo.Config):
    """The settings of urpo.py, and those of the probe."""

    rows: int = setting(32, "prompts of each kind, an even number", least=2)
    json: str = setting("", "write the figures here")


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
    for orders in zip(groups[::2], groups[1::2]):
        truth, verdicts = orders[0].prompt.truth, []
        for group in orders:
            answers = zip(group.texts, group.finished)
            verdicts.append([parse_scores(text, len(truth), finished) for text, finished in answers])
        found = pairs_of(truth, *verdicts) | kind_figures(list(orders))
        row = {"gradient": mean(group.has_signal for group in orders)}
        for name in ("format", "tau", "single order", "order consistency", "first-position preference"):
            row[name] = found[name]
        rows.append(row)
    return summary(rows)


def answer_figures(groups: list[Group]) -> dict[str, dict]:
    """R and I: which groups have a gradient, and what else can be seen of their answers."""
    rows = []
    for group in groups:
        found = kind_figures([group])
        row = {"gradient": group.has_signal, "cut off": 1 - found["finished"]}
        if group.prompt.kind == "reasoning":
            row["solved"] = found["reward"]
        else:
            row["unparsed"] = 1 - found["format"]
            row["spread of self-scores"] = found["score_std"]
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


def main(arguments: list[str] | None = None) -> None:
    try:
        config = parse(Probe, urpo.PRESETS, sys.argv[1:] if arguments is None else arguments, __doc__)
        if config.rows % 2:
            raise InputError(f"--rows {config.rows}: give an even number")
        config.both_orders, config.warmup_steps, config.minibatches, config.batch = True, 0, 1, 0
        data.mix_counts(config, warmup=False)  # refuses what is no mix
        shares = [min(1, int(share)) for share in config.mix.split(":")]
        config.mix, config.batch = ":".join(map(str, shares)), config.rows * sum(shares)
        urpo.check(config, world=1)
        if config.json:
            check_writable("json", config.json)
        figures = measure(config)
    except InputError as error:
        stop(error)
    print(table({config.model: {"figures": figures}}, "n"), *map(verdict, figures, figures.values()), sep="\n")
    if config.json:
        result = {"model": config.model, "settings": asdict(config), "figures": figures}
        write_whole(config.json, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
