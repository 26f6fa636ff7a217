"""What the referee's evaluation costs beside the engine alone: `eval.py rewardbench` on n pairs, from the data file to
the printed table, against the bare `LLM.generate` of vLLM on the same prompts. The bound is 1.15 (ours).

    python tests/bench/judging.py                                      512 pairs, the seed base
    python tests/bench/judging.py --model M --pairs 64 --rounds 1

Both in turn in one process, after one round that does not count; before each the engine forgets its prefix cache. Bare
means: prompts are token ids already, greedy, no log-probs asked for. Exit status 1 where the ratio of the medians is
above the bound.
"""
import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
from toy import world  # noqa: E402


def write_pairs(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in world.records("preference", "heldout", count, 2)))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="seed", help="as of eval.py; default %(default)s")
    parser.add_argument("--pairs", type=int, default=512, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="of each, in turn; default %(default)s")
    parser.add_argument("--bound", type=float, default=1.15, help="largest ratio; default %(default)s")
    given = parser.parse_args()
    from vllm import SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        args = evaluation.parse_arguments(["rewardbench", "--model", given.model, "--data",
                                           str(write_pairs(Path(folder) / "pairs.jsonl", given.pairs))])
        model, tokenizer = opened = evaluation.open_model(args.model)
        engine = evaluation.open_engine(model, tokenizer, args)
        evaluation.open_model = lambda *_: opened  # started once
        evaluation.open_engine = lambda *_: engine
        _, pairs = evaluation.benchmark_pairs(args)
        prompts = [{"prompt_token_ids": data.encode_prompt(tokenizer, shown)}
                   for shown in evaluation.both_orders(pairs)]
        greedy = SamplingParams(temperature=0.0, max_tokens=args.max_referee_tokens)

        def judged() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation.rewardbench(args)

        def bare() -> None:
            engine.generate(prompts, greedy, use_tqdm=False)

        seconds = {judged: [], bare: []}
        for number in range(given.rounds + 1):
            for one, times in seconds.items():
                engine.reset_prefix_cache()
                evaluation.encoded.cache_clear()  # one process, many rounds: each pays for its own prompts
                start = time.perf_counter()
                one()
                if number:  # the first round warms up
                    times.append(time.perf_counter() - start)
    for one, times in seconds.items():
        print(f"{one.__name__:7} {median(times):8.3f} s, median of {', '.join(f'{time:.3f}' for time in times)}")
    ratio = median(seconds[judged]) / median(seconds[bare])
    print(f"ratio   {ratio:8.3f}, bound {given.bound:g}; {len(pairs)} pairs, {len(prompts)} prompts")
    sys.exit(ratio > given.bound)


if __name__ == "__main__":
    main()
