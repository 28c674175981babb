"""Where the compiled kernels' threads run, and on which memory nodes the weights that they read are packed.

In: settings and the processors of this process. Out: threads and memory arranged, for the whole process. Must never
know: weights, requests.

Threads are numbered node by node, and begin with items that follow each other in the same order, so that a node's
threads read the part of each weight that lies there (`csrc/runtime/placement.h`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

from amalgam.base.processors import Core, usable_cores
from amalgam.kernels.backends.cpu import extension

NumaMode = Literal["off", "interleaved", "local"]

logger = logging.getLogger("amalgam.models")


def arrange(num_threads: int, numa: NumaMode, pin_threads: bool, cores: Sequence[Core] | None = None) -> None:
    """Bind threads and place weights that are packed from now on, as far as the system allows; the log says if not.

    Args:
        num_threads: that will compute.
        cores: of this process, those of a node one after the other; None: ask the system.
    """
    if not extension.is_available():
        return
    from amalgam import _native

    cores = usable_cores() if cores is None else cores
    nodes = {node: [cpu for core in own for cpu in core.cpus] for node, own in groupby(cores, lambda core: core.node)}
    if len(nodes) < 2:
        numa = "off"  # which changes nothing on such a machine
    placements = {
        "off": _native.Placement.anywhere,
        "interleaved": _native.Placement.interleaved,
        "local": _native.Placement.local,
    }
    try:
        _native.place_weights(placements[numa], list(nodes.items()))
    except RuntimeError as error:
        logger.warning(
            "engine.numa is %s, which the system does not allow (%s): weights are packed anywhere. In a container, "
            "allow it with --cap-add SYS_NICE, or start the process under numactl --interleave=all.",
            numa,
            error,
        )
        _native.place_weights(_native.Placement.anywhere, [])
        numa = "off"
    try:
        _native.bind_threads(processors_of(num_threads, cores, pin_threads) if pin_threads or numa == "local" else [])
    except RuntimeError as error:
        logger.warning("Compute threads cannot stay on their processors (%s): they run anywhere.", error)


def processors_of(num_threads: int, cores: Sequence[Core], pin_threads: bool) -> list[list[int]]:
    """The processors that each thread may use: of one core, or of all cores of one node.

    Fewer threads than cores are spread over all nodes; of more, some share a core.
    """
    own = [cores[number * len(cores) // num_threads] for number in range(num_threads)]
    if pin_threads:
        return [list(core.cpus) for core in own]
    return [[cpu for core in cores if core.node == thread.node for cpu in core.cpus] for thread in own]
