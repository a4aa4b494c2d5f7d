"""What a checkpoint holds beside its weights: configuration, generation settings, tokenizer and chat template.

Both export formats write it here. Generation settings are written as they are: transformers' own writer refuses those
that contradict each other, as many published models' do, and a model must generate after a reload as it was measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

GENERATION = "generation_config.json"


def write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes config.json, generation_config.json if the model generates, and the tokenizer with its chat templates."""
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.to_json_file(folder / GENERATION)


def read_generation(model: Any, folder: Path) -> None:
    """Gives `model` the generation settings of `folder`; without any, those that follow from its configuration stay."""
    from transformers import GenerationConfig

    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
