"""The costs of a model's segments: measured, estimated, and measured in a child process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from support.tiny import GPT2, LLAMA

from gradstream.coordinator.planning import inventory
from gradstream.coordinator.planning.inventory import take_inventory, take_profile
from gradstream.core.errors import ConfigError
from gradstream.core.model import profile
from gradstream.core.model.profile import SegmentProfile, Workload, profile_segments
from gradstream.core.recipe.recipe import TrainingConfig

WORKLOAD = Workload(microbatch=2, sequence_length=32)
TOKENS = 64


def of(config: dict[str, Any], workload: Workload = WORKLOAD) -> list[SegmentProfile]:
    return profile_segments(config, workload)


@pytest.mark.parametrize("config", [LLAMA, {**LLAMA, "tie_word_embeddings": True}, GPT2])
def test_every_segment_is_measured(config: dict[str, Any]) -> None:
    found = of(config)
    assert [segment.name for segment in found][::3] == ["embedding", "head"]
    assert all(segment.measured for segment in found)
    assert all(segment.forward_seconds > 0 and segment.backward_seconds > 0 for segment in found)
    assert all(segment.backward_weight_seconds > 0 for segment in found)
    # The embedding has no gradient to give away, so all of its pass is that of the weights.
    assert [segment.backward_input_seconds > 0 for segment in found] == [False, True, True, True]
    assert [unit for segment in found for unit in segment.units] == list(
        range(len(found[-1].units) + found[-1].units[0])
    )
    assert [segment.output_elements for segment in found] == [TOKENS * 32] * 3 + [TOKENS * 320]


def test_what_autograd_keeps() -> None:
    embedding, layer, second, head = of(LLAMA)
    assert embedding.activation_bytes == TOKENS * 8  # token ids
    # The head: its input, that of the norm after scaling and the matrix's; the log-softmax; and little else.
    least = 4 * TOKENS * (2 * 32 + 320)
    assert least <= head.activation_bytes <= 1.4 * least
    assert layer.activation_bytes == second.activation_bytes > 4 * TOKENS * 32
    again = of(LLAMA, replace(WORKLOAD, recompute=True))
    assert again[1].activation_bytes == 4 * TOKENS * 32  # its input alone
    assert again[1].activation_bytes + again[1].working_bytes == pytest.approx(layer.activation_bytes, rel=0.05)
    assert [segment.working_bytes > 0 for segment in again] == [False, True, True, False]
    assert again[3].activation_bytes == head.activation_bytes


def test_layers_of_equal_shapes_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    measure = profile._measure

    def counted(config: Any, index: int, estimate: SegmentProfile, workload: Workload, lora: None) -> SegmentProfile:
        measured.append(index)
        return measure(config, index, estimate, workload, lora)

    monkeypatch.setattr(profile, "_measure", counted)
    found = of({**LLAMA, "num_hidden_layers": 5})
    assert measured == [0, 1, 6]
    assert [segment.name for segment in found[1:6]] == [f"model.layers.{number}" for number in range(5)]
    assert [segment.units for segment in found[:6]] == [(number,) for number in range(6)]
    assert len({segment.forward_seconds for segment in found[1:6]}) == 1


@pytest.mark.parametrize("limit", ["MAX_PARAMETERS", "MAX_BYTES", "MAX_SECONDS"])
def test_what_is_too_large_is_estimated(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = of(LLAMA)
    monkeypatch.setattr(profile, limit, 0)
    found = of(LLAMA)
    layers = found[1:3]
    assert not any(segment.measured for segment in layers)
    for mine, real in zip(found, measured, strict=True):
        assert (mine.num_parameters, mine.output_elements) == (real.num_parameters, real.output_elements)
        assert mine.activation_bytes == pytest.approx(real.activation_bytes, rel=0.3)
    assert all(segment.backward_seconds == pytest.approx(2 * segment.forward_seconds) for segment in layers)
    recomputed = of(LLAMA, replace(WORKLOAD, recompute=True))[1]
    assert (recomputed.activation_bytes, recomputed.working_bytes) == (4 * TOKENS * 32, layers[0].activation_bytes)


def test_a_model_that_no_machine_holds_is_estimated() -> None:
    large = {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    embedding, layer, _, head = of({**large, "num_key_value_heads": 8, "vocab_size": 128_000})
    assert [segment.measured for segment in (embedding, layer, head)] == [False] * 3
    assert layer.num_parameters == 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    assert layer.forward_seconds > 0
    assert embedding.forward_seconds == 0  # nothing but looked up


def test_a_family_that_cannot_be_cut_is_refused() -> None:
    config = {
        "model_type": "gpt_neo",
        "vocab_size": 61,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global"], 2]],
        "max_position_embeddings": 32,
    }
    with pytest.raises(ConfigError, match="GPTNeoForCausalLM cannot be cut into pipeline stages"):
        of(config)


async def test_a_child_process_measures_once(
    monkeypatch: pytest.MonkeyPatch, start_child: Callable[[str, str], subprocess.CompletedProcess[bytes]]
) -> None:
    training = TrainingConfig(num_steps=1, num_slots=2, global_batch=4, microbatch=2, sequence_length=32)
    expected = await take_inventory(LLAMA)
    for cache in ("_inventories", "_profiles"):
        monkeypatch.setattr(inventory, cache, {})
    with monkeypatch.context() as patch:
        patch.setattr(inventory, "_run_child", start_child)
        found = await take_profile(LLAMA, training)
    assert [(segment.name, segment.units) for segment in found] == [
        (segment.name, segment.units) for segment in of(LLAMA)
    ]
    assert await take_profile(LLAMA, training) is found
    with pytest.raises(ConfigError, match=r"model.config.model_type 'lama' is not known"):
        await take_profile({**LLAMA, "model_type": "lama"}, training)
    # It has told the inventory too: no other child is asked for it.
    monkeypatch.setattr(inventory, "_ask_child", None)
    assert await take_inventory(LLAMA) == expected


def test_it_is_imported_without_torch() -> None:
    code = "import sys, gradstream.core.model.profile; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_a_profile_survives_json() -> None:
    found = of(LLAMA)
    answer = json.loads(json.dumps({"segments": [profile.asdict(segment) for segment in found]}))
    assert profile.parse_answer(answer) == found
