"""`eval.py` rewardbench, reasoning, alpacaeval, probe. Figures beside those of others."""
import itertools
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import data
import eval as evaluation
import machine
import readers
from conftest import ROOT
from eval import main
from metrics import (
    REWARDBENCH,
    benchmark_figures,
    figure,
    interval,
    length_controlled,
    majority,
    pass_at_k,
    preference_probe,
    probe_verdicts,
    weighted_mean,
)
from rewards import kendall_tau


def fails(arguments, capsys):
    """The one line of an error."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    return err


# ---- scoring, against what others publish or compute ----

def test_the_subsets_weights_and_section_scores_of_rewardbench_are_those_of_its_package():
    official = json.loads((Path(__file__).parent / "rewardbench_official.json").read_text())
    assert {section: list(part) for section, part in REWARDBENCH.items()} == official["mapping"]
    assert {subset: weight for part in REWARDBENCH.values() for subset, weight in part.items()} == official["weights"]
    section_of = {subset: section for section, part in official["mapping"].items() for subset in part}
    figures = benchmark_figures([(section_of[subset], subset) for subset, _ in official["pairs"]],
                                [result for _, result in official["pairs"]])
    for section, score in official["sections"].items():
        assert figures[section]["section"]["value"] == pytest.approx(score, abs=5e-5)  # figures have four digits
        for subset in official["mapping"][section]:
            assert figures[section][subset]["value"] == pytest.approx(official["subsets"][subset], abs=5e-5)
    plain = sum(official["sections"].values()) / 4
    assert figures["RewardBench"]["mean of the sections"]["value"] == pytest.approx(plain, abs=5e-5)


@pytest.fixture
def alpaca_package(monkeypatch, tmp_path):
    """alpaca_eval, which fetches the difficulty of its instructions even for the model without it: here all are 0."""
    import pandas
    import sklearn
    from alpaca_eval.metrics import glm_winrate

    pandas.DataFrame({"model": "none", "index": range(805), "instruction_difficulty": 0.0, "preference": 1.0,
                      "std_delta_len": 0.0, "not_gamed_baseline": False}).to_csv(tmp_path / "zeros.csv", index=False)
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: tmp_path / "zeros.csv")

    def rates(*arguments, **options):
        with sklearn.config_context():  # the package switches on sklearn's metadata routing and leaves it on
            return glm_winrate.get_length_controlled_winrate(*arguments, **options)

    return rates


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("count, skill, pull",
                         [(60, 0.5, 1 / 150), (300, -1.0, 1 / 150), (41, 2.0, 1 / 80), (200, 0.3, 0)])
def test_win_rates_are_those_of_the_alpaca_eval_package(alpaca_package, count, skill, pull):
    import pandas

    rng = random.Random(count)
    own, other = ([rng.randint(5, 400) for _ in range(count)] for _ in range(2))
    chances = [1 / (1 + math.exp(-(a - b) * pull - skill)) for a, b in zip(own, other)]
    preferences = [None if rng.random() < 0.05 else ((rng.random() < chance) + (rng.random() < chance)) / 2
                   for chance in chances]
    told = alpaca_package(pandas.DataFrame({
        "index": range(count), "preference": [math.nan if p is None else 1 + p for p in preferences],
        "output_1": ["x" * n for n in other], "output_2": ["x" * n for n in own], "generator_1": "other",
        "generator_2": "own", "annotator": "none"}), "length_controlled_minimal", save_weights_dir=None)
    assert interval(preferences)["value"] == pytest.approx(told["win_rate"] / 100, abs=5e-5)
    rate = length_controlled(preferences, own, other)
    assert rate == pytest.approx(told["length_controlled_winrate"] / 100, abs=1e-6)
    if pull:
        assert abs(rate - interval(preferences)["value"]) > 0.01 or rate == 0.5  # the length does count here


def test_a_win_rate_at_equal_lengths_is_not_moved_and_too_few_rows_give_none():
    assert length_controlled([1, 0.5, 1, 1, None, 1], [9] * 6, [9] * 6) == pytest.approx(0.9)
    assert length_controlled([1, 1, 1, 1, None], [9] * 5, [7] * 5) is None
    assert length_controlled([1] * 6, [9, 8, 7, 6, 5, 4], [7] * 6) == 1


def test_pass_at_k_is_the_published_formula_and_the_share_of_all_draws():
    for n, right, k in itertools.product(range(1, 8), range(8), range(1, 8)):
        if right <= n and k <= n:
            draws = list(itertools.combinations([1] * right + [0] * (n - right), k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))
            product = 1.0 if n - right < k else 1 - np.prod(1 - k / np.arange(n - right + 1, n + 1))
            assert pass_at_k(n, right, k) == pytest.approx(product)  # the paper's own numerically stable code


def test_tau_is_that_of_scipy():
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(2, 8)
        scores, truth = ([rng.randint(1, 5) for _ in range(n)] for _ in range(2))
        expected = scipy.stats.kendalltau(scores, truth).statistic
        assert kendall_tau(scores, truth) == (0 if math.isnan(expected) else pytest.approx(expected))


@pytest.mark.parametrize("texts, value", [
    (["4", "4", "5"], 1), (["5", "5", "4"], 0), (["4", "5"], 0.5), ([r"\boxed{\frac{1}{2}}", "0.5", "4"], 0),
    (["", "no", "it is 4"], 1), (["", "no"], 0), ([r"\boxed{4}", "5 4.0", "6", "6"], 0.5)])
def test_majority_vote_of_final_answers(texts, value):
    assert majority(texts, "4") == value


def test_a_weighted_mean_draws_rows_within_parts():
    parts = [([0, 1] * 20, 1), ([1] * 10, 3)]
    assert weighted_mean(parts)["value"] == 0.875
    assert 0.8 < weighted_mean(parts)["low"] < 0.875 < weighted_mean(parts)["high"] < 0.95
    assert weighted_mean([([None], 5), ([0.5], 1)]) == {"value": 0.5, "low": None, "high": None, "count": 1}
    assert weighted_mean([])["value"] is None


# ---- the commands, with a made-up engine: no weights ----


class Engine:
    """`answer(text of the prompt, number of the sample)` stands for a model."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def generate(self, engine, prompts, n, limits, seeds, temperature, progress=False):
        self.calls.append(len(prompts))
        answers = []
        for words in prompts:
            texts = [self.answer(" ".join(words), i) for i in range(n)]
            answers.append([machine.Sample(text.split(), text, True, [-0.5] * len(text.split())) for text in texts])
        return answers


@pytest.fixture
def engine(monkeypatch, no_model):
    def start(answer):
        engine = Engine(answer)
        monkeypatch.setattr(machine, "start_engine", lambda *_, **__: engine)
        monkeypatch.setattr(machine, "generate", engine.generate)
        return engine
    return start


def judge(prompt, _):
    """Likes 'good' in any order, always the first of two texts with 'tie', and says nothing of 'odd' ones."""
    if "> odd" in prompt:
        return "cannot say"
    if "> tie" in prompt:
        return "<scores>5, 5</scores>"
    return "<scores>9, 2</scores>" if prompt.index("> good") < prompt.index("> bad") else "<scores>2, 9</scores>"


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_rewardbench_judges_each_pair_in_both_orders_in_one_call_and_reports_subsets_sections_and_their_mean(
        tmp_path, engine, capsys):
    fake = engine(judge)
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    source = write_lines(
        tmp_path / "pairs.jsonl", pair | {"subset": "hep-go"}, pair | {"subset": "math-prm", "rejected": "tie"},
        pair | {"subset": "donotanswer", "chosen": "bad", "rejected": "good"}, pair | {"subset": "x", "section": "Own"},
        pair | {"subset": "x", "section": "Own", "chosen": "odd"}, {"prompt": "q", "responses": ["a", "b"],
                                                                   "scores": [1, 1]})
    main(["rewardbench", "--model", "m", "--data", str(source), "--json", str(tmp_path / "out.json")])
    out = capsys.readouterr().out
    assert fake.calls == [10] and "first wins: accuracy 0.50" in out
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]

    def value(section, name):
        return figures[section][name]["value"]

    assert value("Reasoning", "hep-go: accuracy") == 1 and value("Reasoning", "math-prm: accuracy") == 0.5
    assert value("Reasoning", "section: accuracy") == pytest.approx((984 * 0.5 + 164) / (984 + 164), abs=1e-4)
    assert value("Reasoning", "section: ties as 0") == pytest.approx(164 / (984 + 164), abs=1e-4)
    assert value("Own", "x: accuracy") == 0.75 and value("Own", "x: ties as 0") == 0.5
    assert value("Own", "x: unparsed") == 0.5 and value("Own", "x: consistent") == 1  # of the one that was read
    assert value("Safety", "section: accuracy") == 0
    assert value("RewardBench", "mean of the sections: accuracy") == pytest.approx(
        (value("Reasoning", "section: accuracy") + 0.75 + 0) / 3, abs=1e-4)
    assert sorted(tmp_path.iterdir()) == sorted([source, tmp_path / "out.json"])  # no unfinished file is left


def test_reasoning_measures_each_set_and_their_average(tmp_path, engine):
    engine(lambda prompt, i: "so 4" if i < 3 else "so 5")
    sets = [str(write_lines(tmp_path / f"{answer}.jsonl", {"question": "2 + 2?", "answer": answer}))
            for answer in ("4", "5", "6")]
    main(["reasoning", "--model", "m", "--data", *sets, "--samples", "4", "--json", str(tmp_path / "out.json")])
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    found = {name: [figures[part][name]["value"] for part in (*sets, "average")] for name in figures["average"]}
    assert found["pass@1, greedy"] == pytest.approx([1, 0, 0, 1 / 3], abs=1e-4)
    assert found["mean@4"] == pytest.approx([0.75, 0.25, 0, 1 / 3], abs=1e-4)
    assert found["pass@2"] == pytest.approx([1, 0.5, 0, 0.5], abs=1e-4) and found["pass@4"][:3] == [1, 1, 0]
    assert found["maj@4"] == pytest.approx([1, 0, 0, 1 / 3], abs=1e-4) and found["cut off"] == [0] * 4


def test_toy_questions_and_instructions_come_from_the_heldout_split(tmp_path, engine):
    asked = set()
    engine(lambda prompt, _: asked.add(prompt) or "4")
    main(["reasoning", "--model", "m", "--rows", "40", "--samples", "1"])
    main(["alpacaeval", "--model", "m", "--data", "toy", "--outputs", str(tmp_path / "out.json")])
    known = {" ".join(data.prompt_text(row).split()) for kind in ("reasoning", "instruction")
             for row in readers.load_source(kind, "toy", split="heldout", count=600)}
    assert asked and asked <= known


def test_alpacaeval_writes_what_the_package_reads_and_compares_two_such_files(tmp_path, engine, capsys):
    from alpaca_eval import utils

    asked = [{"instruction": text, "dataset": "helpful_base"} for text in ("Hi?", "Why?", "How?")]
    (tmp_path / "set.json").write_text(json.dumps(asked))
    outputs, other = tmp_path / "model_outputs.json", tmp_path / "other.json"
    engine(lambda prompt, _: {"Hi?": "good", "Why?": "odd", "How?": "tie"}[prompt])
    main(["alpacaeval", "--model", "m", "--data", str(tmp_path / "set.json"), "--outputs", str(outputs)])
    frame = utils.load_or_convert_to_dataframe(outputs)
    assert list(frame.columns) == ["instruction", "output", "generator", "dataset"] and len(frame) == 3
    assert utils.get_generator_name(None, frame) == "m" and set(frame["dataset"]) == {"helpful_base"}

    other.write_text(json.dumps([{"instruction": row["instruction"], "output": "bad"} for row in asked]))
    fake = engine(judge)
    main(["alpacaeval", "--judge", "j", "--outputs", str(outputs), "--against", str(other), "--json",
          str(tmp_path / "out.json")])
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]["alpacaeval"]
    assert fake.calls == [6] and figures["win rate"]["value"] == 0.75 and figures["win rate"]["count"] == 2
    assert figures["unparsed"]["value"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["ties, a judgement"]["value"] == 0.5
    assert figures["length-controlled win rate"]["value"] is None  # three rows are too few
    assert "only with rates of the same judge" in capsys.readouterr().out


# ---- probe ----

def test_probe_runs_parts_1_to_4_of_a_step_and_says_what_is_missing(tmp_path, engine, capsys):
    def model(prompt, i):
        if "Score each response" not in prompt:
            return "an answer " * (i + 1)
        return "<scores>9, 2</scores>" if "s3" not in prompt else "<scores>2, 4, 6, 8</scores>"

    engine(model)
    main(["probe", "--model", "m", "--rows", "8", "--preset", "smol", "--toy_rows", "32", "--judge_list", "0",
          "--judgements", "1", "--json", str(tmp_path / "out.json")])
    out = capsys.readouterr().out
    assert "no gradient from P: 0% of groups have spread; judgements are readable but all samples agree" in out
    assert "it judges by position: --both_orders" in out and "no gradient from R" in out and "a gradient from I" in out
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    gradients = {kind: part["gradient"]["value"] for kind, part in figures.items()}
    assert gradients["preference"] == gradients["reasoning"] == 0 and gradients["instruction"] > 0.5
    assert figures["preference"]["format"]["value"] == 1 and figures["preference"]["tau"]["value"] == 0
    assert figures["preference"]["order consistency"]["value"] == 0  # the first one wins, whichever it is
    assert figures["preference"]["first-position preference"]["value"] == 0.5
    assert figures["reasoning"]["gradient"]["count"] == 8
    assert figures["preference"]["gradient"]["count"] == 4  # the row is the unit: its two orders are no two trials


def test_probe_takes_n_way_rows_as_all_their_pairs(tmp_path, engine):
    levels = {"> " + text: i for i, text in enumerate("abcd")}

    def model(prompt, i):
        shown = sorted(levels, key=lambda text: prompt.index(text + " "))
        return data.score_line(1 + levels[text] + i for text in shown)

    source = write_lines(tmp_path / "P.jsonl", *({"prompt": f"{i}?", "responses": list("abcd"), "scores": [0, 1, 2, 3]}
                                                 for i in range(4)))
    engine(model)
    main(["probe", "--model", "m", "--rows", "8", "--preset", "smol", "--mix", "3:0:0", "--preferences", str(source),
          "--json", str(tmp_path / "out.json")])
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert list(figures) == ["preference"] and figures["preference"]["tau"]["value"] == 1
    assert figures["preference"]["single order"]["value"] == figures["preference"]["order consistency"]["value"] == 1
    assert figures["preference"]["single order"]["count"] == 4  # rows, each the mean of its six pairs


@pytest.mark.parametrize("kind, values, words", [
    ("preference", dict(gradient=0.0, format=0.0), ["no gradient from P", "warm start"]),
    ("preference", dict(gradient=0.6, format=1.0), ["a gradient from P: 60% of groups have spread"]),
    ("reasoning", {"gradient": 0.05, "solved": 0.02, "cut off": 0.9}, ["hardly any", "raise --max_answer_tokens"]),
    ("reasoning", {"gradient": 0.0, "solved": 1.0, "cut off": 0.0}, ["too easy"]),
    ("reasoning", {"gradient": 0.5, "solved": 0.5, "cut off": 0.0}, ["a gradient from R: 50% of groups have spread"]),
    ("instruction", {"gradient": 0.0, "unparsed": 1.0}, ["unreadable: lower --group"]),
    ("instruction", {"gradient": 0.0, "unparsed": 0.0}, ["one score for all"]),
    ("instruction", {"gradient": 1.0, "unparsed": 0.0, "correlation with length": 0.8}, ["go by length (tau 0.80)"]),
])
def test_probe_names_the_flag_to_change(kind, values, words):
    names = {"preference": ("tau", "first-position preference"), "instruction": ("correlation with length",)}
    part = {name: figure(values.get(name), 8, low=0.2 if values.get("format") else None)
            for name in (*names.get(kind, ()), *values)}
    told, = probe_verdicts({kind: part})
    assert all(word in told for word in words), told
    assert (";" in told) == (words[0][:2] != "a " or kind == "instruction")  # no advice where all is well


def test_probe_gives_one_advice_to_a_model_that_knows_nothing():
    """All its answers are cut off, and a longer limit would not help."""
    nothing = {"preference": {"gradient": figure(0, 8), "format": figure(0, 8)},
               "reasoning": {"gradient": figure(0, 8), "solved": figure(0, 8), "cut off": figure(1, 8)}}
    told = probe_verdicts(nothing)
    assert len(told) == 3 and "warm start" in told[2] and "--max_answer_tokens" not in " ".join(told)
    nothing["preference"]["format"] = figure(1, 8)
    assert "--max_answer_tokens" in " ".join(probe_verdicts(nothing | {"preference": {
        "gradient": figure(0, 8), "format": figure(1, 8), "tau": figure(0, 8),
        "first-position preference": figure(0, 8)}}))


def test_the_interval_of_probe_covers_the_truth_where_the_two_orders_of_a_row_agree():
    """Rows whose two orders always agree: 32 trials and not 64. Intervals from 64 would cover 77 % instead of 95."""
    rng = random.Random(0)
    covered = 0
    for _ in range(200):
        groups = []
        for index in range(16):
            signal = float(rng.random() < 0.5)
            for _ in range(2):
                prompt = data.Prompt("preference", "q", ("a", "b"), (1.0, 0.0))
                groups.append(data.Group(index, prompt, [1], [[1]], texts=["?"], rewards=[-1.0], advantages=[signal]))
        cell = preference_probe(groups)["gradient"]
        covered += cell["low"] <= 0.5 <= cell["high"]
    assert covered >= 182  # 95 % of 200, less two and a half deviations


# ---- bad input: one line, exit status 2, nothing written ----

def test_bad_input(tmp_path, capsys, engine):
    engine(judge)
    ties = write_lines(tmp_path / "ties.jsonl", {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]})
    good = tmp_path / "good.json"
    good.write_text(json.dumps([{"instruction": "q", "output": "good"}]))
    (tmp_path / "bad.json").write_text('[{"instruction": "q"}]')
    (tmp_path / "other.json").write_text('[{"instruction": "another", "output": "bad"}]')
    (tmp_path / "cut.json").write_text('[{"instruction": "q"')
    before = sorted(tmp_path.iterdir())
    for part, arguments in [
            ("no valid pair", ["rewardbench", "--model", "m", "--data", ties]),
            ("no such file", ["rewardbench", "--model", "m", "--data", tmp_path / "absent.jsonl"]),
            ("entry 0 (from 0) has no text in field 'output'",
             ["alpacaeval", "--judge", "j", "--outputs", tmp_path / "bad.json", "--against", good]),
            ("not JSON", ["alpacaeval", "--judge", "j", "--outputs", good, "--against", tmp_path / "cut.json"]),
            ("has 0 of the 1 instructions",
             ["alpacaeval", "--judge", "j", "--outputs", good, "--against", tmp_path / "other.json"]),
            ("give --model and --data", ["alpacaeval", "--model", "m"]),
            ("give --model and --data",
             ["alpacaeval", "--model", "m", "--data", good, "--judge", "j", "--against", good]),
            ("must be above 0", ["reasoning", "--model", "m", "--samples", 0]),
            ("unrecognized arguments: --grop", ["heldout", "--model", "m", "--grop", 8]),
            ("--grop 8: no such setting", ["probe", "--model", "m", "--grop", 8]),
            ("--mix x", ["probe", "--model", "m", "--mix", "x"]),
            ("even number", ["probe", "--model", "m", "--rows", 3, "--mix", "1:0:0"])]:
        err = fails(arguments, capsys)
        assert part in err, (part, err)
        assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_that_is_none_is_refused_before_anything_runs(tmp_path, tiny_model, smol_tokenizer, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    assert "no config.json" in fails(["rewardbench", "--model", folder], capsys)
    shutil.copy(Path(tiny_model) / "config.json", folder)
    smol_tokenizer.save_pretrained(folder)
    assert "no *.safetensors here" in fails(["rewardbench", "--model", folder], capsys)
    shutil.copy(Path(tiny_model) / "model.safetensors", folder)
    (folder / "chat_template.jinja").unlink()
    assert "no chat template" in fails(["alpacaeval", "--judge", folder, "--against", "other.json"], capsys)


def test_a_context_longer_than_the_model_reads_is_refused(tmp_path, tiny_model, smol_tokenizer, capsys):
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    smol_tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 1024,
                                                                   "vocab_size": len(smol_tokenizer)}
    (folder / "config.json").write_text(json.dumps(settings))
    source = write_lines(tmp_path / "pairs.jsonl", {"prompt": "q", "chosen": "good", "rejected": "bad"})
    err = fails(["rewardbench", "--model", folder, "--data", source, "--max_prompt_tokens", 2000], capsys)
    assert "reads 1024 tokens" in err


def test_rewardbench_counts_a_row_of_the_hub_that_stands_there_twice(tmp_path, engine, monkeypatch):
    """As the official weights do. Training reads such rows once."""
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad", "subset": "hep-go"}
    monkeypatch.setattr(readers, "hub_records", lambda *_: [pair, pair])
    fake = engine(judge)
    main(["rewardbench", "--model", "m", "--data", "some/hub-set", "--json", str(tmp_path / "out.json")])
    assert fake.calls == [4]
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert figures["Reasoning"]["hep-go: accuracy"]["count"] == 2


def test_a_base_without_a_template_is_measured_with_one_from_a_file(tmp_path, tiny_model, smol_tokenizer, monkeypatch):
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    smol_tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    _, tokenizer = evaluation.open_model(str(folder), str(ROOT / "plain_turns.jinja"))
    assert "User: Hi" in tokenizer.decode(data.encode_chat(tokenizer, "Hi"))
    options = {name: evaluation.parse_arguments([name, "--model", "m", "--chat_template", "file"]).chat_template
               for name in ("heldout", "rewardbench", "reasoning")}
    assert set(options.values()) == {"file"}
