"""What installed packages declare of environments: where they live, and recipes of data sets.

The library knows no simulator by name. A package declares a module by an entry point in the group
``diffpolicy.envs``, and the module has any of

- ``HOMES``: by module, the extra of that package which installs it (empty: none);
- ``RECIPES``: by name, data sets that ``diffpolicy data make`` can make.

Whoever installs such a package trusts it, so files may name environments of its homes. A module
that can merely be imported is not trusted.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from typing import Any, NamedTuple

GROUP = "diffpolicy.envs"
OWN = "diffpolicy_envs.declared"
"""Our own, which a checkout on the path has without being installed."""


class Home(NamedTuple):
    """Where environments live.

    Attributes:
        distribution: the package that declares it, as pip knows it.
        extra: of that package, which installs the module; empty: there is none.
    """

    distribution: str
    extra: str

    @property
    def command(self) -> str:
        """How to install it; empty where nothing is known."""
        return f'pip install "{self.distribution}[{self.extra}]"' if self.extra else ""


class Declared(NamedTuple):
    """All that is declared.

    Attributes:
        homes: by module.
        recipes: by name; each has the attributes of ``diffpolicy_envs.recipes.Recipe``.
        sources: the distribution that declares a recipe, by the recipe's name.
        broken: why a declaration cannot be read, by distribution. It costs the others nothing.
    """

    homes: dict[str, Home]
    recipes: dict[str, Any]
    sources: dict[str, str]
    broken: dict[str, str]


@functools.cache
def declared() -> Declared:
    """Read what all installed packages declare, ours first; of the same name the first counts."""
    places = {OWN: "diffpolicy"} if importlib.util.find_spec(OWN.partition(".")[0]) else {}
    for point in importlib.metadata.entry_points(group=GROUP):
        name = "diffpolicy" if point.dist is None else point.dist.name
        places.setdefault(point.value, name)
    found = Declared({"gymnasium": Home("diffpolicy", "")}, {}, {}, {})
    for place, distribution in places.items():
        try:
            module = importlib.import_module(place)
        except Exception as error:  # whatever a foreign module may raise
            found.broken[distribution] = f"{place}: {type(error).__name__}: {error}"
            continue
        for name, extra in getattr(module, "HOMES", {}).items():
            found.homes.setdefault(name, Home(distribution, extra))
        for name, recipe in getattr(module, "RECIPES", {}).items():
            found.recipes.setdefault(name, recipe)
            found.sources.setdefault(name, distribution)
    return found


def install_hint(text: str) -> str:
    """Say how to install what a message names, if it is a home of environments that is missing."""
    for module, home in declared().homes.items():
        if module in text and home.command and importlib.util.find_spec(module) is None:
            return f" Try: {home.command}"
    return ""
