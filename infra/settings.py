"""Settings as fields of a dataclass: each with its default, its help, its bound; and the command line made of them."""

from __future__ import annotations

import argparse
from dataclasses import field, fields
from typing import Literal, get_args, get_origin, get_type_hints

from infra.ranks import GPU, InputError, missing_gpu

PRESET = "paper" if GPU else "smol"  # what --preset auto means on this machine


def setting(default, help: str, *, above: float | None = None, least: float | None = None, most: float = 1e300):
    """One setting. Its value must be above one bound or at least another, and at most the third."""
    metadata = {"help": help, "above": above, "least": least, "most": most}
    if isinstance(default, list):  # takes several values: --preferences A B
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse(settings: type, presets: dict[str, dict], arguments: list[str], description: str):
    """Flags over preset over the defaults of the dataclass `settings`.

    Raises InputError for an unknown flag, a value that is none of the choices, and a value outside of its bound.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = refuse
    hints, defaults = get_type_hints(settings), vars(settings())
    for one in fields(settings):
        kind, about = hints[one.name], one.metadata["help"].replace("%", "%%")
        parser.add_argument(f"--{one.name}", default=defaults[one.name], help=about, **how_to_read(kind))
    asked = [argument for argument in arguments if argument not in ("-h", "--help")]
    preset = parser.parse_known_args(asked)[0].preset
    if preset == "auto" and asked == arguments and missing_gpu():  # help is given anywhere
        raise InputError(missing_gpu())
    preset = PRESET if preset == "auto" else preset
    parser.set_defaults(**presets[preset])
    config = settings(**vars(parser.parse_args(arguments)))
    config.preset = preset
    check_bounds(config)
    return config


def refuse(message: str) -> None:
    raise InputError(f"{message}; --help lists the settings")


def how_to_read(kind) -> dict:
    """What argparse must know of a setting's type."""
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is list:
        return {"nargs": "+"}
    if kind is bool:  # --offload, or --no-offload
        return {"action": argparse.BooleanOptionalAction}
    return {"type": kind}


def check_bounds(config) -> None:
    for one in fields(config):
        value, above, least, most = [getattr(config, one.name), *map(one.metadata.get, ("above", "least", "most"))]
        end = f"at most {most:g}" if most < 1e300 else "finite"
        if above is not None and not above < value <= most:
            raise InputError(f"--{one.name} {value}: must be above {above:g}, and {end}")
        if least is not None and not least <= value <= most:
            raise InputError(f"--{one.name} {value}: must be {least:g} or more, and {end}")
