"""infra/sampler.py with the real vLLM: where the answers of a base model end, and the flat form of log-probs.

What a sync notices is in test_sync.py.
"""
import json

import pytest

from tiny_run import make_taught_model, run_program

ENDS = """
import json, math
from infra import sampler as samplers
from infra.chat import encode_chat, stop_ids

if __name__ == "__main__":
    sampler = samplers.start_sampler({folder!r}, max_tokens=512, chat_template={template!r})
    tokenizer = sampler.get_tokenizer()
    prompts = [encode_chat(tokenizer, text) for text in ("What is 1 + 1?", "Say hi.")]
    answers = samplers.generate(sampler, prompts, n=2, max_tokens=[40] * 2, seeds=[1, 2], temperature=1.0)
    # The same requests with vLLM's own dictionaries of log-probs and its own text.
    from vllm import SamplingParams
    padded = dict.fromkeys(range(len(tokenizer), len(tokenizer) + 64), -math.inf)
    params = [SamplingParams(n=2, max_tokens=40, seed=seed, temperature=1.0, logprobs=0, logit_bias=padded,
                             stop_token_ids=stop_ids(tokenizer)) for seed in (1, 2)]
    plain = sampler.generate([{{"prompt_token_ids": ids}} for ids in prompts], params, use_tqdm=False)
    found = {{"eos": tokenizer.eos_token, "ours": [], "plain": []}}
    for samples, output in zip(answers, plain):
        for sample, other in zip(samples, output.outputs):
            found["ours"].append([sample.ids, sample.logprobs, sample.text, sample.finished])
            found["plain"].append([list(other.token_ids),
                                   [one[i].logprob for one, i in zip(other.logprobs, other.token_ids)]])
    print("\\nfound", json.dumps(found), flush=True)
    samplers.os._exit(0)
"""


@pytest.mark.slow
def test_answers_of_a_base_end_with_the_turn_and_flat_log_probs_are_the_same(tmp_path, smol_tokenizer):
    """A model taught to end its turns by <|im_end|>, with a base tokenizer, whose eos is <|endoftext|>."""
    base, ids = "<|endoftext|>", smol_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    make_taught_model(tmp_path, smol_tokenizer)
    for path in tmp_path.glob("*config.json"):
        changes = {"eos_token": base} if "tokenizer" in path.name else {"eos_token_id": ids}
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    output = run_program(tmp_path, ENDS.format(folder=str(tmp_path), template=smol_tokenizer.chat_template))
    found = json.loads(output.rpartition("\nfound ")[2].splitlines()[0])
    assert found["eos"] == base and any(finished for *_, finished in found["ours"])
    end = smol_tokenizer.convert_tokens_to_ids("<|im_end|>")
    for (ids, logprobs, text, finished), (plain_ids, plain_logprobs) in zip(found["ours"], found["plain"]):
        assert ids == plain_ids and logprobs == plain_logprobs and len(ids) == len(logprobs)
        assert (ids[-1] == end) == finished and end not in ids[:-1]
        assert text == smol_tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
