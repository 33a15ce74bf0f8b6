"""Names and files of lm-eval's tasks, cached on disk. lm-eval is not imported."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import logging
from pathlib import Path

from pydantic import BaseModel, ValidationError

from qapbench.files import cache_folder, replace_synced

from .scan import scan
from .task_yaml import member_names

LOG = logging.getLogger(__name__)


class TaskIndex(BaseModel):
    """Index of the tasks that come with lm-eval.

    Attributes:
        lm_eval: version of lm-eval that was indexed.
        files: name of a task -> its YAML file, relative to lm-eval's folder of tasks.
        groups: names that stand for several tasks -> the names of these and of groups among them; none if they have no
            names of their own.
    """

    lm_eval: str
    files: dict[str, str]
    groups: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        """All names: tasks and groups."""
        return [*self.files, *self.groups]


def lm_eval_folder() -> Path:
    """Folder of the tasks that come with lm-eval. lm-eval is not imported to find it."""
    found = importlib.util.find_spec("lm_eval")
    places = (found.submodule_search_locations if found else None) or []
    return Path(next(iter(places))) / "tasks"


@functools.cache
def lm_eval_index() -> TaskIndex:
    """The index, from the user's cache folder. On first use of a version of lm-eval it is made and written there."""
    version = importlib.metadata.version("lm-eval")
    cache = cache_folder() / f"lm-eval-tasks-and-groups-{version}.json"
    try:
        index = TaskIndex.model_validate_json(cache.read_bytes())
        if index.lm_eval == version:
            return index
    except (OSError, ValidationError):
        pass  # missing or damaged: the index is made anew
    index = _made(version)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        replace_synced(cache, json.dumps(index.model_dump()))
    except OSError as error:
        LOG.warning("the index of lm-eval's tasks cannot be kept in %s: %s", cache, error)
    return index


def _made(version: str) -> TaskIndex:
    """Make the index, which takes about a second."""
    folder = lm_eval_folder()
    found = sorted(scan(folder).items())
    files = {name: Path(entry.path).relative_to(folder).as_posix() for name, entry in found if entry.is_task}
    groups = {
        name: member_names(entry.config) if entry.path else sorted(entry.tags)
        for name, entry in found
        if not entry.is_task
    }
    return TaskIndex(lm_eval=version, files=files, groups=groups)
