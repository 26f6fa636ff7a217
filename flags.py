"""From the command line to checked settings. The settings and their defaults stand in urpo.py, in Config."""
import math

import data
import machine
from data import InputError
from rewards import judge_strides

DESCRIPTION = ("URPO; see README.md. With --plan beside any flags it trains nothing and shows what such a run needs "
               "and takes; then --nproc and --nodes give the ranks, and --gpu_gib the memory of a GPU.")
ABOVE_0 = """batch group minibatches judgements max_prompt_tokens max_answer_tokens max_referee_tokens
    max_judge_tokens row_tokens logit_chunk rollouts_every toy_rows temperature lr grad_clip gpu_memory cpu_cache
    max_drift timeout""".split()
AT_LEAST_0 = "judge_list audit_judge steps warmup_steps save_every keep lr_warmup importance_cap weight_decay".split()


def parse(settings: type, presets: dict[str, dict], arguments: list[str]):
    """Flags over preset over the defaults of the dataclass `settings`, by transformers' HfArgumentParser."""
    from transformers import HfArgumentParser

    def refuse(message):
        raise InputError(f"{message}; --help lists the settings")

    parser = HfArgumentParser(settings, description=DESCRIPTION, allow_abbrev=False)
    parser.error = refuse
    asked = [argument for argument in arguments if argument not in ("-h", "--help")]
    preset = parser.parse_known_args(asked)[0].preset
    if preset == "auto" and asked == arguments and machine.missing_gpu():  # help is given anywhere
        raise InputError(machine.missing_gpu())
    preset = machine.PRESET if preset == "auto" else preset
    parser.set_defaults(**presets[preset])
    config, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True,
                                                         look_for_args_file=False)
    if unknown:
        raise InputError(f"{' '.join(unknown)}: no such setting; --help lists them")
    config.preset = preset
    return config


def check(config, world: int) -> None:
    """Everything that can be wrong in the settings. Raises InputError that says what to change."""
    for name in ABOVE_0 + AT_LEAST_0:
        value = getattr(config, name)
        bound = "above 0" if name in ABOVE_0 else "0 or more"
        if not (value > 0 or value == 0 and name in AT_LEAST_0) or value == math.inf:
            raise InputError(f"--{name} {value}: must be {bound}, and finite")
    if config.gpu_memory > 1:
        raise InputError(f"--gpu_memory {config.gpu_memory}: a share of the GPU's memory, at most 1")
    if config.group == 1:
        raise InputError("--group 1: an answer is compared with its group, so give 2 or more")
    check_judging(config.group, config.judge_list or config.group, config.judgements)
    if not 0 <= config.clip_low <= 1 <= config.clip_high:
        raise InputError(f"--clip_low {config.clip_low} --clip_high {config.clip_high}: the range must hold 1")
    part = world * config.minibatches
    if config.batch % part:
        raise InputError(f"--batch {config.batch} does not split over {world} ranks, {config.minibatches} minibatches: "
                         f"use a multiple of {part}, for example {-(-config.batch // part) * part}")
    for warmup in {False, config.warmup_steps > 0}:
        rows = data.mix_counts(config.mix, config.batch, warmup)["preference"]
        if config.both_orders and rows % 2:
            raise InputError(f"--batch {config.batch} --mix {config.mix} draws {rows} preference prompts, and "
                             f"--both_orders needs an even number: use --batch {2 * config.batch}")


def check_judging(size: int, listed: int, times: int) -> None:
    """G answers, lists of `listed`, each answer `times` times: by lists that all differ (rewards.judge_orders)."""
    if not 2 <= listed <= size:
        raise InputError(f"--judge_list {listed}: a judgement compares 2 to {size} answers, --group; 0 is all of them")
    if listed < size and times % listed:
        raise InputError(f"--judgements {times} --judge_list {listed}: judging every answer as often, and as often in "
                         f"each place, takes a multiple of {listed}; for example {-(-times // listed) * listed}")
    most = listed * len(judge_strides(size, listed))
    if times > most:
        raise InputError(f"--judgements {times}: lists of {listed} of {size} answers that differ are enough for {most}")


def longest_sequence(settings) -> int:
    """Tokens of the longest prompt with its answer, or of the longest judge's prompt with its judgement."""
    answered = settings.max_prompt_tokens + max(settings.max_answer_tokens, settings.max_referee_tokens)
    return max(answered, settings.max_judge_tokens + settings.max_referee_tokens)
