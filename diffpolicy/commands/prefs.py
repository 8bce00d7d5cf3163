"""`diffpolicy data prefs`: collect, import, look at, draw and label preferences.

usage: diffpolicy data prefs collect TARGET.zarr checkpoint=RUN [key=value] ...
       diffpolicy data prefs import STORE LABELS TARGET.jsonl [key=value] ...
       diffpolicy data prefs info FILE.jsonl
       diffpolicy data prefs render FILE.jsonl FOLDER [key=value] ...
       diffpolicy data prefs page FILE.jsonl|STORE FOLDER [key=value] ...
       diffpolicy data prefs import FOLDER ANSWERS.json TARGET.jsonl [overwrite=true]

A preference file is JSON lines beside an episode store: pairs of segments, the better one first.

collect  pairs from rollouts of a policy, scored by their rewards. What was interrupted goes on.
         The rollouts go to TARGET.zarr, the pairs to prefs=TARGET.jsonl, which is made anew of all
         rollouts at every call (so another score costs no rollouts).
         kind=branches: at points=4 steps of an episode (or every=N steps) branches=6 rollouts go
           on from the same observation for lookahead=40 steps; a pair is a chunk of the best
           against a chunk of the worst. common_noise=true: alike noise after the first chunk. The
           environment must repeat itself exactly, which is checked.
         kind=episodes: repeats=4 whole episodes from each start.
         episodes=50 starts, from env seed=50000 on; noise_seed=0 is the policy's.
         score=return | max_reward | success | MODULE:FUNCTION of (rewards [T], successes [T]);
         discount=1, after_end=zero (or hold: the last reward goes on to the end of the lookahead;
         use it where a success ends the episode), pairs=best_worst (or all, ranking), min_gap=0
         (less apart is a tie and left out), span=null (steps of a segment; null: a chunk of a
         branch, all of an episode).
         env=null (the policy's), kwargs={}, max_episode_steps=null, sampler={} (of the policy),
         num_envs=64, num_workers=null, device=cpu, threads=1.
import   labels of a person: an npz with index_1, index_2, human_label (0: the first is better, 1:
         the second, -1: neither) and perhaps raw_index_map and seg_len; or a folder of the three
         pickles that Uni-RLHF and Preference Transformer publish (read without running them).
         labels=human (or another kind), length=null (steps of a segment), overwrite=false.
         index=qlearning: an index counts the transitions of D4RL's qlearning_dataset, which leaves
         out the last row of episodes that timed out (so it is for pickles); index=rows: the rows of
         the store. An npz without raw_index_map must be told which.
info     counts, lengths, sources, agreement with the rewards; what is doubtful. Exit status 1 if
         something is wrong.
render   pair_N.mp4, the better one on the left in green, and contact_sheet.png.
         pairs=null (numbers, [0,5]) or count=6 of them, side=256, fps=10, before=0 and after=0
         further steps.
page     a page (FOLDER/index.html, to open in a browser) that shows two clips at a time and asks a
         person which is better (keys 1, 2, 0 tie, s skip, u undo, space again, d download). Asked
         are the pairs of a file, or count=100 pairs of length=50 steps drawn from a store (of the
         same seed, where episodes have one; draw_seed=0). The browser keeps the answers; once
         downloaded, `import FOLDER ANSWERS.json TARGET.jsonl` makes a preference file of them.
         side=256, fps=10, before=0, after=0.

render and page draw frames of the store (a field img), else repeat the episode from its seed and
actions, else (recorded demonstrations have no seed) need env=ID with show_observation(obs); env,
kwargs and max_episode_steps choose another environment than the store's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.commands.collecting import Collecting
from diffpolicy.commands.lineage import recorded
from diffpolicy.commands.options import helped, parse, subcommand
from diffpolicy.settings import ConfigError

if TYPE_CHECKING:
    from diffpolicy.data.preferences.set import PreferenceSet
    from diffpolicy.rollout.labelling.clips import ClipRenderer
    from diffpolicy.rollout.labelling.page import Question


def help_text() -> str:
    """This module's own text."""
    return helped(__doc__)


def run(arguments: Sequence[str]) -> int:
    """Dispatch to the subcommand."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "collect": _collect,
        "import": _import,
        "info": _info,
        "render": _render,
        "page": _page,
    }
    return subcommand(arguments, commands, "data prefs")(arguments[1:])


_ENV: dict[str, Any] = {"env": None, "kwargs": {}, "max_episode_steps": None}


def _collect(arguments: Sequence[str]) -> int:
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.commands.preflight import check_writable, pick_device
    from diffpolicy.rollout.pool.supervisor import Workers
    from diffpolicy.rollout.record.branches import collect_rollouts

    defaults: dict[str, Any] = {
        "checkpoint": None,
        "prefs": None,
        **asdict(Collecting(noise_seed=0)),
        **_ENV,
        "sampler": {},
        "num_envs": 64,
        "num_workers": None,
        "device": "cpu",
        "threads": 1,
    }
    options = parse(arguments, ["target"], defaults)
    if options["checkpoint"] is None:
        raise ConfigError("collect needs checkpoint=RUN, the policy that is to act")
    how = Collecting.of({f.name: options[f.name] for f in fields(Collecting)})
    policy = DiffusionPolicy.from_pretrained(
        options["checkpoint"],
        device=pick_device(options["device"], options["threads"]),
        sampler=options["sampler"],
    )
    spec = _collecting_env(options, policy.spec.env_id)
    target = Path(options["target"])
    check_writable(target, Path(options["prefs"] or target).parent)
    preferences = collect_rollouts(
        policy,
        spec,
        range(how.seed, how.seed + how.episodes),
        store_path=target,
        prefs_path=options["prefs"] or target.with_suffix(".jsonl"),
        settings=how.settings(0),
        workers=Workers(num_envs=options["num_envs"], num_workers=options["num_workers"]),
    )
    _print_file(preferences)
    failed = preferences.store.attrs["rollouts"]["failed"]
    if failed:
        print(f"{len(failed)} rollouts failed, for example {next(iter(failed.values()))[-300:]}")
    return 0


def _collecting_env(options: Mapping[str, Any], trained_for: str | None) -> Any:
    """The environment given; else that of the run; else the id that the policy knows."""
    from diffpolicy.rollout.env_spec import stored_env_id

    if options["env"] is not None:
        return _env(options)
    values = recorded(options["checkpoint"], "env") or {"id": trained_for}
    if not values.get("id"):
        raise ConfigError("the policy does not say which environment it is for; give env=ID")
    stored_env_id(values["id"], options["checkpoint"], instead="env=")
    own = {n: options[n] or values.get(n) for n in ("kwargs", "max_episode_steps")}
    return _env({"env": values["id"], **own})


def _env(options: Mapping[str, Any]) -> Any:
    from diffpolicy.rollout.env_spec import EnvSpec

    if options["env"] is None:
        return None
    return EnvSpec(options["env"], options["kwargs"] or {}, options["max_episode_steps"])


def _import(arguments: Sequence[str]) -> int:
    from diffpolicy.data.preferences.published import read_label_file
    from diffpolicy.data.preferences.set import PreferenceSet
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.rollout.labelling.page import QUESTIONS, read_answers

    defaults = {"labels": "human", "length": None, "index": None, "overwrite": False}
    options = parse(arguments, ["store", "source", "target"], defaults)
    how = {"kind": options["labels"], "length": options["length"], "index": options["index"]}
    if (Path(options["store"]) / QUESTIONS).exists():
        store, pairs = read_answers(options["store"], options["source"])
        attrs = {"made_by": "labelling"}
    else:
        store = EpisodeStore.open(options["store"])
        pairs = read_label_file(options["source"], store, **how)
        attrs = {"made_by": "import", "labels": options["labels"]}
    preferences = PreferenceSet.create(
        options["target"], store, attrs=attrs, overwrite=options["overwrite"]
    )
    preferences.extend(pairs)
    _print_file(preferences)
    return 0


def _info(arguments: Sequence[str]) -> int:
    from diffpolicy.data.check import format_issue
    from diffpolicy.data.preferences.check import check_preferences
    from diffpolicy.data.preferences.set import PreferenceSet

    path = parse(arguments, ["file"], {})["file"]
    issues = check_preferences(path)
    errors = any(issue.severity == "error" for issue in issues)
    if not errors:
        preferences = PreferenceSet.open(path)
        issues = preferences.check()
        whole = {"attrs": preferences.attrs, **preferences.summary()}
        print(json.dumps(whole, indent=1, default=str))
    for issue in issues:
        print(format_issue(issue))
    return int(errors)


def _print_file(preferences: PreferenceSet) -> None:
    counts = preferences.summary()
    agreement = counts.get("reward_agreement")
    shown = "" if agreement is None else f", {agreement:.3f} agree with the sums of rewards"
    print(f"{preferences.path}: {counts['pairs']} pairs, {counts['ties']} ties{shown}")


_CLIPS: dict[str, Any] = {"side": 256, "before": 0, "after": 0, **_ENV}


def _renderer(options: Mapping[str, Any], store: Any) -> ClipRenderer:
    from diffpolicy.commands.preflight import choose_rendering
    from diffpolicy.rollout.labelling.clips import ClipRenderer

    if "img" not in store.fields:
        choose_rendering(1)
    margins = {name: options[name] for name in ("side", "before", "after")}
    return ClipRenderer(store, env=_env(options), **margins)


def _render(arguments: Sequence[str]) -> int:
    from diffpolicy.data.preferences.set import PreferenceSet
    from diffpolicy.rollout.labelling.clips import choose_pairs, pair_video, write_pair
    from diffpolicy.rollout.video import contact_sheet

    options = parse(arguments, ["file", "folder"], {"pairs": None, "count": 6, "fps": 10, **_CLIPS})
    preferences = PreferenceSet.open(options["file"])
    pairs = preferences.pairs(ties=True)
    if not pairs:
        raise ConfigError(f"{options['file']} has no pairs to draw")
    numbers = choose_pairs(len(pairs), options["count"], options["pairs"])
    folder = Path(options["folder"])
    videos = []
    with _renderer(options, preferences.store) as renderer:
        for number in numbers:
            pair = pairs[number]
            better = None if pair.tie else "left"
            video = pair_video(renderer, pair.chosen, pair.rejected, better)
            print(write_pair(folder / f"pair_{number}.mp4", video, fps=options["fps"]))
            videos.append(video)
    print(contact_sheet(folder / "contact_sheet.png", videos))
    return 0


def _page(arguments: Sequence[str]) -> int:
    from diffpolicy.rollout.labelling.page import write_page

    drawn = {"count": 100, "length": 50, "draw_seed": 0}
    options = parse(arguments, ["source", "folder"], {"fps": 10, **drawn, **_CLIPS})
    store, questions = _questions(Path(options["source"]), options)
    folder = Path(options["folder"])
    with _renderer(options, store) as renderer:
        left_out = write_page(folder, questions, renderer, fps=options["fps"])
    for key, why in left_out.items():
        print(f"left out question {key}: {why}")
    print(f"{len(questions) - len(left_out)} questions in {folder / 'index.html'}")
    print(f"then: diffpolicy data prefs import {folder} answers.json TARGET.jsonl")
    return 0


def _questions(source: Path, options: Mapping[str, Any]) -> tuple[Any, list[Question]]:
    from diffpolicy.data.preferences.set import PreferenceSet
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.rollout.labelling.page import propose, questions_of

    if not source.exists():
        raise ConfigError(f"neither a preference file nor a store at {source}")
    if source.suffix != ".jsonl" or source.is_dir():
        store = EpisodeStore.open(source)
        numbers = {name: options[name] for name in ("count", "length")}
        return store, propose(store, **numbers, seed=options["draw_seed"])
    preferences = PreferenceSet.open(source)
    return preferences.store, questions_of(preferences)
