"""What a shell offers when the tab key is pressed: shipped specs, kinds of items, and their names."""

from __future__ import annotations

import typer


def specs(incomplete: str) -> list[str]:
    """Names of shipped specs. Where none begins so, the shell offers files."""
    from qapbench.spec.spec_file import shipped_specs

    return [name for name in sorted(shipped_specs()) if name.startswith(incomplete)]


def kinds(incomplete: str) -> list[str]:
    """Kinds of registered items."""
    from qapbench.methods.kinds import KINDS

    return [kind for kind in KINDS if kind.startswith(incomplete)]


def items(context: typer.Context, incomplete: str) -> list[str]:
    """Names of the registered items of the kind that stands before."""
    from qapbench.methods.kinds import KINDS

    kind = str(context.params.get("kind")).removesuffix("s")
    return [name for name in KINDS[kind].names() if name.startswith(incomplete)] if kind in KINDS else []
