"""Exports equal the trained model: the same weights, the same logits, a tokenizer that loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.cluster import Cluster
from support.tiny import GPT2, LLAMA, tiny_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradstream.core.checkpoint.manifest import WEIGHT
from gradstream.core.checkpoint.shard import CheckpointReader
from gradstream.core.model.model import build


@pytest.mark.timeout(180)
def test_export_gives_the_clusters_logits(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0")
    for name, config in (("llama", LLAMA), ("gpt2", GPT2)):
        job = cluster.client.submit(tiny_recipe(tiny_data, tmp_path / "runs", name=name, model={"config": config}))
        cluster.finish(job.job_id)
        directory = cluster.client.export(job.job_id, tmp_path / f"export-{name}")

        exported = AutoModelForCausalLM.from_pretrained(directory).eval()
        checkpoint = cluster.client.checkpoints(job.job_id)[-1]
        assert checkpoint.version == 6
        reader = CheckpointReader(checkpoint.path)
        model = build(config).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                values = torch.from_numpy(reader.read(WEIGHT, parameter_name, 0, parameter.numel()))
                parameter.copy_(values.view_as(parameter))
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = tokenizer("def main() -> None:\n    return 1\n", return_tensors="pt")["input_ids"]
        assert tokenizer.decode(ids[0]) == "def main() -> None:\n    return 1\n"
        with torch.no_grad():
            assert torch.equal(exported(ids).logits, model(ids).logits)
