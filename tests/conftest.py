"""Shared by all tests: the repository on sys.path, no network, one small thread pool, SmolLM2's tokenizer,
a tiny random model, and a process group of one."""
import contextlib
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


def free_port() -> str:
    """Below the ports that Linux gives to connections: one of those may be taken again before a rank listens on it."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return str(port)


@pytest.fixture(scope="session")
def smol_tokenizer():
    from transformers import AutoTokenizer

    import data
    return AutoTokenizer.from_pretrained(data.model_folder("raw"))


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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A folder with a random Llama: 2 layers, hidden 64, 512 token ids."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, initializer_range=0.2)).save_pretrained(folder)
    return str(folder)


class Tokenizer:
    """As much of a tokenizer as measuring a prompt's length needs: one token a word."""
    chat_template, all_special_tokens, name_or_path, is_fast = "some", [], "none", True

    def __call__(self, text, **options):
        return {"input_ids": [], "offset_mapping": []}

    def get_added_vocab(self):
        return {}

    def apply_chat_template(self, turns, **_):
        return " ".join(turn["content"] for turn in turns).split()


@pytest.fixture
def no_model(monkeypatch):
    """A tokenizer and no weights: whatever fails here fails before an engine is started."""
    import transformers

    import data

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder, **options: Tokenizer())
    monkeypatch.setattr(data, "model_folder", lambda model: model)
    monkeypatch.setattr(data, "start_engine", lambda *_: pytest.fail("an engine was started"))
