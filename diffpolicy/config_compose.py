"""Configurations composed from YAML groups and ``key=value`` overrides, ours and users' own.

What is said on the command line stands above what an experiment's file says, groups included:
``experiment=demo evaluation=none`` makes no rollouts, whatever ``demo`` says of evaluation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.settings import ConfigError, near_miss

if TYPE_CHECKING:
    from omegaconf import DictConfig

OWN = "DIFFPOLICY_CONFIG_DIR"
MAX_BYTES, MAX_NODES = 1_000_000, 100_000  # of a YAML file, and of what its aliases expand to

OPEN = (
    *("env.", "data.", "policy.", "sampler.", "evaluation.", "learning.", "method.", "guidance."),
    *("base.", "task.", "pretrain.", "report.", "collect.", "judge.", "plans.", "adapters."),
    *("oracles.network.", "oracles.trainer."),
    *("rti.", "truncated.", "selection.", "returns.", "imagined."),  # these, and below, of eval
    *("streaming.", "chunking."),
)
"""Sections whose keys are checked by what they configure, so that a file may leave any out."""

EARLIER = {"preference": "method", "finetune": "method"}  # earlier names, and what they are now


def config_dir() -> Path:
    """Directory of the YAML groups: inside the installed package, or beside it in a source tree."""
    here = Path(__file__).resolve().parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def own_config_dir() -> Path | None:
    """The user's own directory of YAML groups, laid out as ours (``experiment/mine.yaml``, ...).

    It is what ``--config-dir`` or the variable ``DIFFPOLICY_CONFIG_DIR`` names, else ``./configs``
    where there is one.

    Raises:
        ConfigError: it was named and is no directory.
    """
    named = os.environ.get(OWN)
    path = Path(named or "configs")
    if named and not path.is_dir():
        raise ConfigError(f"no directory of configurations at {path}; see --config-dir and {OWN}")
    return path.resolve() if path.is_dir() and path.resolve() != config_dir() else None


def choice_files() -> dict[str, dict[str, Path]]:
    """The file of every choice of every group, the user's own among them."""
    files: dict[str, dict[str, Path]] = {}
    for path in sorted(config_dir().glob("*/*.yaml")):
        files.setdefault(path.parent.name, {})[path.stem] = path
    own = own_config_dir()
    for path in [] if own is None else sorted(own.glob("*/*.yaml")):
        if path.parent.name in files:
            files[path.parent.name].setdefault(path.stem, path)
    return files


def group_choices() -> dict[str, dict[str, str]]:
    """Every config group with its choices, each with the first comment line of its file."""
    return {
        group: {choice: _first_comment(path) for choice, path in choices.items()}
        for group, choices in choice_files().items()
    }


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = (line[1:].strip() for line in lines if line.startswith("#"))
    return next((c for c in comments if not c.startswith("@")), "")


def check_yaml(path: Path) -> None:
    """Raise ``ConfigError`` for a file whose aliases expand to more than any configuration holds.

    A few hundred bytes of nested aliases are billions of values once they are expanded.
    """
    import yaml  # type: ignore[import-untyped]

    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path} is no configuration: it has more than {MAX_BYTES} bytes")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if root is not None and _expanded(root, {}) > MAX_NODES:
            raise ConfigError(f"{path}: its aliases expand to more than {MAX_NODES} values")
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply, or within itself") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text: {error}") from None


def _expanded(node: Any, known: dict[int, int]) -> int:
    """Values that a node stands for, each alias counted as often as it is used."""
    if id(node) in known:
        return known[id(node)]
    parts = node.value if isinstance(node.value, list) else []
    flat = [n for part in parts for n in (part if isinstance(part, tuple) else (part,))]
    known[id(node)] = 1 + sum(_expanded(part, known) for part in flat)
    return known[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The plain values of a YAML file that holds a mapping; nothing in it is resolved or run.

    Raises:
        ConfigError: a file that is damaged, too big, or of something else.
    """
    from omegaconf import OmegaConf

    check_yaml(path)
    values = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not hold a configuration")
    return {str(key): value for key, value in values.items()}


def experiment_values(name: str) -> dict[str, Any]:
    """What an experiment's file says, with the experiments that it builds on.

    Raises:
        ConfigError: there is no such experiment; the nearest one is said.
    """
    return _layer("experiment", name, choice_files())[1]


def keys_given(overrides: Sequence[str]) -> dict[str, str]:
    """What was given as ``key=value``, by key; ``--``, ``+`` and ``++`` before it do not count."""
    plain = (o.removeprefix("--").lstrip("+") for o in overrides)
    return dict(o.split("=", 1) for o in plain if is_setting(o))


def given_text(text: str) -> str:
    """A text as it was meant: without the quotes that Hydra's grammar asks for."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return str(OverridesParser.create().parse_override(f"key={text}").value())
    except HydraException:
        return text


def is_setting(argument: str) -> bool:
    """Whether an argument is ``key=value``, and not a path that has a ``=`` in it."""
    key = argument.partition("=")[0]
    named = all(c.isalnum() or c in "_.-@/~+:" for c in key) and key[:1] not in "./"
    return "=" in argument and named and not os.path.exists(argument)


def compose(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Compose ``configs/<name>.yaml`` with Hydra ``key=value`` overrides into plain values.

    Raises:
        ConfigError: unknown group choice, key or value, with what would have been right.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    files = choice_files()
    _check_choices(overrides, files)
    normal = [normal_override(o) for o in overrides]
    try:
        composed = _composed(name, normal, files)
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(
                f"{name} needs a value for {', '.join(missing)}; give it as {missing[0]}=..."
            )
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, name, normal, files)) from None
    assert isinstance(values, dict)
    return {str(k): _at_home(v) for k, v in values.items()}


def _at_home(value: Any) -> Any:
    """Plain values whose paths may begin with ``~/``: shells leave that alone after a ``=``."""
    if isinstance(value, dict):
        return {key: _at_home(inner) for key, inner in value.items()}
    home = isinstance(value, str) and value.startswith("~/")
    return os.path.expanduser(value) if home else value


def normal_override(override: str, *, sweep: bool = False) -> str:
    """An argument as Hydra reads it.

    ``--policy.horizon=8`` is accepted as ``policy.horizon=8``, a section that is open takes new
    keys, and a text that Hydra's grammar cannot read (a path with ``=``, spaces, commas, accents)
    is quoted.

    Args:
        override: as it was given.
        sweep: whether commas part values to be tried one after the other.
    """
    plain = override.removeprefix("--")
    if "=" in plain and not plain.startswith("~"):
        key, text = plain.split("=", 1)
        plain = f"{key}={text if _readable(text, sweep=sweep) else quoted(text)}"
    return f"++{plain}" if plain.startswith(OPEN) else plain


def _readable(text: str, *, sweep: bool) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return text[:1] in "[{'\""  # meant as a list, a group or a text: Hydra says what is wrong
    return sweep or not parsed.is_sweep_override()


def quoted(text: str) -> str:
    """A text as a value of ``key=value``, whatever characters are in it."""
    # Hydra reads a backslash as one, but before a quote or at the end.
    inner = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    return f"'{inner}{chr(92) * (len(inner) - len(inner.rstrip(chr(92))))}'"


def _composed(name: str, overrides: Sequence[str], files: Mapping[str, Any]) -> DictConfig:
    """The configuration, with what was said of groups above what an experiment says."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf, open_dict

    given = keys_given(overrides)
    said = {g: c for g, c in given.items() if g in files and g != "experiment" and c != "null"}
    if given.get("experiment", "null") == "null" or not said:
        return _hydra(name, overrides)
    own = _layer("experiment", given["experiment"], files)[0]
    said = {g: c for g, c in said.items() if own.get(g) != c}  # its own choice stays as it has it
    layers = {group: _layer(group, choice, files) for group, choice in said.items()}
    implied = {g: c for layer in layers.values() for g, c in layer[0].items() if g not in said}
    composed = _hydra(name, [*overrides, *(f"{g}={c}" for g, c in implied.items())])
    below = [_layer(group, choice, files)[1] for group, choice in implied.items()]
    # A group of all sections, such as algorithm, stands below a group of one.
    order = sorted(layers, key=lambda group: not layers[group][0])
    with open_dict(composed):
        for values in (*below, *(layers[group][1] for group in order)):
            composed.merge_with(OmegaConf.create(values))
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            key = override.key_or_group
            if key not in files and not override.is_delete():
                OmegaConf.update(composed, key, override.value(), force_add=True)
    return composed


def _file(group: str, choice: str, files: Mapping[str, Mapping[str, Path]]) -> Path:
    if choice not in files[group]:
        hint = near_miss(choice, files[group])
        raise ConfigError(
            f"unknown {group} {choice!r}; expected one of {sorted(files[group])}{hint}"
        )
    return files[group][choice]


def _layer(
    group: str, choice: str, files: Mapping[str, Mapping[str, Path]]
) -> tuple[dict[str, str], dict[str, Any]]:
    """The choices of other groups that a file makes, and its values in their sections."""
    from omegaconf import OmegaConf

    path = _file(group, choice, files)
    own = read_yaml(path)
    choices: dict[str, str] = {}
    merged: Any = OmegaConf.create({})
    for entry in own.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            inner, values = _layer(group, entry.rpartition("/")[2], files)
            choices |= inner
            merged = OmegaConf.merge(merged, values)
        elif isinstance(entry, dict):
            for key, value in entry.items():
                choices[str(key).removeprefix("override ").strip().lstrip("/")] = str(value)
    everywhere = "@package _global_" in path.read_text(encoding="utf-8").split("\n", 1)[0]
    nested = own if everywhere else {group: own}
    plain = OmegaConf.to_container(OmegaConf.merge(merged, nested))
    assert isinstance(plain, dict)
    return choices, {str(k): v for k, v in plain.items()}


def _hydra(name: str, overrides: Sequence[str]) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    own = own_config_dir()
    where = [] if own is None else [f"hydra.searchpath=['file://{own}']"]
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        return hydra_compose(name, [*where, *overrides])


def _check_choices(overrides: Sequence[str], files: Mapping[str, Mapping[str, Path]]) -> None:
    """Raise for a choice that no group has, one of two files of a name, or a stray argument."""
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            known = override in files["experiment"]
            hint = f"; did you mean experiment={override}?" if known else ""
            raise ConfigError(f"unexpected argument {override!r}; settings are key=value{hint}")
    own = own_config_dir()
    for group, choice in keys_given(overrides).items():
        if group not in files or choice == "null":
            continue
        nested = _layer(group, choice, files)[0]  # which also reads, and so checks, the files
        for inner in nested.keys() & files.keys():
            check_yaml(_file(inner, nested[inner], files))
        same = None if own is None else own / group / f"{choice}.yaml"
        if same is not None and same.is_file() and files[group][choice] != same:
            raise ConfigError(f"{same} has the name of a choice that is ours; give it another")


def _explain(
    error: Exception, name: str, overrides: Sequence[str], files: Mapping[str, Any]
) -> str:
    """What is wrong, in a line: the first key that is not there, else what Hydra says."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    choices = [o for o in overrides if o.split("=", 1)[0] in files]
    try:
        known = _hydra(name, choices)
    except (HydraException, OmegaConfBaseException):
        known = None
    for override in overrides if known is not None else ():
        key = override.split("=", 1)[0]
        if key in files or key.startswith(("+", "~")):
            continue
        found = _unknown(key, known, files)
        if found:
            return f"{found} (see `diffpolicy {name.split('_')[0]} --help`)"
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _unknown(key: str, known: Any, files: Mapping[str, Any]) -> str | None:
    """The message about a key that the configuration does not have."""
    from omegaconf import DictConfig

    node, path = known, ""
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            return f"unknown key {key!r}: {path.rstrip('.')} is {node!r}, which has no keys"
        names = list(dict.fromkeys([*map(str, node), *([] if path else sorted(files))]))
        if part not in names:
            inside = [k for k in _keys(known) if k.split(".")[-1] == part]
            inside += [EARLIER[part]] if part in EARLIER else []
            hint = f"; did you mean {inside[0]!r}?" if inside else ""
            hint = hint or near_miss(part, names, prefix=path)
            return f"unknown key {key!r}{hint or near_miss('', names, listing='there are')}"
        node, path = node._get_node(part), f"{path}{part}."
    return None


def _keys(node: Any, path: str = "") -> Iterator[str]:
    """Every key of a configuration, those of its sections with their path."""
    from omegaconf import DictConfig

    for name in node:
        yield f"{path}{name}"
        inner = node._get_node(name)
        if isinstance(inner, DictConfig) and not inner._is_none():
            yield from _keys(inner, f"{path}{name}.")


def seeded_run_dir(run_dir: str, seed: int, overrides: Sequence[str]) -> str:
    """The run's directory; it ends in the seed where one was given, and no directory.

    So that ``for s in 0 1 2; do diffpolicy train ... seed=$s; done`` makes three runs.
    """
    given = keys_given(overrides)
    return f"{run_dir}_seed{seed}" if "seed" in given and "run_dir" not in given else run_dir


def check_data_path(data: Any, given: Mapping[str, str]) -> None:
    """Raise if the ``data.path`` given is not there and looks mistyped: nothing is recorded."""
    if data.path is None:
        return
    path = Path(data.path)
    counted = any(key.startswith("data.collect") for key in given)
    if "data.path" not in given or counted or data.collect is None or path.exists():
        return
    first = next(p for p in (*reversed(path.parents), path) if not p.exists())
    beside = first.parent.iterdir() if first.parent.is_dir() else ()
    hint = near_miss(first.name, [p.name for p in beside])
    if hint:
        raise ConfigError(
            f"nothing is at {path}{hint} (in {first.parent}). To record demonstrations there, say "
            f"how many: data.collect.episodes={data.collect.episodes}"
        )
