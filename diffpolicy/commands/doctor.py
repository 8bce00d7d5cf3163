"""`diffpolicy doctor`: versions, devices, rendering.

And known-broken combinations with their fix.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffpolicy.commands.options import parse


def help_text() -> str:
    """The text of `diffpolicy doctor --help`."""
    return """\
usage: diffpolicy doctor [probe=true]

Prints the versions that matter, the devices, whether pictures can be rendered, and any combination
of packages that is known to be broken, with the fix. probe=false skips what starts processes.
Exit status 1 if something is broken."""


def run(arguments: Sequence[str]) -> int:
    """Print the findings."""
    from diffpolicy.commands.doctor_checks import diagnose, format_findings

    findings = diagnose(probe=bool(parse(arguments, [], {"probe": True})["probe"]))
    print(format_findings(findings))
    return int(any(finding.level == "error" for finding in findings))
