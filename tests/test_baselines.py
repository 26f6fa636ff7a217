"""The baselines: each changes the one part of the loop that it says, on a tiny model; and their own equations."""
import doctest
import json
import random

import pytest
import torch

import baselines
import data
import eval
import flags
import machine
import readers
import runs
import urpo
from baselines import RewardModel, encode_answer, margins, score_rows
from conftest import ROOT
from data import Group, InputError, Prompt
from rewards import parse_scores
from tiny_run import lines, run, start

SHORT = ("--steps", "3", "--toy_rows", "24")


@pytest.fixture(scope="module")
def trained(taught_model, tmp_path_factory):
    """A folder in which all baselines ran: a reward model, and the loop with each judge; SFT on two ranks."""
    folder = tmp_path_factory.mktemp("baselines")

    def baseline(command, *arguments, ranks=1):
        name = ("--name", command)
        run(folder, taught_model, *SHORT, *name, *arguments, ranks=ranks, program=ROOT / "baselines.py",
            command=[command])

    baseline("reward_model", "--mix", "1:1:0", "--lr", "1e-2", "--passes", "2", ranks=2)
    baseline("rm_score", "--mix", "0:1:1", "--judge", "runs/reward_model/model")
    baseline("rm_gen", "--mix", "0:1:1", "--judge", taught_model)
    baseline("sft", "--preferences", "toy:2", "--warmup_steps", "0", "--steps", "8", ranks=2)
    return folder / "runs"


def groups_of(run):
    return [group for _, group in runs.read_groups(run / "rollouts.jsonl", [])]


def test_worked_examples_in_docstrings():
    assert doctest.testmod(baselines).failed == 0


def test_a_baseline_takes_every_flag_and_preset_of_urpo():
    config = flags.parse(baselines.Baseline, urpo.PRESETS, ["--preset", "smol", "--judge", "folder"])
    plain = flags.parse(urpo.Config, urpo.PRESETS, ["--preset", "smol"])
    assert config.judge == "folder" and {name: getattr(config, name) for name in vars(plain)} == vars(plain)


# ---- the scalar reward model ----


@pytest.fixture(scope="module")
def scalar(tiny_model):
    torch.manual_seed(0)
    return RewardModel(tiny_model, "float32").eval()


def test_the_score_of_a_text_does_not_depend_on_what_it_is_padded_with(scalar):
    rng = random.Random(0)
    texts = [[rng.randrange(3, 400) for _ in range(length)] for length in (5, 17, 9)]
    alone = torch.cat([scalar([ids]) for ids in texts])
    torch.testing.assert_close(scalar(texts), alone)
    last = [*texts[1][:-1], texts[1][-1] + 1]
    assert scalar([last]).item() != pytest.approx(alone[1].item()), "the last token is what the head reads"


def test_an_answer_is_encoded_as_the_policy_writes_it_and_is_never_structure(smol_tokenizer):
    stop = data.stop_ids(smol_tokenizer)[0]
    prompt = data.encode_prompt(smol_tokenizer, Prompt("instruction", "Say hi."))
    ids = encode_answer(smol_tokenizer, "Say hi.", "Hi.<|im_end|>\n<|im_start|>user")
    assert ids[: len(prompt)] == prompt and ids[-1] == stop
    assert not data.control_ids(smol_tokenizer) & set(ids[len(prompt) : -1])


def test_margins_are_of_pairs_within_a_row_alone():
    rows = [Prompt("preference", "", tuple("abc"), (3, 2, 1)), Prompt("preference", "", tuple("de"), (1, 1))]
    assert margins(torch.tensor([5.0, 3.0, 0.0, 9.0, 7.0]), rows).tolist() == [2.0, 5.0, 3.0]


def test_the_loss_pulls_better_and_worse_apart():
    score_B = torch.tensor([0.0, 0.0], requires_grad=True)
    margin_N = margins(score_B, [Prompt("preference", "", ("better", "worse"), (1, 0))])
    baselines.bradley_terry_loss(margin_N).sum().backward()
    assert score_B.grad.tolist() == [-0.5, 0.5]


def test_the_reward_model_sees_the_pairs_that_urpo_would_each_once():
    config = flags.parse(baselines.Baseline, urpo.PRESETS, ["--preset", "smol", "--mix", "1:1:0"])
    sources = {"preference": readers.load_source("preference", "toy:2", count=64),
               "reasoning": readers.load_source("reasoning", "toy", count=64)}
    for step in (0, 9):
        batch = data.draw(sources, "1:1:0", 24, 8, 0, step, both_orders=True)
        drawn = [row for row in batch if row.kind == "preference"]
        pairs = baselines.pairs_of_step(sources, config, step)
        assert len(pairs) == 6 and [row for pair in pairs for row in (pair, data.swapped(pair))] == drawn
    tied = Prompt("preference", "q", ("a", "b"), (1, 1))
    assert baselines.pairs_of_step({**sources, "preference": [tied]}, config, 0) == []


def test_fewer_pairs_than_ranks_are_refused_on_every_rank(tmp_path, taught_model):
    output = run(tmp_path, taught_model, "--mix", "0:1:1", "--toy_rows", "24", ranks=2, status=2,
                 program=ROOT / "baselines.py", command=["reward_model"])
    assert output.count("error: reward_model: step 0 has 0 rows of P for 2 ranks") == 1


def test_the_reward_model_logs_what_it_is_worth_and_is_measured_held_out(trained):
    log = lines(trained / "reward_model" / "log.jsonl")
    assert [line["step"] for line in log] == list(range(6))  # twice over three steps
    assert all(0 <= line["accuracy"] <= 1 and line["confidence"] >= 0.5 for line in log)
    measured = json.loads((trained / "reward_model" / "heldout-after.json").read_text())
    assert measured["figures"]["referee"]["accuracy"]["count"] == len(measured["answers"]) == 64
    for answer in measured["answers"]:
        assert answer["truth"][0] > answer["truth"][1] and len(answer["scores"]) == 2


def test_rm_score_writes_the_scores_of_its_model(trained, smol_tokenizer):
    judged = [group for group in groups_of(trained / "rm_score") if group.judgements]
    model = RewardModel(str(trained / "reward_model" / "model"), "float32").eval()
    assert judged
    for group in judged[:3]:
        row = Prompt("preference", group.prompt.instruction, tuple(group.texts))
        (judgement,) = group.judgements
        points = baselines.as_points(score_rows(model, smol_tokenizer, [row]))
        expected = [points[i] for i in judgement["order"]]
        assert parse_scores(judgement["text"], 4) == pytest.approx(expected, abs=1e-3)
        assert group.rewards == pytest.approx(points, abs=1e-3)


def test_a_reward_model_whose_scores_are_all_high_still_tells_the_best_answers_apart():
    score_G = torch.tensor([1.0, 0.0, -1.0, 2.0])
    assert baselines.as_points(score_G + 20) == pytest.approx(baselines.as_points(score_G)) == [6.0, 5.0, 4.0, 7.0]


@pytest.mark.parametrize("name", ["rm_score", "rm_gen"])
def test_the_numbers_of_a_run_whose_judge_is_another_model_can_be_made_again(trained, monkeypatch, capsys, name):
    monkeypatch.chdir(trained.parent)
    eval.main(["explain", str(trained / name), "--all"])
    assert "rewards and advantages are as the texts make them" in capsys.readouterr().out


def test_a_judge_of_another_kind_or_none_at_all_is_refused(trained, taught_model, process_group):
    for command, judge, message in [
        (baselines.rm_score, taught_model, "is a LlamaForCausalLM and no ...ForSequenceClassification"),
        (baselines.rm_gen, str(trained / "reward_model" / "model"), "is a LlamaForSequenceClassification and no"),
        (baselines.rm_gen, "runs/mistyped", "--judge runs/mistyped: no model here"),
    ]:
        with pytest.raises(InputError, match=message):
            command(baselines.Baseline(judge=judge))


# ---- a frozen judge ----


def test_the_frozen_judge_is_asked_as_the_policy_would_be(trained):
    log = lines(trained / "rm_gen" / "log.jsonl")
    assert max(line["instruction"]["format"] for line in log[1:]) > 0
    assert all("preference" not in line for line in log)
    for group in groups_of(trained / "rm_gen"):
        for judgement in group.judgements:
            assert all(f"Response {i}:" in judgement["prompt"] for i in (1, 2, 3, 4))


def test_the_loop_gives_part_3_to_another_judge(monkeypatch, process_group):
    """`train` calls the given function in place of self_score, with the groups of the step."""
    seen = []

    def stop(config, engine, tokenizer, groups, step):
        seen.append((engine, groups, step))
        raise FloatingPointError("enough")

    config = flags.parse(urpo.Config, urpo.PRESETS, ["--preset", "smol"])
    sources = {kind: ["row"] * 12 for kind in data.KINDS}
    monkeypatch.setattr(urpo, "set_up", lambda config, run: (0, sources, 0, 0, 0, "the policy's engine", 0, 0))
    monkeypatch.setattr(data, "draw", lambda *arguments: [])
    monkeypatch.setattr(urpo, "rollout", lambda *arguments: ["group"])
    monkeypatch.setattr(machine, "catch_signals", list)
    with pytest.raises(FloatingPointError):
        urpo.train(config, stop)
    assert seen == [("the policy's engine", ["group"], 0)]


# ---- own answers as preferences ----


@pytest.mark.parametrize("preferences, replaced", [(6, 4), (12, 6), (2, 2), (1, 0)])
def test_half_of_p_is_replaced_by_right_and_wrong_answers_in_both_orders(preferences, replaced, monkeypatch):
    given = []
    monkeypatch.setattr(urpo, "train", lambda config, score: given.append(score))
    monkeypatch.setattr(urpo, "self_score", lambda *arguments: None)
    monkeypatch.setattr(urpo, "rollout", lambda config, engine, tokenizer, share, step: [
        Group(index, prompt, [], []) for index, prompt in share])
    baselines.own_preferences(None)
    groups = [Group(i, Prompt("preference", "old", ("a", "b"), (1, 0)), [], []) for i in range(preferences)]
    for i in range(6):
        texts = ["so 1", "so 2"] if i % 2 else ["so 1", "so 1"]
        groups.insert(2 * i, Group(100 + i, Prompt("reasoning", f"question {i}", answer="1"), [], [], texts))
    before = [(group.index, group.prompt.kind) for group in groups]
    given[0](None, None, None, groups, 0)
    assert [(group.index, group.prompt.kind) for group in groups] == before
    own = [group.prompt for group in groups if group.prompt.kind == "preference" and group.prompt.instruction != "old"]
    assert len(own) == replaced
    for first, second in zip(own[::2], own[1::2]):
        assert first.responses == ("so 1", "so 2") and first.truth == (1.0, 0.0)
        assert second == data.swapped(first) and first.instruction in ("question 1", "question 3", "question 5")


# ---- SFT ----


def test_sft_imitates_a_demonstrator_who_errs_at_the_stated_rates(smol_tokenizer):
    question = Prompt("reasoning", "What is 4 + 4?", answer="8")
    worked = {question.instruction: {"worked": "4 + 4 = \\boxed{8}", "flawed": "4 + 4 = \\boxed{5}"}}
    pair = Prompt("preference", "Say hi.", ("Hi.", "No."), (1, 0))
    group, ranking = (Group(0, prompt, [1], answers=[]) for prompt in (question, pair))
    baselines.demonstrate(smol_tokenizer, group, 400, worked, [0, 0.25, 0], random.Random(0))
    baselines.demonstrate(smol_tokenizer, ranking, 4, worked, [1, 0, 0], random.Random(0))
    assert sum(group.rewards) / 400 == pytest.approx(0.75, abs=0.06)
    assert ranking.rewards == [-1.0] * 4
    assert all(ids[-1] == data.stop_ids(smol_tokenizer)[0] for ids in group.answers + ranking.answers)


def test_sft_lowers_its_loss_and_its_checkpoint_loads(trained):
    log = lines(trained / "sft" / "log.jsonl")
    assert log[-1]["loss"] < 0.9 * log[0]["loss"] and log[-1]["updates"] == 2
    assert (trained / "sft" / "checkpoints" / "last" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("errors", ["0:0", "a:b:c", "0:0:7", ""])
def test_rates_of_error_that_are_none_are_refused(errors):
    with pytest.raises(InputError, match=f"--errors {errors}: give three rates"):
        baselines.error_rates(errors)


def test_sft_refuses_data_without_a_demonstrator(tmp_path, taught_model):
    output = run(tmp_path, taught_model, "--reasoning", "sums.jsonl", ranks=1, status=2,
                 program=ROOT / "baselines.py", command=["sft"])
    assert "the demonstrator knows the toy world alone" in output


@pytest.mark.parametrize("command, message", [
    ([], "--preset: give one of rm_gen, reward_model, rm_score, sft, own_preferences"),
    (["rm_gen"], "rm_gen: give --judge"),
])
def test_a_mistake_on_the_command_line_is_one_line(command, message, tmp_path, taught_model):
    process = start(tmp_path, taught_model, ranks=1, program=ROOT / "baselines.py", command=command)
    assert process.wait() == 2
    assert message in (tmp_path / "output").read_text()
