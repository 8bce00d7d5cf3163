"""`diffpolicy doctor`: versions, devices, rendering, and what of it is broken, with the fix.

usage: diffpolicy doctor [probe=true]

Prints the versions that matter, the devices, whether pictures can be rendered, which simulators are
there and whether their versions fit, and any combination of packages that is known to be broken,
each with the fix. probe=false skips what starts processes. Exit status 1 if something is broken.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

from diffpolicy.commands.doctor_benchmarks import READ, check_benchmarks
from diffpolicy.commands.doctor_checks import (
    CORE,
    OPTIONAL,
    Finding,
    check_d4rl_table,
    check_installation,
    installed_versions,
    mujoco_libraries,
)
from diffpolicy.commands.options import helped, parse

GL_PACKAGES = {"egl": "libegl1 libegl-mesa0 libgl1-mesa-dri", "osmesa": "libosmesa6"}
TIME_LIMIT = 60.0


def help_text() -> str:
    """This module's own text."""
    return helped(__doc__)


def run(arguments: Sequence[str]) -> int:
    """Print the findings."""
    findings = diagnose(probe=bool(parse(arguments, [], {"probe": True})["probe"]))
    print(format_findings(findings))
    return int(any(finding.level == "error" for finding in findings))


def check_threads(environ: Mapping[str, str], cores: int) -> Finding:
    """Tell whether waiting threads will take time from working ones.

    Args:
        environ: environment variables.
        cores: cores this process may use.

    Returns:
        A finding that names the settings.
    """
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")
    settings = ", ".join(f"{name}={environ.get(name, 'unset')}" for name in names)
    message = f"{cores} cores; {settings}"
    single = environ.get("OMP_NUM_THREADS") == "1"
    if cores <= 8 and not single and environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        message += "; on few or shared cores waiting threads spin (measured: 5 x the CPU time)"
        return Finding("warning", "threads", message, "export OMP_WAIT_POLICY=PASSIVE")
    return Finding("ok", "threads", message)


def check_gl(works: Mapping[str, str], chosen: str | None) -> Finding:
    """Judge the results of trying MuJoCo's headless backends.

    Args:
        works: by backend (``"egl"``, ``"osmesa"``) an empty string where it drew, else the reason.
        chosen: value of ``MUJOCO_GL``, None where it is unset.

    Returns:
        A finding that names the working backends, or the Debian packages that are missing.
    """
    good = [name for name, reason in works.items() if not reason]
    reasons = "; ".join(f"{name}: {reason}" for name, reason in works.items() if reason)
    if not good:
        fix = f"apt-get install {GL_PACKAGES['egl']} (or {GL_PACKAGES['osmesa']})"
        message = f"no headless backend works ({reasons}): no videos of MuJoCo tasks"
        return Finding("warning", "rendering", message, fix)
    if chosen is not None and works.get(chosen):
        message = f"MUJOCO_GL={chosen} does not work ({works[chosen]}), {good[0]} does"
        fix = f"export MUJOCO_GL={good[0]}, or apt-get install {GL_PACKAGES[chosen]}"
        return Finding("warning", "rendering", message, fix)
    now = f"MUJOCO_GL={chosen}" if chosen else f"MUJOCO_GL is unset: export MUJOCO_GL={good[0]}"
    return Finding("ok", "rendering", f"works headless: {', '.join(good)}; {now}")


_DRAW = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><light pos="0 0 3"/><geom size=".1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    assert renderer.render().max() > 0, "the image is black"
"""

_DEVICES = """
import json, numpy, torch
torch.from_numpy(numpy.zeros(1))
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
if torch.backends.mps.is_available():
    devices.append("mps")
print(json.dumps({"threads": torch.get_num_threads(), "devices": devices}))
"""


def _run(code: str, time_limit: float, **environ: str) -> tuple[str, str]:
    """Run Python code apart.

    Returns:
        Standard output and an empty reason, or what had been printed and why it failed.
    """
    command = [sys.executable, "-c", code]
    env = {**os.environ, **environ}
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=time_limit, check=False
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer within {time_limit:.0f} s"
    if done.returncode < 0:
        return done.stdout, f"crashed with signal {-done.returncode}"
    if done.returncode:
        # Some packages print further lines after the exception itself.
        lines = [line for line in done.stderr.splitlines() if re.match(r"\w+(\.\w+)*: ", line)]
        return done.stdout, lines[-1][:200] if lines else f"exit status {done.returncode}"
    return done.stdout, ""


def probe_gl() -> Finding:
    """Draw one small image with each headless backend of MuJoCo, in subprocesses."""
    works = {name: _run(_DRAW, TIME_LIMIT, MUJOCO_GL=name)[1] for name in GL_PACKAGES}
    return check_gl(works, os.environ.get("MUJOCO_GL"))


def probe_devices() -> Finding:
    """Ask torch for its devices and number of threads, in a subprocess."""
    output, reason = _run(_DEVICES, TIME_LIMIT)
    if reason:
        fix = 'pip install --force-reinstall "torch>=2.6", or start from a fresh environment'
        return Finding("error", "torch", f"cannot be used: {reason}", fix)
    answer = json.loads(output.splitlines()[-1])
    devices = ", ".join(["cpu", *answer["devices"]])
    return Finding("ok", "devices", f"{devices}; torch uses {answer['threads']} CPU threads")


def probe_benchmarks() -> list[Finding]:
    """Read what is declared of environments, in a subprocess, and look for what they need."""
    output, reason = _run(READ, TIME_LIMIT)
    if reason:
        fix = "pip install --force-reinstall gymnasium"
        return [Finding("warning", "simulators", f"declarations cannot be read: {reason}", fix)]
    return check_benchmarks(json.loads(output.splitlines()[-1]))


def diagnose(*, probe: bool = True) -> list[Finding]:
    """Examine this Python environment and machine.

    Args:
        probe: also start torch and MuJoCo in subprocesses (some seconds) to list devices and to
            find out which rendering backend works.

    Returns:
        Findings, in the order they are worth reading.
    """
    versions = installed_versions()
    findings = [Finding("info", "python", f"{platform.python_version()} on {platform.platform()}")]
    shown = ("diffpolicy", *CORE, *OPTIONAL)
    findings += [Finding("info", name, versions[name]) for name in shown if name in versions]
    if absent := [name for name in OPTIONAL if name not in versions]:
        findings.append(Finding("info", "not installed (optional)", ", ".join(absent)))
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux: the cores that this process may use
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    findings.append(check_threads(os.environ, cores))
    if probe and "torch" in versions:
        findings.append(probe_devices())
    if probe and "mujoco" in versions:
        findings.append(probe_gl())
    if probe and "gymnasium" in versions:
        findings += probe_benchmarks()
    if (table := check_d4rl_table()) is not None:
        findings.append(table)
    fine = Finding("ok", "combinations", "none of the known-broken ones is present")
    return findings + (check_installation(versions, mujoco_libraries()) or [fine])


def format_findings(findings: Iterable[Finding]) -> str:
    """Write one line per finding, its fix on a line of its own below."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:>7}  {finding.name}: {finding.message}")
        if finding.fix:
            lines.append(f"{'':>7}  fix: {finding.fix}")
    return "\n".join(lines)
