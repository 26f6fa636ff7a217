"""What could a model learn, before any training? Parts 1 to 4 of one step, by the functions of urpo.py, no update.

    python -m lab.probe --model M [--rows 32] [any flag of urpo.py]

Each kind whose share in --mix is above 0 has --rows prompts. A P row is drawn in both orders, which counts as two. The
figures have the names of docs/log.md. "gradient" is the share of prompts that have one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import data
import urpo
from eval import open_model
from infra.ranks import InputError, one_line_errors
from infra.results import summary, table
from infra.sampler import start_sampler
from infra.settings import parse, setting
from rewards import kind_figures, mean


@dataclass
class Probe(urpo.Config):
    """The settings of urpo.py, and how much is asked."""

    rows: int = setting(32, "prompts of each kind, an even number", least=2)


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
    groups = urpo.reward(config, groups)
    figures = {}
    for kind in data.KINDS:
        part, rows = [group for group in groups if group.prompt.kind == kind], []
        orders = 2 if kind == "preference" else 1
        for first in range(0, len(part), orders):
            row = part[first : first + orders]
            rows.append({"gradient": mean(group.has_signal for group in row), **kind_figures(row)})
        if rows:
            figures[kind] = summary(rows)
    return figures


def main(arguments: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(Probe, urpo.PRESETS, sys.argv[1:] if arguments is None else arguments, __doc__)
        if config.rows % 2:
            raise InputError(f"--rows {config.rows}: give an even number")
        config.both_orders, config.warmup_steps, config.minibatches, config.batch = True, 0, 1, 0
        data.mix_counts(config, warmup=False)  # refuses what is no mix
        shares = [min(1, int(share)) for share in config.mix.split(":")]
        config.mix, config.batch = ":".join(map(str, shares)), config.rows * sum(shares)
        urpo.check(config, world=1)
        figures = measure(config)
        print(table({config.model: {"figures": figures}}, "n"), *map(verdict, figures, figures.values()), sep="\n")


if __name__ == "__main__":
    main()
