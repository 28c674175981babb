"""Runs in another tool's environment: quantizes a model as a job says, and tells how far it is.

    python -I worker.py JOB.json < PIPE

A job is a JSON object: see `external._job`. On stdout stands a JSON object a line: `{"what", "done", "total"}`,
whenever one of the tool's own progress bars moves. All that the tool prints goes to stderr. Ends when the pipe does:
whoever started it is gone then. Nothing is fetched, no code of a checkpoint is run, nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

Job = dict[str, Any]

_LOADING = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}


def auto_round(job: Job) -> None:
    """SignRound (Cheng et al. 2023), or plain rounding."""
    import torch
    from auto_round import AutoRound

    length, token_ids = job["sequence_length"], job["token_ids"]
    together = [token for ids in token_ids for token in ids]  # it leaves out what is shorter than all the rest
    windows = [together[start : start + length] for start in range(0, len(together) - length + 1, length)]
    batches = [torch.tensor(windows[start : start + _BATCH]) for start in range(0, len(windows), _BATCH)]
    weights = job["weights"]
    rounder = AutoRound(
        job["model"],
        bits=weights["num_bits"],
        group_size=weights.get("group_size", -1),
        sym=weights["symmetric"],
        data_type="int",
        iters=job["iterations"] if job["method"] == "signround" else 0,
        disable_opt_rtn=True,  # a search for scales, for which it would fetch texts where there are none
        disable_model_free=True,  # another way to round, which declares itself by a key of its own
        dataset=batches or None,
        nsamples=max(1, len(windows)),
        seqlen=length,
        batch_size=_BATCH,
        enable_torch_compile=torch.cuda.is_available(),  # elsewhere a compiler of C++ would have to be there
        trust_remote_code=False,
    )
    rounder.quantize_and_save(job["out"], format="auto_round")


_BATCH = 8


def llm_compressor(job: Job) -> None:
    """Its recipes: rounding, GPTQ, or AWQ and rounding."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.accelerator.is_available():  # its AWQ pins memory for one all the same, which fails
        IntermediatesCache.pin_memory = lambda *_: None
    # It takes fused experts apart by itself. Its way to load them apart imports all of transformers, and torchvision.
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto", **_LOADING)
    groups = {
        "group_0": {"targets": ["Linear"], "weights": job["weights"], "input_activations": job["input_activations"]}
    }
    what = {"config_groups": groups, "ignore": job["ignore"]}
    if job["method"] == "gptq":
        order = "static" if job["act_order"] else None
        recipe = [GPTQModifier(**what, dampening_frac=job["damping"], actorder=order)]
    else:
        recipe = [*([AWQModifier()] if job["method"] == "awq" else []), QuantizationModifier(**what)]
    texts = reader = None
    if job["token_ids"]:
        # Named, or it looks for the processor of images too, whose packages need not be there.
        reader = AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False, local_files_only=True)
        rows = [torch.ones(len(ids), dtype=torch.int64).tolist() for ids in job["token_ids"]]
        texts = Dataset.from_dict({"input_ids": job["token_ids"], "attention_mask": rows})
    oneshot(
        model=model,
        processor=reader,
        dataset=texts,
        recipe=recipe,
        num_calibration_samples=len(job["token_ids"]),
        max_seq_length=job["sequence_length"],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(job["out"], save_compressed=True)


def gptqmodel(job: Job) -> None:
    """GPTQ."""
    from gptqmodel import GPTQModel, QuantizeConfig

    weights = job["weights"]
    config = QuantizeConfig(
        bits=weights["num_bits"],
        group_size=weights.get("group_size", -1),
        sym=weights["symmetric"],
        desc_act=False,
        act_group_aware=job["act_order"],
        damp_percent=job["damping"],
    )
    model = GPTQModel.load(job["model"], config, trust_remote_code=False)
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["token_ids"]], batch_size=1)
    model.save(job["out"])


_TOOLS = {"auto-round": auto_round, "llm-compressor": llm_compressor, "gptqmodel": gptqmodel}


def _end_with_parent() -> None:
    """Our standard input is a pipe that nobody writes to: it ends when its other end closes."""
    os.read(0, 1)  # not sys.stdin: its lock would be held while the interpreter ends
    if os.getpgrp() == os.getpid():  # what it has started belongs to its group, and ends too
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _report_bars(out: int) -> None:
    """Let every progress bar say where it stands on a descriptor instead of drawing itself."""
    import tqdm.std

    def display(self: Any, *_: Any, **__: Any) -> None:
        if self.total:
            line = {"what": str(self.desc or "").strip(": "), "done": int(self.n), "total": int(self.total)}
            os.write(out, (json.dumps(line) + "\n").encode())

    tqdm.std.tqdm.display = display


def main() -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # whatever prints from here on prints to stderr
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads(Path(sys.argv[1]).read_text())
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    _report_bars(out)
    _TOOLS[job["tool"]](job)


if __name__ == "__main__":
    main()
