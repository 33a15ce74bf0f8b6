"""Lets the nodes of a Ray cluster get files from the machine of the driver, through Ray's object store."""

from __future__ import annotations

import functools
from typing import Any

from .ray_cluster import import_ray
from .sent_files import Ask, FileServer, Tree


class SentTrees:
    """An actor on the driver's machine that reads pieces of files for whoever asks. It takes no core.

    A piece is in the object store until it was written: two at a time for each node that gets files.
    """

    def __init__(self) -> None:
        self._ray: Any = import_ray()
        self._trees: dict[str, Tree] = {}
        self._actor: Any = None

    def offer(self, trees: dict[str, Tree]) -> Any:
        """Serve the files of trees, and no longer those of earlier ones.

        Args:
            trees: the trees by name.

        Returns:
            Ray's handle of the actor; None if there are no trees.
        """
        if trees != self._trees:
            if self._actor is not None:
                self._ray.kill(self._actor)
            self._trees, self._actor = trees, self._started(trees) if trees else None
        return self._actor

    def _started(self, trees: dict[str, Tree]) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        return self._ray.remote(**options)(FileServer).remote(list(trees.values()))


def asking(actor: Any, tree: Tree) -> Ask:
    """A function that asks an actor for pieces of a tree.

    Args:
        actor: Ray's handle of it.
        tree: the tree.
    """
    return functools.partial(actor.piece.remote, tree.digest)
