"""The memory of one update on so many ranks, under fake tensors: nothing is computed, every allocation is counted.

    python tests/fake_update.py '{"config": {"model_type": "qwen2", ...}, "world": 8, "prompt": 512, "answer": 900,
                                  "group": 8, "vocabulary": 151665}'

Prints one JSON line: GiB by what they are for at the peak of two rows, forward and backward, and after it. Moments are
not in it. One rank plays all of them, in torch's fake process group. Sharding, policy and row are those of infra/ as on
a GPU; attention keeps what FlexAttention keeps.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from data import Group
from infra import policy, rows


class Flex(torch.autograd.Function):
    """The tensors of FlexAttention: it keeps query, key, value, output and a number for each query and head."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, torch.empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def attention(module, query, key, value, mask, scaling=None, row=None, **_):
    return Flex.apply(query, key, value).transpose(1, 2).contiguous(), None


def main(case: dict) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case["world"])
    mesh = dist.init_device_mesh("cpu", (case["world"],))
    dist.init_device_mesh = lambda *_: mesh  # under fake tensors a mesh cannot be made
    policy.GPU, policy.block_mask = True, lambda row: None
    AttentionInterface.register("fake_flex", attention)
    config = AutoConfig.for_model(**case["config"])
    config._attn_implementation = "fake_flex"
    with FakeTensorMode(allow_non_fake_inputs=True):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        lm.train()
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        model = policy.shard_policy(policy.Policy(lm, case["vocabulary"], 1.0, torch.bfloat16, recompute=True))
        prompt, answers = [0] * case["prompt"], [[0] * case["answer"]] * case["group"]
        group = Group(0, None, prompt, answers, advantages=[1.0] * case["group"],
                      sampler_logprobs=[[0.0] * case["answer"]] * case["group"])
        row = rows.build_row([group], 1.0)
        tracker = FSDPMemTracker(model)
        tracker.track_inputs((row.ids_T,))
        with tracker:
            for one in policy.accumulate(model, [row, row]):
                model(one).sum().backward()
                tracker.reset_mod_stats()
        found = {"tokens": len(row.ids_T)}
        for when in ("peak", "current"):
            (parts,) = tracker.get_tracker_snapshot(when).values()
            found[when] = {str(part).rpartition(".")[2]: round(size / 2**30, 3) for part, size in parts.items() if size}
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
