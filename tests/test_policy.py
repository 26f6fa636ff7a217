"""infra/policy.py and infra/ranks.py: a packed row against separate sequences, precision, the gradient's clip, the
weights by their names; and what ranks tell each other. Refused models are in test_bad_input.py."""
import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import fsdp
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conftest import VOCABULARY, assert_same_gradients, gradients, packed, plain_logprobs, random_groups
from infra import policy as policies
from infra import ranks, rows
from infra.ranks import InputError
from tiny_run import run_program


@pytest.mark.parametrize("count", [1, 3])
def test_a_packed_row_equals_separate_sequences(make_policy, plain_model, count):
    policy, groups = make_policy(temperature=0.7), random_groups(count)
    logprob_N = policy(packed(groups))
    weight_N = torch.randn(len(logprob_N), generator=torch.Generator().manual_seed(1))
    (logprob_N * weight_N).sum().backward()
    parts = []
    for group in groups:
        for answer in group.answers:
            parts.append(plain_logprobs(plain_model, group.prompt_ids, answer, temperature=0.7))
    expected_N = torch.cat(parts)
    (expected_N * weight_N).sum().backward()
    torch.testing.assert_close(logprob_N, expected_N, rtol=4e-6, atol=4e-6)
    assert_same_gradients(gradients(policy, "lm."), gradients(plain_model), tolerance=4e-6)


@pytest.mark.parametrize("chunk, recompute", [(1, False), (7, False), (1024, True), (7, True)])
def test_chunks_and_recomputation_change_nothing(make_policy, monkeypatch, chunk, recompute):
    results = []
    for policy in (make_policy(), make_policy(recompute=recompute)):
        logprob_N = policy(packed(random_groups(2)))
        logprob_N.square().sum().backward()
        results.append((logprob_N.detach(), gradients(policy)))
        monkeypatch.setattr(policies, "LOGIT_CHUNK", chunk)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert_same_gradients(results[1][1], results[0][1])


# ---- models that a packed row would misread ----

@pytest.mark.parametrize("config, tokens, said", [
    ({"sliding_window": 512}, 513, "sliding_window is 512, .*513 tokens: lower --max_prompt_tokens"),
    ({"sliding_window": 512}, 512, None), ({"sliding_window": 512, "use_sliding_window": False}, 513, None),
    ({"sliding_window": 512, "layer_types": ["full_attention"]}, 513, None),
    ({"sliding_window": 512, "layer_types": ["full_attention", "sliding_attention"]}, 513, "sliding_window is 512"),
    ({"max_position_embeddings": 512}, 513, "max_position_embeddings is 512"),
    ({"final_logit_softcapping": 30.0}, 9, "its final_logit_softcapping is 30.0"),
    ({"attn_logit_softcapping": 50.0}, 9, "its attn_logit_softcapping is 50.0"),
    ({"logits_scaling": 8.0}, 9, "its logits_scaling is 8.0"), ({"logits_scaling": 1.0}, 9, None)])
def test_windows_too_short_and_logits_that_are_capped_or_scaled_are_refused_by_name(config, tokens, said):
    with pytest.raises(InputError, match=f"^--model m: .*{said}") if said else contextlib.nullcontext():
        policies.check_attention("m", SimpleNamespace(**config), tokens)


@pytest.mark.parametrize("differs", [False, True])
def test_a_model_whose_attention_does_what_a_packed_row_does_not_is_refused(make_policy, monkeypatch, differs):
    """Here plain transformers see another scale of attention than the row's."""
    policy, attention = make_policy(), rows.row_attention
    if differs:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "row_attention", lambda *inputs, scaling, **options: attention(
            *inputs, scaling=2 * scaling, **options))
    with pytest.raises(FloatingPointError, match="packed rows.*use another") if differs else contextlib.nullcontext():
        policies.check_packing(policy)


# ---- weights ----

def test_weights_are_the_folders_in_fp32_and_one_that_is_missing_or_of_another_shape_is_named(
        tmp_path, tiny_model, process_group):
    from safetensors.torch import load_file, save_file
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    policy = policies.load_policy(str(tmp_path), vocabulary=VOCABULARY, precision="float32")
    for name, weight in policies.full_weights(policy):
        assert weight.dtype == torch.float32 and torch.equal(weight, model.state_dict()[name].float()), name
    weights = load_file(tmp_path / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    for more, said in (({}, "hold None for model.norm.weight"), ({"model.norm.weight": norm[:9]}, r"hold \[9\] for")):
        save_file(weights | more, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=f"{said}.*save_pretrained"):
            policies.load_policy(str(tmp_path), vocabulary=VOCABULARY, precision="float32")
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.6}')  # and it does not sample
    with pytest.raises(InputError, match="generation_config.json contradicts itself.*top_p"):
        policies.load_policy(str(tmp_path), vocabulary=VOCABULARY, precision="float32")


def test_heads_that_do_not_split_over_the_sharers_of_a_sampler_name_numbers_that_do():
    qwen = SimpleNamespace(num_attention_heads=28, num_key_value_heads=4)
    for number in (1, 2, 4, 28):
        policies.check_heads("m", qwen, number)
    with pytest.raises(InputError, match="--tensor_parallel 3: m has 28 .* 4 of keys, which go to 1, 2, 4, 28 ranks"):
        policies.check_heads("m", qwen, 3)


def test_offload_is_asked_of_every_layer_and_of_the_rest(tiny_model, process_group, monkeypatch):
    """On a CPU it changes nothing else: what it does on a GPU is not yet run."""
    asked, shard = [], fsdp.fully_shard
    monkeypatch.setattr(fsdp, "fully_shard", lambda part, **options: asked.append(options) or shard(part, **options))
    policy = policies.load_policy(tiny_model, vocabulary=VOCABULARY, precision="float32", offload=True)
    assert [type(one["offload_policy"]) for one in asked] == [fsdp.CPUOffloadPolicy] * (1 + len(policy.lm.model.layers))


LOAD = """
import resource
from infra import policy as policies, ranks
if __name__ == "__main__":
    ranks.start_ranks()
    policies.load_policy({tiny!r}, vocabulary=512, precision="float32")  # all code that loading needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    policy = policies.load_policy("model", vocabulary=512, precision="float32")
    own = before + sum(weight.to_local().numel() * 4 for weight in policy.parameters()) / 1024
    total = ranks.all_reduce(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - own) / 2**20
    if policies.dist.get_rank() == 0:
        print("\\nGiB", total, flush=True)
"""


@pytest.mark.slow
def test_two_ranks_load_a_model_of_a_gigabyte_in_at_most_1_3_of_it_beside_what_they_keep(tmp_path, tiny_model):
    """With the pages of its file that they have read, which the kernel shares and can drop."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=32768, hidden_size=1024, intermediate_size=4096, num_hidden_layers=28, num_attention_heads=8,
            num_key_value_heads=8)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size / 2**30
    used = float(run_program(tmp_path, LOAD.format(tiny=tiny_model), ranks=2).rpartition("\nGiB ")[2].split()[0])
    assert size > 0.95 and used < 1.3 * size


# ---- ranks ----

def test_an_error_of_rank_0_reaches_all_and_one_of_writing_says_what_to_do(process_group, tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(InputError, match="^writing x failed: .*Not a directory.*--resume"):
        ranks.on_rank_0("writing x", lambda: (tmp_path / "runs" / "mine").mkdir())
    with pytest.raises(InputError, match="^--model x: no$"):
        ranks.on_rank_0("reading", lambda: (_ for _ in ()).throw(InputError("--model x: no")))
    with pytest.raises(ZeroDivisionError):  # no full disk
        ranks.on_rank_0("reading", lambda: 1 / 0)
    assert ranks.on_rank_0("reading", lambda: 7) == 7


def gone(message, count):
    """The node that held the ranks' notes is no more."""
    raise torch.distributed.DistNetworkError("Connection reset by peer")


@pytest.mark.parametrize("notes, world", [(torch.distributed.HashStore(), 4), (SimpleNamespace(add=gone), 1)])
@pytest.mark.parametrize("error, printed", [
    (InputError("--model x: no"), "error: --model x: no\n"),
    (FloatingPointError("drift: 1 nat"), "error: drift: 1 nat\n"),
    (RuntimeError("[gloo] Connection closed by peer\nand more"), "error: another rank died, ")])
def test_an_error_that_all_ranks_find_is_one_line_printed_once_and_status_2(
        monkeypatch, capsys, error, printed, notes, world):
    monkeypatch.setattr(ranks, "STORE", notes)
    for _ in range(world):
        with pytest.raises(SystemExit) as caught:
            ranks.stop(error)
        assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(printed) and said.count("\n") == 1


def test_a_runtime_error_that_is_no_lost_rank_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes do not match"):
        ranks.stop(RuntimeError("shapes do not match"))
