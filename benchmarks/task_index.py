"""Compares the index of lm-eval's tasks with lm-eval's own, and says how long each takes to make.

    python -m benchmarks.task_index

Every name must be the same, stand for a task or a group alike, come from the same file, and, if it is a tag, be that of
the same tasks. The command ends with exit code 1 if any is not.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from qapbench.tasking.index import lm_eval_folder
from qapbench.tasking.scan import scan

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

out = Console(width=120, highlight=False)


def differences(folder: Path, manager: TaskManager) -> list[str]:
    """The names in a folder that differ.

    Args:
        folder: folder of YAML files.
        manager: lm-eval's own index of it.
    """
    tasks = set(manager.all_subtasks)
    ours = {name: (entry.path, entry.is_task, sorted(entry.tags)) for name, entry in scan(folder).items()}
    theirs = {}
    for name, entry in manager.task_index.items():
        tagged = [] if entry.cfg is not None else sorted(entry.tags)
        theirs[name] = (str(entry.yaml_path or ""), name in tasks, tagged)
        if name in ours and entry.cfg is not None:
            ours[name] = (*ours[name][:2], [])  # what tags it, which is no part of what it stands for
    names = sorted({*ours, *theirs})
    return [
        f"{name}: {ours.get(name)}, lm-eval {theirs.get(name)}" for name in names if ours.get(name) != theirs.get(name)
    ]


def main() -> None:
    folder = lm_eval_folder()
    started = time.process_time()
    found = scan(folder)
    ours = time.process_time() - started
    from lm_eval.tasks import TaskManager

    started = time.process_time()
    manager = TaskManager(include_defaults=True)
    theirs = time.process_time() - started
    out.print(f"CPU seconds: {ours:.2f}, lm-eval {theirs:.2f}")
    different = differences(folder, manager)
    out.print(f"{len(found)} names, of which {len(different)} differ from lm-eval's {len(manager.all_tasks)}")
    for line in different:
        out.print(f"    {line}", markup=False)
    if different:
        sys.exit(1)


if __name__ == "__main__":
    main()
