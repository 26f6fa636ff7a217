"""What must not matter does not: the number of ranks, and the size of a row."""
import random
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import urpo
from conftest import VOCABULARY
from data import Group, Prompt
from infra import runs
from infra.policy import full_weights, load_policy
from infra.rows import rebalance
from tiny_run import run_program

WORLDS, BUDGETS = (1, 2, 4), (1, 4096)  # one group a row, all in one
CONFIG = dict(precision="float32", group=3, lr_warmup=0, lr=1e-3)
BATCHES = ("every rank has signal", "one of two has none", "nobody has any")


def make_batch(name: str) -> list[Group]:
    """Eight groups whose shares on 4 ranks are: solved and unsolved questions; judgements that cannot be read;
    preferences without spread; judged answers. `name` takes the signal from the second half, or from all."""
    rng, groups = random.Random(7), []

    def ids(low, high):
        return [rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high))]

    for index in range(8):
        group = Group(index, None, ids(4, 12), [ids(1, 9) for _ in range(3)], finished=[True] * 3)
        if index in (0, 1, 7):
            group.prompt, group.texts = Prompt("reasoning", "1 + 1?", answer="2"), ["2", "3", "two or 2"]
        elif index in (4, 5):
            group.prompt = Prompt("preference", "Say hi.", ("hi", "no"), (1.0, 0.0))
            group.texts = ["<scores>9, 2</scores>"] * 3
        else:
            group.prompt, group.texts = Prompt("instruction", "Say hi."), ["one", "two", "three"]
            text = "<scores>9, 5, 2</scores>" if index == 6 else "all are fine"
            group.judgements = [{"order": [2, 0, 1], "text": text, "finished": True}]
        if name == BATCHES[2] or (name == BATCHES[1] and index > 3):
            group.prompt, group.texts = Prompt("reasoning", "1 + 1?", answer="2"), ["3"] * 3
        groups.append(group)
    return groups


class Recorder:
    """In place of the optimiser: keeps each update's gradient, whole, and leaves the weights as they are."""

    def __init__(self, policy):
        self.policy, self.gradients, self.param_groups, self.state = policy, [], [{"lr": 0.0}], {}

    def step(self):
        self.gradients.append(torch.cat([p.grad.full_tensor().flatten() for p in self.policy.parameters()]))

    def zero_grad(self):
        self.policy.zero_grad()


UPDATES = [(1, True), (2, True), (2, False)]  # minibatches, and whether old log-probs are moved


def one_update(policy, groups, optimizer, moved=True, **changes) -> dict:
    """Parts 4 to 6 on this rank's share of `groups`, as train() calls them. `moved`: with old log-probs for every
    minibatch, moved by noise, so that the clip bites in all; the sampler's are noise too, so that the cap does."""
    config = urpo.Config(**CONFIG | {"importance_cap": 2.0 * moved} | changes)
    share = groups[dist.get_rank() :: dist.get_world_size()]
    for group in share:
        rng = random.Random(group.index)
        group.sampler_logprobs = [[rng.gauss(-6, 0.5) for _ in answer] for answer in group.answers]
    batch = urpo.reward(config, share)
    minibatches = urpo.build_minibatches(config, rebalance(batch, config.minibatches))
    urpo.old_logprobs(config, policy, minibatches)
    for row in [row for rows in minibatches * moved for row in rows]:
        row.keep_old(policy(row).detach() + row.sampler_N + 6, config.importance_cap)
    with patch.multiple(urpo, largest_drift=lambda precision: 1e9, GRAD_CLIP=1e9):
        return urpo.update(config, policy, optimizer, minibatches)


def trainer(model: str):
    policy = load_policy(model, vocabulary=VOCABULARY, precision="float32")
    return policy, torch.optim.AdamW(policy.parameters(), lr=CONFIG["lr"], fused=True)


def state_of(policy, optimizer) -> dict[str, torch.Tensor]:
    """Weights and both moments of AdamW, whole."""
    state = dict(full_weights(policy))
    for i, p in enumerate(policy.parameters()):
        state |= {f"{name}/{i}": optimizer.state[p][name].full_tensor() for name in ("exp_avg", "exp_avg_sq")}
    return {name: value.clone() for name, value in state.items()}


def measure(folder: Path) -> None:
    """What any number of ranks does; rank 0 writes it to `folder`. Two ranks save a checkpoint, the others load it."""
    world, tokenizer = dist.get_world_size(), SimpleNamespace(save_pretrained=lambda folder: None)
    policy, optimizer = trainer(str(folder / "model"))
    found = {}
    for name in BATCHES:
        for budget in BUDGETS:
            for minibatches, moved in UPDATES:
                recorder = Recorder(policy)
                figures = one_update(policy, make_batch(name), recorder, row_tokens=budget,
                                     minibatches=minibatches, moved=moved)
                found[name, budget, minibatches, moved] = recorder.gradients, figures
    checkpoint = folder / "checkpoints" / "step_1"
    if world == 2:
        one_update(policy, make_batch(BATCHES[0]), optimizer)
        runs.save_checkpoint(checkpoint, policy, optimizer, tokenizer, settings={"keep": 0})
    else:
        runs.load_checkpoint(checkpoint, policy, optimizer)
    found["loaded"] = state_of(policy, optimizer)
    one_update(policy, make_batch(BATCHES[1]), optimizer)
    found["continued"] = state_of(policy, optimizer)
    if dist.get_rank() == 0:
        torch.save(found, folder / f"world_{world}.pt")


ONE_RANK = """
import os, pathlib, torch, test_invariance
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
test_invariance.measure(pathlib.Path.cwd())
os._exit(0)  # as urpo.py ends: a thread of gloo can abort a Python that is being torn down
"""


@pytest.fixture(scope="module")
def measured(tiny_model, tmp_path_factory, process_group):
    """{ranks: what `measure` found}: two ranks, then four, then one in this process."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "model").symlink_to(tiny_model)
    for world in (2, 4):
        run_program(folder, ONE_RANK, ranks=world)
    measure(folder)
    return {world: torch.load(folder / f"world_{world}.pt") for world in WORLDS}


def distance(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


# ---- ranks and rows ----

@pytest.mark.parametrize("minibatches, moved", UPDATES)
@pytest.mark.parametrize("name", BATCHES[:2])
def test_the_gradient_is_the_same_on_any_number_of_ranks_and_in_rows_of_any_size(
        measured, name, minibatches, moved):
    gradients, expected = measured[1][name, 4096, minibatches, moved]
    assert gradients and all(gradient.norm() > 0 for gradient in gradients)
    for world in WORLDS:
        for budget in BUDGETS:
            found, figures = measured[world][name, budget, minibatches, moved]
            assert len(found) == len(gradients)
            for gradient, whole in zip(found, gradients):
                assert distance(gradient, whole) <= 1e-6, (world, budget)
            for figure, value in expected.items():
                assert figures[figure] == pytest.approx(value, rel=1e-5, abs=1e-7), (world, budget, figure)


def test_ranks_without_spread_instructions_or_a_readable_judgement_meet_every_collective(measured):
    """That `measured` ended is the test; that nothing was left out shows in the number of updates."""
    for world in WORLDS:
        for budget in BUDGETS:
            updates = [measured[world][name, budget, *case][1]["updates"]
                       for name in BATCHES for case in UPDATES]
            # The second batch has no signal in its second half, the third in neither.
            assert updates == [1, 2, 2, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("world", [1, 4])
def test_a_checkpoint_of_two_ranks_loads_on_another_number_bit_for_bit_and_goes_on_alike(measured, world):
    saved, loaded = measured[2]["loaded"], measured[world]["loaded"]
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    for name, value in measured[2]["continued"].items():
        torch.testing.assert_close(measured[world]["continued"][name], value, rtol=1e-4, atol=1e-5)
        assert name.endswith("norm.weight") or not torch.equal(value, saved[name]), "the update changed nothing"
