"""Throughput of a model on this machine, now: measured, or by the model of the machine's speed.

In: settings. Out: `Measurements`. Must never know: prices.
"""

from __future__ import annotations

import torch

from amalgam.base.energy import EnergyMeter
from amalgam.composition.loader import ModelLoader
from amalgam.composition.progress import Progress
from amalgam.config.settings import Settings
from amalgam.kernels.backends import choose_backend
from amalgam.planning.pace import Sample, expected_step
from amalgam.runtime.device import choose_device
from amalgam.runtime.opening import open_deployment
from amalgam.runtime.threads import set_threads
from amalgam.tools.bench import bench_model, hardware
from amalgam.tools.cost import Measurements, Pace, measurements_of, with_energy

_PROMPT, _BATCHES, _NEW = (256,), (1, 4, 16), 32


def measured_now(settings: Settings, prompt_tokens: float, progress: Progress | None = None) -> Measurements:
    """As `amalgam bench`, with few rounds; and what the processors use meanwhile."""
    batches = [batch for batch in _BATCHES if batch <= settings.inference.max_batch_size]
    deployment = open_deployment(settings, progress)
    try:
        meter = EnergyMeter()
        report = bench_model(deployment, prompts=_PROMPT, batches=batches, num_tokens=_NEW, repeats=2)
        use = meter.read()
    finally:
        deployment.close()
    return with_energy(measurements_of(report.as_json(), prompt_tokens, "a measurement made now"), use)


def expected_now(settings: Settings, prompt_tokens: float, progress: Progress | None = None) -> Measurements:
    """Of one sequence, from a few layers that are timed: the model need not fit. Prompts are not in it.

    Raises:
        AmalgamError: the plan cannot be fulfilled.
    """
    set_threads(settings.engine)
    device = choose_device(settings.inference.device_map)
    dtype: torch.dtype = getattr(torch, settings.inference.dtype)
    loader = ModelLoader(settings.model, settings.inference, device, settings.engine.num_load_threads)
    backend = choose_backend(dtype, device)
    samples: dict[str, Sample] = {}
    for weight in loader.plan():
        kind = weight.slot.shape, weight.format.name, weight.stored.block, weight.coded_bytes is not None
        samples[weight.slot.name] = Sample(
            kind if weight.slot.is_linear else None,
            lambda weight=weight: weight.load(backend),  # type: ignore[misc]
        )
    if progress is not None:
        progress("Timing layers", 0, 1)
    seconds = expected_step(loader.spec, samples.__getitem__, dtype, device)
    described = hardware()
    pace = Pace("1 sequence, prompts left out", 1.0 / seconds, 0.0, "expected")
    name = settings.model.name or loader.base_folder.name
    where = str(described.get("gpu") or described["processor"])
    return Measurements(name, where, (pace,), "the speed model of this machine, not a measurement")
